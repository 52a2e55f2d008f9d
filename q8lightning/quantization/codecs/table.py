"""Which codec a name means, in rules and in files: the one table of all kinds."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from q8lightning.quantization.codecs.codebook import CodebookCodec
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.log import LogCodec
from q8lightning.quantization.codecs.residual import ResidualCodec
from q8lightning.quantization.spec.codebook import CodebookName, get_codebook
from q8lightning.quantization.spec.layout import check_block_size

CODECS: Mapping[tuple[str, bool], Callable[[int], Codec]] = MappingProxyType(
    {
        ("linear", True): ResidualCodec,
        ("log", False): LogCodec,
    }
)
"""What makes a codec of a block size, by the codec's name and whether it has a residual.

Every name that is not here is that of a codebook, or its levels.
"""

CodecName = Literal["log"] | CodebookName
"""The names that rules have, for type checkers."""


def get_codec(codec: str, block_size: int = 256, residual: bool = False) -> Codec:
    """Return the codec that rules and files mean.

    Args:
        codec: A name of :data:`CODECS`, or a codebook's name or
            :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        residual: Also encode what the first stage lost; ``linear`` only.

    Raises:
        ValueError: If the name or the block size is unknown, a residual is asked for elsewhere, or the codebook is not
            one for checkpoints.
    """
    check_block_size(block_size)
    make = CODECS.get((codec, residual))
    if make is not None:
        return make(block_size)
    if residual:
        raise ValueError(f"a residual stage needs the codec linear, got {codec!r}; drop residual or use linear")
    try:
        get_codebook(codec)
    except ValueError as error:
        raise ValueError(f"unknown codec: for second moments there is 'log'; otherwise {error}") from None
    return CodebookCodec(codec, block_size)
