"""The GPU's backend of ``ops.py``: functions that launch kernels, each with one pass over memory.

Each function has the signature and the meaning of its namesake in ``reference.py``, and returns the same bits.
Statistics of float16, bfloat16 and float32 tensors are computed in the same pass. The functions take CUDA tensors, and
CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported).

A program handles a tile of ROWS blocks of BLOCK elements. All its loads and stores are masked.
"""

from q8lightning.quantization.backends.kernels.codecs.affine import dequantize_affine, quantize_affine
from q8lightning.quantization.backends.kernels.codecs.codebook import dequantize, quantize
from q8lightning.quantization.backends.kernels.codecs.log import dequantize_log, quantize_log
from q8lightning.quantization.backends.kernels.codecs.residual import dequantize_residual, quantize_residual
from q8lightning.quantization.backends.kernels.fake_quantize import fake_quantize
from q8lightning.quantization.backends.kernels.launch import INTERPRETED

__all__ = [
    "INTERPRETED",
    "dequantize",
    "dequantize_affine",
    "dequantize_log",
    "dequantize_residual",
    "fake_quantize",
    "quantize",
    "quantize_affine",
    "quantize_log",
    "quantize_residual",
]
