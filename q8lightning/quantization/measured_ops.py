"""The operators that also return what is lost, on a GPU from the same pass over memory.

Each does what its namesake in ``ops.py`` does. Its last result is :func:`reference.measure` of the tensor and its
decoded form: ``[5]`` float64 on the device of the tensor.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from q8lightning.quantization.backends import cpu_statistics as measuring
from q8lightning.quantization.backends.choose import backend_of, kernels
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook
from q8lightning.system.ambient import neutral


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(5, dtype=torch.float64)


def _measure(x: Tensor, block_size: int, decode: measuring.Decode) -> Tensor:
    if x.device.type == "cpu":
        return measuring.measure(x, block_size, decode)
    return reference.measure(x, decode(slice(None), slice(None)).view(x.shape))


def empty_codes(x: Tensor) -> Tensor:
    """Codes of ``x``, not yet written."""
    return x.new_empty(x.shape, dtype=torch.uint8)


def empty_scale(x: Tensor, block_size: int, *trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One value, or ``trailing`` ones, for each block of ``x``, not yet written."""
    return x.new_empty(((x.numel() + block_size - 1) // block_size, *trailing), dtype=dtype)


@custom_op("q8lightning::measured_quantize", mutates_args=())
@neutral()
def quantize(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    book = get_codebook(codebook)
    if x.is_cuda:
        statistics = _statistics(x)
        return *kernels().quantize(x, book, block_size, signed_scale, statistics), statistics
    backend = backend_of(x)
    codes, scale = backend.quantize(x, book, block_size, signed_scale)
    flat = codes.view(-1)
    lost = _measure(x, block_size, lambda e, b: backend.dequantize(flat[e], scale[b], book, block_size, x.dtype))
    return codes, scale, lost


@quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size), _statistics(x)


@custom_op("q8lightning::measured_fake_quantize", mutates_args=())
@neutral()
def fake_quantize(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    book = get_codebook(codebook)
    if x.is_cuda:
        statistics = _statistics(x)
        return kernels().fake_quantize(x, book, block_size, statistics), statistics
    values = backend_of(x).fake_quantize(x, book, block_size)
    flat = values.view(-1)
    return values, _measure(x, block_size, lambda e, b: flat[e])


@fake_quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _statistics(x)


def _straight_through(ctx: object, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


fake_quantize.register_autograd(_straight_through)


@custom_op("q8lightning::measured_quantize_residual", mutates_args=())
@neutral()
def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.is_cuda:
        statistics = _statistics(x)
        return *kernels().quantize_residual(x, block_size, statistics), statistics
    backend = backend_of(x)
    codes, residual, scale = backend.quantize_residual(x, block_size)
    one, two = codes.view(-1), residual.view(-1)
    lost = _measure(
        x, block_size, lambda e, b: backend.dequantize_residual(one[e], two[e], scale[b], block_size, x.dtype)
    )
    return codes, residual, scale, lost


@quantize_residual.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_codes(x), empty_scale(x, block_size), _statistics(x)


@custom_op("q8lightning::measured_quantize_log", mutates_args=())
@neutral()
def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        statistics = _statistics(x)
        return *kernels().quantize_log(x, block_size, statistics), statistics
    backend = backend_of(x)
    codes, bounds = backend.quantize_log(x, block_size)
    flat = codes.view(-1)
    lost = _measure(x, block_size, lambda e, b: backend.dequantize_log(flat[e], bounds[b], block_size, x.dtype))
    return codes, bounds, lost


@quantize_log.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size, 2), _statistics(x)


@custom_op("q8lightning::measured_quantize_affine", mutates_args=())
@neutral()
def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.is_cuda:
        statistics = _statistics(x)
        return *kernels().quantize_affine(x, block_size, statistics), statistics
    backend = backend_of(x)
    parts = backend.quantize_affine(x, block_size)
    return *parts, reference.measure(x, backend.dequantize_affine(*parts, block_size, x.dtype))


@quantize_affine.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size), empty_scale(x, block_size, dtype=torch.uint8), _statistics(x)
