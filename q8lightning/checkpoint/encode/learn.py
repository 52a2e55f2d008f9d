"""Find out, when a checkpoint has been saved, how to save one like it again."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.candidates import Candidate, Pair, is_held_unless_it_failed
from q8lightning.checkpoint.encode.guard import Watched
from q8lightning.checkpoint.encode.leaves import ModelNames, epsilons_of, names_from
from q8lightning.checkpoint.encode.outline import outline_of
from q8lightning.checkpoint.encode.repeat import EncodedPart, RawPart, Routine
from q8lightning.checkpoint.encode.state_dict import SUMMARY_KEY, find
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import DirectionLoss, SaveReport
from q8lightning.checkpoint.tree import has_memory, is_ordinary
from q8lightning.quantization.backends.choose import has_kernels
from q8lightning.quantization.many.encode import EncodePlan
from q8lightning.quantization.many.update_directions import Alike


def routine_of(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames | None, report: SaveReport
) -> Routine | None:
    """Return how to save a checkpoint like this one again, None if that would not be faster or not the same.

    Args:
        checkpoint: As it was saved.
        policy: By which it was encoded.
        names: What is known of the model.
        report: What that save reported.
    """
    known = names or names_from(checkpoint)
    described = outline_of(checkpoint)
    if described is None or report.guarded or report.refused or known.quantized or SUMMARY_KEY in checkpoint:
        return None
    outline, tensors = described
    if not any(map(has_kernels, tensors)):
        return None  # before everything is looked at, at every save
    found = find(checkpoint, policy, known)
    candidates, numbers = found.distinct, {id(tensor): i for i, tensor in enumerate(tensors)}
    moments = [moment for pair in found.pairs for moment in (pair.exp_avg, pair.exp_avg_sq)]
    if (
        len({each.tensor.device for each in (*candidates, *moments)}) != 1
        or not all(has_kernels(each.tensor) for each in (*candidates, *moments))
        or not all(each.codec and is_held_unless_it_failed(each.tensor, each.codec) for each in candidates)
    ):
        return None
    places = {each: i for i, each in enumerate(candidates)}
    encoded = {i: found.candidates[id(x)] for i, x in enumerate(tensors) if id(x) in found.candidates}
    raws = _raws_of(tensors, encoded)
    if raws is None:
        return None
    packing = EncodePlan([each.tensor for each in candidates], [each.codec for each in candidates if each.codec])
    encoding = EncodedPart(
        tuple(numbers[id(each.tensor)] for each in candidates),
        packing,
        _alike(found.pairs, places, packing.starts, numbers),
        Watched.of(candidates, found.pairs, policy),
        report.tensors,
        [
            DirectionLoss(pair.exp_avg.path, pair.exp_avg.parameter, 0.0, 0.0) if pair.is_stepped_by else None
            for pair in found.pairs
        ],
    )
    payloads = {i: (each.codec, places[each]) for i, each in encoded.items() if each.codec}
    return Routine(outline, known, epsilons_of(checkpoint), encoding, raws, payloads, report, policy)


def _alike(
    pairs: Sequence[Pair], places: Mapping[Candidate, int], starts: Sequence[int], numbers: Mapping[int, int]
) -> list[tuple[Alike, tuple[int, ...], tuple[int, ...]]]:
    """Sort pairs by the launch that measures them."""
    groups: dict[Hashable, list[int]] = {}
    for i, (first, second, eps) in enumerate((pair.exp_avg, pair.exp_avg_sq, pair.eps) for pair in pairs):
        groups.setdefault((first.tensor.dtype, first.codec, second.tensor.dtype, second.codec, eps), []).append(i)
    result = []
    for members in groups.values():
        sides = [[pairs[i].exp_avg for i in members], [pairs[i].exp_avg_sq for i in members]]
        begin = [tuple(0 if each.codec is None else starts[places[each]] for each in side) for side in sides]
        alike = Alike(
            tuple(members), (sides[0][0].codec, sides[1][0].codec), (begin[0], begin[1]), pairs[members[0]].eps
        )
        which = [tuple(numbers[id(each.tensor)] for each in side) for side in sides]
        result.append((alike, which[0], which[1]))
    return result


def _raws_of(tensors: Sequence[Tensor], encoded: Mapping[int, Candidate]) -> list[RawPart] | None:
    """Sort tensors that are stored as they are by how they are copied; leave out those that share memory.

    None if one shares memory with an encoded tensor.
    """
    visible = {i: x for i, x in enumerate(tensors) if has_memory(x) and x.numel()}
    users = Counter(x.untyped_storage().data_ptr() for x in visible.values())
    with_encoded = {tensors[i].untyped_storage().data_ptr() for i in encoded}
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, x in visible.items():
        storage = x.untyped_storage()
        if i in encoded:
            continue
        if storage.data_ptr() in with_encoded:
            return None
        if users[storage.data_ptr()] == 1 and storage.nbytes() == x.nbytes and is_ordinary(x) and x.is_contiguous():
            groups.setdefault((x.device, x.dtype, x.ndim == 0), []).append(i)
    return [RawPart(tuple(members), scalars) for (_, _, scalars), members in groups.items()]
