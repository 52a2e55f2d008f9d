"""Walk a checkpoint, apply the policy, return a new one; the one that came in is never changed."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.codes import CODES_KEY, describe_codes
from q8lightning.checkpoint.payload import FORMAT_VERSION, QuantizedTensor, is_dense
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.quantization.codec import LOG, Codec
from q8lightning.quantization.reference import SMALLEST_NORMAL
from q8lightning.quantization.weight_codec import WeightCodec

WEIGHTS = ("state_dict", "current_model_state")
"""Sections that hold a model's state dict; the second is where WeightAveraging keeps the weights being trained."""

SUMMARY_KEY = "q8lightning"
"""Where a checkpoint says by what format it was written."""


@dataclass(frozen=True)
class ModelNames:
    """What a checkpoint does not say about the model it is of.

    Attributes:
        parameters: Names of the model's parameters. What else its state dict holds (buffers, states of metrics, extra
            state) is left alone, unless it holds none of these names, as when a hook renames them.
        optimizer_parameters: For each optimizer, the names of its parameters in the order of its groups.
        quantized: How weights that are trained quantized are, by name.
    """

    parameters: frozenset[str] = frozenset()
    optimizer_parameters: tuple[tuple[str, ...], ...] = ()
    quantized: Mapping[str, WeightCodec] = field(default_factory=dict)


@dataclass(frozen=True)
class _Leaf:
    path: str
    tensor: Tensor
    codec: Codec | None


def encode_checkpoint(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames | None = None
) -> dict[str, Any]:
    """Return a copy of ``checkpoint`` in which the tensors that the policy selects are payloads.

    Containers are copied only where something in them changes; keys, their order, ``_metadata`` and everything that is
    not selected stay the same objects. A tensor that occurs twice becomes one payload that occurs twice. Tensors that
    overlap others in memory without being the same, and tied ones whose paths ask for different codecs, are left as
    they are, so that they stay tied. Tensors that the codec cannot hold are left as they are, with a warning.
    """
    leaves = list(_leaves(checkpoint, policy, names or _names_from(checkpoint)))
    replacements = _replacements(leaves)
    encoded = dict(_replace(checkpoint, replacements))
    encoded[SUMMARY_KEY] = {"format_version": FORMAT_VERSION}
    if names is not None and names.quantized and "state_dict" in checkpoint:
        codes = describe_codes(checkpoint["state_dict"], encoded["state_dict"], names.quantized)
        encoded[SUMMARY_KEY][CODES_KEY] = codes
    return encoded


def _names_from(checkpoint: Mapping[str, Any]) -> ModelNames:
    """Take what names the checkpoint has: those of optimizers that were made from named parameters."""
    optimizers = checkpoint.get("optimizer_states", ())
    return ModelNames(
        optimizer_parameters=tuple(
            tuple(name for group in state.get("param_groups", ()) for name in group.get("param_names", ()))
            for state in optimizers
            if isinstance(state, Mapping)
        )
    )


def _leaves(checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames) -> Iterator[_Leaf]:
    known = {section for section in WEIGHTS if not names.parameters.isdisjoint(checkpoint.get(section, ()))}
    for keys, tensor in _tensors(checkpoint, ()):
        path = ".".join(map(str, keys))
        parameter = _parameter_of(keys, names)
        wanted = None
        if _eligible(tensor, policy.min_numel) and not (keys[0] in known and parameter not in names.parameters):
            wanted = policy.codec_for(path, parameter)
        if wanted is not None and wanted.encoded_bytes(tensor.numel()) >= tensor.nbytes:
            wanted = None
        yield _Leaf(path, tensor, wanted)


def _tensors(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield keys, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*keys, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, (*keys, index))


def _parameter_of(keys: tuple[Any, ...], names: ModelNames) -> str | None:
    """Return the name of the parameter that a tensor is or belongs to, None if nobody knows."""
    if keys[0] in WEIGHTS:
        return ".".join(map(str, keys[1:]))
    if keys[0] == "optimizer_states" and len(keys) == 5 and keys[2] == "state":
        _, optimizer, _, parameter, _ = keys
        if isinstance(parameter, str):  # optimizer states of FSDP go by name
            return parameter
        if isinstance(optimizer, int) and optimizer < len(names.optimizer_parameters):
            known = names.optimizer_parameters[optimizer]
            return known[parameter] if isinstance(parameter, int) and parameter < len(known) else None
    return None


def _ordinary(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that can be looked at: no subclass, nothing sparse, nested or on meta."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.device.type != "meta"
    )


def _eligible(tensor: Tensor, min_numel: int) -> bool:
    return (
        _ordinary(tensor)
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and not tensor.requires_grad
        and not tensor.is_neg()
        and tensor.ndim > 0
        and tensor.numel() >= min_numel
        and is_dense(tensor)
    )


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Identify what a tensor shows of its memory: equal for tied tensors only."""
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _replacements(leaves: list[_Leaf]) -> dict[int, Any]:
    """Return what to put in the place of each tensor that changes, by the tensor's id."""
    storages: dict[Any, dict[tuple[Any, ...], list[_Leaf]]] = {}
    for leaf in leaves:
        if not _ordinary(leaf.tensor) or leaf.tensor.numel() == 0:
            continue
        storage = (leaf.tensor.device, leaf.tensor.untyped_storage().data_ptr())
        storages.setdefault(storage, {}).setdefault(_view(leaf.tensor), []).append(leaf)

    replacements: dict[int, Any] = {}
    refused: list[str] = []
    for views in storages.values():
        payloads = {
            key: payload for key, leaves in _separate(views) if (payload := _encode(leaves, refused)) is not None
        }
        for key, group in views.items():
            value: Any = payloads.get(key)
            if value is None and payloads and len(views) > 1:
                # A small neighbour in the same storage (a fused LSTM's bias): saved as a view, it would take all of the
                # storage along.
                value = group[0].tensor.detach().clone()
            replacements |= {id(leaf.tensor): value for leaf in group if value is not None}
    if refused:
        warnings.warn(
            "stored as they are, not quantized: " + "; ".join(refused) + ". The checkpoint is complete but larger;"
            " values that are not finite usually mean that training has diverged",
            stacklevel=2,
        )
    return replacements


def _separate(views: dict[tuple[Any, ...], list[_Leaf]]) -> list[tuple[tuple[Any, ...], list[_Leaf]]]:
    """Return the views of one storage if none overlaps another, else nothing."""
    if len(views) > 1:
        spans = sorted(_span(group[0].tensor) for group in views.values())
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            return []
    return list(views.items())


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _encode(leaves: list[_Leaf], refused: list[str]) -> QuantizedTensor | None:
    """Encode the one tensor that all leaves share, or return None if it is to stay as it is."""
    leaf = leaves[0]
    if leaf.codec is None or any(other.codec != leaf.codec for other in leaves):
        return None
    payload = QuantizedTensor.encode(leaf.tensor, leaf.codec, leaf.path)
    reason = _reason_to_refuse(leaf.tensor, payload)
    if reason is not None:
        refused.append(f"{leaf.path} ({reason})")
        return None
    return payload


def _reason_to_refuse(tensor: Tensor, payload: QuantizedTensor) -> str | None:
    """Say why the payload must not take the tensor's place, None if it may."""
    codec, parts = payload.codec, payload.parts
    if not bool(parts[1].isfinite().all()):
        if not bool(tensor.isfinite().all()):
            return "it holds NaN or infinity"
        negative = codec.name == LOG and bool((tensor < 0).any())
        return "it holds a negative value" if negative else "its values exceed the range of float32"
    if codec.unsigned and codec.name != LOG and bool((tensor < 0).any()):
        return f"it holds a negative value, which {codec.label} has no code for"
    if tensor.dtype == torch.float64 and bool(_vanished(tensor, payload).any()):
        return "it holds nonzero values that are zero in float32"
    # A 16-bit float can be too coarse for a codebook's finest levels: rounding to it would make the next save find
    # other codes. The codecs of the presets are stable in bfloat16 (tests/checkpoint/test_saving_again.py).
    if tensor.dtype == torch.float16 or (tensor.dtype == torch.bfloat16 and codec.name not in _STABLE_IN_BFLOAT16):
        again = QuantizedTensor.encode(payload.decode(), codec, payload.name)
        if not torch.equal(payload.data, again.data):
            return f"{tensor.dtype} is too coarse for {codec.label} at its magnitude"
    return None


_STABLE_IN_BFLOAT16 = ("linear", "softsign", LOG)


def _vanished(tensor: Tensor, payload: QuantizedTensor) -> Tensor:
    """Tell which nonzero elements became zero because their magnitude does, not because a level is nearest."""
    gone = (payload.decode() == 0) & (tensor != 0)
    return gone if payload.codec.name == LOG else gone & (tensor.abs() < SMALLEST_NORMAL)


def _replace(value: Any, replacements: Mapping[int, Any]) -> Any:
    """Return ``value`` with tensors replaced, copying only the containers in which something changes."""
    if isinstance(value, Tensor):
        return replacements.get(id(value), value)
    if isinstance(value, dict):
        changed = {key: new for key, item in value.items() if (new := _replace(item, replacements)) is not item}
        if not changed:
            return value
        result = copy.copy(value)  # keeps the subclass, and _metadata
        result.update(changed)
        return result
    if type(value) in (list, tuple):
        items = [_replace(item, replacements) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        make: Callable[[list[Any]], Any] = type(value)
        return make(items)
    return value
