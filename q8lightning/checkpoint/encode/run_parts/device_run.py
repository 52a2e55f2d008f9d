"""Run the part of a plan that is on one device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.plan import DevicePlan, Measured, Plan, Side
from q8lightning.checkpoint.encode.run_parts.review import Review
from q8lightning.checkpoint.memory import in_memory_order
from q8lightning.quantization.many.buffer import kept_index
from q8lightning.quantization.many.encode import EncodedBuffer
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums


class DeviceRun:
    """Encodes on one device, and says later what that lost.

    Args:
        plan: How the checkpoint is saved.
        device: Its part on the device.

    Attributes:
        plan: The part on the device.
        encoded: What was encoded; None before.
        measured: What was measured, on the host; None before.
        review: Which tensors need a review; None before anything was measured.
    """

    def __init__(self, plan: Plan, device: DevicePlan) -> None:
        self.plan = device
        self.encoded: EncodedBuffer | None = None
        self.measured: Measured | None = None
        self.review: Review | None = None
        self._whole_plan = plan
        self._numbers: Tensor | None = None  # all that was measured, in one tensor on the device
        self._stream: torch.cuda.Stream | None = None
        self._marked: torch.cuda.Event | None = None

    def encode(self, tensors: Sequence[Tensor]) -> None:
        """Encode and measure; a GPU is not waited for.

        Args:
            tensors: Those of the checkpoint, or copies of them, by number.
        """
        plan = self.plan
        members = [in_memory_order(tensors[i]) for i in plan.numbers]
        encoded = self.encoded = plan.packing.encode(members, measure=True)
        assert encoded.statistics is not None
        if plan.is_host:
            plan.limits.measure_in_whole(members, plan.packing.codecs, encoded)
        sums = encoded.statistics.new_empty(len(plan.pairs), 2)
        for alike, firsts, seconds in plan.launches:
            alike.measure([tensors[i] for i in firsts], [tensors[i] for i in seconds], encoded.buffer, sums)
        if plan.loose:
            data, places = encoded.data, {member: place for place, member in enumerate(plan.members)}
            stored = partial(self._stored, tensors=tensors, data=data, places=places)
            moments = [Moments(stored(pair.exp_avg), stored(pair.exp_avg_sq), pair.eps) for _, pair in plan.loose]
            sums[kept_index(tuple(place for place, _ in plan.loose), sums.device)] = update_direction_sums(moments)
        self._numbers = torch.cat([encoded.failed.double(), encoded.statistics.view(-1), sums.view(-1)])

    def _stored(
        self, side: Side, tensors: Sequence[Tensor], data: Sequence[Tensor], places: Mapping[int, int]
    ) -> StoredMoment:
        values = in_memory_order(tensors[side.number])
        if side.member is None:
            return StoredMoment(values)
        place = places[side.member]
        return StoredMoment(values, self.plan.packing.codecs[place], data[place])

    def mark(self) -> None:
        """Remember how far the training's stream has come; :meth:`aside` begins behind that."""
        if self.plan.device.type == "cuda":
            self._marked = torch.cuda.current_stream(self.plan.device).record_event()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on a stream of its own behind the mark, and wait for that work at the end.

        Without a mark, nothing changes.
        """
        if self._marked is None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.plan.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._marked)
            yield
            self._stream.synchronize()

    def measure(self) -> Review:
        """Bring what was measured to the host; waits for the device."""
        assert self._numbers is not None
        count, pairs = len(self.plan.members), len(self.plan.pairs)
        failed, statistics, sums = torch.split(self._numbers.cpu(), [count, 5 * count, 2 * pairs])
        self.measured = Measured(failed, statistics.view(-1, 5), sums.view(-1, 2))
        self._numbers = None
        self.review = Review(self._whole_plan, self.plan, self.measured)
        return self.review

    def record_event(self) -> torch.cuda.Event | None:
        """Return an event behind the work in :meth:`aside` so far; None where there is no stream."""
        return None if self._stream is None else self._stream.record_event()
