"""Walk a checkpoint, apply the policy, return a new one; the one that came in is never changed."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.codes import CODES_KEY, describe_codes
from q8lightning.checkpoint.payload import FORMAT_VERSION, QuantizedTensor, encode_tensors, is_dense
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


class _Leaf(NamedTuple):
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
    leaves = list(_leaves(checkpoint, policy, names or names_in(checkpoint)))
    replacements = _replacements(leaves)
    encoded = dict(_replace(checkpoint, replacements))
    encoded[SUMMARY_KEY] = {"format_version": FORMAT_VERSION}
    if names is not None and names.quantized and "state_dict" in checkpoint:
        codes = describe_codes(checkpoint["state_dict"], encoded["state_dict"], names.quantized)
        encoded[SUMMARY_KEY][CODES_KEY] = codes
    return encoded


def names_in(checkpoint: Mapping[str, Any]) -> ModelNames:
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
        and not tensor.is_meta
    )


def _eligible(tensor: Tensor, min_numel: int) -> bool:
    return (
        _ordinary(tensor)
        and tensor.numel() >= min_numel
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and not tensor.requires_grad
        and not tensor.is_neg()
        and tensor.ndim > 0
        and is_dense(tensor)
    )


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Identify what a tensor shows of its memory: equal for tied tensors only."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _replacements(leaves: list[_Leaf]) -> dict[int, Any]:
    """Return what to put in the place of each tensor that changes, by the tensor's id."""
    views = [_views(members) for members in _by_storage(leaves)]
    refused: list[str] = []
    payloads = _encode([group for separate in map(_separate, views) for group in separate], refused)
    replacements: dict[int, Any] = {}
    for groups in views:
        any_encoded = any(id(group[0].tensor) in payloads for group in groups)
        for group in groups:
            value: Any = payloads.get(id(group[0].tensor))
            if value is None and any_encoded:
                # A small neighbour in the same storage (a fused LSTM's bias): saved as a view, it would take all of the
                # storage along.
                value = group[0].tensor.detach().clone()
            if value is not None:
                for leaf in group:
                    replacements[id(leaf.tensor)] = value
    if refused:
        warnings.warn(
            "stored as they are, not quantized: " + "; ".join(refused) + ". The checkpoint is complete but larger;"
            " values that are not finite usually mean that training has diverged",
            stacklevel=2,
        )
    return replacements


def _by_storage(leaves: list[_Leaf]) -> list[list[_Leaf]]:
    """Return the leaves of each storage in which one is to be encoded."""
    storages: dict[tuple[torch.device, int], list[_Leaf]] = {}
    for leaf in leaves:
        if leaf.codec is not None:
            storages.setdefault(_storage(leaf.tensor), []).append(leaf)
    for leaf in leaves:
        if leaf.codec is None and _ordinary(leaf.tensor) and leaf.tensor.numel():
            members = storages.get(_storage(leaf.tensor))
            if members is not None:
                members.append(leaf)
    return list(storages.values())


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _views(leaves: list[_Leaf]) -> list[list[_Leaf]]:
    """Return the leaves of a storage in groups that show the same of it: tied tensors."""
    if len(leaves) == 1:
        return [leaves]
    views: dict[tuple[Any, ...], list[_Leaf]] = {}
    for leaf in leaves:
        views.setdefault(_view(leaf.tensor), []).append(leaf)
    return list(views.values())


def _separate(views: list[list[_Leaf]]) -> list[list[_Leaf]]:
    """Return the views of one storage if none overlaps another, else nothing."""
    if len(views) > 1:
        spans = sorted(_span(group[0].tensor) for group in views)
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            return []
    return views


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _encode(groups: list[list[_Leaf]], refused: list[str]) -> dict[int, QuantizedTensor]:
    """Encode the tensor that all leaves of a group share, for each group whose leaves agree on a codec.

    Returns:
        Payloads by the id of the group's first tensor; none for those that are to stay as they are.
    """
    devices: dict[torch.device, list[tuple[Tensor, Codec, str]]] = {}
    for leaf, *others in groups:
        if leaf.codec is not None and all(other.codec == leaf.codec for other in others):
            devices.setdefault(leaf.tensor.device, []).append((leaf.tensor, leaf.codec, leaf.path))
    payloads: dict[int, QuantizedTensor] = {}
    for items in devices.values():
        kept: dict[int, QuantizedTensor] = {}
        for (tensor, _, path), payload, held in zip(items, *encode_tensors(items), strict=True):
            reason = _reason_to_refuse(tensor, payload, held)
            if reason is None:
                kept[id(tensor)] = payload
            else:
                refused.append(f"{path} ({reason})")
        if len(kept) < len(items):
            # What was refused would be saved along with the memory that it shares with the others.
            kept = {key: copy.deepcopy(payload) for key, payload in kept.items()}
        payloads |= kept
    return payloads


def _reason_to_refuse(tensor: Tensor, payload: QuantizedTensor, held: bool) -> str | None:
    """Say why the payload must not take the tensor's place, None if it may; ``held``: whether its scales are finite."""
    codec = payload.codec
    if not held:
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
