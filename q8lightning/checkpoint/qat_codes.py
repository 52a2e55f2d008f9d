"""Describe in a checkpoint how weights were trained quantized, and read their codes back.

The codes are what is deployed. A checkpoint stores the masters. If the same codebook encodes them (``linear`` with or
without a residual) in the same blocks, the codes of the first stage are these. If the masters are stored as they are,
the codes can be computed from them. Otherwise the summary stores the codes, packed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.call_arguments import damaged, described
from q8lightning.checkpoint.format import NewerFormatError
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.packed_bits import unpack_bits

_KEYS = {"codebook", "block_size", "axis", "codes", "scales"}
"""The entries of a weight's description."""

Codes = tuple[WeightCodec, Tensor, Tensor, Tensor]
"""Codec, codes ``[rows, row]`` uint8, scales ``[rows, blocks a row]`` float32, and a tensor on ``meta`` with the
weight's shape, strides and dtype."""


def describe_codes(
    stored: Mapping[str, Any],
    codecs: Mapping[str, WeightCodec],
    codes: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, dict[str, Any]]:
    """Return a description of each quantized weight: its codec, and its codes if they do not follow from the weight.

    Args:
        stored: The state dict as it is saved, with payloads.
        codecs: The codec of each weight, by name.
        codes: Packed codes and scales of the weights whose codes do not follow, by name.
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
        value: The state dict's entry, a payload if it was encoded.
        entry: The weight's description from :func:`describe_codes`.

    Raises:
        NewerFormatError: If the description has an entry or a codec that this version does not know.
        CorruptCheckpointError: If codes and scales are not as many as the weight has.
    """
    if not entry.keys() <= _KEYS:
        raise NewerFormatError(f"weights that were trained quantized with {sorted(entry.keys() - _KEYS)}")
    codec = _codec_of(entry)
    like = torch.empty_strided(value.shape, _strides(value), dtype=value.dtype, device="meta")
    if "codes" in entry:
        scales = entry["scales"]
        _check_codes(value, codec, entry["codes"], scales, like)
        codes = unpack_bits(entry["codes"], codec.bits, like.numel())
        return codec, codes.view(scales.shape[0], -1), scales, like
    if isinstance(value, QuantizedTensor):
        codes, scales = value.parts[:2]
        return codec, codes.view(1, -1), scales.view(1, -1), like
    return codec, *codec.encode(value), like


def _codec_of(entry: Mapping[str, Any]) -> WeightCodec:
    """Return the codec of a weight's description."""
    try:
        codebook, block_size, axis = (entry[key] for key in ("codebook", "block_size", "axis"))
        if isinstance(codebook, str) and type(block_size) is int and (axis is None or type(axis) is int):
            return WeightCodec(codebook, block_size, axis)
    except (KeyError, ValueError):
        pass
    said = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
    raise NewerFormatError(f"weights that were trained quantized with {said}")


def _check_codes(value: Tensor | QuantizedTensor, codec: WeightCodec, codes: Any, scales: Any, like: Tensor) -> None:
    """Refuse codes and scales that are not those of a weight like this."""
    what = f"the tensor {value.name}" if isinstance(value, QuantizedTensor) else "a weight"
    if codec.axis is not None and not -like.ndim <= codec.axis < like.ndim:
        raise damaged(what, f"whose codes are of the axis {codec.axis} of {like.ndim}")
    rows, row = codec.to_rows(like).shape
    nbytes, blocks = -(-rows * row * codec.bits // 8), -(-row // codec.block_size)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.shape != (nbytes,):
        raise damaged(what, f"whose codes are {described(codes)} instead of {nbytes} bytes")
    # A shard that begins inside a block has one block more.
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32 or scales.ndim != 2 or len(scales) != rows:
        raise damaged(what, f"whose scales are {described(scales)} instead of {rows} rows")
    if not blocks <= scales.shape[1] <= blocks + 1:
        raise damaged(what, f"whose scales are {scales.shape[1]} a row instead of {blocks}")


def is_first_stage(stored: Codec, codec: WeightCodec) -> bool:
    """Whether a payload of the codec ``stored`` has the codes of ``codec``.

    Both give a one-sided codebook a signed scale.
    """
    return codec.axis is None and (stored.codebook, stored.block_size) == (codec.codebook, codec.block_size)


def _strides(value: Tensor | QuantizedTensor) -> tuple[int, ...]:
    return value.stride if isinstance(value, QuantizedTensor) else value.stride()
