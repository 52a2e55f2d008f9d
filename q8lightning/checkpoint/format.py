"""Write and read headers of format version 1, and refuse what a later version wrote; see docs/format.md."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec

FORMAT_VERSION = 1
"""The version that files are written in. It is the only version number in a file: the summary has it, and the name of
the function that files call (``rebuild_v1``). It is raised when something that readers know gets another meaning. New
codecs and options do not raise it, because a reader refuses a name that it does not know."""

DTYPES = {
    name: getattr(torch, name)  # the same string each time: a pickle writes it once
    for name in ("float32", "float16", "bfloat16", "float64")
}
"""The dtypes of tensors that can be encoded."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ENTRIES = {"codec", "dtype", "name", "shape", "stride"}
"""The entries that every header has."""


class NewerFormatError(RuntimeError):
    """The file has something that only a later version of q8lightning knows.

    Args:
        what: What the file has, such as ``format version 2``.
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
    """Refuse a checkpoint whose summary is of a later version; accept anything that is no summary.

    Raises:
        NewerFormatError: If the version is later.
    """
    version = summary.get("format_version") if isinstance(summary, Mapping) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
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
    """Return the header of a payload: JSON without spaces, with sorted keys.

    With ``save`` it also says which save of a checkpoint in shards the payload is of.

    It is a string because a pickle writes that as fast as a single number. It is put together by hand because a save
    makes one for each tensor while training waits for Python's lock.
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
        ValueError: If the text is no header, because it is damaged.
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
        entry: The header's entry for the codec.
        name: The tensor, for the message.

    Raises:
        NewerFormatError: If there is no such codec, or if it has an option or a value that this version does not know.
    """
    try:
        options = entry.get("residual_bits", 0), entry.get("scale_dtype", "float32")
        codec = get_codec(entry["name"], entry["block_size"], entry["bits"], *options)
        if codec.entry == entry:
            return codec
    except (KeyError, TypeError, ValueError):
        pass
    raise NewerFormatError(f"codec {dict(entry)} for the tensor {name}")


def read_dtype(header: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a header names.

    Raises:
        NewerFormatError: If this version does not encode tensors of that dtype.
    """
    dtype: torch.dtype | None = DTYPES.get(header["dtype"])
    if dtype is None:
        raise NewerFormatError(f"dtype {header['dtype']} for the tensor {header['name']}")
    return dtype
