"""The codes of weights that are trained quantized, beside their masters in a checkpoint: what is deployed.

Where the masters are stored by the same codec (``linear`` with or without a residual, the same blocks), the first stage
of the masters is these codes, and nothing is stored twice. Where the masters are stored as they are, their codes can be
computed at any time. Otherwise they are stored, packed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.packed_bits import pack_bits, unpack_bits

CODES_KEY = "qat"
"""Where the summary of a checkpoint says how each weight is quantized."""

Codes = tuple[WeightCodec, Tensor, Tensor, Tensor]
"""Codec, codes ``[rows, row]`` uint8, scales ``[rows, blocks a row]`` float32, and a tensor on ``meta`` that has the
weight's shape, strides and dtype."""


def describe_codes(
    masters: Mapping[str, Any], stored: Mapping[str, Any], codecs: Mapping[str, WeightCodec]
) -> dict[str, dict[str, Any]]:
    """Return, for each quantized weight of a state dict, its codec and, where they do not follow, its codes.

    Args:
        masters: The state dict.
        stored: The state dict as it is saved, with payloads.
        codecs: How each weight is quantized, by name.
    """
    described: dict[str, dict[str, Any]] = {}
    entries: dict[int, dict[str, Any]] = {}  # tied weights share an entry
    for name, codec in codecs.items():
        value = stored.get(name)
        if not isinstance(value, Tensor | QuantizedTensor):
            continue  # a hook renamed or removed it
        if id(value) not in entries:
            entry = {"codebook": codec.codebook, "block_size": codec.block_size, "axis": codec.axis}
            if isinstance(value, QuantizedTensor) and not _is_first_stage(value, codec):
                codes, scales = codec.encode(masters[name])
                entry |= {"codes": pack_bits(codes, codec.bits), "scales": scales}
            entries[id(value)] = entry
        described[name] = entries[id(value)]
    return described


def read_codes(value: Tensor | QuantizedTensor, entry: Mapping[str, Any]) -> Codes:
    """Return the codes of a weight.

    Args:
        value: What the state dict holds, encoded if it was.
        entry: What :func:`describe_codes` returned for it.
    """
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


def _is_first_stage(payload: QuantizedTensor, codec: WeightCodec) -> bool:
    """Whether the payload's codes are those of ``codec``; a one-sided codebook has a signed scale in both."""
    return codec.axis is None and (payload.codec.codebook, payload.codec.block_size) == (
        codec.codebook,
        codec.block_size,
    )


def _strides(value: Tensor | QuantizedTensor) -> tuple[int, ...]:
    return value.stride if isinstance(value, QuantizedTensor) else value.stride()
