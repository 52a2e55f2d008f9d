"""``compressed-tensors``: a folder with codes packed into int32, or int8 codes, which vLLM and transformers load.

A value is its code, -8 to 7 or -128 to 127, times the scale of its group of a row. For integers, our scale over a power
of two is that scale, to the bit. Scales are written in float32; where they were trained in bfloat16 or float16, they
stay the same in a model of that dtype.

Inputs that were trained quantized (:class:`~q8lightning.qat.rules.ActivationRule`) become ``input_activations``, which
are quantized while the model runs. Codes are then int8 and not packed (``int-quantized``).
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.export.errors import ExportError, library
from q8lightning.export.formats.folder import module_of, unquantized_modules, write_folder
from q8lightning.export.formats.safetensors import Part, values
from q8lightning.export.holds import check_all, why_not_in_groups
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight

_REMEDY = 'WeightRule(..., "int4", block_size=128, axis=0, scale_dtype="bfloat16"), or "int8" and block_size="row"'


class _Scheme(NamedTuple):
    """What the weights of a group of modules have in common: bits, elements that share a scale, inputs."""

    bits: int
    group_size: int | None
    inputs: str | None


def write(source: Source, path: Path, options: Options) -> None:
    """Write codes for all weights that have some, and the rest as floats."""
    library("compressed_tensors", "compressed-tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationConfig

    check_all(source, "compressed-tensors", why_not_in_groups, _REMEDY)
    schemes: dict[_Scheme, list[str]] = defaultdict(list)
    parts: list[Part] = []
    for weight in source:
        if weight.codec is None:
            parts.append(values(source, weight))
            continue
        scheme = _scheme(source, weight)
        schemes[scheme].append(module_of(weight))
        parts += _int_quantized(weight) if scheme.inputs else _packed(weight, pack_to_int32)
    formats = {_format_of(scheme) for scheme in schemes}
    config = QuantizationConfig(
        config_groups={f"group_{number}": _group(*each) for number, each in enumerate(schemes.items())},
        quant_method="compressed-tensors",
        quantization_status="compressed",
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=unquantized_modules(source),
    )
    write_folder(source, path, parts, options, config.to_dict())


def _scheme(source: Source, weight: Weight) -> _Scheme:
    assert weight.codec is not None
    rule = source.inputs_of(weight)
    if rule is not None and (rule["codebook"] not in ("linear", "int8") or weight.codec.bits != 8):
        raise ExportError(
            f'format="compressed-tensors" cannot hold inputs of {rule["codebook"]} beside weights of'
            f" {weight.codec.book.name} in {weight.original}; train int8 weights with inputs of linear, or leave the"
            " activation rule out"
        )
    group = None if weight.group == weight.row else weight.group
    return _Scheme(weight.codec.bits, group, None if rule is None else rule["per"])


def _format_of(scheme: _Scheme) -> str:
    return "pack-quantized" if scheme.inputs is None else "int-quantized"


def _group(scheme: _Scheme, modules: Sequence[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "channel"}
    if scheme.group_size is not None:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    group: dict[str, Any] = {"targets": sorted(modules), "weights": weights, "format": _format_of(scheme)}
    if scheme.inputs is not None:
        shared = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
        group["input_activations"] = {**shared, "strategy": scheme.inputs}
    return group


def _packed(weight: Weight, pack: Any) -> list[Part]:
    assert weight.codec is not None
    bits = weight.codec.bits
    words = -(-weight.row * bits // 32)
    shape = torch.tensor(weight.shape, dtype=torch.int64, device="cpu")
    return [
        Part(f"{weight.name}_packed", torch.int32, (weight.shape[0], words), lambda: pack(_codes(weight), bits)),
        _scales(weight),
        Part(f"{weight.name}_shape", torch.int64, (2,), lambda: shape),
    ]


def _int_quantized(weight: Weight) -> list[Part]:
    return [Part(weight.name, torch.int8, weight.shape, lambda: _codes(weight)), _scales(weight)]


def _scales(weight: Weight) -> Part:
    assert weight.codec is not None
    assert weight.group is not None
    unit, blocks = weight.codec.book.scale_unit, weight.row // weight.group
    name = f"{weight.name}_scale"
    return Part(name, torch.float32, (weight.shape[0], blocks), lambda: weight.rows()[1] / unit)


def _codes(weight: Weight) -> Tensor:
    """Return the codes as signed integers, ``[rows, row]`` int8."""
    assert weight.codec is not None
    return (weight.rows()[0].to(torch.int16) - int(weight.codec.book.scale_unit)).to(torch.int8)
