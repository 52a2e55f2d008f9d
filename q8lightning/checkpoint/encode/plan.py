"""Plan a save: which tensor gets which codec, in which launches, and what is stored as it is.

A plan is made from the first checkpoint (``planner.py``) and run by every save (``run.py``). It knows tensors by their
numbers in the checkpoint's outline, and keeps none of them alive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.judge.limits import Limits
from q8lightning.checkpoint.encode.judge.refuse import is_held_if_finite
from q8lightning.checkpoint.encode.outline import Outline
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.layout.sections import epsilons_of
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import Kept
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.many.encode import EncodePlan
from q8lightning.quantization.many.update_directions import MomentLaunch


class Member(NamedTuple):
    """A tensor that is encoded. Tied tensors are one member.

    Attributes:
        number: Its number in the outline; that of the first of tied ones.
        path: Its path in the checkpoint.
        name: What messages call it; see :func:`~q8lightning.checkpoint.layout.sections.name_of`.
        kind: See :class:`~q8lightning.checkpoint.report.TensorLoss`.
        parameter: The name of the parameter that it is or belongs to; its path where that is not known.
        codec: What its rule names.
        nbytes: Its size before it is encoded.
    """

    number: int
    path: str
    name: str
    kind: str
    parameter: str
    codec: Codec
    nbytes: int


class Side(NamedTuple):
    """One of the two moments of a pair.

    Attributes:
        number: The tensor's number in the outline.
        member: Its number among the members; None if it is stored as it is.
    """

    number: int
    member: int | None


class PairPlan(NamedTuple):
    """The moments of one parameter, of which at least one is a member.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        eps: The optimizer's.
        is_stepped_by: Whether the optimizer steps by these two. Other pairs are judged, but not reported.
        path: The path of the first moment.
        parameter: The parameter's name; the path where that is not known.
    """

    exp_avg: Side
    exp_avg_sq: Side
    eps: float
    is_stepped_by: bool
    path: str
    parameter: str


class Measured(NamedTuple):
    """Measurements of the members and pairs of a device, float64 on the host.

    Attributes:
        failed: ``[members]``, 1 where the codec cannot hold the tensor.
        statistics: ``[members, 5]``, see :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`.
        directions: ``[pairs, 2]``, see :func:`~q8lightning.quantization.many.update_directions.update_direction_sums`.
    """

    failed: Tensor
    statistics: Tensor
    directions: Tensor


@dataclass(frozen=True)
class DevicePlan:
    """What is encoded on one device, into one buffer.

    Attributes:
        device: The device.
        members: The numbers of the members on it.
        numbers: The numbers of their tensors in the outline.
        packing: How the members are laid out and launched.
        pairs: The numbers of the pairs on it.
        launches: For each launch that measures pairs: which pairs, the numbers of their first and of their second
            moments.
        loose: Pairs that no launch takes, each with its place among the pairs of the device.
        limits: Which limits of the policy apply to which members.
    """

    device: torch.device
    members: tuple[int, ...]
    numbers: tuple[int, ...]
    packing: EncodePlan
    pairs: tuple[int, ...]
    launches: tuple[tuple[MomentLaunch, tuple[int, ...], tuple[int, ...]], ...]
    loose: tuple[tuple[int, PairPlan], ...]
    limits: Limits

    @property
    def is_host(self) -> bool:
        """Whether this is the CPU, which encodes when a run is settled; other devices encode when it begins."""
        return self.device.type == "cpu"


class RawPlan(NamedTuple):
    """Tensors of one device and dtype that are stored as they are. Each fills a memory of its own.

    Attributes:
        device: The device.
        numbers: The tensors' numbers in the outline.
        scalars: Whether they have no dimensions. Otherwise each of them has some.
    """

    device: torch.device
    numbers: tuple[int, ...]
    scalars: bool

    def freeze(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a copy of all their elements, one tensor after the other."""
        own = [tensors[i].detach() if tensors[i].requires_grad else tensors[i] for i in self.numbers]
        return torch.stack(own) if self.scalars else torch.cat([x if x.ndim == 1 else x.reshape(-1) for x in own])


class CodesTogether(NamedTuple):
    """Weights that are trained quantized and whose codes one launch encodes.

    Attributes:
        codes: Their places among :attr:`Plan.codes`.
        encoding: How their codes are laid out and launched.
    """

    codes: tuple[int, ...]
    encoding: EncodePlan


class Storage(NamedTuple):
    """A memory that one or more tensors of the checkpoint view.

    Attributes:
        nbytes: Its size.
        numbers: The numbers of these tensors.
    """

    nbytes: int
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How to save the checkpoints of one outline.

    Attributes:
        outline: The outline.
        policy: The policy that the plan follows.
        names: What is known of the model.
        epsilons: The eps of each parameter's optimizer, by the keys that lead to the parameter's state.
        members: The tensors that are encoded.
        places: For each tensor that is encoded, by its number, the number of its member.
        pairs: Moments that are measured together.
        devices: What is encoded on each device.
        raws: Tensors that are stored as they are and copied together.
        neighbours: Tensors that share a memory with members and are stored as they are, in memory of their own. Tied
            ones stand together.
        codes: For each weight that is trained quantized and whose codes do not follow from what is stored: its name,
            its tensor's number and its codec.
        codes_together: Which of these codes the kernels encode together.
        storages: The memories of the checkpoint's tensors.
        parameters: Elements of the model's parameters, of tied ones once; of all floats in the state dict if names are
            not known.
        holds_payloads: Whether some of the checkpoint was loaded encoded and stays so.
        refused: Tensors that the policy selects and that cannot be encoded, with the reason.
        passed_over: If nothing is encoded, the tensors that are large enough but that no rule names.
        unmatched: If nothing is encoded of a checkpoint in Lightning's layout, the patterns that match nothing of it.
        kept: States of optimizers that are kept as they are, and of which the user should hear.
        reviewed: Numbers of tensors that a save copies at once, because the save before it reviewed them.
    """

    outline: Outline
    policy: CheckpointPolicy
    names: ModelNames
    epsilons: Mapping[tuple[Any, ...], float]
    members: tuple[Member, ...]
    places: Mapping[int, int]
    pairs: tuple[PairPlan, ...]
    devices: tuple[DevicePlan, ...]
    raws: tuple[RawPlan, ...]
    neighbours: tuple[tuple[int, ...], ...]
    codes: tuple[tuple[str, int, WeightCodec], ...]
    codes_together: tuple[CodesTogether, ...]
    storages: tuple[Storage, ...]
    parameters: int
    holds_payloads: bool
    refused: tuple[str, ...]
    passed_over: tuple[str, ...]
    unmatched: tuple[str, ...]
    kept: tuple[Kept, ...]
    reviewed: frozenset[int] = frozenset()

    def fits(
        self, checkpoint: Mapping[str, Any], outline: Outline, policy: CheckpointPolicy, names: ModelNames
    ) -> bool:
        """Whether this is the plan for a checkpoint.

        Args:
            checkpoint: The checkpoint.
            outline: Its outline.
            policy: Must be the very policy that the plan follows.
            names: What is known of its model.
        """
        return (
            policy is self.policy
            and self.names.is_same_model(names)
            and self.outline.is_that_of(outline)
            and epsilons_of(checkpoint, names.places) == self.epsilons
        )

    def reviewing(self, numbers: frozenset[int]) -> "Plan":
        """Return the plan for the next save, after a save that reviewed some tensors."""
        wanted = self.always_reviewed | numbers
        return self if wanted == self.reviewed else replace(self, reviewed=wanted)

    @cached_property
    def always_reviewed(self) -> frozenset[int]:
        """Numbers of tensors that every save reviews, since finite scales do not show that a codec holds them."""
        properties = self.outline.properties
        return frozenset(x.number for x in self.members if not is_held_if_finite(properties[x.number][1], x.codec))

    @cached_property
    def encoded_on_cpu(self) -> frozenset[int]:
        """Numbers of tensors that the CPU reads to encode: members, and moments that they are measured with."""
        here = [device for device in self.devices if device.is_host]
        pairs = [self.pairs[i] for device in here for i in device.pairs]
        members = {i for device in here for i in device.numbers}
        return frozenset(members | {side.number for pair in pairs for side in pair[:2]})
