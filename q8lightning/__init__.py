"""PyTorch Lightning checkpoints, several times smaller, that load as before.

Names are imported when they are used first, so that the command line and ``import q8lightning`` take no time.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from q8lightning import fabric, tools
    from q8lightning.checkpoint.format import NewerFormatError
    from q8lightning.checkpoint.integrity import CorruptCheckpointError, without_verification
    from q8lightning.checkpoint.loading import keep_encoded
    from q8lightning.checkpoint.payload import QuantizedTensor
    from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
    from q8lightning.export.quantized import export_quantized
    from q8lightning.qat.config import QATConfig
    from q8lightning.qat.lost_write import LostWriteError
    from q8lightning.qat.masters import masters
    from q8lightning.qat.rules import ActivationRule, FreezeRule, WeightRule
    from q8lightning.quantization.affine import dequantize_affine_blockwise, quantize_affine_blockwise
    from q8lightning.quantization.functional import dequantize_blockwise, fake_quantize, quantize_blockwise
    from q8lightning.quantization.spec.codebook import Codebook
    from q8lightning.system.save_queue import BackgroundSaveError
    from q8lightning.tools import ToolError, compare, compress, decompress, inspect, load, save, verify
    from q8lightning.trainer.callback import QuantizationCallback
    from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO

_HOMES = {
    "ActivationRule": "qat.rules",
    "BackgroundSaveError": "system.save_queue",
    "CheckpointPolicy": "checkpoint.policy",
    "Codebook": "quantization.spec.codebook",
    "CorruptCheckpointError": "checkpoint.integrity",
    "FreezeRule": "qat.rules",
    "LostWriteError": "qat.lost_write",
    "NewerFormatError": "checkpoint.format",
    "QATConfig": "qat.config",
    "QuantizationCallback": "trainer.callback",
    "QuantizedCheckpointIO": "trainer.checkpoint_io.quantized",
    "QuantizedTensor": "checkpoint.payload",
    "Rule": "checkpoint.policy",
    "ToolError": "tools",
    "WeightRule": "qat.rules",
    "compare": "tools",
    "compress": "tools",
    "decompress": "tools",
    "dequantize_affine_blockwise": "quantization.affine",
    "dequantize_blockwise": "quantization.functional",
    "export_quantized": "export.quantized",
    "fabric": "",
    "fake_quantize": "quantization.functional",
    "inspect": "tools",
    "keep_encoded": "checkpoint.loading",
    "load": "tools",
    "masters": "qat.masters",
    "quantize_affine_blockwise": "quantization.affine",
    "quantize_blockwise": "quantization.functional",
    "save": "tools",
    "tools": "",
    "verify": "tools",
    "without_verification": "checkpoint.integrity",
}
"""The module of each public name, in this package; empty for a module that is public itself."""

__all__ = [
    "ActivationRule",
    "BackgroundSaveError",
    "CheckpointPolicy",
    "Codebook",
    "CorruptCheckpointError",
    "FreezeRule",
    "LostWriteError",
    "NewerFormatError",
    "QATConfig",
    "QuantizationCallback",
    "QuantizedCheckpointIO",
    "QuantizedTensor",
    "Rule",
    "ToolError",
    "WeightRule",
    "compare",
    "compress",
    "decompress",
    "dequantize_affine_blockwise",
    "dequantize_blockwise",
    "export_quantized",
    "fabric",
    "fake_quantize",
    "inspect",
    "keep_encoded",
    "load",
    "masters",
    "quantize_affine_blockwise",
    "quantize_blockwise",
    "save",
    "tools",
    "verify",
    "without_verification",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'q8lightning' has no attribute {name!r}")
    module = import_module(f"q8lightning.{home or name}")
    found = getattr(module, name) if home else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _torch_knows() -> bool:
    """Whether torch has called, or will call, what lets ``torch.load(weights_only=True)`` read quantized files."""
    if "q8lightning_autoload" in sys.modules:
        return True
    if "torch" in sys.modules or os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return False
    from importlib.metadata import entry_points

    return any(each.name == "q8lightning" for each in entry_points(group="torch.backends"))


if not TYPE_CHECKING and not _torch_knows():
    import_module("q8lightning.checkpoint.payload")
