"""Find a codec by its name in rules and files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from q8lightning.quantization.codecs.codebook import CodebookCodec, book_with_bits
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.log import LogCodec
from q8lightning.quantization.codecs.residual import ResidualCodec
from q8lightning.quantization.spec.codebook import FAMILY_OF, CodebookName, get_codebook
from q8lightning.quantization.spec.layout import check_bits, check_block_size

MAKERS: Mapping[str, Callable[[int, int], Codec]] = MappingProxyType(
    {
        "log": LogCodec,
    }
)
"""The constructor of each codec that is no codebook, by its name. It takes block size and bits."""

CodecName = Literal["log"] | CodebookName
"""The names of codecs in rules, for type checkers."""


def get_codec(codec: str, block_size: int = 256, bits: int | None = None, residual_bits: int = 0) -> Codec:
    """Return the codec of a name.

    Args:
        codec: ``"log"``, or a codebook's name or :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        bits: The bits of a code, 2 to 8 for ``linear``, ``softsign`` and ``log``; None for 8, or those of the codebook.
        residual_bits: Also encode what the first stage lost, in codes of 2 to 8 bits; ``linear`` only. 0 for no second
            stage.

    Raises:
        ValueError: If the name, the block size or the bits are wrong, another codec than ``linear`` shall have a
            residual, or the codebook does not suit checkpoints.
    """
    check_block_size(block_size)
    if bits is not None:
        check_bits("bits", bits, least=1)  # two levels of one's own need one bit; every other codec checks again
    if residual_bits:
        check_bits("residual_bits", residual_bits)
        family = FAMILY_OF.get(codec)
        if family != "linear":
            raise ValueError(
                f"a residual stage needs the codec linear, got {codec!r}; drop residual_bits or use linear"
            )
        return ResidualCodec(block_size, book_with_bits(codec, bits or 0).bits, residual_bits)
    if (make := MAKERS.get(codec)) is not None:
        return make(block_size, 8 if bits is None else bits)
    try:
        get_codebook(codec)
    except ValueError as error:
        raise ValueError(f"unknown codec: for second moments there is 'log'; otherwise {error}") from None
    return CodebookCodec(codec, block_size, bits or 0)
