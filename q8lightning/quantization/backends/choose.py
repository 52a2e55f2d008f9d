"""Choose a backend by the device of a tensor: three modules with the same functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.quantization.spec.layout import MAX_BLOCK_SIZE


class Backend(Protocol):
    """The functions of ``reference.py``, which says what they do, ``cpu.py`` and ``kernels/blockwise.py``."""

    def quantize(
        self,
        x: Tensor,
        codebook: Codebook,
        block_size: int,
        signed_scale: bool = False,
        statistics: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    def dequantize(
        self, codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype
    ) -> Tensor: ...
    def fake_quantize(
        self, x: Tensor, codebook: Codebook, block_size: int, statistics: Tensor | None = None
    ) -> Tensor: ...
    def quantize_residual(
        self, x: Tensor, block_size: int, bits: int, residual_bits: int, statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def dequantize_residual(
        self,
        codes: Tensor,
        residual: Tensor,
        scale: Tensor,
        block_size: int,
        bits: int,
        residual_bits: int,
        dtype: torch.dtype,
    ) -> Tensor: ...
    def quantize_log(
        self, x: Tensor, block_size: int, bits: int, scale_dtype: str = "float32", statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def dequantize_log(
        self, codes: Tensor, bounds: Tensor, block_size: int, bits: int, dtype: torch.dtype
    ) -> Tensor: ...
    def quantize_affine(
        self, x: Tensor, block_size: int, bits: int = 8, statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def dequantize_affine(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype
    ) -> Tensor: ...


_LAUNCHES: ContextVar[bool | None] = ContextVar("launches", default=None)
"""The argument of :func:`launching`, None outside of it."""


@contextmanager
def launching(launch: bool) -> Iterator[None]:
    """Decide within this context which tensors go to the kernels for many tensors; the results are the same.

    Tests and benchmarks compare both ways with it.

    Args:
        launch: True sends CPU tensors in float32 and float16 there too, which needs Triton's interpreter
            (``TRITON_INTERPRET=1``). False sends no tensor there.
    """
    token = _LAUNCHES.set(launch)
    try:
        yield
    finally:
        _LAUNCHES.reset(token)


def has_kernels(tensor: Tensor) -> bool:
    """Tell whether the kernels for many tensors take a tensor."""
    asked = _LAUNCHES.get()
    if tensor.is_cuda:
        return asked is not False and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    # Triton interprets with NumPy, which lacks bfloat16.
    return asked is True and tensor.dtype in (torch.float32, torch.float16)


def backend_of(x: Tensor, block_size: int = 1) -> Backend:
    """Return the backend that computes with ``x``, in blocks of a size: kernels cannot hold long ones."""
    if x.is_cuda:
        return kernels() if block_size <= MAX_BLOCK_SIZE else reference
    return cpu if x.device.type == "cpu" else reference


def kernels() -> Backend:
    """Return the backend of a GPU. The first call imports Triton."""
    from q8lightning.quantization.backends.kernels import blockwise

    return blockwise
