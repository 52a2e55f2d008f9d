"""Find a codec by its name in rules and files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, get_args

from q8lightning.quantization.codecs.codebook import CodebookCodec, book_with_bits
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.log import LogCodec
from q8lightning.quantization.codecs.residual import ResidualCodec
from q8lightning.quantization.spec.codebook import FAMILY_OF, CodebookName, get_codebook
from q8lightning.quantization.spec.layout import check_bits, check_block_size
from q8lightning.quantization.spec.scale_dtype import StoredScaleDtype, finds_scale_again

MAKERS: Mapping[str, Callable[[int, int, StoredScaleDtype], Codec]] = MappingProxyType(
    {
        "log": lambda block_size, bits, scale_dtype: LogCodec(block_size, bits, scale_dtype=scale_dtype),
    }
)
"""What makes each codec that is no codebook, by its name."""

CodecName = Literal["log"] | CodebookName
"""The names of codecs in rules, for type checkers."""


def get_codec(
    codec: str,
    block_size: int = 256,
    bits: int | None = None,
    residual_bits: int = 0,
    scale_dtype: StoredScaleDtype = "float32",
) -> Codec:
    """Return the codec of a name.

    Args:
        codec: ``"log"``, or a codebook's name or :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        bits: The bits of a code, 2 to 8 for ``linear``, ``softsign`` and ``log``; None for 8, or those of the codebook.
        residual_bits: Also encode what the first stage lost, in codes of 2 to 8 bits; ``linear`` only. 0 for no second
            stage.
        scale_dtype: The dtype in which scales are stored, ``"float32"`` or ``"bfloat16"``. Scales of bfloat16 need two
            levels at each end of the codebook that are 1/128 apart, and no residual stage.

    Raises:
        ValueError: If the name, the block size, the bits or the dtype are wrong, another codec than ``linear`` shall
            have a residual, or the codebook does not suit checkpoints.
    """
    check_block_size(block_size)
    if scale_dtype not in get_args(StoredScaleDtype):
        raise ValueError(_WRONG_DTYPE.format(repr(scale_dtype)))
    if bits is not None:
        check_bits("bits", bits, least=1)  # two levels of one's own need one bit; every other codec checks again
    if residual_bits:
        check_bits("residual_bits", residual_bits)
        family = FAMILY_OF.get(codec)
        if family != "linear":
            raise ValueError(
                f"a residual stage needs the codec linear, got {codec!r}; drop residual_bits or use linear"
            )
        bits = book_with_bits(codec, bits or 0).bits
        return ResidualCodec(block_size, bits, residual_bits, scale_dtype=scale_dtype)
    if (make := MAKERS.get(codec)) is not None:
        return make(block_size, 8 if bits is None else bits, scale_dtype)
    try:
        get_codebook(codec)
    except ValueError as error:
        raise ValueError(f"unknown codec: for second moments there is 'log'; otherwise {error}") from None
    return _checked(CodebookCodec(codec, block_size, bits or 0, scale_dtype=scale_dtype))


_WRONG_DTYPE = "scale_dtype of a checkpoint is float32 or bfloat16, which hold small moments, got {}; try 'bfloat16'"


def _checked(codec: CodebookCodec) -> CodebookCodec:
    """Return a codec if encoding what it decoded finds the same scales, else raise ValueError."""
    if codec.scale_dtype == "float16":  # of a codebook for weights
        raise ValueError(_WRONG_DTYPE.format("'float16'"))
    if codec.scale_dtype == "bfloat16" and not finds_scale_again(codec.book.levels, codec.book.thresholds):
        raise ValueError(
            f"scales of bfloat16 need the last two levels 1/128 apart, got {codec.label} with closer ones, whose scales"
            " would move at every save; leave scale_dtype out, or use linear or softsign"
        )
    return codec
