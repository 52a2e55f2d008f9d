"""Sort the tensors of a checkpoint into the modules of the model, and add up what those take."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from q8lightning.tools.entries import TensorEntry
from q8lightning.tools.inspection import Inspection

DEPTH = 4
"""Levels of modules that are shown; tensors below stand in the last one."""


@dataclass
class Module:
    """A module, or another part of a checkpoint, with everything in it.

    Attributes:
        name: The last part of its path.
        path: Its path.
        parts: The modules in it, by name.
        entries: The tensors that are directly in it.
    """

    name: str
    path: str
    parts: dict[str, "Module"] = field(default_factory=dict)
    entries: list[TensorEntry] = field(default_factory=list)

    def all_entries(self) -> Iterator[TensorEntry]:
        """Yield the tensors in it and in its parts."""
        yield from self.entries
        for part in self.parts.values():
            yield from part.all_entries()

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return sum(entry.bytes for entry in self.all_entries())

    @property
    def decoded_bytes(self) -> int:
        """Bytes in memory."""
        return sum(entry.decoded_bytes for entry in self.all_entries())

    @property
    def worst(self) -> TensorEntry | None:
        """The tensor with the smallest signal-to-noise ratio; None if nothing was measured."""
        measured = [each for each in self.all_entries() if each.sqnr_db is not None]
        return min(measured, key=lambda each: each.sqnr_db or math.inf, default=None)


def modules_in(found: Inspection) -> Module:
    """Sort tensors into modules: an optimizer's state stands with the parameter that it belongs to."""
    root = Module("", "")
    for entry in found.tensors:
        *around, _ = place_of(entry)
        here = root
        for depth, name in enumerate(around):
            here = here.parts.setdefault(name, Module(name, ".".join(around[: depth + 1])))
        here.entries.append(entry)
    return root


def place_of(entry: TensorEntry) -> list[str]:
    """Return the names of the modules around a tensor, and its own."""
    name, _, state = entry.name.rpartition(": ")
    if name and entry.name != entry.path:  # an optimizer's state whose parameter is known
        return ["optimizer", *name.split("."), state]
    return entry.path.split(".")
