"""The codec ``linear`` with a residual, a second code for what the first one lost."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.spec.codebook import name_with_bits
from q8lightning.quantization.spec.error_bound import of_residual, relative_error_bound
from q8lightning.quantization.spec.layout import KernelCodec, Layout, check_bits


@dataclass(frozen=True)
class ResidualCodec(Codec):
    """The codec of ``reference.quantize_residual``. Codes and scales are those of the codebook ``linear``.

    Args:
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        bits: The bits of a first code, 2 to 8.
        residual_bits: The bits of a residual code, 2 to 8.

    Raises:
        ValueError: If the block size is not such a power, the bits are out of range, or scales shall be rounded: what
            the residual adds to the largest element would move a rounded scale at every save.
    """

    name: str = field(default="linear", init=False)
    residual_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits)
        check_bits("residual_bits", self.residual_bits)
        if self.scale_dtype != "float32":
            raise ValueError(
                f"the scales of a codec with a residual stage are float32, got scale_dtype={self.scale_dtype!r}; leave"
                " it out, or drop residual_bits"
            )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, later, scales, _ = ops.quantize_residual(x.detach(), *self._options)
        return codes, scales, later

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        codes, later, scales, lost = ops.quantize_residual(x.detach(), *self._options, measure=True)
        return (codes, scales, later), lost

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scales, later = parts
        values: Tensor = ops.dequantize_residual(codes, later, scales, *self._options, dtype)
        return values

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.block_size, bits=(self.bits, self.residual_bits))

    @property
    def entry(self) -> dict[str, str | int]:
        return super().entry | {"residual_bits": self.residual_bits}

    def relative_error_bound(self, values: Tensor, parts: tuple[Tensor, ...]) -> float:
        return relative_error_bound(values, parts[1], self.block_size, *of_residual(self.bits, self.residual_bits))

    @property
    def label(self) -> str:
        return f"{self.name}{self.bits}+{self.residual_bits}"

    @property
    def codebook(self) -> str:
        return name_with_bits(self.name, self.bits)

    @property
    def finer(self) -> Codec | None:
        return None if self.bits == self.residual_bits == 8 else ResidualCodec(self.block_size)

    @cached_property
    def kernel(self) -> KernelCodec:
        return KernelCodec("residual", self.layout)

    @property
    def _options(self) -> tuple[int, int, int]:
        return self.block_size, self.bits, self.residual_bits

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        return super().is_stable_in(dtype) or dtype == torch.bfloat16
