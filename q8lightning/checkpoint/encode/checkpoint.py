"""Encode a checkpoint in memory, as a copy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from q8lightning.checkpoint.encode.outline import outline_to_plan
from q8lightning.checkpoint.encode.plan import Plan
from q8lightning.checkpoint.encode.planner import plan_save
from q8lightning.checkpoint.encode.run import Run
from q8lightning.checkpoint.encode.select.model_names import ModelNames, names_in
from q8lightning.checkpoint.encode.warn import warn_of
from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.layout.sections import (
    CODES_KEY,
    INPUTS_KEY,
    PARAMETERS_KEY,
    STATE_DICT,
    SUMMARY_KEY,
    state_dicts_in,
)
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.qat_codes import describe_codes
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.tree import rebuild


class Encoded(NamedTuple):
    """An encoded checkpoint, and what it lost."""

    checkpoint: dict[str, Any]
    report: SaveReport


def encode_checkpoint(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames | None = None
) -> dict[str, Any]:
    """Return a copy of ``checkpoint`` in which the tensors that the policy selects are payloads.

    Containers are copied only where something in them changes. Keys, their order, ``_metadata`` and everything that is
    not selected stay the same objects. A tensor that occurs twice becomes one payload that occurs twice.

    Some tensors are left as they are. Tensors that overlap in memory without being equal, and tied ones whose rules
    name different codecs, must stay tied. Tensors that the codec cannot hold are named in a warning. Another warning
    names those that would lose more than the policy allows and are stored better (``guard.py``).
    """
    encoded, report = encode_and_report(checkpoint, policy, names)
    warn_of(report)
    return encoded


def encode_and_report(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames | None = None
) -> Encoded:
    """Encode as :func:`encode_checkpoint` does, and leave the warnings to the caller."""
    if type(checkpoint) is not dict:
        checkpoint = dict(checkpoint)
    known = names or names_in(checkpoint)
    part, outline, tensors = outline_to_plan(checkpoint)
    run = Run(plan_save(part, outline, tensors, policy, known), tensors, live=False)
    run.settle()
    replacements = replacements_for(run.plan, tensors, run.payloads, run.own)
    encoded: dict[str, Any] = rebuild(checkpoint, lambda leaf: replacements.get(id(leaf), leaf), anew=True)
    summarize(encoded, run.plan, run.report, known, run.codes)
    return Encoded(encoded, run.report)


def replacements_for(
    plan: Plan,
    tensors: list[Tensor],
    payloads: list[QuantizedTensor | None],
    own: Mapping[int, Tensor],
) -> dict[int, Any]:
    """Return what replaces each tensor that changes, by the tensor's id.

    Args:
        plan: The plan that was run.
        tensors: The checkpoint's, as the plan's outline numbers them.
        payloads: The payload of each member; None for a member that is stored as it is.
        own: Copies of tensors that are stored in memory of their own, by number.
    """
    replacements: dict[int, Any] = {}
    for number, member in plan.places.items():
        if payloads[member] is not None:
            replacements[id(tensors[number])] = payloads[member]
    for number, copy in own.items():
        replacements[id(tensors[number])] = _like(tensors[number], copy, plan.outline.properties[number][2])
    return replacements


def _like(tensor: Tensor, own: Tensor, requires_grad: bool) -> Tensor:
    """Return a copy's elements as a tensor of the original's class, ``requires_grad`` and attributes."""
    is_parameter = type(tensor) is nn.Parameter
    if not (is_parameter or requires_grad or tensor.__dict__):
        return own
    result = nn.Parameter(own, requires_grad) if is_parameter else own.detach().requires_grad_(requires_grad)
    result.__dict__.update(tensor.__dict__)
    return result


def summarize(
    content: dict[str, Any],
    plan: Plan,
    report: SaveReport,
    names: ModelNames,
    codes: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Put the summary into an encoded checkpoint: how it was written, what it lost, how weights are quantized.

    A checkpoint that was loaded encoded and stays so keeps its summary.

    Args:
        content: The encoded checkpoint; gets the summary.
        plan: The plan that was run.
        report: What was lost; its bytes are updated by those of the codes.
        names: What is known of the model.
        codes: Packed codes and scales of weights that are trained quantized, by name.
    """
    before = content.get(SUMMARY_KEY)
    described: dict[str, dict[str, Any]] = {}
    if names.quantized and (stored := state_dicts_in(content).get(STATE_DICT)) is not None:
        described = describe_codes(stored, names.quantized, codes)
    report.stored_bytes += sum(each.nbytes for name in codes.keys() & described.keys() for each in codes[name])
    if () in names.places:
        return  # a bare state, whose load_state_dict refuses keys that it does not know
    if report.tensors or not isinstance(before, Mapping) or not plan.holds_payloads:
        parameters = names.optimizer_parameters
        restored = names.restored or (before.get("restored", 0) if isinstance(before, Mapping) else 0)
        content[SUMMARY_KEY] = {
            "format_version": FORMAT_VERSION,
            "policy": plan.policy.as_primitives(),
            "restored": restored,
            **({PARAMETERS_KEY: list(map(list, parameters))} if any(parameters) else {}),
            **report.summary(),
        }
    if described:
        content[SUMMARY_KEY] = {**content[SUMMARY_KEY], CODES_KEY: described}
        if names.inputs:
            content[SUMMARY_KEY][INPUTS_KEY] = {name: dict(each) for name, each in names.inputs.items()}
