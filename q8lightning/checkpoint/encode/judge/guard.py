"""Store tensors better that would lose more than the policy allows.

A tensor gets the codec that its rule names. If that loses too much, it gets a finer codec at the same block size,
``linear`` with 8 bits and a residual of 8. If that loses too much as well, or saves no bytes, it is stored as it is.

Decisions depend on values alone, so that saving what was loaded decides the same again. The finer codec rounds values,
which may move an error across a limit. So a tensor keeps that codec if its error is within ``MARGIN`` of the limit and
the codec loses nothing: then it was loaded from a file that has it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from q8lightning.checkpoint.encode.judge.encode_tensors import encode_tensors
from q8lightning.checkpoint.encode.judge.limits import MARGIN, allowed_alone
from q8lightning.checkpoint.encode.judge.refuse import reason_to_refuse
from q8lightning.checkpoint.layout.optimizer_states import FIRST_MOMENTS, SECOND_MOMENTS
from q8lightning.checkpoint.memory import in_memory_order
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.report import Guarded, SaveReport, relative_error, sqnr_db
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import is_sampled, measure
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums


@dataclass(eq=False)
class Candidate:
    """A tensor that the guard judges.

    Attributes:
        path: Its path in the checkpoint.
        name: What messages call it.
        kind: See :class:`~q8lightning.checkpoint.report.TensorLoss`.
        tensor: The original or a copy: a dense float tensor.
        codec: What its rule names; None for a tensor that is stored as it is and only belongs to a pair.
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
        """What loading will return, in the order of memory."""
        return in_memory_order(self.tensor if self.payload is None else self.payload.decode())

    def stored(self, payload: QuantizedTensor | None) -> StoredMoment:
        """Return the moment as it is if ``payload`` is stored in its place."""
        values = in_memory_order(self.tensor)
        return StoredMoment(values) if payload is None else StoredMoment(values, payload.codec, payload.data)


@dataclass(eq=False)
class CandidatePair:
    """Two moments that the guard judges together.

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
        """Measure the error as both are stored now; waits for the device."""
        first, second = (each.stored(each.payload) for each in (self.exp_avg, self.exp_avg_sq))
        if self.exp_avg.payload is None and self.exp_avg_sq.payload is None:
            return
        self.squared_error, self.squares = update_direction_sums([Moments(first, second, self.eps)])[0].tolist()


def guard(
    candidates: Sequence[Candidate],
    pairs: Sequence[CandidatePair],
    alone: Iterable[Candidate],
    policy: CheckpointPolicy,
    report: SaveReport,
) -> None:
    """Hold tensors to the limits of the policy; measure again what that changes; waits for the device.

    Args:
        candidates: The tensors to judge, those of the pairs included. Their payloads and statistics are set.
        pairs: Moments that belong together, with all other pairs of the same first moment.
        alone: The candidates that are judged by themselves.
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
                pair.measure()  # it was measured with a payload that is not stored
        if limit is not None and any(relative_error(pair.squared_error, pair.squares) > limit / 2 for pair in alike):
            _hold_moments(alike, limit, report)
    allowed = {each: allowed_alone(each.kind, policy) for each in alone if each.payload is not None}
    left = {each: most for each, most in allowed.items() if most is not None}
    finer = _encode_finer([each for each, most in left.items() if _is_close(_error_alone(None, each.statistics), most)])
    for each, most in left.items():
        describe = _as_direction if each.kind in FIRST_MOMENTS and limit is not None else _as_sqnr
        _hold(each, most, _error_alone, describe, report, finer)


_Error = Callable[[QuantizedTensor, tuple[float, ...]], float]
"""Returns the relative error of a payload with these statistics."""

_Finer = tuple[QuantizedTensor, tuple[float, ...]]
"""The payload of the finer codec and its statistics, five numbers."""


def _is_close(error: float, limit: float) -> bool:
    """Whether an error exceeds a limit, or may have done so when the tensor was saved before; see the module."""
    return error > limit * (1 - MARGIN)


def _error_alone(_: QuantizedTensor | None, statistics: tuple[float, ...]) -> float:
    return relative_error(*statistics[:2])


def _hold(
    candidate: Candidate,
    limit: float,
    error_of: _Error,
    describe: Callable[[float], str],
    report: SaveReport,
    known: "Mapping[Candidate, _Finer | None]" = MappingProxyType({}),
) -> bool:
    """Store a candidate better if it loses more than ``limit``; return whether that changed anything.

    Args:
        candidate: The candidate.
        limit: The largest relative error.
        error_of: Returns what a payload loses.
        describe: Puts an error into words.
        report: Gets what was guarded.
        known: What the finer codec makes of candidates, where many were encoded at once.
    """
    payload = candidate.payload
    if payload is None:
        return False
    error = error_of(payload, candidate.statistics)
    if not _is_close(error, limit):
        return False
    finer = known[candidate] if candidate in known else _encode_finer([candidate])[candidate]
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
    """Hold a first moment and the second moments of the same parameter to the limit of the update direction.

    The first moment is judged with the second ones as their rules' codecs decode them. The second ones are judged with
    the first as it is stored. Saving what was loaded finds the same values in all of them, and so decides the same.
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


def _encode_finer(candidates: Sequence[Candidate]) -> "dict[Candidate, _Finer | None]":
    """Encode candidates of one device together with their finer codecs; None for those that cannot have one."""
    result: dict[Candidate, _Finer | None] = dict.fromkeys(candidates)
    wanted = [(each, finer) for each in candidates if (finer := _finer_codec(each)) is not None]
    if not wanted:
        return result
    encoded = encode_tensors([(each.tensor, finer, each.path) for each, finer in wanted], measure=True)
    assert encoded.statistics is not None
    failed, statistics = encoded.failed.tolist(), encoded.statistics.tolist()
    for i, (each, finer) in enumerate(wanted):
        payload, lost = encoded.payloads[i], statistics[i]
        if reason_to_refuse(each.tensor, payload, not failed[i]) is None:
            if is_sampled(each.tensor, finer):  # a sample cannot show that nothing is lost
                lost = measure(in_memory_order(each.tensor), finer, payload.data).tolist()
            result[each] = payload, tuple(lost)
    return result


def _finer_codec(candidate: Candidate) -> Codec | None:
    """Return the finer codec; None if there is none or it saves no bytes."""
    finer = None if candidate.codec is None else candidate.codec.finer
    too_large = finer is not None and finer.encoded_bytes(candidate.tensor.numel()) >= candidate.tensor.nbytes
    return None if too_large else finer


def _as_sqnr(error: float) -> str:
    return f"SQNR {sqnr_db(error**2, 1.0):.1f} dB"


def _as_direction(error: float) -> str:
    return f"update direction off by {error:.1%}"
