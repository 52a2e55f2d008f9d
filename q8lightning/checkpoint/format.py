"""What files say in format version 1, and how readers refuse what they do not know; docs/format.md has every byte."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec

FORMAT_VERSION = 1
"""The version that files are written in, the only number of a version that they have: it stands in the summary, and in
the name of the function that they call (``rebuild_v1``). It is raised when what a reader knows would mean something
else. What a reader does not know (a codec, an option of one) is no reason to: it refuses that by its name."""

CHECKSUM_KEY = "xxh3_64"
"""Where the header of a payload has its checksum."""

DTYPES = {
    name: getattr(torch, name)  # one string for each dtype: a pickle has the number of the first
    for name in ("float32", "float16", "bfloat16", "float64")
}
"""What tensors can be encoded of."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_COVERED = ("codec", "dtype", "name", "shape", "stride")
"""What the checksum covers beside the data: every entry of a header that has a part in the decoded values."""


class NewerFormatError(RuntimeError):
    """The file has something that this version of q8lightning does not know, since a later one wrote it.

    Args:
        what: What it has, such as ``format version 2``.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this checkpoint has q8lightning {what}, which this installation (format version {FORMAT_VERSION})"
            " does not know; upgrade q8lightning to load it"
        )
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what,)

    @classmethod
    def of_version(cls, version: object) -> "NewerFormatError":
        """Return the error about a file of a later version."""
        return cls(f"format version {version}")


def check_version(summary: Any) -> None:
    """Refuse a checkpoint whose summary is of a later version; whatever is no summary passes.

    Raises:
        NewerFormatError: If it is.
    """
    if isinstance(summary, Mapping) and (version := summary.get("format_version", 0)) > FORMAT_VERSION:
        raise NewerFormatError.of_version(version)


def describe(
    codec: Codec, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, name: str
) -> dict[str, Any]:
    """Return what the header of a payload says of the tensor that it stands for, as primitives."""
    return {
        "codec": _codec(codec),
        "dtype": _NAMES[dtype],
        "name": name,
        "shape": tuple(shape),
        "stride": tuple(stride),
    }


def covered_text(header: Mapping[str, Any]) -> str:
    """Return what the checksum covers of a header, as JSON whose keys are sorted."""
    return json.dumps({key: header[key] for key in _COVERED}, sort_keys=True)


@lru_cache(maxsize=256)
def _codec(codec: Codec) -> dict[str, str | int]:
    """Return the entry of a codec, the same object each time: a pickle has it once."""
    return codec.entry


def read_codec(entry: Mapping[str, Any], name: str) -> Codec:
    """Return the codec that a header names.

    Args:
        entry: What the header says.
        name: The tensor, for the message.

    Raises:
        NewerFormatError: If there is no such codec, or if it has an option or a value that this version does not know.
    """
    try:
        codec = get_codec(entry["name"], entry["block_size"], "residual_bits" in entry)
        if _codec(codec) == entry:
            return codec
    except (KeyError, TypeError, ValueError):
        pass
    raise NewerFormatError(f"codec {dict(entry)} for the tensor {name}")


def read_dtype(header: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a header names.

    Raises:
        NewerFormatError: If this version encodes no such tensors.
    """
    dtype: torch.dtype | None = DTYPES.get(header["dtype"])
    if dtype is None:
        raise NewerFormatError(f"dtype {header['dtype']} for the tensor {header['name']}")
    return dtype
