"""Find a codec by its name in rules and files."""

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
"""The constructor of each codec, by its name and whether it has a residual.

Any other name is that of a codebook, or lists its levels.
"""

CodecName = Literal["log"] | CodebookName
"""The names of codecs in rules, for type checkers."""


def get_codec(codec: str, block_size: int = 256, residual: bool = False) -> Codec:
    """Return the codec of a name.

    Args:
        codec: A name of :data:`CODECS`, or a codebook's name or
            :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        residual: Also encode what the first stage lost; ``linear`` only.

    Raises:
        ValueError: If the name or the block size is wrong, another codec than ``linear`` shall have a residual, or the
            codebook does not suit checkpoints.
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
