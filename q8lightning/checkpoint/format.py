"""What files say in format version 1, and how readers refuse what they do not know; docs/format.md has every byte."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec

FORMAT_VERSION = 1
"""The version that files are written in, the only number of a version that they have: it stands in the summary, and in
the name of the function that they call (``rebuild_v1``). It is raised when what a reader knows would mean something
else. What a reader does not know (a codec, an option of one) is no reason to: it refuses that by its name."""

DTYPES = {
    name: getattr(torch, name)  # one string for each dtype: a pickle has the number of the first
    for name in ("float32", "float16", "bfloat16", "float64")
}
"""What tensors can be encoded of."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ENTRIES = {"codec", "dtype", "name", "shape", "stride"}
"""What every header has."""


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


def write_header(
    codec: Codec,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    name: str,
    requires_grad: bool = False,
    is_parameter: bool = False,
    save: str | None = None,
) -> str:
    """Return what a file says of the tensor that a payload stands for: JSON without spaces, keys sorted.

    With ``save``, also which save of a checkpoint in shards it is of.

    A string, because a pickle takes as long for it as for a single number. Put together by hand, because a save makes
    one for each tensor while training waits for Python's lock.
    """
    flags = (',"parameter":true' if is_parameter else "") + (',"requires_grad":true' if requires_grad else "")
    if save is not None:
        flags += f',"save":{json.dumps(save)}'
    return (
        f'{{"codec":{_codec_text(codec)},"dtype":"{_NAMES[dtype]}","name":{json.dumps(name)}{flags}'
        f',"shape":[{",".join(map(str, shape))}],"stride":[{",".join(map(str, stride))}]}}'
    )


def read_header(text: str) -> dict[str, Any]:
    """Return the entries of a header.

    Raises:
        ValueError: If it is none, since it is damaged.
    """
    header = json.loads(text)
    if not isinstance(header, dict) or not header.keys() >= _ENTRIES:
        raise ValueError(f"{text!r} is no header")
    return header


@lru_cache(maxsize=256)
def _codec_text(codec: Codec) -> str:
    return json.dumps(codec.entry, sort_keys=True, separators=(",", ":"))


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
        if codec.entry == entry:
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
