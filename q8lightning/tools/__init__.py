"""Inspect, verify, compare, compress and decompress checkpoints: functions for users and for the command line."""

from q8lightning.checkpoint.format import NewerFormatError
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.tools.compare import Comparison, Difference, Reshaped, Row, compare
from q8lightning.tools.compress import compress
from q8lightning.tools.conversion import Conversion
from q8lightning.tools.decompress import decompress
from q8lightning.tools.inspect import Inspection, Size, StoredOtherwise, TensorEntry, inspect
from q8lightning.tools.open_checkpoint import ToolError
from q8lightning.tools.tensors import BytesAParameter
from q8lightning.tools.verify import Verification, verify

__all__ = [
    "BytesAParameter",
    "Comparison",
    "Conversion",
    "CorruptCheckpointError",
    "Difference",
    "Inspection",
    "NewerFormatError",
    "Reshaped",
    "Row",
    "Size",
    "StoredOtherwise",
    "TensorEntry",
    "ToolError",
    "Verification",
    "compare",
    "compress",
    "decompress",
    "inspect",
    "verify",
]
