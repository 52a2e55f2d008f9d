"""Run a plan: encode while training waits, judge and guard later, and hand over what is stored.

A GPU encodes at once, and nobody waits for it: what was lost is looked at by whoever calls :meth:`Run.settle`, usually
the thread that writes. For the few tensors that the guard may look at again, copies are kept. A tensor that nobody
expected to be looked at is copied when that is found out, which must be before training changes it: see
:meth:`Run.let_go`.

A CPU that encodes would hold training for as long as that takes. Where training goes on, its tensors are copied at
once, to memory that is kept from save to save, and encoded when the run is settled.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q8lightning.checkpoint.encode.look import Look
from q8lightning.checkpoint.encode.plan import DevicePlan, Measured, PairPlan, Plan
from q8lightning.checkpoint.payload import QuantizedTensor, in_memory_order
from q8lightning.checkpoint.report import DirectionLoss, SaveReport, TensorLoss
from q8lightning.checkpoint.staging.transfer import HostMemory, take
from q8lightning.quantization.many.buffer import copy_together, split
from q8lightning.quantization.many.encode import EncodedBuffer
from q8lightning.quantization.spec.packed_bits import pack_bits
from q8lightning.system.ambient import neutral

_VERSION = attrgetter("_version")


class Buffer(NamedTuple):
    """Where the data of several members lies.

    Attributes:
        memory: uint8, on the device that encoded.
        cuts: The sizes of its stretches in bytes, of gaps and data in turns.
        members: The members' numbers.
    """

    memory: Tensor
    cuts: list[int]
    members: tuple[int, ...]


class _Part:
    """What runs on one device.

    Attributes:
        plan: Of the device.
        encoded: What was encoded, and all that was measured; None before.
        measured: What was measured, on the host; None before.
        look: Which tensors need a closer look; None before it was measured.
        stream: Where a thread other than the training's works; None on a CPU.
        started: When what training launched is complete.
    """

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan
        self.encoded: tuple[EncodedBuffer, Tensor] | None = None
        self.measured: Measured | None = None
        self.look: Look | None = None
        self.stream: Any = None
        self.started: Any = None

    def mark(self) -> None:
        """Remember the moment up to which the training's stream must have worked."""
        if self.plan.device.type == "cuda":
            self.started = torch.cuda.current_stream(self.plan.device).record_event()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on a stream of its own, after what was started; wait for it in the end. Nothing on a CPU."""
        if self.started is None:
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.plan.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.started)
            yield
            self.stream.synchronize()


class Run:
    """A save on its way. What training may change is encoded or copied when this returns.

    Args:
        plan: How the checkpoint is saved.
        tensors: The checkpoint's, as the plan's outline numbers them.
        live: Training goes on before :meth:`settle`.
        memory: Where a CPU's tensors are copied if it does.

    Attributes:
        payloads: For each member what is stored in its place, None if it is stored as it is; once settled.
        buffers: Where the data of the payloads lies; once settled.
        own: Tensors that are stored as they are in memory of their own, by number; once settled.
        codes: For each weight that is trained quantized and whose codes are stored, packed codes and scales; once
            settled.
        report: What was lost; once settled.
        next_plan: The plan for the next save of the same tensors; once settled.
    """

    @neutral()
    @torch.inference_mode(False)
    def __init__(self, plan: Plan, tensors: Sequence[Tensor], live: bool, memory: HostMemory | None = None) -> None:
        self.plan = plan
        self.next_plan = plan
        self.payloads: list[QuantizedTensor | None] = [None] * len(plan.members)
        self.buffers: list[Buffer] = []
        self.own: dict[int, Tensor] = {}
        self.codes: dict[str, tuple[Tensor, Tensor]] = {}
        self.report = SaveReport(refused=list(plan.refused), passed_over=list(plan.passed_over))
        self._live = live
        self._tensors = list(tensors)  # kept with the run: what is freed could be followed by another at its address
        self._originals = list(tensors)
        self._copied: set[int] = set()
        self._versions = _versions_of(tensors)
        self._parts = [_Part(each) for each in plan.devices]
        self._codes: dict[str, tuple[Tensor, Tensor]] = {}
        self._settling, self._measuring, self._settled = threading.Lock(), threading.Lock(), False
        self._late: list[Any] = []
        self._error: BaseException | None = None
        self.frozen = [raw.freeze(tensors) if live else None for raw in plan.raws]
        if live:
            self._copy_to_host(memory)
            self._copy_on_devices()
        self._neighbours()
        for part in self._parts:
            if part.plan.device.type != "cpu":
                part.encoded = part.plan.encode(self._tensors)
                self._encode_codes(part.plan.device)
            if live:
                part.mark()

    def _copy_to_host(self, memory: HostMemory | None) -> None:
        """Copy what a CPU encodes later: its members, and moments that they are measured with."""
        wanted = {i for part in self.plan.devices if part.device.type == "cpu" for i in part.numbers}
        wanted |= {
            side.number
            for pair in self.plan.pairs
            for side in pair[:2]
            if self._tensors[side.number].device.type == "cpu"
        }
        numbers = sorted(wanted)
        if not numbers:
            return
        originals = [in_memory_order(self._tensors[i]) for i in numbers]
        sizes = [-(-each.nbytes // 64) * 64 for each in originals]
        space = take(sum(sizes), memory)
        copies = [
            part[: each.nbytes].view(each.dtype)
            for part, each in zip(torch.split(space, sizes), originals, strict=True)
        ]
        torch._foreach_copy_(copies, originals)
        for i, copy in zip(numbers, copies, strict=True):
            self._set_copy(i, copy)

    def _copy_on_devices(self) -> None:
        """Copy what the guard may look at again."""
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in sorted(self.plan.looked_at - self._copied):
            alike.setdefault((self._tensors[i].device, self._tensors[i].dtype), []).append(i)
        for numbers in alike.values():
            originals = [in_memory_order(self._tensors[i]) for i in numbers]
            copies = torch.split(torch.cat(originals), [each.numel() for each in originals])
            for i, copy in zip(numbers, copies, strict=True):
                self._set_copy(i, copy)

    def _set_copy(self, number: int, copy: Tensor) -> None:
        tensor = self._tensors[number]
        self._originals[number] = copy.as_strided(tensor.shape, tensor.stride())
        self._copied.add(number)

    def _neighbours(self) -> None:
        for group in self.plan.neighbours:
            own = self._tensors[group[0]].detach().clone()
            self.own |= dict.fromkeys(group, own)

    def _encode_codes(self, device: torch.device) -> None:
        """Encode the weights of a device that are trained quantized: in launches where kernels take them."""
        for together in self.plan.codes_together:
            entries = [self.plan.codes[i] for i in together.codes]
            tensors = [self._originals[number] for _, number, _ in entries]
            if tensors[0].device == device:
                data = together.encoding.encode(tensors).data
                for (name, _, codec), tensor, stored, each in zip(
                    entries, tensors, together.encoding.codecs, data, strict=True
                ):
                    codes, scales = stored.split(each, tensor.numel())
                    rows = 1 if codec.axis is None else tensor.shape[codec.axis]
                    self._codes[name] = codes.view(rows, -1), scales.view(rows, -1)
        for name, number, codec in self.plan.codes:
            tensor = self._originals[number]
            if tensor.device == device and name not in self._codes:
                self._codes[name] = codec.encode(tensor)

    def is_of(self, plan: Plan, tensors: Sequence[Tensor], live: bool) -> bool:
        """Whether this is what a run of the plan would be now, as far as versions of tensors tell."""
        versions = self._versions
        return self.plan is plan and self._live == live and versions is not None and versions == _versions_of(tensors)

    @neutral()
    @torch.inference_mode(False)
    def let_go(self) -> None:
        """Wait until nothing needs the tensors themselves any more: training may change them after this.

        What this waits for is the device having encoded, a moment after it did what training wanted before the save;
        called as late as possible, it has. Nothing to do where everything was copied.
        """
        if self._live:
            self._measure_devices()
            for event in self._late:
                torch.cuda.current_stream(event.device).wait_event(event)

    def _measure_devices(self) -> None:
        """Find out what devices have measured, and keep what needs a closer look; once, by whoever comes first."""
        with self._measuring:
            for part in self._parts:
                if part.look is None and part.encoded is not None:
                    with part.aside():
                        self._measure(part)

    def _measure(self, part: _Part) -> None:
        assert part.encoded is not None
        part.measured = part.plan.measured(part.encoded[1].cpu())
        part.look = Look(self.plan, part.plan, part.measured)
        self._keep(part.look, part)

    @neutral()
    @torch.inference_mode(False)
    def settle(self) -> SaveReport:
        """Find out what was lost, guard what lost too much, and set what is stored; once.

        Raises:
            RuntimeError: If a tensor that no codec can hold was written to before it could be stored as it is.
        """
        with self._settling:
            if not self._settled:
                self._settled = True
                try:
                    self._settle()
                except BaseException as error:
                    self._error = error
                    raise
            elif self._error is not None:
                raise self._error
        return self.report

    def _settle(self) -> None:
        self._measure_devices()
        directions: dict[int, tuple[float, float]] = {}
        losses: dict[int, tuple[float, ...]] = {}
        looked_at: set[int] = set()
        for part in self._parts:
            with part.aside():
                if part.encoded is None:
                    part.encoded = part.plan.encode(self._originals)
                    self._encode_codes(part.plan.device)
                    self._measure(part)
                assert part.measured is not None
                assert part.look is not None
                losses |= dict(zip(part.plan.members, map(tuple, part.measured.statistics.tolist()), strict=True))
                directions |= dict(zip(part.plan.pairs, map(tuple, part.measured.directions.tolist()), strict=True))
                looked_at |= part.look.numbers
                self._store(part, part.measured, part.look, losses, directions)
                self._pack_codes(part.plan.device)
        self._report(losses, directions)
        self.next_plan = self.plan.looking_at(frozenset(looked_at))
        self._parts.clear()
        self._originals.clear()

    def _keep(self, look: Look, part: _Part) -> None:
        """Copy what will be looked at and nobody has a copy of, before training changes it."""
        missing = sorted(look.numbers - self._copied) if self._live else []
        if not missing:
            return
        for i in missing:
            self._set_copy(i, in_memory_order(self._tensors[i]).clone())
        now = _versions_of(self._tensors)
        if now is not None and self._versions is not None:
            look.gone |= {i for i in missing if now[i] != self._versions[i]}
        if part.stream is not None:
            self._late.append(part.stream.record_event())

    def _store(
        self,
        part: _Part,
        measured: Measured,
        look: Look,
        losses: dict[int, tuple[float, ...]],
        directions: dict[int, tuple[float, float]],
    ) -> None:
        """Set the payloads of a device, after a closer look where one is needed."""
        assert part.encoded is not None
        packed, members = part.encoded[0], part.plan.members
        memory, cuts = packed.buffer, packed.cuts
        payloads = [self._payload(i, data) for i, data in zip(members, packed.data, strict=True)]
        part.encoded = None
        if look.numbers:
            kept = look.closely(self._originals, payloads, measured, losses, directions, self.report)
            if kept != payloads:
                left = [(i, payload) for i, payload in zip(members, kept, strict=True) if payload is not None]
                # What is not stored would be saved along with the memory that it shares with the others.
                memory, cuts = memory[:0], list[int]()
                if left:
                    memory, cuts = copy_together([payload.data for _, payload in left])
                members = tuple(i for i, _ in left)
                payloads = [
                    payload.replace_data(data) for (_, payload), data in zip(left, split(memory, cuts), strict=True)
                ]
        for i, payload in zip(members, payloads, strict=True):
            self.payloads[i] = payload
        if members:
            self.buffers.append(Buffer(memory, cuts, members))

    def _payload(self, member: int, data: Tensor) -> QuantizedTensor:
        each, outline = self.plan.members[member], self.plan.outline
        shape, dtype, requires_grad = outline.properties[each.number]
        return QuantizedTensor(
            *(each.codec, data, tuple(shape), outline.strides[each.number], dtype, each.path),
            requires_grad=requires_grad,
            is_parameter=type(self._tensors[each.number]) is nn.Parameter,
        )

    def _pack_codes(self, device: torch.device) -> None:
        for name, number, codec in self.plan.codes:
            if name in self._codes and self._tensors[number].device == device:
                codes, scales = self._codes.pop(name)
                # A file has whole memories; scales that were encoded together share one with all codes.
                self.codes[name] = pack_bits(codes, codec.bits), scales.clone()

    def _report(self, losses: Mapping[int, tuple[float, ...]], directions: Mapping[int, tuple[float, float]]) -> None:
        report = self.report
        for i, (member, payload) in enumerate(zip(self.plan.members, self.payloads, strict=True)):
            if payload is not None:
                stored = payload.nbytes
                report.tensors.append(
                    TensorLoss(member.path, member.kind, member.parameter, member.nbytes, stored, *losses[i])
                )
        for i, pair in enumerate(self.plan.pairs):
            sums = directions[i]
            if pair.is_stepped_by and self._is_encoded(pair) and not math.isnan(sums[0]):  # 0 / 0, or diverged
                report.directions.append(DirectionLoss(pair.path, pair.parameter, *sums))
        for i, member in enumerate(self.plan.members):
            if self.payloads[i] is None:
                self._store_raw(i, member.number)
        self._count_bytes()

    def _is_encoded(self, pair: PairPlan) -> bool:
        return any(side.member is not None and self.payloads[side.member] is not None for side in pair[:2])

    def _store_raw(self, member: int, number: int) -> None:
        """Store a member as it is: in memory of its own, unless it has that and training does not go on."""
        tied = [i for i, place in self.plan.places.items() if place == member]
        storage = next(each for each in self.plan.storages if number in each.numbers)
        alone = storage.nbytes == self.plan.members[member].nbytes and set(storage.numbers) <= set(tied)
        own = self._originals[number].detach()
        on_host = own.device.type == "cpu"
        if self._live or not (alone and on_host):
            if on_host or number in self._copied or not alone:
                own = own.clone()  # a file has whole memories, and copies share one
            self.own |= dict.fromkeys(tied, own)

    def _count_bytes(self) -> None:
        """Count what all tensors take, and what is stored of them: whole memories, as ``torch.save`` writes them."""
        report, plan = self.report, self.plan
        replaced = {i for i, member in plan.places.items() if self.payloads[member] is not None} | self.own.keys()
        report.original_bytes = sum(storage.nbytes for storage in plan.storages)
        report.stored_bytes = sum(
            storage.nbytes for storage in plan.storages if not replaced.issuperset(storage.numbers)
        )
        report.stored_bytes += sum(payload.nbytes for payload in self.payloads if payload is not None)
        report.stored_bytes += sum(own.nbytes for own in {id(own): own for own in self.own.values()}.values())


def _versions_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """Return how often each tensor was written to; None if one does not count that (inference tensors)."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return None
