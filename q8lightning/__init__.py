"""PyTorch Lightning checkpoints, several times smaller, that load as before."""

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
from q8lightning.quantization.functional import dequantize_blockwise, fake_quantize, quantize_blockwise
from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.system.save_queue import BackgroundSaveError
from q8lightning.trainer.callback import QuantizationCallback
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO

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
    "WeightRule",
    "dequantize_blockwise",
    "export_quantized",
    "fake_quantize",
    "keep_encoded",
    "masters",
    "quantize_blockwise",
    "without_verification",
]
__version__ = "0.1.0"
