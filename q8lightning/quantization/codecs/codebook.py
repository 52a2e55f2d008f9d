"""The codecs that are a codebook: the nearest level, times the largest magnitude of the block."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.residual import ResidualCodec
from q8lightning.quantization.spec.codebook import Codebook, get_codebook
from q8lightning.quantization.spec.error_bound import of_codebook, relative_error_bound
from q8lightning.quantization.spec.layout import KernelCodec

STABLE_IN_BFLOAT16 = ("linear", "softsign")
"""Codebooks whose levels are further apart than a rounding to bfloat16 (tests/checkpoint/test_saving_again.py)."""


@dataclass(frozen=True)
class CodebookCodec(Codec):
    """The codec of ``reference.quantize``, with a signed scale if the codebook reaches only one of -1 and 1.

    Args:
        name: A codebook's name or :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`; an alias becomes the
            name.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.

    Raises:
        ValueError: If the codebook or the block size is unknown, or the codebook reaches neither -1 nor 1, so that its
            scales would shrink at every save.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        book = self.book
        object.__setattr__(self, "name", book.spec)
        if book.end == 0:
            raise ValueError(
                f"a codebook for checkpoints holds 1 or -1, got levels from {book.levels[0]:g} to"
                f" {book.levels[-1]:g}; divide them by the largest magnitude"
            )

    @property
    def book(self) -> Codebook:
        """The codebook."""
        return get_codebook(self.name)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, scales, _ = ops.quantize(x.detach(), self.name, self.block_size, self.book.one_sided)
        return codes, scales

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        codes, scales, lost = ops.quantize(x.detach(), self.name, self.block_size, self.book.one_sided, measure=True)
        return (codes, scales), lost

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        values: Tensor = ops.dequantize(codes, scales, self.name, self.block_size, dtype)
        return values

    def relative_error_bound(self, values: Tensor, parts: tuple[Tensor, ...]) -> float:
        return relative_error_bound(values, parts[1], self.block_size, *of_codebook(self.book))

    @property
    def label(self) -> str:
        return self.book.name  # short also for a codebook of the user's own, whose ``name`` lists its levels

    @property
    def unsigned(self) -> bool:
        return not self.book.signed

    @property
    def codebook(self) -> str:
        return self.name

    @cached_property
    def kernel(self) -> KernelCodec:
        return KernelCodec("codebook", self.layout, self.book, self.book.scale_end)

    @property
    def finer(self) -> Codec:
        return ResidualCodec(self.block_size)

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        return super().is_stable_in(dtype) or (dtype == torch.bfloat16 and self.name in STABLE_IN_BFLOAT16)
