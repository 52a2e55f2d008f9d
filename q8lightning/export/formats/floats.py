"""``float``: a Lightning checkpoint with the very weights that the forward pass used, which needs no q8lightning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from q8lightning.checkpoint.file.write import write_durably
from q8lightning.checkpoint.layout.sections import FOR_TRAINING, STATE_DICT, SUMMARY_KEY
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight
from q8lightning.tools.convert.write_tensor_by_tensor import Store, write_tensor_by_tensor

Later = Callable[[Store], Any]
"""Writes the tensors of an entry, and returns what is pickled in its place."""


def write(source: Source, path: Path, options: Options) -> None:
    """Write the checkpoint without what only training needs."""

    content = source.opened.content
    plain = {key: value for key, value in content.items() if key not in (*FOR_TRAINING, SUMMARY_KEY)}
    write_state(source, path, plain, lambda weight: values_of(source, weight))


def write_state(source: Source, path: Path, content: Mapping[str, Any] | None, entry: Callable[[Weight], Any]) -> None:
    """Write a file for ``torch.load``, whose state dict has an entry for each weight; tied ones share it.

    Args:
        source: The weights.
        path: The file.
        content: What is in the file beside the state dict; None if the file is the state dict.
        entry: Returns the entry of a weight; :func:`later` for one that is read when it is written.
    """
    opened = source.opened
    state: dict[str, Any] = {}
    for weight in source:
        state |= dict.fromkeys((weight.name, *weight.tied), entry(weight))
    state |= {name: opened.content[STATE_DICT][original] for original, name in source.others.items()}
    order = {name: state[name] for name in source.order}
    whole = order if content is None else {**content, STATE_DICT: order}
    stored: dict[int, Any] = {}

    def replace(value: Any, store: Store) -> Any:
        if not isinstance(value, _Entry | QuantizedTensor | UnreadTensor):
            return value
        if id(value) not in stored:
            if isinstance(value, _Entry):
                stored[id(value)] = value.write(store)
            else:
                stored[id(value)] = store(opened.values(value), opened.location(value))
        return stored[id(value)]

    def write_file(file: IO[bytes]) -> None:
        with opened.verified():  # otherwise damage would get a new sum and never be found
            write_tensor_by_tensor(whole, file, replace, lambda storage: opened.locations.get(storage, "cpu"))

    write_durably(path, write_file)


def later(write: Later) -> Any:
    """Return an entry whose tensors are written when the file gets to it."""
    return _Entry(write)


def values_of(source: Source, weight: Weight) -> Any:
    """Return an entry for the values of a weight. What stays as it is keeps sharing memory with others."""
    dtype = source.kept_dtype(weight)
    if weight.trained is None and dtype == weight.dtype and not weight.is_transposed:
        return weight.value
    return later(lambda store: store(weight.values().detach().to(dtype), source.opened.location(weight.value)))


class _Entry:
    def __init__(self, write: Later) -> None:
        self.write = write
