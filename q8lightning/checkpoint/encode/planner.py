"""Make the plan of a save from a checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.judge.limits import Limits
from q8lightning.checkpoint.encode.outline import Outline
from q8lightning.checkpoint.encode.plan import CodesTogether, DevicePlan, Member, PairPlan, Plan, RawPlan, Side, Storage
from q8lightning.checkpoint.encode.select.find import Found, find
from q8lightning.checkpoint.encode.select.leaves import WHOLE, Leaf, Shard, kept_states, not_named
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.encode.select.pairs import Pair
from q8lightning.checkpoint.layout.sections import STATE_DICT, epsilons_of, state_dicts_in
from q8lightning.checkpoint.memory import has_memory, is_ordinary
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.qat_codes import is_first_stage
from q8lightning.checkpoint.staging.copier import IMMUTABLE
from q8lightning.checkpoint.tree import leaves
from q8lightning.quantization.backends.choose import has_kernels
from q8lightning.quantization.codecs.codebook import CodebookCodec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.many.encode import EncodePlan
from q8lightning.quantization.many.update_directions import MomentLaunch
from q8lightning.quantization.spec.layout import MAX_BLOCK_SIZE


def plan_save(
    checkpoint: Mapping[str, Any],
    outline: Outline,
    tensors: Sequence[Tensor],
    policy: CheckpointPolicy,
    names: ModelNames,
    shards: Mapping[int, Shard] = WHOLE,
) -> Plan:
    """Plan how to save a checkpoint and all later ones with the same outline.

    Args:
        checkpoint: The checkpoint.
        outline: Its outline.
        tensors: Its tensors, as the outline numbers them.
        policy: Says what is encoded, and how.
        names: What is known of the model.
        shards: What tensors are a part of, by their ids.
    """
    found = find(checkpoint, policy, names, shards)
    numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
    members = [_member(group[0], numbers) for group in found.members]
    places = {numbers[id(leaf.tensor)]: i for i, group in enumerate(found.members) for leaf in group}
    pairs = [_pair(pair, numbers, places) for pair in found.pairs]
    neighbours = [tuple(dict.fromkeys(numbers[id(leaf.tensor)] for leaf in group)) for group in found.neighbours]
    apart = {number for group in neighbours for number in group}
    others = [leaf for _, leaf in leaves(checkpoint) if not isinstance(leaf, Tensor)]
    holds_payloads = any(isinstance(leaf, QuantizedTensor) for leaf in others)
    # An object may hold a view of a tensor. Both must then view the same copy, which a copy of many tensors is not.
    nothing_hidden = all(type(leaf) in IMMUTABLE or isinstance(leaf, QuantizedTensor) for leaf in others)
    nothing = not (members or found.refused or holds_payloads)
    codes = tuple(_codes(checkpoint, names, members, numbers, places))
    plan = Plan(
        outline=outline,
        policy=policy,
        names=names,
        epsilons=epsilons_of(checkpoint, names.places),
        members=tuple(members),
        places=places,
        pairs=tuple(pairs),
        devices=tuple(_devices(members, pairs, tensors, policy)),
        raws=tuple(_raws(tensors, places.keys() | apart)) if nothing_hidden else (),
        neighbours=tuple(neighbours),
        codes=codes,
        codes_together=tuple(_codes_together(codes, tensors)),
        storages=tuple(_storages(found, numbers)),
        parameters=_parameters(found, names),
        holds_payloads=holds_payloads,
        refused=tuple(found.refused),
        passed_over=tuple(not_named(checkpoint, found.leaves, policy)) if nothing else (),
        kept=kept_states(found.leaves),
    )
    return plan.reviewing(frozenset())


def _member(leaf: Leaf, numbers: Mapping[int, int]) -> Member:
    assert leaf.codec is not None
    number, parameter = numbers[id(leaf.tensor)], leaf.parameter or leaf.path
    return Member(number, leaf.path, leaf.name, leaf.kind, parameter, leaf.codec, leaf.tensor.nbytes)


def _pair(pair: Pair, numbers: Mapping[int, int], places: Mapping[int, int]) -> PairPlan:
    one, two = (Side(number, places.get(number)) for number in (numbers[id(leaf.tensor)] for leaf in pair[:2]))
    first = pair.exp_avg
    return PairPlan(one, two, pair.eps, pair.is_stepped_by, first.path, first.parameter or first.path)


def _devices(
    members: Sequence[Member], pairs: Sequence[PairPlan], tensors: Sequence[Tensor], policy: CheckpointPolicy
) -> Iterator[DevicePlan]:
    """Yield what is encoded on each device."""
    devices: dict[torch.device, list[int]] = {}
    for i, member in enumerate(members):
        devices.setdefault(tensors[member.number].device, []).append(i)
    for device, here in devices.items():
        own = [tensors[members[i].number] for i in here]
        packing = EncodePlan(own, [members[i].codec for i in here])
        local = [i for i, pair in enumerate(pairs) if tensors[pair.exp_avg.number].device == device]
        place = {member: i for i, member in enumerate(here)}
        launches, loose = _launches([pairs[i] for i in local], tensors, packing, place)
        in_pairs = frozenset(place[s.member] for i in local for s in pairs[i][:2] if s.member is not None)
        yield DevicePlan(
            device=device,
            members=tuple(here),
            numbers=tuple(members[i].number for i in here),
            packing=packing,
            pairs=tuple(local),
            launches=launches,
            loose=loose,
            limits=Limits.of([members[i].kind for i in here], in_pairs, policy),
        )


_Launches = tuple[tuple[MomentLaunch, tuple[int, ...], tuple[int, ...]], ...]


def _launches(
    pairs: Sequence[PairPlan], tensors: Sequence[Tensor], packing: EncodePlan, place: Mapping[int, int]
) -> tuple[_Launches, tuple[tuple[int, PairPlan], ...]]:
    """Sort pairs by the launch that measures them; return launches, and the pairs that no launch takes.

    Args:
        pairs: Those of one device.
        tensors: The checkpoint's, as the outline numbers them.
        packing: How the members of the device are encoded.
        place: Where among them each member is, by its number.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    loose = []
    for i, pair in enumerate(pairs):
        sides = [tensors[side.number] for side in pair[:2]]
        if all(map(has_kernels, sides)):
            codecs = [None if side.member is None else packing.codecs[place[side.member]] for side in pair[:2]]
            groups.setdefault((*codecs, *(side.dtype for side in sides), pair.eps), []).append(i)
        else:
            loose.append((i, pair))
    launches = []
    for (one, two, *_), group in groups.items():
        first, second = [pairs[i].exp_avg for i in group], [pairs[i].exp_avg_sq for i in group]
        starts = [
            tuple(0 if side.member is None else packing.starts[place[side.member]] for side in sides)
            for sides in (first, second)
        ]
        alike = MomentLaunch(tuple(group), (one, two), (starts[0], starts[1]), pairs[group[0]].eps)
        launches.append((alike, tuple(side.number for side in first), tuple(side.number for side in second)))
    return tuple(launches), tuple(loose)


def _raws(tensors: Sequence[Tensor], elsewhere: AbstractSet[int]) -> Iterator[RawPlan]:
    """Group tensors that are stored as they are and can be copied together; leave out those that share memory.

    Args:
        tensors: The checkpoint's, as the outline numbers them.
        elsewhere: The numbers of tensors that other parts of the plan take care of.
    """
    visible = {i: x for i, x in enumerate(tensors) if has_memory(x) and x.numel()}
    users = Counter(x.untyped_storage().data_ptr() for x in visible.values())
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, x in visible.items():
        storage = x.untyped_storage()
        alone = users[storage.data_ptr()] == 1 and storage.nbytes() == x.nbytes
        if alone and i not in elsewhere and is_ordinary(x) and x.is_contiguous():
            groups.setdefault((x.device, x.dtype, x.ndim == 0), []).append(i)
    for (device, _, scalars), members in groups.items():
        yield RawPlan(device, tuple(members), scalars)


def _codes(
    checkpoint: Mapping[str, Any],
    names: ModelNames,
    members: Sequence[Member],
    numbers: Mapping[int, int],
    places: Mapping[int, int],
) -> Iterator[tuple[str, int, WeightCodec]]:
    """Yield the weights that are trained quantized and whose codes do not follow from what is stored.

    Yields:
        The weight's name, its tensor's number and its codec.
    """
    masters = state_dicts_in(checkpoint).get(STATE_DICT, {})
    for name, codec in names.quantized.items():
        number = numbers.get(id(masters.get(name)))
        if number is not None and number in places and not is_first_stage(members[places[number]].codec, codec):
            yield name, number, codec


def _codes_together(
    codes: Sequence[tuple[str, int, WeightCodec]], tensors: Sequence[Tensor]
) -> Iterator[CodesTogether]:
    """Yield the codes that the kernels of each device encode together.

    Kernels need blocks that run along memory and that they can hold.
    """
    devices: dict[torch.device, list[int]] = {}
    for i, (_, number, codec) in enumerate(codes):
        fits = codec.block_size <= MAX_BLOCK_SIZE and codec.runs_along_memory(tensors[number])
        if has_kernels(tensors[number]) and fits:
            devices.setdefault(tensors[number].device, []).append(i)
    for here in devices.values():
        stored = [CodebookCodec(codec.codebook, codec.block_size) for _, _, codec in (codes[i] for i in here)]
        yield CodesTogether(tuple(here), EncodePlan([tensors[codes[i][1]] for i in here], stored))


def _storages(found: Found, numbers: Mapping[int, int]) -> Iterator[Storage]:
    """Yield the memories of a checkpoint, each once."""
    storages: dict[Any, list[Leaf]] = {}
    for leaf in found.leaves:
        if leaf.storage is not None:
            storages.setdefault(leaf.storage, []).append(leaf)
    for leaves_in in storages.values():
        nbytes = leaves_in[0].tensor.untyped_storage().nbytes()
        yield Storage(nbytes, tuple(numbers[id(leaf.tensor)] for leaf in leaves_in))


def _parameters(found: Found, names: ModelNames) -> int:
    """Count the elements of the model's parameters, of tied ones once; of all floats if names are not known."""
    floats = [
        leaf
        for leaf in found.leaves
        if leaf.storage is not None and leaf.keys[:1] == (STATE_DICT,) and leaf.tensor.is_floating_point()
    ]
    named = [leaf for leaf in floats if leaf.parameter in names.parameters] or floats
    return sum({(leaf.storage, leaf.tensor.data_ptr()): leaf.tensor.numel() for leaf in named}.values())
