"""Review what a device encoded: refuse what no codec holds, guard what lost too much."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from q8lightning.checkpoint.encode.judge.guard import Candidate, CandidatePair, guard
from q8lightning.checkpoint.encode.judge.refuse import reason_to_refuse
from q8lightning.checkpoint.encode.plan import DevicePlan, Measured, Plan
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.report import Guarded, SaveReport


class Review:
    """Finds the tensors of a device that need a review, and decides how they are stored.

    Args:
        plan: What was run.
        device: Its part on the device.
        measured: What was measured there.

    Attributes:
        numbers: The numbers of the tensors that the review reads.
        overwritten: Those that were written to before they could be copied; set by the caller.
    """

    def __init__(self, plan: Plan, device: DevicePlan, measured: Measured) -> None:
        self._plan = plan
        self._device = device
        self.overwritten: set[int] = set()
        beyond, pairs_beyond = device.limits.beyond(measured.statistics, measured.directions)
        failed = measured.failed.nonzero().view(-1).tolist()
        always = [i for i, number in enumerate(device.numbers) if number in plan.always_reviewed]
        self._refusable = sorted({*failed, *always})
        numbers = {device.numbers[i] for i in (*self._refusable, *beyond)}
        of_device = [plan.pairs[i] for i in device.pairs]
        firsts = {of_device[i].exp_avg.number for i in pairs_beyond}
        firsts |= {p.exp_avg.number for p in of_device if numbers & {p.exp_avg.number, p.exp_avg_sq.number}}
        self._lossy = {device.numbers[i] for i in beyond}
        self._lossy |= {side.number for i in pairs_beyond for side in of_device[i][:2]}
        self._pairs = [i for i in device.pairs if plan.pairs[i].exp_avg.number in firsts]
        self.numbers = numbers | {side.number for i in self._pairs for side in plan.pairs[i][:2]}

    def decide(
        self,
        values: Sequence[Tensor],
        payloads: Sequence[QuantizedTensor],
        measured: Measured,
        losses: dict[int, tuple[float, ...]],
        directions: dict[int, tuple[float, float]],
        report: SaveReport,
    ) -> list[QuantizedTensor | None]:
        """Refuse and guard; return the payloads that are stored, None for what is stored as it is.

        Args:
            values: The checkpoint's tensors or copies of them, by number.
            payloads: What the device's members were encoded to.
            measured: What was measured.
            losses: What each member loses, by its number among all members; updated.
            directions: What each pair loses; updated.
            report: Gets what was refused and guarded.

        Raises:
            RuntimeError: If a tensor that no codec can hold was written to before it could be copied.
        """
        plan, device = self._plan, self._device
        places = {number: i for i, number in enumerate(device.numbers)}
        candidates: dict[int, Candidate] = {}
        for number in sorted(self.numbers):
            candidates[number] = self._candidate(values[number], places.get(number), payloads, losses)
        for place in self._refusable:
            self._refuse(place, candidates[device.numbers[place]], bool(measured.failed[place]), report)
        pairs = {
            i: CandidatePair(candidates[one.number], candidates[two.number], eps, *directions[i])
            for i, (one, two, eps, *_) in ((i, plan.pairs[i]) for i in self._pairs)
        }
        usable = {
            i: pair for i, pair in pairs.items() if not self.overwritten & {side.number for side in plan.pairs[i][:2]}
        }
        usable_candidates = [each for number, each in candidates.items() if number not in self.overwritten]
        alone = [candidates.get(device.numbers[i]) for i in device.limits.alone.tolist()]
        guard(
            usable_candidates,
            list(usable.values()),
            [each for each in alone if each is not None and each in usable_candidates],
            plan.policy,
            report,
        )
        for number in self.overwritten & self._lossy:
            if (each := candidates[number]).payload is not None:
                found = "written to before it could be stored better"
                report.guarded.append(Guarded(each.path, each.name, found, "none"))
        for i, pair in usable.items():
            directions[i] = pair.squared_error, pair.squares
        kept: list[QuantizedTensor | None] = list(payloads)
        for number, place in places.items():
            if number in candidates:
                kept[place] = candidates[number].payload
                losses[device.members[place]] = candidates[number].statistics
        return kept

    def _candidate(
        self,
        tensor: Tensor,
        place: int | None,
        payloads: Sequence[QuantizedTensor],
        losses: Mapping[int, tuple[float, ...]],
    ) -> Candidate:
        """Return what the guard judges.

        Args:
            tensor: Its values.
            place: Its place among the device's members; None if it is no member, but the other moment of one.
            payloads: What the members were encoded to.
            losses: What each member loses, by its number among all members.
        """
        if place is None:
            return Candidate("", "", "", tensor, None)
        member = self._plan.members[self._device.members[place]]
        statistics = losses[self._device.members[place]]
        return Candidate(member.path, member.name, member.kind, tensor, member.codec, payloads[place], statistics)

    def _refuse(self, place: int, candidate: Candidate, failed: bool, report: SaveReport) -> None:
        """Store a candidate as it is if its codec cannot hold it."""
        assert candidate.payload is not None
        if self._device.numbers[place] in self.overwritten:
            if failed:
                raise RuntimeError(
                    f"{candidate.name} holds values that {candidate.payload.codec.label} cannot hold, and something"
                    " wrote to it before it could be stored as it is; write to weights within the training step or the"
                    " optimizer's, or pass async_save=False"
                )
            return
        reason = reason_to_refuse(candidate.tensor, candidate.payload, not failed)
        if reason is not None:
            candidate.payload = None
            report.refused.append(f"{candidate.name} ({reason})")
