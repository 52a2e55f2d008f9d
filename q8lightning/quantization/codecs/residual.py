"""The codec ``linear`` with a residual, a second byte for what the first one lost."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.spec.error_bound import OF_RESIDUAL, relative_error_bound
from q8lightning.quantization.spec.layout import KernelCodec, Layout


@dataclass(frozen=True)
class ResidualCodec(Codec):
    """The codec of ``reference.quantize_residual``. Codes and scales are those of the codebook ``linear``.

    Args:
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.

    Raises:
        ValueError: If the block size is not such a power.
    """

    name: str = field(default="linear", init=False)
    residual: ClassVar[bool] = True

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, later, scales, _ = ops.quantize_residual(x.detach(), self.block_size)
        return codes, scales, later

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        codes, later, scales, lost = ops.quantize_residual(x.detach(), self.block_size, measure=True)
        return (codes, scales, later), lost

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scales, later = parts
        values: Tensor = ops.dequantize_residual(codes, later, scales, self.block_size, dtype)
        return values

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.block_size, stages=2)

    @property
    def entry(self) -> dict[str, str | int]:
        return super().entry | {"residual_bits": 8}

    def relative_error_bound(self, values: Tensor, parts: tuple[Tensor, ...]) -> float:
        return relative_error_bound(values, parts[1], self.block_size, *OF_RESIDUAL)

    @property
    def label(self) -> str:
        return f"{self.name}+residual"

    @property
    def codebook(self) -> str:
        return self.name

    @cached_property
    def kernel(self) -> KernelCodec:
        return KernelCodec("residual", self.layout)

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        return super().is_stable_in(dtype) or dtype == torch.bfloat16
