"""The metrics as functions in plain torch: update reduces tensors to sums, compute makes the value."""

from q8lightning.metrics.functional.codebook_usage import codebook_usage
from q8lightning.metrics.functional.compression import compression_ratio
from q8lightning.metrics.functional.reconstruction import (
    max_reconstruction_error,
    reconstruction_sqnr,
    relative_reconstruction_error,
)
from q8lightning.metrics.functional.update_direction import update_direction_error

__all__ = [
    "codebook_usage",
    "compression_ratio",
    "max_reconstruction_error",
    "reconstruction_sqnr",
    "relative_reconstruction_error",
    "update_direction_error",
]
