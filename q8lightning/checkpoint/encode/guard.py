"""Encode tensors, measure what they lose, and do better by those that would lose more than the policy allows.

A tensor gets the codec that its rule names; if that loses too much, the residual stage at the same block size; if that
does too, or does not make it smaller, it is stored as it is. Decisions depend on nothing but values, so that saving
what was loaded makes the same ones: whoever passes a limit by less than ``MARGIN`` and is held without any loss by the
residual stage comes from a file where it was found on the other side of the limit, and keeps that stage.

Whatever has to be looked at a second time waits for the device; that is rare.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.candidates import Candidate, Pair, encode_and_measure, reason_to_refuse
from q8lightning.checkpoint.payload import QuantizedTensor, encode_tensors
from q8lightning.checkpoint.policy import SECOND_MOMENTS, CheckpointPolicy
from q8lightning.checkpoint.report import DirectionLoss, Guarded, SaveReport, TensorLoss, relative_error, sqnr_db
from q8lightning.quantization.many.buffer import copy_together
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.system.ambient import neutral

MARGIN = 0.01
"""How close to a limit, relatively, an error can move when the residual stage has rounded the values: its own error is
about a 250th of a first stage's."""


@neutral()
def encode_candidates(candidates: Sequence[Candidate], pairs: Sequence[Pair], policy: CheckpointPolicy) -> SaveReport:
    """Set the payload of each candidate that is to be stored encoded, and report what that loses.

    Args:
        candidates: Tensors with a codec each.
        pairs: Moments that belong together, candidates or not.
        policy: Its limits count, not its rules.
    """
    report = SaveReport()
    devices: dict[torch.device, list[Candidate]] = {}
    for candidate in candidates:
        devices.setdefault(candidate.tensor.device, []).append(candidate)
    for device, members in devices.items():
        _encode(members, [pair for pair in pairs if pair.exp_avg.tensor.device == device], policy, report)
    report.tensors = [
        TensorLoss(each.path, each.kind, each.parameter, each.tensor.nbytes, each.payload.nbytes, *each.statistics)
        for each in candidates
        if each.payload is not None
    ]
    report.directions = [
        DirectionLoss(pair.exp_avg.path, pair.exp_avg.parameter, pair.squared_error, pair.squares)
        for pair in pairs
        if pair.is_stepped_by
        and pair.is_encoded
        and not math.isnan(pair.squared_error)  # a direction of 0 / 0, or of what has diverged
    ]
    return report


def _encode(candidates: list[Candidate], pairs: Sequence[Pair], policy: CheckpointPolicy, report: SaveReport) -> None:
    """Encode the candidates of one device into one stretch of memory that holds nothing else."""
    first = encode_and_measure(candidates, pairs)
    for candidate, reason in zip(candidates, first, strict=True):
        if reason is not None:
            candidate.payload = None
            report.refused.append(f"{candidate.path} ({reason})")
    before = [candidate.payload for candidate in candidates]
    _guard(candidates, pairs, policy, report)
    kept = [candidate for candidate in candidates if candidate.payload is not None]
    changed = any(payload is not each.payload for payload, each in zip(before, candidates, strict=True))
    if kept and (changed or len(kept) < len(candidates)):
        # What was refused would be saved along with the memory that it shares with the others.
        payloads = [candidate.payload for candidate in kept if candidate.payload is not None]
        for candidate, payload, data in zip(
            kept, payloads, copy_together([each.data for each in payloads]), strict=True
        ):
            candidate.payload = payload.replace_data(data)


def _guard(candidates: list[Candidate], pairs: Sequence[Pair], policy: CheckpointPolicy, report: SaveReport) -> None:
    """Hold candidates and pairs to the limits, and measure again what is changed by that."""
    for candidate in candidates:
        if candidate.payload is not None and candidate.kind in SECOND_MOMENTS and candidate.statistics[4]:
            zeroed = f"{candidate.statistics[4]:.0f} nonzero values become zero under {candidate.payload.codec.label}"
            candidate.payload = None
            report.guarded.append(Guarded(candidate.path, zeroed, "raw"))
    judged: set[Candidate] = set()
    limit = policy.max_update_direction_error
    for alike in _by_first_moment(pairs):
        for pair in alike:
            if any(each.codec is not None and each.payload is None for each in (pair.exp_avg, pair.exp_avg_sq)):
                pair.measure()  # it was measured with what was refused
        if limit is not None:
            judged |= {moment for pair in alike for moment in (pair.exp_avg, pair.exp_avg_sq)}
            # One of two errors beyond the limit makes both together hardly smaller than it.
            if any(relative_error(pair.squared_error, pair.squares) > limit / 2 for pair in alike):
                _hold_moments(alike, limit, report)
    if policy.min_sqnr_db is not None:
        limit = 10 ** (-policy.min_sqnr_db / 20)
        for candidate in candidates:
            if candidate not in judged and candidate.kind not in SECOND_MOMENTS:
                _hold(candidate, limit, lambda _, statistics: relative_error(*statistics[:2]), _as_sqnr, report)


class Watched(NamedTuple):
    """Which of many candidates the guard would look at, to tell at a glance whether it has to.

    Attributes:
        second_moments: ``[any]`` int64, the candidates that are second moments.
        by_sqnr: ``[any]`` int64, those that the limit of the SQNR applies to.
        policy: Its limits.
    """

    second_moments: Tensor
    by_sqnr: Tensor
    policy: CheckpointPolicy

    @classmethod
    def of(cls, candidates: Sequence[Candidate], pairs: Sequence[Pair], policy: CheckpointPolicy) -> "Watched":
        """Return which these are."""
        judged: set[Candidate] = set()
        if policy.max_update_direction_error is not None:
            judged = {moment for pair in pairs for moment in (pair.exp_avg, pair.exp_avg_sq)}
        second = [i for i, each in enumerate(candidates) if each.kind in SECOND_MOMENTS]
        others = [i for i, each in enumerate(candidates) if each.kind not in SECOND_MOMENTS and each not in judged]
        first, rest = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (second, others))
        return cls(first, rest, policy)

    def nothing_to_do(self, statistics: Tensor, directions: Tensor) -> bool:
        """Whether the guard would leave all candidates as they are; False where that is not sure.

        Args:
            statistics: ``[candidates, 5]`` float64 on the CPU, what each loses.
            directions: ``[pairs, 2]`` float64 on the CPU, the sums of :func:`update_direction_sums`.
        """
        limit, min_sqnr = self.policy.max_update_direction_error, self.policy.min_sqnr_db
        clear = not statistics[self.second_moments, 4].any()
        if limit is not None:
            clear &= not _beyond(directions, limit / 2)
        if min_sqnr is not None:
            clear &= not _beyond(statistics[self.by_sqnr, :2], 10 ** (-min_sqnr / 20) * (1 - MARGIN))
        return clear


def _beyond(sums: Tensor, limit: float) -> bool:
    """Whether a relative error, from sums of squared errors and of squares, may be greater than ``limit``."""
    return bool((sums[:, 0] > limit**2 * (1 - 1e-9) * sums[:, 1]).any())


NAMED = 20
"""How many tensors a warning names; the summary in the checkpoint has all of them."""


_Error = Callable[[QuantizedTensor, tuple[float, ...]], float]
"""What a payload with these statistics loses, relative."""


def _hold(
    candidate: Candidate, limit: float, error_of: _Error, describe: Callable[[float], str], report: SaveReport
) -> bool:
    """Give a candidate that loses more than ``limit`` what loses less; return whether anything changed."""
    payload = candidate.payload
    if payload is None:
        return False
    error = error_of(payload, candidate.statistics)
    if not error > limit * (1 - MARGIN):
        return False
    finer = _encoded_finer(candidate)
    remedy = None
    if finer is not None and (finer[1][0] == 0 or (error > limit and error_of(*finer) <= limit)):
        remedy = "residual"
        candidate.payload, candidate.statistics = finer
    elif error > limit:
        remedy = "raw"
        candidate.payload = None
    if remedy is not None:
        report.guarded.append(Guarded(candidate.path, f"{describe(error)} under {payload.codec.label}", remedy))
    return remedy is not None


def _by_first_moment(pairs: Sequence[Pair]) -> list[list[Pair]]:
    alike: dict[Candidate, list[Pair]] = {}
    for pair in pairs:
        alike.setdefault(pair.exp_avg, []).append(pair)
    return list(alike.values())


def _hold_moments(pairs: Sequence[Pair], limit: float, report: SaveReport) -> None:
    """Hold a first moment, and each second moment that belongs to it, to the limit by what it does to the direction.

    The first moment is judged beside the second ones as their rules' codecs decode them, these beside the first as
    it is stored: all are the same when what was stored is saved again.
    """
    exp_avg, changed = pairs[0].exp_avg, False
    for pair in pairs:
        second = pair.exp_avg_sq.decoded

        def error_of_first(
            payload: QuantizedTensor, _: tuple[float, ...], pair: Pair = pair, v: Tensor = second
        ) -> float:
            return _direction_error(Moments(exp_avg.stored(payload), StoredMoment(v), pair.eps))

        changed |= _hold(exp_avg, limit, error_of_first, _as_direction, report)
    first = exp_avg.decoded
    for pair in pairs:

        def error_of_second(payload: QuantizedTensor, _: tuple[float, ...], pair: Pair = pair) -> float:
            return _direction_error(Moments(StoredMoment(first), pair.exp_avg_sq.stored(payload), pair.eps))

        changed |= _hold(pair.exp_avg_sq, limit, error_of_second, _as_direction, report)
    if changed:
        for pair in pairs:
            if pair.is_encoded:
                pair.measure()


def _direction_error(moments: Moments) -> float:
    return relative_error(*update_direction_sums([moments])[0].tolist())


def _encoded_finer(candidate: Candidate) -> tuple[QuantizedTensor, tuple[float, ...]] | None:
    """Return the candidate encoded with the finer codec and what that loses; None if that is no improvement."""
    codec, tensor = candidate.codec, candidate.tensor
    finer = None if codec is None else codec.finer
    if finer is None or finer.encoded_bytes(tensor.numel()) >= tensor.nbytes:
        return None
    payloads, failed, statistics = encode_tensors([(tensor, finer, candidate.path)], measure=True)
    if statistics is None or reason_to_refuse(tensor, payloads[0], not failed.item()) is not None:
        return None
    return payloads[0], tuple(statistics[0].tolist())


def _as_sqnr(error: float) -> str:
    return f"SQNR {sqnr_db(error**2, 1.0):.1f} dB"


def _as_direction(error: float) -> str:
    return f"update direction off by {error:.1%}"


def warn_of_guarded(guarded: Iterable[Guarded]) -> None:
    """Name tensors that the guard kept from losing too much, in one warning; none if there are none."""
    remedies = {"residual": "stored with a residual stage", "raw": "stored as it is"}
    named = [f"{each.path} ({each.found}; {remedies[each.remedy]})" for each in guarded]
    if named:
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        warnings.warn(
            "would have lost more than the policy allows: " + "; ".join(named[:NAMED]) + more + ". The checkpoint is"
            " complete but larger; give them another rule (second moments: the codec log), or change the policy's"
            " min_sqnr_db or max_update_direction_error, None for no limit",
            stacklevel=2,
        )
