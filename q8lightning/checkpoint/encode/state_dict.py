"""Walk a checkpoint, apply the policy, return a new one; the one that came in is never changed."""

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from q8lightning.checkpoint.encode.candidates import Candidate, Pair
from q8lightning.checkpoint.encode.guard import encode_candidates, warn_of_guarded
from q8lightning.checkpoint.encode.leaves import (
    Leaf,
    ModelNames,
    leaves_of,
    names_from,
    pairs_of,
    passed_over,
)
from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.qat_codes import describe_codes
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sections import CODES_KEY, SUMMARY_KEY, epsilons_of, state_dicts_in
from q8lightning.checkpoint.tree import leaves, rebuild, tensors


class Encoded(NamedTuple):
    """A checkpoint as it is to be saved, and what that loses."""

    checkpoint: dict[str, Any]
    report: SaveReport


def encode_checkpoint(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames | None = None
) -> dict[str, Any]:
    """Return a copy of ``checkpoint`` in which the tensors that the policy selects are payloads.

    Containers are copied only where something in them changes; keys, their order, ``_metadata`` and everything that is
    not selected stay the same objects. A tensor that occurs twice becomes one payload that occurs twice. Tensors that
    overlap others in memory without being the same, and tied ones whose paths ask for different codecs, are left as
    they are, so that they stay tied. Tensors that the codec cannot hold are left as they are, with a warning; those
    that would lose more than the policy allows are stored better, with another one (``guard.py``).
    """
    encoded, report = encode_and_report(checkpoint, policy, names)
    warn_of_refused(report.refused)
    warn_of_guarded(report.guarded)
    warn_of_passed_over(report.passed_over)
    return encoded


def encode_and_report(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames | None = None
) -> Encoded:
    """As :func:`encode_checkpoint`; leave the warnings to the caller."""
    known = names or names_from(checkpoint)
    found = find(checkpoint, policy, known)
    report = encode_candidates(found.distinct, found.pairs, policy)
    report.refused[:0] = found.refused
    replacements = _replacements(found)
    encoded = _replace(checkpoint, replacements)
    codes: dict[str, dict[str, Any]] = {}
    if known.quantized and (masters := state_dicts_in(checkpoint).get("state_dict")) is not None:
        codes = describe_codes(masters, encoded["state_dict"], known.quantized)
    report.original_bytes, report.stored_bytes = _count_bytes(found.leaves, replacements)
    report.stored_bytes += sum(tensor.nbytes for _, tensor in tensors(codes))
    if not (found.candidates or found.refused or _holds_payload(checkpoint)):
        report.passed_over = passed_over(checkpoint, found.leaves, policy)
    before = checkpoint.get(SUMMARY_KEY)
    if report.tensors or not isinstance(before, Mapping) or not _holds_payload(checkpoint):
        restored = known.restored or (before.get("restored", 0) if isinstance(before, Mapping) else 0)
        encoded[SUMMARY_KEY] = summary_of(report, policy, restored)
    # Otherwise it was loaded encoded and stays so, and what it says about itself stays true.
    if codes:
        encoded[SUMMARY_KEY] = {**encoded[SUMMARY_KEY], CODES_KEY: codes}
    return Encoded(encoded, report)


def summary_of(report: SaveReport, policy: CheckpointPolicy, restored: int) -> dict[str, Any]:
    """Return what a checkpoint says under ``SUMMARY_KEY``."""
    return {
        "format_version": FORMAT_VERSION,
        "policy": policy.as_primitives(),
        "restored": restored,
        **report.summary(),
    }


def _holds_payload(value: Any) -> bool:
    return any(isinstance(leaf, QuantizedTensor) for _, leaf in leaves(value))


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Identify what a tensor shows of its memory: equal for tied tensors only."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


class Found(NamedTuple):
    """What there is to encode in a checkpoint.

    Attributes:
        leaves: All its tensors.
        views: For each stretch of memory in which one is to be encoded, the leaves in it; those that show the same of
            it together.
        candidates: What may be encoded, by the ids of the tensors; tied ones have the same.
        pairs: The moments of which one is a candidate.
        refused: What the policy wants encoded and what for a reason that the user should hear of is not; with that.
    """

    leaves: list[Leaf]
    views: list[list[list[Leaf]]]
    candidates: dict[int, Candidate]
    pairs: list[Pair]
    refused: list[str]

    @property
    def distinct(self) -> list[Candidate]:
        """The candidates, each once."""
        return list(dict.fromkeys(self.candidates.values()))


def find(checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames) -> Found:
    """Find what the policy wants encoded and what can be."""
    found = list(leaves_of(checkpoint, policy, names))
    refused = [f"{leaf.path} ({leaf.refused})" for leaf in found if leaf.refused]
    views = [_views(members) for members in _by_storage(found)]
    candidates: dict[int, Candidate] = {}
    for first, *others in (group for separate in map(_separate, views) for group in separate):
        if first.codec is not None and all(other.codec == first.codec for other in others):
            other = next((each for each in others if _is_what(each.tensor) != _is_what(first.tensor)), None)
            if other is not None:
                refused.append(f"{first.path} ({_DIFFER.format(other.path)})")
                continue
            candidate = first.candidate(first.codec)
            candidates |= {id(leaf.tensor): candidate for leaf in (first, *others)}
    return Found(found, views, candidates, list(pairs_of(found, candidates, epsilons_of(checkpoint))), refused)


_DIFFER = (
    "it is also there as {}, and only one of them is a parameter or requires grad; put .detach() of that one there"
)


def _is_what(tensor: Tensor) -> tuple[bool, bool]:
    return type(tensor) is nn.Parameter, tensor.requires_grad


def _replacements(found: Found) -> dict[int, Any]:
    """Return what to put in the place of each tensor that changes, by the tensor's id."""
    payloads = {key: each.payload for key, each in found.candidates.items() if each.payload is not None}
    replacements: dict[int, Any] = {}
    for groups in found.views:
        any_encoded = any(id(group[0].tensor) in payloads for group in groups)
        for group in groups:
            first = group[0].tensor
            payload = payloads.get(id(first))
            if payload is not None:
                payload = payload.standing_for(first)
                replacements |= {id(leaf.tensor): payload for leaf in group}
            elif any_encoded:
                # A small neighbour in the same storage (a fused LSTM's bias): saved as a view, it would take all of the
                # storage along.
                own = first.detach().clone()
                replacements |= {id(leaf.tensor): _like(leaf.tensor, own) for leaf in group}
    return replacements


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    """Return a view of a copy of the tensor's elements that is in everything else what the tensor is."""
    is_parameter, requires_grad = _is_what(tensor)
    if not (is_parameter or requires_grad or tensor.__dict__):
        return own
    result = nn.Parameter(own, requires_grad) if is_parameter else own.detach().requires_grad_(requires_grad)
    result.__dict__.update(tensor.__dict__)
    return result


def warn_of_refused(refused: list[str]) -> None:
    """Name tensors that no codec can hold, in one warning; none if there are none."""
    if refused:
        warnings.warn(
            f"stored as they are, not quantized: {'; '.join(refused)}. The checkpoint is complete but larger;"
            " values that are not finite usually mean that training has diverged",
            stacklevel=3,
        )


def warn_of_passed_over(paths: list[str]) -> None:
    """Say that a policy was asked for and nothing is encoded, although there is something to encode."""
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warnings.warn(
            f"nothing of the checkpoint is quantized: no rule of the policy names {', '.join(paths[:3])}{more}. The"
            ' checkpoint is complete but as large as without a policy; put the weights under "state_dict" and what'
            ' optimizers remember under "optimizer_states", as Lightning does, or pass a CheckpointPolicy with rules'
            " for these paths",
            stacklevel=3,
        )


def _count_bytes(found: list[Leaf], replacements: Mapping[int, Any]) -> tuple[int, int]:
    """Return what all tensors take, and what is stored of them: whole storages, as ``torch.save`` writes them."""
    original: dict[Any, int] = {}
    stored: dict[Any, int] = {_identity(value): value.nbytes for value in replacements.values()}
    for leaf in found:
        if leaf.storage is not None:
            if leaf.storage not in original:
                original[leaf.storage] = leaf.tensor.untyped_storage().nbytes()
            if id(leaf.tensor) not in replacements:
                stored[leaf.storage] = original[leaf.storage]
    return sum(original.values()), sum(stored.values())


def _identity(value: Tensor | QuantizedTensor) -> tuple[str, int]:
    return ("memory", value.untyped_storage()._cdata) if isinstance(value, Tensor) else ("payload", id(value))


def _by_storage(found: list[Leaf]) -> list[list[Leaf]]:
    """Return the leaves of each storage in which one is to be encoded."""
    storages: dict[Any, list[Leaf]] = {}
    for leaf in found:
        if leaf.codec is not None:
            storages.setdefault(leaf.storage, []).append(leaf)
    for leaf in found:
        if leaf.codec is None and leaf.storage in storages and leaf.tensor.numel():
            storages[leaf.storage].append(leaf)
    return list(storages.values())


def _views(leaves: list[Leaf]) -> list[list[Leaf]]:
    """Return the leaves of a storage in groups that show the same of it: tied tensors."""
    if len(leaves) == 1:
        return [leaves]
    views: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in leaves:
        views.setdefault(_view(leaf.tensor), []).append(leaf)
    return list(views.values())


def _separate(views: list[list[Leaf]]) -> list[list[Leaf]]:
    """Return the views of one storage if none overlaps another, else nothing."""
    if len(views) > 1:
        spans = sorted(_span(group[0].tensor) for group in views)
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            return []
    return views


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _replace(checkpoint: Mapping[str, Any], replacements: Mapping[int, Any]) -> dict[str, Any]:
    """Return a copy of the checkpoint with tensors replaced, sharing the containers in which nothing changes."""

    def change(leaf: Any) -> Any:
        return replacements.get(id(leaf), leaf)

    if type(checkpoint) is not dict:
        checkpoint = dict(checkpoint)
    encoded: dict[str, Any] = rebuild(checkpoint, change, anew=True)
    return encoded
