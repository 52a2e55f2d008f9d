"""Save, load, inspect, verify, compare, compress and decompress checkpoints: functions without a Trainer."""

from q8lightning.checkpoint.format import NewerFormatError
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.tools.compare import compare
from q8lightning.tools.comparison import Comparison, Difference, Reshaped, Row
from q8lightning.tools.convert.compress import compress
from q8lightning.tools.convert.conversion import Conversion, check_not_there
from q8lightning.tools.convert.decompress import decompress
from q8lightning.tools.entries import Size, StoredOtherwise, TensorEntry
from q8lightning.tools.html.page import write_html
from q8lightning.tools.inspect import inspect
from q8lightning.tools.inspection import Inspection
from q8lightning.tools.load import load
from q8lightning.tools.open_checkpoint import ToolError
from q8lightning.tools.save import Saved, save
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
    "Saved",
    "Size",
    "StoredOtherwise",
    "TensorEntry",
    "ToolError",
    "Verification",
    "check_not_there",
    "compare",
    "compress",
    "decompress",
    "inspect",
    "load",
    "save",
    "verify",
    "write_html",
]
