"""Find the tensors of an open checkpoint, and describe kind, size and storage of each."""

from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint import tree
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sections import FIRST_MOMENTS, SECOND_MOMENTS
from q8lightning.checkpoint.sections import kind_of as kind_by_keys
from q8lightning.checkpoint.tree import Keys

KINDS = ("weights", *FIRST_MOMENTS, *SECOND_MOMENTS, "other")
"""The kinds of tensors: weights of the model, moments by their optimizer's name for them, and others."""

Value = Tensor | QuantizedTensor
"""A tensor of a checkpoint that was loaded with its payloads encoded."""


def tensors_in(content: Any) -> list[tuple[Keys, Value]]:
    """Return the tensors and payloads of a checkpoint with the keys that lead to them."""
    return [leaf for leaf in tree.leaves(content, tree.PATHS) if isinstance(leaf[1], Value)]


def kind_of(keys: Keys, value: Value) -> str:
    """Return one of :data:`KINDS`. Entries of a state dict count as weights if they are floats."""
    if not keys or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return "other"
    kind = kind_by_keys(keys)
    return kind if kind in KINDS else "other"


def decoded_bytes(value: Value) -> int:
    """Return the bytes of a tensor's values in memory when it is loaded."""
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
    """Return the codec of a tensor, such as ``linear+residual/256``; None if it is not encoded."""
    if not isinstance(value, QuantizedTensor):
        return None
    return f"{value.codec.label}/{value.codec.block_size}"
