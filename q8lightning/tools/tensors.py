"""Find the tensors of an open checkpoint, and describe kind, size and storage of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from q8lightning.checkpoint import tree
from q8lightning.checkpoint.layout.optimizer_states import FIRST_MOMENTS, OTHER_WEIGHTS, SECOND_MOMENTS
from q8lightning.checkpoint.layout.parameter_names import identity_of
from q8lightning.checkpoint.layout.places import place_of
from q8lightning.checkpoint.layout.sections import STATE_DICT, places_in
from q8lightning.checkpoint.layout.sections import kind_of as kind_by_keys
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.checkpoint.tree import Keys

KINDS = ("weights", *FIRST_MOMENTS, *SECOND_MOMENTS, *OTHER_WEIGHTS, "other")
"""The kinds of tensors: weights of the model, states of optimizers by their keys, and others."""

Value = Tensor | QuantizedTensor | UnreadTensor
"""A tensor of a checkpoint that was loaded with its payloads encoded, or of a folder."""


@dataclass(frozen=True)
class BytesAParameter:
    """How many bytes a checkpoint takes for each parameter of the model.

    Attributes:
        parameters: Elements of the floats in the state dict, its buffers included; of tied ones once. 0 if there are
            none.
        kinds: Bytes a parameter that are stored of each kind of tensor; empty without parameters.
        whole: Bytes a parameter of the whole file or folder; None without parameters.
    """

    parameters: int
    kinds: Mapping[str, float]
    whole: float | None


def bytes_a_parameter(content: Any, size: int) -> BytesAParameter:
    """Return what a checkpoint of ``size`` bytes takes for each parameter; tied tensors count once."""
    parameters, kinds, seen = 0, dict.fromkeys(KINDS, 0), set[Any]()
    places = places_in(content)
    for path, value in tensors_in(content):
        keys = place_of(path, places)
        if (identity := identity_of(value)) in seen:
            continue
        seen.add(identity)
        kinds[kind_of(keys, value)] += stored_bytes(value)
        if keys[:1] == (STATE_DICT,) and value.dtype.is_floating_point:
            parameters += torch.Size(value.shape).numel()
    if not parameters:
        return BytesAParameter(0, {}, None)
    stored = {kind: nbytes / parameters for kind, nbytes in kinds.items() if nbytes}
    return BytesAParameter(parameters, stored, size / parameters)


def tensors_in(content: Any) -> list[tuple[Keys, Value]]:
    """Return the tensors and payloads of a checkpoint with the keys that lead to them."""
    return [leaf for leaf in tree.leaves(content, tree.PATHS) if isinstance(leaf[1], Value)]


def kind_of(keys: Keys, value: Value) -> str:
    """Return one of :data:`KINDS`. Entries of a state dict count as weights if they are floats.

    Args:
        keys: Keys that would lead to it in Lightning's layout.
        value: The tensor.
    """
    if not keys or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return "other"
    kind = kind_by_keys(keys)
    return kind if kind in KINDS else "other"


def decoded_bytes(value: Value) -> int:
    """Return the bytes of a tensor's values in memory when it is loaded."""
    if isinstance(value, UnreadTensor):
        return value.decoded_bytes
    if isinstance(value, QuantizedTensor):
        return torch.Size(value.shape).numel() * value.dtype.itemsize
    if value.layout == torch.strided:
        return value.nbytes
    if value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    return value.values().nbytes


def dtype_of(value: Value) -> str:
    """Return the dtype of a tensor's values, without ``torch.``."""
    return str(value.dtype).removeprefix("torch.")


def codec_of(value: Value) -> str | None:
    """Return the codec of a tensor, such as ``linear8+4/256``; None if it is not encoded.

    Of a tensor whose shards are stored in several ways, all of these.
    """
    if not is_encoded(value):
        return None
    codecs = value.stored.codecs if isinstance(value, UnreadTensor) else (value.codec,)
    return ", ".join("raw" if codec is None else f"{codec.label}/{codec.block_size}" for codec in codecs)


def stored_bytes(value: Value) -> int:
    """Return the bytes of a tensor's elements or codes where it is stored."""
    return decoded_bytes(value) if isinstance(value, Tensor) else value.nbytes


def is_encoded(value: Any) -> TypeGuard[QuantizedTensor | UnreadTensor]:
    """Whether an object is a tensor that is stored encoded."""
    return isinstance(value, QuantizedTensor) or (isinstance(value, UnreadTensor) and value.is_encoded)
