"""The kernels, one pass over memory each, and the functions that launch them: the GPU's backend of ``ops.py``.

The launchers have the signatures and the meaning of their namesakes in ``reference.py`` and return the same bits;
statistics of float16, bfloat16 and float32 tensors come out of the same pass. They take CUDA tensors; under Triton's
interpreter (``TRITON_INTERPRET=1`` set before Triton is imported) CPU tensors too.

A program handles a tile of ROWS blocks of BLOCK elements. Its offsets are 64-bit and all its loads and stores masked.
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
