"""Find the tensors of an open checkpoint, and describe kind, size and storage of each."""

from typing import Any, TypeGuard

import torch
from torch import Tensor

from q8lightning.checkpoint import tree
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sections import FIRST_MOMENTS, SECOND_MOMENTS
from q8lightning.checkpoint.sections import kind_of as kind_by_keys
from q8lightning.checkpoint.sharded.unread import UnreadTensor
from q8lightning.checkpoint.tree import Keys

KINDS = ("weights", *FIRST_MOMENTS, *SECOND_MOMENTS, "other")
"""The kinds of tensors: weights of the model, moments by their optimizer's name for them, and others."""

Value = Tensor | QuantizedTensor | UnreadTensor
"""A tensor of a checkpoint that was loaded with its payloads encoded, or of a folder."""


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
