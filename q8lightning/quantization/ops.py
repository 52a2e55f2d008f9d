"""Torch operators that encode, decode and fake-quantize a tensor.

An operator calls the backend of its input's device (``backends/choose.py``) and does nothing else. It gets a codebook
as its :attr:`Codebook.spec`, because operators take only tensors and primitives.

The last result of an operator that encodes is ``lost``. With ``measure``, it is :func:`reference.measure` of the tensor
and its decoded form, ``[5]`` float64 on the tensor's device, computed in the same pass. Otherwise it is ``[0]``.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from q8lightning.quantization.backends.choose import backend_of
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook
from q8lightning.quantization.spec.layout import empty_codes, empty_scales
from q8lightning.system.ambient import neutral


def _empty_lost(x: Tensor, measure: bool) -> Tensor:
    """Return memory for what is lost of ``x``."""
    return x.new_empty(5 if measure else 0, dtype=torch.float64)


# Codebooks


@custom_op("q8lightning::quantize", mutates_args=())
@neutral()
def quantize(
    x: Tensor, codebook: str, block_size: int, signed_scale: bool = False, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    lost = _empty_lost(x, measure)
    backend, book = backend_of(x, block_size), get_codebook(codebook)
    return *backend.quantize(x, book, block_size, signed_scale, lost if measure else None), lost


@quantize.register_fake
def _(
    x: Tensor, codebook: str, block_size: int, signed_scale: bool = False, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scales(x, block_size), _empty_lost(x, measure)


@custom_op("q8lightning::dequantize", mutates_args=())
@neutral()
def dequantize(codes: Tensor, scale: Tensor, codebook: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes, block_size).dequantize(codes, scale, get_codebook(codebook), block_size, dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, codebook: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::fake_quantize", mutates_args=())
@neutral()
def fake_quantize(x: Tensor, codebook: str, block_size: int, measure: bool = False) -> tuple[Tensor, Tensor]:
    lost = _empty_lost(x, measure)
    return backend_of(x).fake_quantize(x, get_codebook(codebook), block_size, lost if measure else None), lost


@fake_quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int, measure: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_lost(x, measure)


def _straight_through(ctx: object, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


fake_quantize.register_autograd(_straight_through)


@custom_op("q8lightning::fake_quantize_rows", mutates_args=())
@neutral()
def fake_quantize_rows(x: Tensor, codebook: str, row: int) -> Tensor:
    rows, width = x.reshape(-1, row), max(32, 1 << (row - 1).bit_length())
    if width > 4096 or x.numel() == 0:  # a kernel cannot hold such a row
        return reference.fake_quantize_rows(x, get_codebook(codebook), row)
    padded = torch.nn.functional.pad(rows, (0, width - row)) if row < width else rows  # zeros change no scale
    values = backend_of(x).fake_quantize(padded, get_codebook(codebook), width)
    return values[:, :row].contiguous().view(x.shape)


@fake_quantize_rows.register_fake
def _(x: Tensor, codebook: str, row: int) -> Tensor:
    return x.new_empty(x.shape)


fake_quantize_rows.register_autograd(lambda ctx, grad: (grad, None, None))


# Residual


@custom_op("q8lightning::quantize_residual", mutates_args=())
@neutral()
def quantize_residual(
    x: Tensor, block_size: int, bits: int, residual_bits: int, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lost = _empty_lost(x, measure)
    return *backend_of(x).quantize_residual(x, block_size, bits, residual_bits, lost if measure else None), lost


@quantize_residual.register_fake
def _(
    x: Tensor, block_size: int, bits: int, residual_bits: int, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_codes(x), empty_scales(x, block_size), _empty_lost(x, measure)


@custom_op("q8lightning::dequantize_residual", mutates_args=())
@neutral()
def dequantize_residual(
    codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, bits: int, residual_bits: int, dtype: torch.dtype
) -> Tensor:
    return backend_of(codes).dequantize_residual(codes, residual, scale, block_size, bits, residual_bits, dtype)


@dequantize_residual.register_fake
def _(
    codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, bits: int, residual_bits: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


# Log


@custom_op("q8lightning::quantize_log", mutates_args=())
@neutral()
def quantize_log(
    x: Tensor, block_size: int, bits: int, scale_dtype: str = "float32", measure: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    lost = _empty_lost(x, measure)
    return *backend_of(x).quantize_log(x, block_size, bits, scale_dtype, lost if measure else None), lost


@quantize_log.register_fake
def _(
    x: Tensor, block_size: int, bits: int, scale_dtype: str = "float32", measure: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scales(x, block_size, 2), _empty_lost(x, measure)


@custom_op("q8lightning::dequantize_log", mutates_args=())
@neutral()
def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_log(codes, bounds, block_size, bits, dtype)


@dequantize_log.register_fake
def _(codes: Tensor, bounds: Tensor, block_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


# Affine


@custom_op("q8lightning::quantize_affine", mutates_args=())
@neutral()
def quantize_affine(
    x: Tensor, block_size: int, bits: int = 8, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lost = _empty_lost(x, measure)
    return *backend_of(x).quantize_affine(x, block_size, bits, lost if measure else None), lost


@quantize_affine.register_fake
def _(x: Tensor, block_size: int, bits: int = 8, measure: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_codes(x),
        empty_scales(x, block_size),
        empty_scales(x, block_size, dtype=torch.uint8),
        _empty_lost(x, measure),
    )


@custom_op("q8lightning::dequantize_affine", mutates_args=())
@neutral()
def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_affine(codes, scale, zero_point, block_size, dtype)


@dequantize_affine.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)
