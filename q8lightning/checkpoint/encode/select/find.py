"""Find the tensors of a checkpoint that the policy selects, with their parameters, codecs and ties."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q8lightning.checkpoint.layout.optimizer_states import (
    BASES,
    FIRST_OF_ADAM,
    SECONDS_OF_ADAM,
    UNKNOWN,
    is_exact,
    state_of,
)
from q8lightning.checkpoint.layout.places import NOWHERE, Places, place_of
from q8lightning.checkpoint.layout.sections import (
    DEFAULT_EPS,
    OPTIMIZER_STATES,
    epsilons_of,
    is_in_state,
    is_state,
    kind_of,
    options_in,
    parameter_names_in,
    parameter_of,
    path_of,
    places_in,
    state_dicts_in,
)
from q8lightning.checkpoint.memory import has_memory, is_dense
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import Kept
from q8lightning.checkpoint.tree import PATHS, Keys, tensors
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.layout import MIN_BLOCK_SIZE

_MOMENTS = (FIRST_OF_ADAM, *SECONDS_OF_ADAM)


@dataclass(frozen=True)
class ModelNames:
    """What a checkpoint does not say about its model.

    Attributes:
        parameters: Names of the model's parameters. What else its state dict holds (buffers, states of metrics, extra
            state) is not encoded. If it holds none of these names, as when a hook renames them, they do not count.
        optimizer_parameters: For each optimizer, the names of its parameters in the order of its groups.
        quantized: The codecs of weights that are trained quantized, by name.
        inputs: How inputs of modules are trained quantized, by the modules' names.
        restored: How often the run was restored from a quantized checkpoint.
        places: The places of what stands under a user's own keys.
    """

    parameters: frozenset[str] = frozenset()
    optimizer_parameters: tuple[tuple[str, ...], ...] = ()
    quantized: Mapping[str, WeightCodec] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    restored: int = 0
    places: Places = field(default_factory=lambda: NOWHERE)

    def is_same_model(self, other: "ModelNames") -> bool:
        """Whether both name the same parameters, quantized alike."""
        return self is other or (
            self.parameters == other.parameters
            and self.optimizer_parameters == other.optimizer_parameters
            and self.quantized == other.quantized
            and self.places == other.places
        )


def names_in(checkpoint: Mapping[str, Any]) -> ModelNames:
    """Return what a checkpoint says itself: the names in optimizers that were made from named parameters, and where
    states of modules and optimizers are."""
    return ModelNames(optimizer_parameters=parameter_names_in(checkpoint), places=places_in(checkpoint))


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


class Leaf(NamedTuple):
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


class Pair(NamedTuple):
    """The moments of one parameter, of which at least one is selected and whose elements correspond.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        eps: The optimizer's.
        is_stepped_by: Whether the optimizer steps by these two. AMSGrad's first moment is in two pairs, one with each
            second moment, and the optimizer steps by the pair with the largest.
    """

    exp_avg: Leaf
    exp_avg_sq: Leaf
    eps: float
    is_stepped_by: bool


class Found(NamedTuple):
    """The tensors of a checkpoint, sorted by how they are stored.

    Attributes:
        leaves: All its tensors.
        members: Those to encode: each member is a list of leaves that view the same memory, which ties them.
        neighbours: Leaves that share the memory of a member but are stored as they are, tied ones together.
        pairs: Moments that are measured together.
        refused: Tensors that the policy selects and that cannot be encoded, each with a reason for the user.
    """

    leaves: list[Leaf]
    members: list[list[Leaf]]
    neighbours: list[list[Leaf]]
    pairs: list[Pair]
    refused: list[str]


def find(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames, shards: Mapping[int, Shard] = WHOLE
) -> Found:
    """Find the tensors that the policy selects and that can be encoded.

    Two sorts are not encoded, so that they stay tied: tensors that overlap in memory without being equal, and tied ones
    whose rules name different codecs.

    Args:
        checkpoint: The checkpoint.
        policy: Says what is encoded, and how.
        names: What is known of the model.
        shards: What tensors are a part of, by their ids; whether one is large enough depends on the whole.
    """
    leaves = list(_leaves_of(checkpoint, policy, names, shards))
    found = Found(leaves, [], [], [], [f"{leaf.name} ({leaf.refused})" for leaf in leaves if leaf.refused])
    for sharing in _by_storage(leaves):
        views = _views(sharing)
        members = [view for view in views if _is_member(view, found.refused)] if _are_separate(views) else []
        found.members.extend(members)
        if members and len(members) < len(views):
            # A view is saved with all of its memory, even a small one such as the bias of a fused LSTM.
            found.neighbours.extend(view for view in views if view not in members)
    encoded = {id(leaf.tensor) for member in found.members for leaf in member}
    found.pairs.extend(_pairs_of(leaves, encoded, epsilons_of(checkpoint, names.places)))
    return found


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


def _leaves_of(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames, shards: Mapping[int, Shard]
) -> Iterator[Leaf]:
    """Yield all tensors of a checkpoint in its order, each with the codec that it gets."""
    options = options_in(checkpoint, names.places)
    tells = policy.may_encode(OPTIMIZER_STATES)
    known = {name for name, found in state_dicts_in(checkpoint).items() if not names.parameters.isdisjoint(found)}
    for keys, tensor in tensors(checkpoint, PATHS):
        path, place = path_of(keys), place_of(keys, names.places)
        parameter = parameter_of(place, names.optimizer_parameters)
        wanted = storage = refused = kept = None
        if has_memory(tensor):
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            shard = shards.get(id(tensor))
            if (
                (tensor.numel() if shard is None else shard.numel) >= policy.min_numel
                and not (keys[0] in known and parameter not in names.parameters)
                and is_encodable(tensor)
            ):
                wanted = policy.codec_at(path, path_of(place), parameter)
                if wanted is not None and shard is not None:
                    wanted = shard.aligned(wanted)
                if is_in_state(place):
                    state, group = state_of(str(keys[-1])), options.get(_state(keys, place), {})
                    if wanted is not None and state.unless and group.get(state.unless):
                        wanted, kept = None, state.why
                    elif tells and not is_exact(place[4:]) and not any(map(policy.mentions, (path, path_of(place)))):
                        kept = UNKNOWN.why
                if wanted is not None and wanted.encoded_bytes(tensor.numel()) >= tensor.nbytes:
                    wanted = None
                if wanted is not None and tensor.__dict__:
                    wanted = None
                    refused = f"it has attributes ({', '.join(tensor.__dict__)}); put its .detach() there"
        yield Leaf(keys, place, path, parameter, tensor, wanted, storage, refused, kept)


def _state(keys: Keys, place: Keys) -> Keys:
    """Return the keys that lead to all states of a parameter, from those that lead into one of them."""
    return keys[: len(keys) - len(place) + 4]


def _by_storage(leaves: list[Leaf]) -> list[list[Leaf]]:
    """Return the leaves of each storage that has at least one to encode."""
    storages: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.codec is not None:
            storages.setdefault(leaf.storage, []).append(leaf)
    for leaf in leaves:
        if leaf.codec is None and leaf.storage in storages and leaf.tensor.numel():
            storages[leaf.storage].append(leaf)
    return list(storages.values())


def _views(leaves: list[Leaf]) -> list[list[Leaf]]:
    """Group the leaves of a storage by what they view of it; the leaves of a group are tied."""
    if len(leaves) == 1:
        return [leaves]
    views: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in leaves:
        tensor = leaf.tensor
        views.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), []).append(leaf)
    return list(views.values())


def _are_separate(views: list[list[Leaf]]) -> bool:
    """Whether no view of a storage overlaps another."""
    spans = sorted(_span(view[0].tensor) for view in views) if len(views) > 1 else []
    return all(start >= end for (_, end), (start, _) in pairwise(spans))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses where a tensor begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _is_member(view: list[Leaf], refused: list[str]) -> bool:
    """Whether tied leaves are encoded.

    They must have one codec and load as the same kind of tensor. If only the latter fails, ``refused`` gets the reason.
    """
    first, *others = view
    if first.codec is None or any(other.codec != first.codec for other in others):
        return False
    other = next((each for each in others if _loads_as(each.tensor) != _loads_as(first.tensor)), None)
    if other is None:
        return True
    refused.append(
        f"{first.name} (it is also there as {other.name}, and only one of them is a parameter or requires grad; put"
        " .detach() of that one there)"
    )
    return False


def _loads_as(tensor: Tensor) -> tuple[bool, bool]:
    """Return what decides how a tensor is loaded: whether it is a parameter and whether it requires grad."""
    return type(tensor) is nn.Parameter, tensor.requires_grad


def _pairs_of(leaves: list[Leaf], encoded: set[int], epsilons: Mapping[Keys, float]) -> Iterator[Pair]:
    """Yield the pairs of moments.

    Args:
        leaves: All tensors of the checkpoint.
        encoded: The ids of those that are encoded.
        epsilons: The eps of each parameter's optimizer; see :func:`epsilons_of`.
    """
    moments = {leaf.keys: leaf for leaf in leaves if is_state(leaf.place) and leaf.keys[-1] in _MOMENTS}
    rotated = {_state(leaf.keys, leaf.place) for leaf in leaves if is_in_state(leaf.place) and leaf.place[4] in BASES}
    for keys, first in moments.items():
        if keys[-1] != FIRST_OF_ADAM or keys[:-1] in rotated:
            continue
        seconds = [moments[place] for key in SECONDS_OF_ADAM if (place := (*keys[:-1], key)) in moments]
        for second in seconds:
            if not encoded.isdisjoint((id(first.tensor), id(second.tensor))) and _correspond(first, second, encoded):
                yield Pair(first, second, epsilons.get(keys[:-1], DEFAULT_EPS), second is seconds[0])


def _correspond(first: Leaf, second: Leaf, encoded: set[int]) -> bool:
    """Whether elements at the same place in memory have the same index."""
    for leaf in (first, second):
        if id(leaf.tensor) not in encoded and not (leaf.storage and leaf.tensor.numel() and is_encodable(leaf.tensor)):
            return False
    one, two = first.tensor, second.tensor
    return one.shape == two.shape and one.stride() == two.stride() and one.device == two.device
