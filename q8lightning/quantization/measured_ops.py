"""The operators that also return what is lost, from the same pass over memory.

Each does what its namesake in ``ops.py`` does. Its last result is :func:`reference.measure` of the tensor and its
decoded form: ``[5]`` float64 on the device of the tensor.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from q8lightning.quantization.backends.choose import backend_of
from q8lightning.quantization.spec.codebook import get_codebook
from q8lightning.system.ambient import neutral


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(5, dtype=torch.float64)


def empty_codes(x: Tensor) -> Tensor:
    """Codes of ``x``, not yet written."""
    return x.new_empty(x.shape, dtype=torch.uint8)


def empty_scale(x: Tensor, block_size: int, *trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One value, or ``trailing`` ones, for each block of ``x``, not yet written."""
    return x.new_empty(((x.numel() + block_size - 1) // block_size, *trailing), dtype=dtype)


@custom_op("q8lightning::measured_quantize", mutates_args=())
@neutral()
def quantize(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    statistics = _statistics(x)
    return *backend_of(x).quantize(x, get_codebook(codebook), block_size, signed_scale, statistics), statistics


@quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size), _statistics(x)


@custom_op("q8lightning::measured_fake_quantize", mutates_args=())
@neutral()
def fake_quantize(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    statistics = _statistics(x)
    return backend_of(x).fake_quantize(x, get_codebook(codebook), block_size, statistics), statistics


@fake_quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _statistics(x)


def _straight_through(ctx: object, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


fake_quantize.register_autograd(_straight_through)


@custom_op("q8lightning::measured_quantize_residual", mutates_args=())
@neutral()
def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = _statistics(x)
    return *backend_of(x).quantize_residual(x, block_size, statistics), statistics


@quantize_residual.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_codes(x), empty_scale(x, block_size), _statistics(x)


@custom_op("q8lightning::measured_quantize_log", mutates_args=())
@neutral()
def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    statistics = _statistics(x)
    return *backend_of(x).quantize_log(x, block_size, statistics), statistics


@quantize_log.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size, 2), _statistics(x)


@custom_op("q8lightning::measured_quantize_affine", mutates_args=())
@neutral()
def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = _statistics(x)
    return *backend_of(x).quantize_affine(x, block_size, statistics), statistics


@quantize_affine.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size), empty_scale(x, block_size, dtype=torch.uint8), _statistics(x)
