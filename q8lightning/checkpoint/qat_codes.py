"""The codes of weights that are trained quantized, beside their masters in a checkpoint: what is deployed.

Where the masters are stored by the same codec (``linear`` with or without a residual, the same blocks), the first stage
of the masters is these codes, and nothing is stored twice. Where the masters are stored as they are, their codes can be
computed at any time. Otherwise they are stored, packed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.format import NewerFormatError
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.packed_bits import unpack_bits

_KEYS = {"codebook", "block_size", "axis", "codes", "scales"}
"""What it says of one."""

Codes = tuple[WeightCodec, Tensor, Tensor, Tensor]
"""Codec, codes ``[rows, row]`` uint8, scales ``[rows, blocks a row]`` float32, and a tensor on ``meta`` that has the
weight's shape, strides and dtype."""


def describe_codes(
    stored: Mapping[str, Any],
    codecs: Mapping[str, WeightCodec],
    codes: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, dict[str, Any]]:
    """Return, for each quantized weight of a state dict, its codec and, where they do not follow, its codes.

    Args:
        stored: The state dict as it is saved, with payloads.
        codecs: How each weight is quantized, by name.
        codes: The packed codes and the scales of those whose codes do not follow, by name.
    """
    described: dict[str, dict[str, Any]] = {}
    entries: dict[int, dict[str, Any]] = {}  # tied weights share an entry
    for name, codec in codecs.items():
        value = stored.get(name)
        if not isinstance(value, Tensor | QuantizedTensor):
            continue  # a hook renamed or removed it
        if id(value) not in entries:
            entry = {"codebook": codec.codebook, "block_size": codec.block_size, "axis": codec.axis}
            if isinstance(value, QuantizedTensor) and not is_first_stage(value.codec, codec):
                entry["codes"], entry["scales"] = codes[name]
            entries[id(value)] = entry
        described[name] = entries[id(value)]
    return described


def read_codes(value: Tensor | QuantizedTensor, entry: Mapping[str, Any]) -> Codes:
    """Return the codes of a weight.

    Args:
        value: What the state dict holds, encoded if it was.
        entry: What :func:`describe_codes` returned for it.

    Raises:
        NewerFormatError: If the entry says more than this version knows.
    """
    if not entry.keys() <= _KEYS:
        raise NewerFormatError(f"weights that were trained quantized with {sorted(entry.keys() - _KEYS)}")
    codec = WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
    like = torch.empty_strided(value.shape, _strides(value), dtype=value.dtype, device="meta")
    if "codes" in entry:
        scales = entry["scales"]
        codes = unpack_bits(entry["codes"], codec.bits, like.numel())
        return codec, codes.view(scales.shape[0], -1), scales, like
    if isinstance(value, QuantizedTensor):
        codes, scales = value.parts[:2]
        return codec, codes.view(1, -1), scales.view(1, -1), like
    return codec, *codec.encode(value), like


def is_first_stage(stored: Codec, codec: WeightCodec) -> bool:
    """Whether the codes of what is stored are those of ``codec``; a one-sided codebook has a signed scale in both."""
    return codec.axis is None and (stored.codebook, stored.block_size) == (codec.codebook, codec.block_size)


def _strides(value: Tensor | QuantizedTensor) -> tuple[int, ...]:
    return value.stride if isinstance(value, QuantizedTensor) else value.stride()
