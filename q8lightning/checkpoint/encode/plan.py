"""Plan a save: which tensor gets which codec, in which launches, and what is stored as it is.

A plan is made from the first checkpoint and run by every save, first or later (``run.py``). It keeps no tensor alive:
it knows tensors by their numbers in the checkpoint's outline, and holds while the outline stays the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.find import ModelNames
from q8lightning.checkpoint.encode.guard import Watched
from q8lightning.checkpoint.encode.outline import Outline
from q8lightning.checkpoint.encode.refuse import is_held_if_finite
from q8lightning.checkpoint.payload import in_memory_order
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.sections import epsilons_of
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.many.buffer import kept_index
from q8lightning.quantization.many.encode import EncodedBuffer, EncodePlan
from q8lightning.quantization.many.update_directions import Alike, Moments, StoredMoment, update_direction_sums


class Member(NamedTuple):
    """A tensor that is to be encoded. Tied tensors are one member.

    Attributes:
        number: Of the tensor in the outline; of tied ones, the first one's.
        path: Its path in the checkpoint.
        name: What messages call it; see :func:`~q8lightning.checkpoint.sections.name_of`.
        kind: See :class:`~q8lightning.checkpoint.report.TensorLoss`.
        parameter: The name of the parameter that it is or belongs to; its path where that is not known.
        codec: What its rule asks for.
        nbytes: What it takes.
    """

    number: int
    path: str
    name: str
    kind: str
    parameter: str
    codec: Codec
    nbytes: int


class Side(NamedTuple):
    """One of two moments.

    Attributes:
        number: Of the tensor in the outline.
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
        is_stepped_by: Whether the optimizer steps by these two; otherwise they are judged but not reported.
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
    """What was measured of the members and pairs of a device, on the host, float64.

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
        device: Where.
        members: The members' numbers.
        numbers: The numbers of their tensors in the outline.
        packing: How they are laid out and launched.
        pairs: The numbers of the pairs.
        launches: Pairs that one launch measures together, with the numbers of the first and of the second moments.
        loose: Pairs, by their place among those of the device, that no launch takes, with what each side is.
        watched: What the guard looks at.
    """

    device: torch.device
    members: tuple[int, ...]
    numbers: tuple[int, ...]
    packing: EncodePlan
    pairs: tuple[int, ...]
    launches: tuple[tuple[Alike, tuple[int, ...], tuple[int, ...]], ...]
    loose: tuple[tuple[int, PairPlan], ...]
    watched: Watched

    def encode(self, tensors: Sequence[Tensor]) -> tuple[EncodedBuffer, Tensor]:
        """Encode and measure; return what was encoded, and all that was measured in one tensor on the device.

        A GPU is not waited for.

        Args:
            tensors: Those of the checkpoint, or copies of them.
        """
        members = [in_memory_order(tensors[i]) for i in self.numbers]
        packed = self.packing.encode(members, measure=True)
        assert packed.statistics is not None
        if self.device.type == "cpu":
            self.watched.look_closer(members, self.packing.codecs, packed)
        sums = packed.statistics.new_empty(len(self.pairs), 2)
        for alike, firsts, seconds in self.launches:
            alike.measure([tensors[i] for i in firsts], [tensors[i] for i in seconds], packed.buffer, sums)
        if self.loose:
            data, places = packed.data, {member: place for place, member in enumerate(self.members)}
            stored = partial(self._stored, tensors=tensors, data=data, places=places)
            moments = [Moments(stored(pair.exp_avg), stored(pair.exp_avg_sq), pair.eps) for _, pair in self.loose]
            sums[kept_index(tuple(place for place, _ in self.loose), sums.device)] = update_direction_sums(moments)
        return packed, torch.cat([packed.failed.double(), packed.statistics.view(-1), sums.view(-1)])

    def _stored(
        self, side: Side, tensors: Sequence[Tensor], data: Sequence[Tensor], places: Mapping[int, int]
    ) -> StoredMoment:
        values = in_memory_order(tensors[side.number])
        if side.member is None:
            return StoredMoment(values)
        place = places[side.member]
        return StoredMoment(values, self.packing.codecs[place], data[place])

    def measured(self, numbers: Tensor) -> Measured:
        """Take apart what :meth:`encode` measured, once it is on the host."""
        count = len(self.members)
        failed, statistics, sums = torch.split(numbers, [count, 5 * count, 2 * len(self.pairs)])
        return Measured(failed, statistics.view(-1, 5), sums.view(-1, 2))


class RawPlan(NamedTuple):
    """Tensors of one device and dtype that are stored as they are, each in memory of its own.

    Attributes:
        device: Where they are.
        numbers: Which of the outline's tensors.
        scalars: Whether they have no dimensions; otherwise all of them have some.
    """

    device: torch.device
    numbers: tuple[int, ...]
    scalars: bool

    def freeze(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a copy of all, one after the other."""
        own = [tensors[i].detach() if tensors[i].requires_grad else tensors[i] for i in self.numbers]
        return torch.stack(own) if self.scalars else torch.cat([x if x.ndim == 1 else x.reshape(-1) for x in own])


class Storage(NamedTuple):
    """A memory that tensors of the checkpoint lie in.

    Attributes:
        nbytes: Its size.
        numbers: The numbers of those tensors.
    """

    nbytes: int
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How to save a checkpoint that looks like one outline.

    Attributes:
        outline: Of the checkpoint.
        policy: By which it is encoded.
        names: What is known of the model.
        epsilons: Of its optimizers.
        members: What is encoded.
        places: The members' numbers, by the numbers of all tensors that a member stands for.
        pairs: Moments that are measured together.
        devices: What is encoded on each device.
        raws: What is stored as it is and copied in one piece.
        neighbours: Tensors that are stored as they are, apart from the memory that they share with members; those that
            show the same of it together.
        codes: For each parameter that is trained quantized and whose codes do not follow from what is stored: its name,
            the number of its tensor and how it is quantized.
        storages: The memories that the checkpoint's tensors lie in.
        holds_payloads: Whether some of it was loaded encoded and stays so.
        refused: Tensors that the policy wants encoded and that cannot be, with the reason.
        passed_over: If nothing is encoded, the tensors that no rule of the policy names and that are large enough.
        looked_at: Numbers of tensors of which a save is to keep a copy, because the guard may look at them again.
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
    storages: tuple[Storage, ...]
    holds_payloads: bool
    refused: tuple[str, ...]
    passed_over: tuple[str, ...]
    looked_at: frozenset[int] = field(default=frozenset())

    def fits(
        self, checkpoint: Mapping[str, Any], outline: Outline, policy: CheckpointPolicy, names: ModelNames
    ) -> bool:
        """Whether this is how to save a checkpoint, too."""
        return (
            policy is self.policy
            and self.names.is_same_model(names)
            and self.outline.is_that_of(outline)
            and epsilons_of(checkpoint) == self.epsilons
        )

    def looking_at(self, numbers: frozenset[int]) -> "Plan":
        """Return the plan for the next save after the guard has looked at some tensors."""
        wanted = self.always | numbers
        return self if wanted == self.looked_at else replace(self, looked_at=wanted)

    @cached_property
    def always(self) -> frozenset[int]:
        """Numbers of tensors that are looked at each time, since finite scales do not say that a codec holds them."""
        properties = self.outline.properties
        return frozenset(x.number for x in self.members if not is_held_if_finite(properties[x.number][1], x.codec))
