"""What computes: three modules with the same functions, chosen by the device of a tensor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.quantization.spec.layout import KernelCodec


class Backend(Protocol):
    """The functions that ``reference.py``, ``cpu.py`` and ``kernels/blockwise.py`` have, as ``reference.py`` says."""

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
        self, x: Tensor, block_size: int, statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def dequantize_residual(
        self, codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype
    ) -> Tensor: ...
    def quantize_log(self, x: Tensor, block_size: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def dequantize_log(self, codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor: ...
    def quantize_affine(
        self, x: Tensor, block_size: int, statistics: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def dequantize_affine(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype
    ) -> Tensor: ...


class ManyBackend(Protocol):
    """Encodes, decodes, fake-quantizes and compares many tensors in few launches; see ``kernels/many.py``."""

    def encode(
        self,
        tensors: Sequence[Tensor],
        buffer: Tensor,
        starts: tuple[int, ...],
        codec: KernelCodec,
        failed: Tensor,
        statistics: Tensor | None = None,
    ) -> None: ...
    def decode(self, buffer: Tensor, starts: tuple[int, ...], values: Sequence[Tensor], codec: KernelCodec) -> None: ...
    def fake_quantize(
        self,
        tensors: Sequence[Tensor],
        buffer: Tensor,
        starts: tuple[int, ...],
        codebook: Codebook,
        block_size: int,
        numbers: tuple[int, ...] | None = None,
        share: float = 1.0,
        seed: int = 0,
        statistics: Tensor | None = None,
    ) -> None: ...
    def update_direction_sums(
        self,
        tensors: tuple[Sequence[Tensor], Sequence[Tensor]],
        starts: tuple[tuple[int, ...], tuple[int, ...]],
        codecs: tuple[KernelCodec | None, KernelCodec | None],
        buffer: Tensor,
        eps: float,
        sums: Tensor,
    ) -> None: ...


_LAUNCHES: ContextVar[bool | None] = ContextVar("launches", default=None)
"""What :func:`launching` asks for."""


@contextmanager
def launching(launch: bool) -> Iterator[None]:
    """Send tensors on the CPU, too, to the kernels for many tensors, or no tensor at all, within this context.

    The results are the same. Tests and benchmarks compare the two ways with it.

    Args:
        launch: True for CPU tensors in float32 and float16, which need Triton's interpreter (``TRITON_INTERPRET=1``);
            False to do without those kernels everywhere.
    """
    token = _LAUNCHES.set(launch)
    try:
        yield
    finally:
        _LAUNCHES.reset(token)


def has_kernels(tensor: Tensor) -> bool:
    """Whether the kernels for many tensors read and write such tensors."""
    asked = _LAUNCHES.get()
    if tensor.is_cuda:
        return asked is not False and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return asked is True and tensor.dtype in (torch.float32, torch.float16)  # NumPy interprets, and has no bfloat16


def backend_of(x: Tensor) -> Backend:
    """Return what computes with ``x``."""
    if x.is_cuda:
        return kernels()
    return cpu if x.device.type == "cpu" else reference


def kernels() -> Backend:
    """Return the kernels; with the first call Triton is imported."""
    from q8lightning.quantization.backends.kernels import blockwise

    return blockwise


def many() -> ManyBackend:
    """Return the kernels for many tensors; with the first call Triton is imported."""
    from q8lightning.quantization.backends.kernels import many

    return many
