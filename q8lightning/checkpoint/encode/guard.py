"""Guard what a save would lose too much of: give it the residual stage, or store it as it is.

A tensor gets the codec that its rule names. If that loses more than the policy allows, it gets the residual stage at
the same block size. If that does too, or does not make it smaller, it is stored as it is.

Decisions depend on values alone, so that saving what was loaded decides the same. The residual stage rounds values, and
an error close to a limit may then be found on its other side. A tensor whose error is within ``MARGIN`` of the limit,
and which the residual stage holds without any loss, was loaded from such a file and keeps the stage.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.refuse import reason_to_refuse
from q8lightning.checkpoint.payload import QuantizedTensor, encode_tensors, in_memory_order
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import Guarded, SaveReport, relative_error, sqnr_db
from q8lightning.checkpoint.sections import SECOND_MOMENTS
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import EncodedBuffer, is_sampled, measure
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import share_out

MARGIN = 0.01
"""How close to a limit, relatively, an error can move when the residual stage has rounded the values: its own error is
about a 250th of a first stage's."""

NAMED = 20
"""How many tensors a warning names; the summary in the checkpoint has all of them."""


class Watched(NamedTuple):
    """What the guard looks at among the members and pairs of a device.

    Attributes:
        second_moments: ``[any]`` int64, the places of members that are second moments.
        by_sqnr: ``[any]`` int64, of those that the limit of the SQNR applies to.
        policy: Its limits.
    """

    second_moments: Tensor
    by_sqnr: Tensor
    policy: CheckpointPolicy

    @classmethod
    def of(cls, kinds: Sequence[str], in_pairs: frozenset[int], policy: CheckpointPolicy) -> "Watched":
        """Return what is looked at.

        Args:
            kinds: The kind of each member.
            in_pairs: The places of members that are moments of a pair; the limit of the update direction is theirs.
            policy: Its limits count, not its rules.
        """
        judged = in_pairs if policy.max_update_direction_error is not None else frozenset[int]()
        second = [i for i, kind in enumerate(kinds) if kind in SECOND_MOMENTS]
        others = [i for i, kind in enumerate(kinds) if kind not in SECOND_MOMENTS and i not in judged]
        first, rest = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (second, others))
        return cls(first, rest, policy)

    @neutral()
    def look_closer(self, values: Sequence[Tensor], codecs: Sequence[Codec], packed: EncodedBuffer) -> None:
        """Measure members in whole, where a part was measured and the rest could lose more than the policy allows.

        Only a CPU measures a part. Most members need no second look, because their scales bound what they lose.

        Args:
            values: The elements of each member as they lie in memory.
            codecs: How each is encoded.
            packed: What came of it; its statistics are set.
        """
        assert packed.statistics is not None
        data = packed.data
        sampled = [is_sampled(each, codec) for each, codec in zip(values, codecs, strict=True)]
        unsure = [i for i in self.second_moments.tolist() if sampled[i] and not codecs[i].keeps_nonzero]
        if self.policy.min_sqnr_db is not None:
            limit = 10 ** (-self.policy.min_sqnr_db / 20) * (1 - MARGIN)
            for i in self.by_sqnr.tolist():
                if not sampled[i]:
                    continue
                parts = codecs[i].split(data[i], values[i].numel())
                if not codecs[i].relative_error_bound(values[i], parts) <= limit:
                    unsure.append(i)
        jobs = [partial(measure, values[i], codecs[i], data[i]) for i in unsure]
        for i, statistics in zip(unsure, share_out(jobs, [values[i].nbytes for i in unsure]), strict=True):
            packed.statistics[i] = statistics

    def beyond(self, statistics: Tensor, directions: Tensor) -> tuple[list[int], list[int]]:
        """Return the places of the members and of the pairs that may lose more than the policy allows.

        Args:
            statistics: ``[members, 5]`` float64 on the CPU, what each loses.
            directions: ``[pairs, 2]`` float64 on the CPU, the sums of :func:`update_direction_sums`.
        """
        limit, min_sqnr = self.policy.max_update_direction_error, self.policy.min_sqnr_db
        members: list[int] = self.second_moments[statistics[self.second_moments, 4] != 0].tolist()
        if min_sqnr is not None:
            beyond = _beyond(statistics[self.by_sqnr, :2], 10 ** (-min_sqnr / 20) * (1 - MARGIN))
            members += self.by_sqnr[beyond].tolist()
        # One of two errors beyond the limit makes both together hardly smaller than it.
        pairs: list[int] = [] if limit is None else _beyond(directions, limit / 2).nonzero().view(-1).tolist()
        return members, pairs


def _beyond(sums: Tensor, limit: float) -> Tensor:
    """Tell which relative errors, from sums of squared errors and of squares, may be greater than ``limit``."""
    return sums[:, 0] > limit**2 * (1 - 1e-9) * sums[:, 1]


@dataclass(eq=False)
class Candidate:
    """A tensor that the guard looks at.

    Attributes:
        path: Its path in the checkpoint.
        name: What messages call it.
        kind: See :class:`~q8lightning.checkpoint.report.TensorLoss`.
        tensor: The original or a copy: a dense float tensor.
        codec: What its rule asks for; None for one that is stored as it is and only part of a pair.
        payload: What is stored in its place; None if it is stored as it is.
        statistics: What the payload lost, five numbers.
    """

    path: str
    name: str
    kind: str
    tensor: Tensor
    codec: Codec | None
    payload: QuantizedTensor | None = None
    statistics: tuple[float, ...] = ()

    @property
    def decoded(self) -> Tensor:
        """What loading would give, in the order of memory."""
        return in_memory_order(self.tensor if self.payload is None else self.payload.decode())

    def stored(self, payload: QuantizedTensor | None) -> StoredMoment:
        """Return the moment with ``payload`` stored in its place."""
        values = in_memory_order(self.tensor)
        return StoredMoment(values) if payload is None else StoredMoment(values, payload.codec, payload.data)


@dataclass(eq=False)
class CandidatePair:
    """Two moments that the guard looks at together.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        eps: The optimizer's.
        squared_error: Of the update direction; see :class:`~q8lightning.checkpoint.report.DirectionLoss`.
        squares: Of the original direction.
    """

    exp_avg: Candidate
    exp_avg_sq: Candidate
    eps: float
    squared_error: float
    squares: float

    def measure(self) -> None:
        """Measure again; waits for the device."""
        first, second = (each.stored(each.payload) for each in (self.exp_avg, self.exp_avg_sq))
        if self.exp_avg.payload is None and self.exp_avg_sq.payload is None:
            return
        self.squared_error, self.squares = update_direction_sums([Moments(first, second, self.eps)])[0].tolist()


def guard(
    candidates: Sequence[Candidate],
    pairs: Sequence[CandidatePair],
    by_sqnr: Iterable[Candidate],
    policy: CheckpointPolicy,
    report: SaveReport,
) -> None:
    """Hold tensors to the limits of the policy, and measure again what is changed by that; waits for the device.

    Args:
        candidates: Whatever is looked at, those of the pairs included. Their payloads and statistics are set.
        pairs: Moments that belong together, with all other pairs of the same first moment.
        by_sqnr: The candidates that the limit of the SQNR applies to.
        policy: Its limits count, not its rules.
        report: Gets what was guarded.
    """
    for candidate in candidates:
        if candidate.payload is not None and candidate.kind in SECOND_MOMENTS and candidate.statistics[4]:
            zeroed = f"{candidate.statistics[4]:.0f} nonzero values become zero under {candidate.payload.codec.label}"
            candidate.payload = None
            report.guarded.append(Guarded(candidate.path, candidate.name, zeroed, "raw"))
    limit = policy.max_update_direction_error
    for alike in _by_first_moment(pairs):
        for pair in alike:
            if any(each.codec is not None and each.payload is None for each in (pair.exp_avg, pair.exp_avg_sq)):
                pair.measure()  # it was measured with what is not stored
        if limit is not None and any(relative_error(pair.squared_error, pair.squares) > limit / 2 for pair in alike):
            _hold_moments(alike, limit, report)
    if policy.min_sqnr_db is not None:
        limit = 10 ** (-policy.min_sqnr_db / 20)
        for candidate in by_sqnr:
            _hold(candidate, limit, lambda _, statistics: relative_error(*statistics[:2]), _as_sqnr, report)


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
        found = f"{describe(error)} under {payload.codec.label}"
        report.guarded.append(Guarded(candidate.path, candidate.name, found, remedy))
    return remedy is not None


def _by_first_moment(pairs: Sequence[CandidatePair]) -> list[list[CandidatePair]]:
    alike: dict[Candidate, list[CandidatePair]] = {}
    for pair in pairs:
        alike.setdefault(pair.exp_avg, []).append(pair)
    return list(alike.values())


def _hold_moments(pairs: Sequence[CandidatePair], limit: float, report: SaveReport) -> None:
    """Hold a first moment, and each second moment that belongs to it, to the limit by what it does to the direction.

    The first moment is judged beside the second ones as their rules' codecs decode them, these beside the first as
    it is stored: all are the same when what was stored is saved again.
    """
    exp_avg, changed = pairs[0].exp_avg, False
    for pair in pairs:
        second = pair.exp_avg_sq.decoded

        def error_of_first(
            payload: QuantizedTensor, _: tuple[float, ...], pair: CandidatePair = pair, v: Tensor = second
        ) -> float:
            return _direction_error(Moments(exp_avg.stored(payload), StoredMoment(v), pair.eps))

        changed |= _hold(exp_avg, limit, error_of_first, _as_direction, report)
    first = exp_avg.decoded
    for pair in pairs:

        def error_of_second(payload: QuantizedTensor, _: tuple[float, ...], pair: CandidatePair = pair) -> float:
            return _direction_error(Moments(StoredMoment(first), pair.exp_avg_sq.stored(payload), pair.eps))

        changed |= _hold(pair.exp_avg_sq, limit, error_of_second, _as_direction, report)
    if changed:
        for pair in pairs:
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
    if is_sampled(tensor, finer):  # that nothing is lost must be said of all of it
        statistics = measure(in_memory_order(tensor), finer, payloads[0].data)[None]
    return payloads[0], tuple(statistics[0].tolist())


def _as_sqnr(error: float) -> str:
    return f"SQNR {sqnr_db(error**2, 1.0):.1f} dB"


def _as_direction(error: float) -> str:
    return f"update direction off by {error:.1%}"


def warn_of_guarded(guarded: Iterable[Guarded]) -> None:
    """Name tensors that the guard kept from losing too much, in one warning; none if there are none."""
    remedies = {"residual": "stored with a residual stage", "raw": "stored as it is", "none": "stored all the same"}
    named = [f"{each.name} ({each.found}; {remedies[each.remedy]})" for each in guarded]
    if named:
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        warnings.warn(
            "would have lost more than the policy allows: " + "; ".join(named[:NAMED]) + more + ". The checkpoint is"
            " complete but larger; give them another rule (second moments: the codec log), or change the policy's"
            " min_sqnr_db or max_update_direction_error, None for no limit",
            stacklevel=2,
        )
