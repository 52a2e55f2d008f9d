"""The operators: each codec as a ``torch.library`` op with a fake implementation.

An op picks the backend by the device of its input (``backend.py``) and does nothing else. Codebooks travel as their
:attr:`Codebook.spec`, so that ops take only tensors and primitives. Those that also measure what is lost are in
``measured_ops.py``.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from q8lightning.quantization.backends.choose import backend_of
from q8lightning.quantization.measured_ops import empty_codes, empty_scale
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook
from q8lightning.system.ambient import neutral


@custom_op("q8lightning::quantize", mutates_args=())
@neutral()
def quantize(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    return backend_of(x).quantize(x, get_codebook(codebook), block_size, signed_scale)


@quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size)


@custom_op("q8lightning::dequantize", mutates_args=())
@neutral()
def dequantize(codes: Tensor, scale: Tensor, codebook: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize(codes, scale, get_codebook(codebook), block_size, dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, codebook: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::fake_quantize", mutates_args=())
@neutral()
def fake_quantize(x: Tensor, codebook: str, block_size: int) -> Tensor:
    return backend_of(x).fake_quantize(x, get_codebook(codebook), block_size)


@fake_quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


fake_quantize.register_autograd(_straight_through)


@custom_op("q8lightning::fake_quantize_rows", mutates_args=())
@neutral()
def fake_quantize_rows(x: Tensor, codebook: str, row: int) -> Tensor:
    rows, width = x.reshape(-1, row), max(32, 1 << (row - 1).bit_length())
    if width > 4096 or x.numel() == 0:  # more than the kernels hold at once
        return reference.fake_quantize_rows(x, get_codebook(codebook), row)
    padded = torch.nn.functional.pad(rows, (0, width - row)) if row < width else rows  # zeros change no scale
    values = backend_of(x).fake_quantize(padded, get_codebook(codebook), width)
    return values[:, :row].contiguous().view(x.shape)


@fake_quantize_rows.register_fake
def _(x: Tensor, codebook: str, row: int) -> Tensor:
    return x.new_empty(x.shape)


fake_quantize_rows.register_autograd(_straight_through)


@custom_op("q8lightning::quantize_residual", mutates_args=())
@neutral()
def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return backend_of(x).quantize_residual(x, block_size)


@quantize_residual.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_codes(x), empty_scale(x, block_size)


@custom_op("q8lightning::dequantize_residual", mutates_args=())
@neutral()
def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_residual(codes, residual, scale, block_size, dtype)


@dequantize_residual.register_fake
def _(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::quantize_log", mutates_args=())
@neutral()
def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return backend_of(x).quantize_log(x, block_size)


@quantize_log.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size, 2)


@custom_op("q8lightning::dequantize_log", mutates_args=())
@neutral()
def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_log(codes, bounds, block_size, dtype)


@dequantize_log.register_fake
def _(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::quantize_affine", mutates_args=())
@neutral()
def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return backend_of(x).quantize_affine(x, block_size)


@quantize_affine.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size), empty_scale(x, block_size, dtype=torch.uint8)


@custom_op("q8lightning::dequantize_affine", mutates_args=())
@neutral()
def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_affine(codes, scale, zero_point, block_size, dtype)


@dequantize_affine.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def check_block_size(block_size: int) -> int:
    """Return ``block_size`` if it is a power of two between 32 and 4096, else raise ValueError."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise ValueError(f"block_size must be an integer, got {block_size!r}; try 256")
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        nearest = min((2**i for i in range(5, 13)), key=lambda size: abs(size - block_size))
        raise ValueError(f"block_size must be a power of two between 32 and 4096, got {block_size}; try {nearest}")
    return block_size
