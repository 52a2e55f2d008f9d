"""The codec ``log`` for values that are never negative: zero, and equal steps of the logarithm."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.spec.layout import KernelCodec, Layout, check_bits
from q8lightning.quantization.spec.scale_dtype import stored_dtype


@dataclass(frozen=True)
class LogCodec(Codec):
    """The codec of ``reference.quantize_log``. A block has two scales, its smallest positive and its largest value.

    Args:
        block_size: Elements of the flattened tensor that share them; a power of two between 32 and 4096.
        bits: The bits of a code, 2 to 8.
        scale_dtype: The dtype of both, ``"float32"`` or ``"bfloat16"``.

    Raises:
        ValueError: If the block size is not such a power, or the bits are out of range.
    """

    name: str = field(default="log", init=False)
    marks_negative: ClassVar[bool] = True
    keeps_nonzero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, bounds, _ = ops.quantize_log(x.detach(), self.block_size, self.bits, self.scale_dtype)
        return codes, bounds

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        codes, bounds, lost = ops.quantize_log(x.detach(), self.block_size, self.bits, self.scale_dtype, measure=True)
        return (codes, bounds), lost

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, bounds = parts
        values: Tensor = ops.dequantize_log(codes, bounds, self.block_size, self.bits, dtype)
        return values

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.block_size, 2, (self.bits,), stored_dtype(self.scale_dtype))

    @property
    def unsigned(self) -> bool:
        return True

    @cached_property
    def kernel(self) -> KernelCodec:
        return KernelCodec("log", self.layout)

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        return super().is_stable_in(dtype) or dtype == torch.bfloat16
