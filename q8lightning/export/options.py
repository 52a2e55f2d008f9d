"""What a user asks of an export beside its format: names, and what single formats need."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from q8lightning.export.errors import ExportError

Rename = Mapping[str, str] | Callable[[str], str]
"""Regular expressions and what replaces their matches, in order; or a function from name to name."""


@dataclass(frozen=True)
class Naming:
    """From names in a checkpoint to names in a target.

    Args:
        prefix: Only tensors whose name begins with it are exported, without it. A LightningModule that keeps a model as
            ``self.net`` has the prefix ``"net."``.
        rename: Applied to what is left of a name.
        transpose: Patterns of names in the checkpoint of matrices that the target holds transposed, such as
            transformers' ``Conv1D``.
        as_floats: Patterns of names in the checkpoint of weights whose codes are not written, only their values.
    """

    prefix: str = ""
    rename: Rename | None = None
    transpose: Sequence[str] = ()
    as_floats: Sequence[str] = ()

    def names(self, originals: Iterable[str]) -> dict[str, str]:
        """Return the target's name of each tensor that is exported, by its name in the checkpoint.

        Raises:
            ExportError: If no name has the prefix, or two tensors would have the same name, or a pattern matches none.
        """
        every = list(originals)
        kept = [name for name in every if name.startswith(self.prefix) and name != self.prefix]
        if not kept:
            raise ExportError(
                f"no tensor's name begins with prefix={self.prefix!r}; the first one is {every[0] if every else None!r}"
            )
        for what, patterns in (("transpose", self.transpose), ("as_floats", self.as_floats)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in kept):
                    raise ExportError(f"{what}={pattern!r} matches no tensor; names are such as {kept[0]!r}")
        renamed = {name: self._renamed(name.removeprefix(self.prefix)) for name in kept}
        first: dict[str, str] = {}
        for name, new in renamed.items():
            if new in first:
                raise ExportError(f"rename gives {first[new]} and {name} the same name {new!r}; tell them apart")
            first[new] = name
        return renamed

    def is_transposed(self, original: str) -> bool:
        """Whether the target holds the transpose of a matrix, given by its name in the checkpoint."""
        return any(fnmatchcase(original, pattern) for pattern in self.transpose)

    def is_float(self, original: str) -> bool:
        """Whether the codes of a weight, given by its name in the checkpoint, are not written."""
        return any(fnmatchcase(original, pattern) for pattern in self.as_floats)

    def _renamed(self, name: str) -> str:
        if self.rename is None:
            return name
        if callable(self.rename):
            return self.rename(name)
        for pattern, replacement in self.rename.items():
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class Options:
    """What targets may need; see :func:`~q8lightning.export.quantized.export_quantized`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    round_scales: bool = False


def as_mapping(config: Any) -> dict[str, Any]:
    """Return the configuration of a model as a mapping, given as one, as a JSON file, or as an object of transformers.

    Raises:
        ExportError: If it is none of these.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str | os.PathLike):
        try:
            with open(config, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError) as error:
            raise ExportError(f"config={os.fspath(config)!r} cannot be read as JSON ({error})") from error
        return as_mapping(found)
    if callable(getattr(config, "to_dict", None)):
        return as_mapping(config.to_dict())
    raise ExportError(f"config is a mapping, a JSON file or a configuration of transformers, got {config!r}")
