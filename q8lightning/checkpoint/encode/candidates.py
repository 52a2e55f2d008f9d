"""Tensors that may be stored encoded and the moments of one parameter: encode them as their rules say, and measure.

A device is waited for once, for everything that was measured there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q8lightning.checkpoint.payload import QuantizedTensor, encode_tensors, in_memory_order
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.quantization.spec.reference import SMALLEST_NORMAL


@dataclass(eq=False)
class Candidate:
    """A tensor that may be stored encoded.

    Attributes:
        path: Its path in the checkpoint.
        kind: See :class:`~q8lightning.checkpoint.report.TensorLoss`.
        parameter: The name of the parameter that it is or belongs to; its path where that is not known.
        tensor: A dense float tensor.
        codec: What its rule asks for; None for one that is stored as it is and only part of a pair.
        payload: What is stored in its place; None if it is stored as it is.
        statistics: What the payload lost, five numbers.
    """

    path: str
    kind: str
    parameter: str
    tensor: Tensor
    codec: Codec | None
    payload: QuantizedTensor | None = None
    statistics: tuple[float, ...] = ()

    @property
    def values(self) -> Tensor:
        """Its elements as they lie in memory."""
        return in_memory_order(self.tensor)

    @property
    def decoded(self) -> Tensor:
        """What loading would give, in the same order."""
        return self.values if self.payload is None else in_memory_order(self.payload.decode())

    def stored(self, payload: QuantizedTensor | None) -> StoredMoment:
        """Return the moment with ``payload`` stored in its place."""
        return StoredMoment(self.values) if payload is None else StoredMoment(self.values, payload.codec, payload.data)


@dataclass(eq=False)
class Pair:
    """The moments of one parameter, of the same shape, strides and device.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        eps: The optimizer's.
        is_stepped_by: Whether the optimizer steps by these two; otherwise they are judged but not reported.
        squared_error: Of the update direction; see :class:`~q8lightning.checkpoint.report.DirectionLoss`.
        squares: Of the original direction.
    """

    exp_avg: Candidate
    exp_avg_sq: Candidate
    eps: float
    is_stepped_by: bool = True
    squared_error: float = 0.0
    squares: float = 0.0

    @property
    def is_encoded(self) -> bool:
        """Whether anything of it is."""
        return self.exp_avg.payload is not None or self.exp_avg_sq.payload is not None

    @property
    def moments(self) -> Moments:
        """Both moments as they are stored."""
        first, second = (each.stored(each.payload) for each in (self.exp_avg, self.exp_avg_sq))
        return Moments(first, second, self.eps)

    def measure(self) -> None:
        """Measure again; waits for the device."""
        self.squared_error, self.squares = update_direction_sums([self.moments])[0].tolist()


def encode_and_measure(candidates: Sequence[Candidate], pairs: Sequence[Pair]) -> list[str | None]:
    """Encode all candidates as their rules say into one stretch of memory; set what they and the pairs lose.

    Args:
        candidates: Tensors of one device, with a codec each; at least one.
        pairs: Moments on the same device.

    Returns:
        For each candidate why its payload must not take its place, None if it may.
    """
    items = [(each.tensor, each.codec, each.path) for each in candidates if each.codec is not None]
    payloads, failures, statistics = encode_tensors(items, measure=True)
    assert statistics is not None
    for candidate, payload in zip(candidates, payloads, strict=True):
        candidate.payload = payload
    encoded = [pair for pair in pairs if pair.is_encoded]
    parts = [failures.double(), statistics.view(-1)]
    if encoded:
        parts.append(update_direction_sums([pair.moments for pair in encoded]).view(-1))
    numbers = torch.cat(parts).tolist()  # the one transfer, which waits for the device
    count = len(candidates)
    for i, candidate in enumerate(candidates):
        candidate.statistics = tuple(numbers[count + 5 * i : count + 5 * (i + 1)])
    for i, pair in enumerate(encoded):
        pair.squared_error, pair.squares = numbers[6 * count + 2 * i : 6 * count + 2 * (i + 1)]
    return [
        reason_to_refuse(candidate.tensor, payload, held=not failed)
        for candidate, payload, failed in zip(candidates, payloads, numbers[:count], strict=True)
    ]


def is_held_unless_it_failed(tensor: Tensor, codec: Codec) -> bool:
    """Whether finite scales say that the payload may take the tensor's place, whatever its values are."""
    misread = codec.unsigned and not codec.marks_negative
    return not (misread or tensor.dtype == torch.float64 or not codec.is_stable_in(tensor.dtype))


def reason_to_refuse(tensor: Tensor, payload: QuantizedTensor, held: bool) -> str | None:
    """Say why the payload must not take the tensor's place, None if it may; ``held``: whether its scales are finite."""
    codec = payload.codec
    if not held:
        if not bool(tensor.isfinite().all()):
            return "it holds NaN or infinity"
        negative = codec.marks_negative and bool((tensor < 0).any())
        return "it holds a negative value" if negative else "its values exceed the range of float32"
    if codec.unsigned and not codec.marks_negative and bool((tensor < 0).any()):
        return f"it holds a negative value, which {codec.label} has no code for"
    if tensor.dtype == torch.float64 and bool(_vanished(tensor, payload).any()):
        return "it holds nonzero values that are zero in float32"
    if not codec.is_stable_in(tensor.dtype):  # a 16-bit float can be too coarse for the finest levels
        again = QuantizedTensor.encode(payload.decode(), codec, payload.name)
        if not torch.equal(payload.data, again.data):
            return f"{tensor.dtype} is too coarse for {codec.label} at its magnitude"
    return None


def _vanished(tensor: Tensor, payload: QuantizedTensor) -> Tensor:
    """Tell which nonzero elements became zero because their magnitude does, not because a level is nearest."""
    gone = (payload.decode() == 0) & (tensor != 0)
    return gone if payload.codec.keeps_nonzero else gone & (tensor.abs() < SMALLEST_NORMAL)
