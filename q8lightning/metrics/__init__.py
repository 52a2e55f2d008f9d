"""What quantization costs and saves, as torchmetrics."""

from q8lightning.metrics.codebook_usage import CodebookUsage
from q8lightning.metrics.compression import CompressionRatio
from q8lightning.metrics.reconstruction import (
    MaxReconstructionError,
    ReconstructionSQNR,
    RelativeReconstructionError,
)
from q8lightning.metrics.update_direction import UpdateDirectionError

__all__ = [
    "CodebookUsage",
    "CompressionRatio",
    "MaxReconstructionError",
    "ReconstructionSQNR",
    "RelativeReconstructionError",
    "UpdateDirectionError",
]
