"""What a user asks of an export, beside its format and names."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from q8lightning.export.errors import ExportError


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
