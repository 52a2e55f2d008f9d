"""The codecs that are a codebook: the nearest level, times the largest magnitude of the block."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.residual import ResidualCodec
from q8lightning.quantization.spec.codebook import FAMILIES, FAMILY_OF, Codebook, get_codebook, name_with_bits
from q8lightning.quantization.spec.error_bound import of_codebook, relative_error_bound
from q8lightning.quantization.spec.layout import KernelCodec, check_bits

STABLE_IN_BFLOAT16 = ("linear", "softsign")
"""Codebooks whose levels are further apart than a rounding to bfloat16 (tests/checkpoint/test_saving_again.py)."""


@dataclass(frozen=True)
class CodebookCodec(Codec):
    """The codec of ``reference.quantize``, with a signed scale if the codebook reaches only one of -1 and 1.

    Args:
        name: A codebook's name or :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`; an alias becomes the
            name.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        bits: The bits of a code: 2 to 8 for ``linear`` and ``softsign``. Other codebooks have the bits that they need.
            0 stands for the bits of the codebook that is named.
        scale_dtype: The dtype of scales. A spec may name it instead: ``"int4 with bfloat16 scales"``.

    Raises:
        ValueError: If the codebook or the block size is unknown, the codebook has codes of other bits, or it reaches
            neither -1 nor 1, so that its scales would shrink at every save.
    """

    bits: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        book = book_with_bits(self.name, self.bits)
        if self.scale_dtype == "float32":
            object.__setattr__(self, "scale_dtype", book.scale_dtype)
        plain = book.with_scales("float32").spec
        object.__setattr__(self, "name", FAMILY_OF.get(plain, plain))
        object.__setattr__(self, "bits", book.bits)
        if book.end == 0:
            raise ValueError(
                f"a codebook for checkpoints holds 1 or -1, got levels from {book.levels[0]:g} to"
                f" {book.levels[-1]:g}; divide them by the largest magnitude"
            )

    @cached_property
    def book(self) -> Codebook:
        """The codebook."""
        return book_with_bits(self.name, self.bits).with_scales(self.scale_dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, scales, _ = ops.quantize(x.detach(), self.codebook, self.block_size, self.book.one_sided)
        return codes, scales

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        options = self.codebook, self.block_size, self.book.one_sided
        codes, scales, lost = ops.quantize(x.detach(), *options, measure=True)
        return (codes, scales), lost

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        values: Tensor = ops.dequantize(codes, scales, self.codebook, self.block_size, dtype)
        return values

    def relative_error_bound(self, values: Tensor, parts: tuple[Tensor, ...]) -> float:
        return relative_error_bound(values, parts[1], self.block_size, *of_codebook(self.book))

    @property
    def label(self) -> str:
        return self.book.name  # short also for a codebook of the user's own, whose ``name`` lists its levels

    @property
    def unsigned(self) -> bool:
        return not self.book.signed

    @cached_property
    def codebook(self) -> str:
        return self.book.spec

    @cached_property
    def kernel(self) -> KernelCodec:
        return KernelCodec("codebook", self.layout, self.book, self.book.scale_end)

    @property
    def finer(self) -> Codec:
        return ResidualCodec(self.block_size)

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        return super().is_stable_in(dtype) or (dtype == torch.bfloat16 and self.name in STABLE_IN_BFLOAT16)


def book_with_bits(name: str, bits: int) -> Codebook:
    """Return a codebook by the name of a codec.

    Args:
        name: A codebook's name or :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`.
        bits: The bits of its codes, or 0 for those of the codebook.

    Raises:
        ValueError: If there is no such codebook, or its codes have other bits.
    """
    if name in FAMILIES and bits:
        return get_codebook(name_with_bits(name, check_bits("bits", bits)))
    book = get_codebook(name)
    if bits not in (0, book.bits):
        raise ValueError(
            f"the codes of {book.name} have {book.bits} bits, got bits={bits}; leave bits out, or use"
            f" {' or '.join(FAMILIES)}, which have 2 to 8"
        )
    return book
