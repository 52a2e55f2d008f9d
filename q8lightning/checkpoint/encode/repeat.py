"""A save of the same tensors as the one before, in the same places: what was found out then need not be again.

To find what there is to encode, to lay out what it becomes, and to look at what each tensor lost takes Python longer
than a GPU takes to encode a billion numbers. A :class:`Routine` is what such a save has found out. It does the least
that has to be done while training waits, and most of that while the GPU encodes; payloads, the summary and the content
of the file are made on the thread that writes. The file is the same, byte for byte.

Whatever is not as it was, or must be looked at more closely, is left to the usual way.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn

from q8lightning.checkpoint.encode.guard import Watched
from q8lightning.checkpoint.encode.leaves import ModelNames, epsilons_of, names_from
from q8lightning.checkpoint.encode.outline import Outline, outline_of
from q8lightning.checkpoint.encode.state_dict import SUMMARY_KEY, summary_of
from q8lightning.checkpoint.load_locations import located
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import DirectionLoss, SaveReport, TensorLoss
from q8lightning.checkpoint.staging.snapshot import Copier
from q8lightning.checkpoint.staging.transfer import PinnedMemory
from q8lightning.checkpoint.tree import rebuild
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import EncodedBuffer, EncodePlan
from q8lightning.quantization.many.update_directions import Alike
from q8lightning.system.ambient import neutral


class EncodedPart(NamedTuple):
    """What is encoded, on one device.

    Attributes:
        members: Which of the checkpoint's tensors.
        packing: How.
        alike: Pairs of moments that are measured together, and the numbers of the first and of the second ones.
        watched: What the guard would look at.
        losses: What is reported of each member, but for what it loses.
        directions: What is reported of each pair of moments, likewise; None for one that is only judged.
    """

    members: tuple[int, ...]
    packing: EncodePlan
    alike: list[tuple[Alike, tuple[int, ...], tuple[int, ...]]]
    watched: Watched
    losses: list[TensorLoss]
    directions: list[DirectionLoss | None]

    def start(self, tensors: Sequence[Tensor]) -> tuple[EncodedBuffer, Tensor]:
        """Encode and measure; return what was encoded, and all that was measured in one tensor on the device."""
        packed = self.packing.encode([tensors[i] for i in self.members], measure=True)
        assert packed.statistics is not None
        sums = packed.statistics.new_empty(len(self.directions), 2)
        for alike, firsts, seconds in self.alike:
            alike.measure([tensors[i] for i in firsts], [tensors[i] for i in seconds], packed.buffer, sums)
        return packed, torch.cat([packed.failed.double(), packed.statistics.view(-1), sums.view(-1)])

    def measured(self, numbers: Tensor) -> "_Measured":
        """Return what was measured by itself again."""
        count = len(self.members)
        failed, statistics, sums = torch.split(numbers, [count, 5 * count, 2 * len(self.directions)])
        return _Measured(failed, statistics.view(-1, 5), sums.view(-1, 2))

    def report(self, measured: "_Measured", original_bytes: int, stored_bytes: int) -> SaveReport:
        """Return what the usual way would report."""
        losses = zip(self.losses, measured.statistics.tolist(), strict=True)
        sums = zip(self.directions, measured.directions.tolist(), strict=True)
        return SaveReport(
            tensors=[TensorLoss(*loss[:5], *statistics) for loss, statistics in losses],
            directions=[DirectionLoss(*each[:2], *pair) for each, pair in sums if each and not math.isnan(pair[0])],
            original_bytes=original_bytes,
            stored_bytes=stored_bytes,
        )


class _Measured(NamedTuple):
    """What was measured, on the host: ``[members]``, ``[members, 5]`` and ``[pairs, 2]`` float64."""

    failed: Tensor
    statistics: Tensor
    directions: Tensor


class RawPart(NamedTuple):
    """Tensors of one device and dtype that are stored as they are, each in memory of its own.

    Attributes:
        members: Which of the checkpoint's tensors.
        scalars: Whether they have no dimensions; otherwise all of them have some.
    """

    members: tuple[int, ...]
    scalars: bool

    def freeze(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a copy of all, one after the other."""
        own = [tensors[i].detach() if tensors[i].requires_grad else tensors[i] for i in self.members]
        return torch.stack(own) if self.scalars else torch.cat([x if x.ndim == 1 else x.reshape(-1) for x in own])


class Routine:
    """What a save has found out, for those that follow; it keeps no tensor of the checkpoint alive.

    Args:
        outline: Of the checkpoint.
        names: What is known of the model.
        epsilons: Of its optimizers.
        encoding: What is encoded.
        raws: What is stored as it is and copied in one piece.
        payloads: For each encoded tensor the codec of its payload and its number among the members of the encoding;
            tied tensors have the same.
        report: What the save before reported.
        policy: By which it was encoded.
    """

    def __init__(
        self,
        outline: Outline,
        names: ModelNames,
        epsilons: Mapping[tuple[Any, ...], float],
        encoding: EncodedPart,
        raws: list[RawPart],
        payloads: dict[int, tuple[Codec, int]],
        report: SaveReport,
        policy: CheckpointPolicy,
    ) -> None:
        self.outline = outline
        self.names = names
        self.epsilons = epsilons
        self.encoding = encoding
        self.raws = raws
        self.payloads = payloads
        self.bytes = report.original_bytes, report.stored_bytes
        self.policy = policy
        self._known = [*payloads, *(i for raw in raws for i in raw.members)]

    @neutral()
    def save(
        self, checkpoint: Mapping[str, Any], names: ModelNames | None, stand_ins: bool = False
    ) -> "Repeated | None":
        """Encode and freeze a checkpoint like the one before; None if it is not, or needs a closer look.

        Waits for the device once. For ``stand_ins``, see :class:`~q8lightning.checkpoint.staging.snapshot.Copier`.
        """
        described = outline_of(checkpoint)
        if described is None or not self.outline.is_that_of(described[0]):
            return None
        if (names or names_from(checkpoint)) != self.names or epsilons_of(checkpoint) != self.epsilons:
            return None
        tensors = described[1]
        packed, numbers = self.encoding.start(tensors)
        # What follows takes the host about as long as the device encodes.
        copier = Copier(live=True, known=[tensors[i] for i in self._known], stand_ins=stand_ins)
        copier.transfer_of(packed.buffer.untyped_storage()).add(packed.buffer.untyped_storage(), private=True)
        frozen = [raw.freeze(tensors) for raw in self.raws]
        for raw, copy in zip(self.raws, frozen, strict=True):
            if copy.device.type != "cpu":
                parts = [(_key(i), tensors[i].nbytes) for i in raw.members]
                copier.transfer_of(copy.untyped_storage()).add_frozen(copy, parts)
        content = copier.copy(checkpoint)
        copier.start()
        measured = self.encoding.measured(numbers.cpu())
        if measured.failed.any() or not self.encoding.watched.nothing_to_do(measured.statistics, measured.directions):
            return None
        return Repeated(self, copier, content, tensors, packed, frozen, measured)


class Repeated:
    """A save of a :class:`Routine`: what it lost, and its content once it is fetched.

    Args:
        routine: Which has made it.
        copier: Copies what the routine does not know, and brings everything to the host.
        content: A copy of the checkpoint in which the tensors that the routine knows are still those of the training.
        tensors: Those of the checkpoint, kept until they are replaced so that their ids are theirs alone.
        packed: Those that are encoded.
        frozen: Copies of the others that the routine knows.
        measured: What is lost.
    """

    def __init__(
        self,
        routine: Routine,
        copier: Copier,
        content: Any,
        tensors: list[Tensor],
        packed: EncodedBuffer,
        frozen: list[Tensor],
        measured: _Measured,
    ) -> None:
        self._routine = routine
        self._copier = copier
        self._content = content
        self._tensors = tensors
        self._packed: EncodedBuffer | None = packed
        self._frozen = frozen
        self.report: Callable[[], SaveReport] = cache(lambda: routine.encoding.report(measured, *routine.bytes))
        """Returns what was lost; made when it is first asked for."""

    @contextmanager
    def fetch(self, memory: PinnedMemory | None = None) -> Iterator[Any]:
        """As :meth:`q8lightning.checkpoint.staging.snapshot.Snapshot.fetch`."""
        with located(self._fill(memory)):
            yield self._content

    def _fill(self, memory: PinnedMemory | None) -> dict[int, str]:
        """Put on the host what is not there, and into the content what belongs there; return the locations."""
        packed, self._packed = self._packed, None
        assert packed is not None
        key, cuts = packed.buffer.untyped_storage()._cdata, packed.cuts
        del packed  # the device's memory goes as soon as the copy is complete
        copies = self._copier.fetch(memory)
        data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(copies.storages[key]).split_with_sizes(cuts)[1::2]
        replacements: dict[int, Any] = {}
        payloads: dict[int, QuantizedTensor] = {}
        routine = self._routine
        outline = routine.outline  # what the tensors were: training may have changed even their shapes
        for i, (codec, member) in routine.payloads.items():
            if member not in payloads:
                name = routine.encoding.losses[member].path  # the same string as in the summary
                shape, dtype, requires_grad = outline.properties[i]
                payloads[member] = QuantizedTensor(
                    *(codec, data[member], tuple(shape), outline.strides[i], dtype, name),
                    requires_grad=requires_grad,
                    is_parameter=type(self._tensors[i]) is nn.Parameter,
                )
            replacements[id(self._tensors[i])] = payloads[member]
        for raw, frozen in zip(routine.raws, self._frozen, strict=True):
            own = torch.split(frozen.view(-1), [outline.properties[i][0].numel() for i in raw.members])
            for i, part in zip(raw.members, own, strict=True):
                tensor = _restored(outline, i, copies.storages.get(_key(i)), part)
                if type(self._tensors[i]) is nn.Parameter:
                    tensor = nn.Parameter(tensor, tensor.requires_grad)
                replacements[id(self._tensors[i])] = tensor
        rebuild(self._content, lambda leaf: replacements.get(id(leaf), leaf), in_place=True)
        self._tensors.clear()
        self._frozen.clear()
        self._content[SUMMARY_KEY] = summary_of(self.report(), routine.policy, routine.names.restored)
        return copies.tags


def _key(number: int) -> int:
    """Return what a tensor's bytes are called among the copies: no address, as the keys of storages are."""
    return -1 - number


def _restored(outline: Outline, number: int, storage: UntypedStorage | None, part: Tensor) -> Tensor:
    """Return a tensor as it was, with the bytes of a storage or, if there is none, with a copy of ``part``."""
    shape, dtype, requires_grad = outline.properties[number]
    if storage is None:
        result = part.clone().as_strided(shape, outline.strides[number])
    else:
        result = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, outline.strides[number])
    return result.requires_grad_(requires_grad)
