"""``safetensors``: floats on the grid under the names of the model's own library.

The library writes from memory. So the tensors are first laid one by one into a file beside the target, which is mapped
into memory, and the system writes and drops its pages as it needs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.export.errors import ExportError, library
from q8lightning.export.holds import check_only_tensors
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight
from q8lightning.export.whole_file import whole_file

LIBRARY = "safetensors.torch"

ALIGNMENT = 64
"""Bytes that the beginning of a tensor in the file beside is a multiple of."""


class Part(NamedTuple):
    """A tensor of the file: its name, dtype and shape, and what reads it when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Parts = Callable[[Weight], Sequence[Part]]
"""Returns the tensors that a weight becomes. Nothing is read before all weights have been asked."""


def write(source: Source, path: Path, options: Options) -> None:
    """Write the values of all weights; tied ones once, with the other names in the metadata, as ``save_model`` does."""
    parts = [values(source, weight) for weight in source]
    write_parts(source, path, parts, {"format": "pt", **metadata(source, options)})


def values(source: Source, weight: Weight) -> Part:
    """Return the tensor of a weight's values."""
    return Part(weight.name, source.kept_dtype(weight), weight.shape, lambda: source.kept(weight))


def metadata(source: Source, options: Options) -> dict[str, str]:
    """Return what stands in the head of the file: names of tied weights, and the user's own."""
    return {**source.ties, **{key: str(value) for key, value in options.metadata.items()}}


def write_parts(source: Source, path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> None:
    """Write tensors that are read one at a time.

    Raises:
        ExportError: If the library is not installed, an entry is no tensor, or two have the same name.
        CorruptCheckpointError: If the checkpoint is damaged; nothing is written then.
    """
    safetensors = library(LIBRARY, "safetensors")
    check_only_tensors(source, "safetensors", "leave it out of the state dict")
    names = [part.name for part in parts]
    for name, count in Counter(names).items():
        if count > 1:
            raise ExportError(f"{count} tensors would be called {name!r}; tell them apart by rename")
    with whole_file(path) as file, _laid_beside(file, parts) as views, source.opened.verified():
        for part, view in zip(parts, views, strict=True):
            view.copy_(part.read())
        safetensors.save_file(dict(zip(names, views, strict=True)), str(file), metadata=dict(metadata))


@contextmanager
def _laid_beside(file: Path, parts: Sequence[Part]) -> Iterator[list[Tensor]]:
    """Yield memory for the tensors, which lies in a file beside this one that is removed at the end."""
    beside = file.with_name("tensors")
    sizes = [torch.Size(part.shape).numel() * part.dtype.itemsize for part in parts]
    ends = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    with open(beside, "wb") as made:
        made.truncate(max(ends[-1], ALIGNMENT))
    whole = torch.from_file(str(beside), shared=True, size=max(ends[-1], ALIGNMENT), dtype=torch.uint8)
    try:
        yield [
            whole[start : start + size].view(part.dtype).view(part.shape)
            for start, size, part in zip(ends[:-1], sizes, parts, strict=True)
        ]
    finally:
        beside.unlink()
