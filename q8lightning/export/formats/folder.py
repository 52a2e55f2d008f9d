"""Write a folder for ``from_pretrained`` of transformers and for vLLM: ``model.safetensors`` and ``config.json``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from q8lightning.export.errors import ExportError
from q8lightning.export.formats.safetensors import Part, metadata, write_parts
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight
from q8lightning.export.whole_file import whole_file

MODEL, CONFIG = "model.safetensors", "config.json"


def write_folder(
    source: Source, path: Path, parts: Sequence[Part], options: Options, quantization: Mapping[str, Any]
) -> None:
    """Write the tensors and the configuration; while that goes on, the folder has none, so that nothing loads it.

    Args:
        source: The weights.
        path: The folder, which is made if it is missing.
        parts: The tensors.
        options: Hold the model's configuration.
        quantization: The configuration's entry ``quantization_config``.

    Raises:
        ExportError: If the path is a file, or as :func:`write_parts`.
    """
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file, but the format is a folder; name a folder")
    path.mkdir(parents=True, exist_ok=True)
    config = path / CONFIG
    before = config.read_bytes() if config.exists() else None
    config.unlink(missing_ok=True)
    try:
        write_parts(source, path / MODEL, parts, {"format": "pt", **metadata(source, options)})
    except BaseException:
        if before is not None:
            config.write_bytes(before)  # the model beside it is the old one, too
        raise
    with whole_file(config) as file:
        text = json.dumps({**options.config, "quantization_config": dict(quantization)}, indent=2, sort_keys=True)
        file.write_text(text + "\n", encoding="utf-8")


def module_of(weight: Weight) -> str:
    """Return the module that a weight belongs to in the target.

    Raises:
        ExportError: If it is not called ``weight``, so that the target would not find its codes.
    """
    module, _, name = weight.name.rpartition(".")
    if name != "weight":
        raise ExportError(
            f"the target quantizes weights of modules, which are called MODULE.weight, and {weight.original} becomes"
            f" {weight.name!r}; rename it, or write it as floats (as_floats={weight.original!r})"
        )
    return module


def unquantized_modules(source: Source) -> list[str]:
    """Return the modules whose weights are matrices without codes, by their names in the target."""
    names = [name for weight in source if weight.codec is None and len(weight.shape) == 2 for name in _names(weight)]
    return sorted({name.removesuffix(".weight") for name in names if name.endswith(".weight")})


def _names(weight: Weight) -> tuple[str, ...]:
    return weight.name, *weight.tied
