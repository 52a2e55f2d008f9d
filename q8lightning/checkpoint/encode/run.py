"""Run a plan: encode or copy what training may change, then decide what is stored.

A GPU encodes at once, and training does not wait for it. A CPU would hold training for as long as it encodes. Where
training goes on, its tensors are therefore copied, to memory that is kept from save to save, and encoded when the run
is settled.

:meth:`Run.settle` waits for the devices and stores better what lost too much; usually the thread that writes calls it.
That review needs the tensors as they were. The plan says which of them are copied at the start: those that an earlier
save reviewed. Others are copied when the losses are known, which :meth:`Run.let_go` does before training changes them.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from q8lightning.checkpoint.encode.plan import Plan
from q8lightning.checkpoint.encode.run_parts.device_run import DeviceRun
from q8lightning.checkpoint.encode.run_parts.fill_report import add_bytes, add_losses
from q8lightning.checkpoint.encode.run_parts.originals import Originals
from q8lightning.checkpoint.encode.run_parts.review import Review
from q8lightning.checkpoint.encode.run_parts.trained_codes import TrainedCodes
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.quantization.many.buffer import copy_together, split
from q8lightning.system.ambient import neutral


class Buffer(NamedTuple):
    """The memory that holds the data of several members.

    Attributes:
        memory: uint8, on the device that encoded.
        cuts: The sizes of its stretches in bytes, of gaps and data in turns.
        members: The members' numbers.
    """

    memory: Tensor
    cuts: list[int]
    members: tuple[int, ...]


class Run:
    """A save that has begun. What training may change is encoded or copied when the constructor returns.

    Args:
        plan: How the checkpoint is saved.
        tensors: The checkpoint's, as the plan's outline numbers them.
        live: Training goes on before :meth:`settle`.
        memory: Where a CPU's tensors are copied in that case; None for new memory.

    Attributes:
        payloads: For each member what is stored in its place, None if it is stored as it is; once settled.
        buffers: The memories that hold the data of the payloads; once settled.
        own: Tensors that are stored as they are in memory of their own, by number; once settled.
        codes: For each weight that is trained quantized and whose codes are stored, packed codes and scales; once
            settled.
        frozen: For each of the plan's raws a copy of all its tensors; None where training does not go on.
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
        self.report = SaveReport(
            refused=list(plan.refused),
            passed_over=list(plan.passed_over),
            unmatched=list(plan.unmatched),
            kept=list(plan.kept),
        )
        self._live = live
        self._originals = Originals(tensors)
        self._parts = [DeviceRun(plan, each) for each in plan.devices]
        self._codes = TrainedCodes(plan)
        self._late_copies: list[torch.cuda.Event] = []
        self._settling, self._measuring, self._settled = threading.Lock(), threading.Lock(), False
        self._error: BaseException | None = None
        self.frozen = [raw.freeze(tensors) if live else None for raw in plan.raws]
        if live:
            self._originals.copy_to_host(plan.encoded_on_cpu, memory)
            self._originals.copy(plan.reviewed - self._originals.copied)
        for group in plan.neighbours:
            self.own |= dict.fromkeys(group, tensors[group[0]].detach().clone())
        for part in self._parts:
            if not part.plan.is_host:
                part.encode(self._originals.tensors)
                self._codes.encode(part.plan.device, self._originals.values)
            if live:
                part.mark()

    @property
    def codes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Packed codes and scales of weights that are trained quantized; see the class."""
        return self._codes.packed

    def is_of(self, plan: Plan, tensors: Sequence[Tensor], live: bool) -> bool:
        """Whether a run of the plan would store the same now, as far as versions of tensors tell."""
        return self.plan is plan and self._live == live and self._originals.are(tensors)

    @neutral()
    @torch.inference_mode(False)
    def let_go(self) -> None:
        """Wait until nothing needs the tensors themselves: training may change them after this.

        It waits for the device to have encoded, which is a moment after what training asked of it before the save.
        Called as late as possible, it need not wait. Where everything was copied it does nothing.
        """
        if self._live:
            self._measure_devices()
            for event in self._late_copies:
                torch.cuda.current_stream(event.device).wait_event(event)

    def _measure_devices(self) -> None:
        """Read what devices have measured, and copy what needs a review; the first thread that calls this does it."""
        with self._measuring:
            for part in self._parts:
                if part.review is None and not part.plan.is_host:
                    with part.aside():
                        self._measure(part)

    def _measure(self, part: DeviceRun) -> None:
        review = part.measure()
        missing = sorted(review.numbers - self._originals.copied) if self._live else []
        if missing:
            review.overwritten |= self._originals.copy_late(missing)
            event = part.record_event()
            if event is not None:
                self._late_copies.append(event)

    @neutral()
    @torch.inference_mode(False)
    def settle(self) -> SaveReport:
        """Decide what is stored and report what that loses; only the first call does something.

        Raises:
            RuntimeError: If a tensor that no codec can hold was written to before it could be copied.
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
        reviewed: set[int] = set()
        for part in self._parts:
            with part.aside():
                if part.plan.is_host:
                    part.encode(self._originals.values)
                    self._codes.encode(part.plan.device, self._originals.values)
                    self._measure(part)
                assert part.measured is not None
                assert part.review is not None
                losses |= dict(zip(part.plan.members, map(tuple, part.measured.statistics.tolist()), strict=True))
                directions |= dict(zip(part.plan.pairs, map(tuple, part.measured.directions.tolist()), strict=True))
                reviewed |= part.review.numbers
                self._store(part, part.review, losses, directions)
                for i in part.plan.members:
                    # On this stream, which is waited for. On training's stream, the copy would come after all that
                    # training has asked for, and the host would read it before.
                    if self.payloads[i] is None:
                        self._store_raw(i, self.plan.members[i].number)
                self._codes.pack(part.plan.device)
        add_losses(self.report, self.plan, self.payloads, losses, directions)
        add_bytes(self.report, self.plan, self.payloads, self.own)
        self.next_plan = self.plan.reviewing(frozenset(reviewed))
        # All of it is memory of training's stream, which could hand it out again. So it is kept until here, where the
        # streams that read it were waited for.
        self._parts.clear()
        self._codes.let_go()
        self._originals.release_copies()

    def _store(
        self,
        part: DeviceRun,
        review: Review,
        losses: dict[int, tuple[float, ...]],
        directions: dict[int, tuple[float, float]],
    ) -> None:
        """Set the payloads of a device, reviewed where that is needed."""
        assert part.encoded is not None
        assert part.measured is not None
        packed, members = part.encoded, part.plan.members
        memory, cuts = packed.buffer, packed.cuts
        payloads = [self._payload(i, data) for i, data in zip(members, packed.data, strict=True)]
        if review.numbers:
            kept = review.decide(self._originals.values, payloads, part.measured, losses, directions, self.report)
            if kept != payloads:
                # A view is saved with all of its memory, so what is not stored must not lie in it.
                left = [(i, payload) for i, payload in zip(members, kept, strict=True) if payload is not None]
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
            is_parameter=type(self._originals.tensors[each.number]) is nn.Parameter,
        )

    def _store_raw(self, member: int, number: int) -> None:
        """Store a member as it is, in memory of its own unless it has that already and training does not go on."""
        tied = [i for i, place in self.plan.places.items() if place == member]
        storage = next(each for each in self.plan.storages if number in each.numbers)
        alone = storage.nbytes == self.plan.members[member].nbytes and set(storage.numbers) <= set(tied)
        own = self._originals.values[number].detach()
        on_host = own.device.type == "cpu"
        if self._live or not (alone and on_host):
            if on_host or number in self._originals.copied or not alone:
                own = own.clone()  # copies share one memory, and a file holds whole memories
            self.own |= dict.fromkeys(tied, own)
