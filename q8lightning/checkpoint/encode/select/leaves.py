"""List the tensors of a checkpoint, each with its parameter and the codec that the policy selects for it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.layout.optimizer_states import UNKNOWN, is_exact, state_of
from q8lightning.checkpoint.layout.places import place_of
from q8lightning.checkpoint.layout.sections import (
    OPTIMIZER_STATES,
    is_in_state,
    is_state,
    kind_of,
    options_in,
    parameter_of,
    path_of,
    state_dicts_in,
)
from q8lightning.checkpoint.memory import has_memory, is_dense
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import Kept
from q8lightning.checkpoint.tree import PATHS, Keys, tensors
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.spec.layout import MIN_BLOCK_SIZE


class Shard(NamedTuple):
    """What a tensor of a checkpoint is a part of, where several processes have a part each.

    Attributes:
        numel: Elements of the whole.
        row: Elements that every way of cutting the whole along its first dimension leaves together; 0 if there is no
            such number but 1.
    """

    numel: int
    row: int

    def aligned(self, codec: Codec) -> Codec:
        """Return a codec whose blocks cross no row, so that they are the same however the whole is cut.

        The one that was asked for, where rows have no room for such blocks.
        """
        block_size = codec.block_size
        while block_size > MIN_BLOCK_SIZE and self.row % block_size:
            block_size //= 2
        fits = self.row > 0 and self.row % block_size == 0
        return replace(codec, block_size=block_size) if fits and block_size != codec.block_size else codec


WHOLE: Mapping[int, Shard] = MappingProxyType({})
"""Of a checkpoint whose tensors are whole."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of a checkpoint.

    Attributes:
        keys: Keys and indices that lead to it.
        place: Those that would lead to it in Lightning's layout; see ``places.py``.
        path: The keys, joined by dots.
        parameter: The name of the parameter that it is or belongs to; None if that is not known.
        tensor: The tensor.
        codec: The codec that the policy selects for it; None to store it as it is.
        storage: Equal for tensors that share memory; None for a tensor without memory (see ``has_memory``).
        refused: Why it cannot be encoded although the policy selects it, if the user should hear of it.
        kept: Why a state of an optimizer is kept as it is, although the policy selects it or says nothing of it.
    """

    keys: Keys
    place: Keys
    path: str
    parameter: str | None
    tensor: Tensor
    codec: Codec | None
    storage: tuple[torch.device, int] | None
    refused: str | None = None
    kept: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        known = self.parameter is not None and is_state(self.place)
        return f"{self.parameter}: {self.place[-1]}" if known else self.path

    @property
    def kind(self) -> str:
        """See :class:`~q8lightning.checkpoint.report.TensorLoss`."""
        return kind_of(self.place)

    @property
    def state(self) -> Keys:
        """The keys that lead to all states of its parameter, for a leaf in the states of an optimizer."""
        return self.keys[: len(self.keys) - len(self.place) + 4]


def leaves_of(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames, shards: Mapping[int, Shard] = WHOLE
) -> Iterator[Leaf]:
    """Yield all tensors of a checkpoint in its order, each with the codec that it gets.

    Args:
        checkpoint: The checkpoint.
        policy: Says what is encoded, and how.
        names: What is known of the model.
        shards: What tensors are a part of, by their ids; whether one is large enough depends on the whole.
    """
    options = options_in(checkpoint, names.places)
    known = {name for name, found in state_dicts_in(checkpoint).items() if not names.parameters.isdisjoint(found)}
    for keys, tensor in tensors(checkpoint, PATHS):
        place = place_of(keys, names.places)
        parameter = parameter_of(place, names.optimizer_parameters)
        leaf = Leaf(keys, place, path_of(keys), parameter, tensor, None, _storage_of(tensor))
        shard = shards.get(id(tensor))
        is_buffer = keys[0] in known and parameter not in names.parameters
        if leaf.storage is not None and not is_buffer and is_encodable(tensor):
            numel = tensor.numel() if shard is None else shard.numel
            if numel >= policy.min_numel:
                leaf = _decided(leaf, shard, policy, options)
        yield leaf


def _storage_of(tensor: Tensor) -> tuple[torch.device, int] | None:
    return (tensor.device, tensor.untyped_storage().data_ptr()) if has_memory(tensor) else None


def _decided(
    leaf: Leaf, shard: Shard | None, policy: CheckpointPolicy, options: Mapping[Keys, Mapping[str, Any]]
) -> Leaf:
    """Return a leaf that may be encoded, with its codec, or with the reason that it has none.

    Args:
        leaf: The leaf.
        shard: What it is a part of; None for a whole tensor.
        policy: Says what is encoded, and how.
        options: The optimizer group of each parameter; see :func:`options_in`.
    """
    tensor, place = leaf.tensor, path_of(leaf.place)
    codec = policy.codec_at(leaf.path, place, leaf.parameter)
    if codec is not None and shard is not None:
        codec = shard.aligned(codec)
    if is_in_state(leaf.place):
        state, group = state_of(str(leaf.keys[-1])), options.get(leaf.state, {})
        if codec is not None and state.unless and group.get(state.unless):
            return replace(leaf, kept=state.why)
        is_meant = is_exact(leaf.place[4:]) or policy.mentions(leaf.path) or policy.mentions(place)
        if not is_meant and policy.may_encode(OPTIMIZER_STATES):
            leaf = replace(leaf, kept=UNKNOWN.why)
    if codec is None or codec.encoded_bytes(tensor.numel()) >= tensor.nbytes:
        return leaf
    if tensor.__dict__:
        return replace(leaf, refused=f"it has attributes ({', '.join(tensor.__dict__)}); put its .detach() there")
    return replace(leaf, codec=codec)


def not_named(checkpoint: Mapping[str, Any], leaves: Iterable[Leaf], policy: CheckpointPolicy) -> list[str]:
    """Return the names of the tensors that are large enough for the policy but that none of its rules names."""
    sections = state_dicts_in(checkpoint)
    return [
        leaf.name
        for leaf in leaves
        if leaf.storage is not None
        and leaf.tensor.numel() >= policy.min_numel
        and is_encodable(leaf.tensor)
        and not (leaf.keys and leaf.keys[0] in sections)
        and not policy.names(leaf.path, leaf.parameter)
        and not policy.names(path_of(leaf.place), leaf.parameter)
    ]


def kept_states(leaves: Iterable[Leaf]) -> tuple[Kept, ...]:
    """Return what the user should hear of states that are kept as they are, once for each key."""
    found: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.kept is not None:
            inner = leaf.keys[4:]
            key = inner[0] if isinstance(inner[-1], int) else inner[-1]
            found.setdefault(f"{key}.*" if isinstance(inner[-1], int) else str(key), []).append(leaf)
    return tuple(Kept(key, alike[0].name, len(alike), str(alike[0].kept)) for key, alike in found.items())


def is_encodable(tensor: Tensor) -> bool:
    """Whether codecs encode such a tensor: a dense float tensor with at least one dimension."""
    return (
        tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and not tensor.is_neg()
        and tensor.ndim > 0
        and is_dense(tensor)
    )
