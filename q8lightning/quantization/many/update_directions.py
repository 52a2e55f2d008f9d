"""Measure how far stored moments turn Adam's steps, ``exp_avg / (sqrt(exp_avg_sq) + eps)``.

The error of a small second moment counts here as much as it changes the step, while the error of the tensor does not
show it. Of a large tensor an eighth is measured (``sampling.py``), because training waits meanwhile, and a sample tells
the ratio of error to signal as well as the whole.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.backends.choose import has_kernels
from q8lightning.quantization.backends.cpu_memory import scratch
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.buffer import kept_index
from q8lightning.quantization.spec.layout import take_stretches
from q8lightning.quantization.spec.sampling import STRETCH, stretches_of, stretches_on_cpu, weight_of
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import share_out

CHUNK = {"cpu": 2**16, "cuda": 2**24}
"""Elements that are decoded and compared at a time. They fit into the caches of a CPU; on a GPU, scratch stays under
half a gigabyte."""

_Part = slice | Tensor
"""Stretches of a tensor: a range, or their numbers."""


class StoredMoment(NamedTuple):
    """A moment of one parameter, and its encoded form.

    Attributes:
        values: ``[numel]`` float, the original.
        codec: Its codec; None if it is stored as it is.
        data: ``[nbytes]`` uint8, its parts as :meth:`Codec.join` writes them; None if it is stored as it is.
    """

    values: Tensor
    codec: Codec | None = None
    data: Tensor | None = None


class Moments(NamedTuple):
    """Both moments of one parameter, on one device.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment, its elements in the same order.
        eps: The eps of the optimizer.
    """

    exp_avg: StoredMoment
    exp_avg_sq: StoredMoment
    eps: float = 1e-8

    @property
    def moments(self) -> tuple[StoredMoment, StoredMoment]:
        """The first and the second moment."""
        return self[:2]


class MomentLaunch(NamedTuple):
    """Pairs of moments that one launch measures.

    Attributes:
        members: The indices of the pairs.
        codecs: The codecs of all first and of all second moments; None for moments that are stored as they are.
        starts: Where the data of each first and of each second moment begins in the buffer, in bytes; 0 for none.
        eps: The eps of the optimizer.
    """

    members: tuple[int, ...]
    codecs: tuple[Codec | None, Codec | None]
    starts: tuple[tuple[int, ...], tuple[int, ...]]
    eps: float

    def measure(self, firsts: Sequence[Tensor], seconds: Sequence[Tensor], buffer: Tensor, sums: Tensor) -> None:
        """Write the rows of these pairs into the sums that :func:`update_direction_sums` returns.

        Args:
            firsts: The first moment of each pair, dense in memory, in the same order of memory as the second.
            seconds: The second moment of each pair.
            buffer: uint8, the data of all moments.
            sums: ``[pairs, 2]`` float64 to be written.
        """
        where = kept_index(self.members, sums.device)
        first, second = (None if codec is None else codec.kernel for codec in self.codecs)
        if not all(map(_in_kernels, self.codecs)):
            sides = zip(*(self._stored(i, tensors, buffer) for i, tensors in enumerate((firsts, seconds))), strict=True)
            sums[where] = torch.stack([_sums(Moments(one, two, self.eps)) for one, two in sides])
            return
        from q8lightning.quantization.backends.kernels import many  # imports Triton

        part = torch.empty(len(self.members), 2, dtype=torch.float64, device=sums.device)
        many.update_direction_sums((firsts, seconds), self.starts, (first, second), buffer, self.eps, part)
        sums[where] = part

    def _stored(self, side: int, tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[StoredMoment]:
        codec = self.codecs[side]
        for tensor, start in zip(tensors, self.starts[side], strict=True):
            data = None if codec is None else buffer[start : start + codec.encoded_bytes(tensor.numel())]
            yield StoredMoment(tensor.as_strided((tensor.numel(),), (1,)), codec, data)


def _in_kernels(codec: Codec | None) -> bool:
    """Tell whether kernels can read moments with this codec, or without one."""
    return codec is None or codec.kernel is not None


@neutral()
def update_direction_sums(pairs: Sequence[Moments]) -> Tensor:
    """Measure how far each parameter's update direction is off after decoding. On a GPU this returns at once.

    Args:
        pairs: At least one, all on one device.

    Returns:
        ``[len(pairs), 2]`` float64 on their device, in squared units of the learning rate: the sum of squared
        differences between stored and original direction, and the sum of squares of the original. Zeros for empty
        tensors. NaN if a moment holds NaN, or if both moments and ``eps`` are zero somewhere. Directions are computed
        in float32, or in float64 if the moments are.
    """
    sums = torch.empty(len(pairs), 2, dtype=torch.float64, device=pairs[0].exp_avg.values.device)
    alike: dict[Hashable, list[int]] = {}
    for index, pair in enumerate(pairs):
        alike.setdefault(_likeness(pair), []).append(index)
    for likeness, members in alike.items():
        chosen = [pairs[index] for index in members]
        if likeness is None:
            sizes = [pair.exp_avg.values.nbytes if sums.device.type == "cpu" else 0 for pair in chosen]
            each = share_out([partial(_sums_on_cpu if _is_simple(pair) else _sums, pair) for pair in chosen], sizes)
            sums[kept_index(tuple(members), sums.device)] = torch.stack(each)
        else:
            _measure_in_a_launch(tuple(members), chosen, sums)
    return sums


def _likeness(pair: Moments) -> Hashable:
    """Return a key that pairs of one launch share; None for a pair that no launch takes."""
    memory = {each.data.untyped_storage()._cdata for each in pair.moments if each.data is not None}
    if len(memory) > 1 or not all(
        has_kernels(each.values) and each.values.is_contiguous() and _in_kernels(each.codec) for each in pair.moments
    ):
        return None
    return *memory, *((each.values.dtype, each.codec) for each in pair.moments), pair.eps


def _measure_in_a_launch(members: tuple[int, ...], pairs: Sequence[Moments], sums: Tensor) -> None:
    stored = [each.data for each in pairs[0].moments if each.data is not None]
    buffer = torch.empty(0, dtype=torch.uint8, device=sums.device)
    if stored:
        buffer.set_(stored[0].untyped_storage())
    first, second = ([pair.moments[i] for pair in pairs] for i in range(2))
    alike = MomentLaunch(members, (first[0].codec, second[0].codec), (_starts(first), _starts(second)), pairs[0].eps)
    alike.measure([each.values for each in first], [each.values for each in second], buffer, sums)


def _starts(moments: list[StoredMoment]) -> tuple[int, ...]:
    return tuple(0 if each.data is None else int(each.data.storage_offset()) for each in moments)


def _sums(pair: Moments) -> Tensor:
    exp_avg, exp_avg_sq, eps = pair
    sums = torch.zeros(2, dtype=torch.float64, device=exp_avg.values.device)
    for part in _parts(exp_avg.values):
        first, stored_first = _look(exp_avg, part)
        second, stored_second = _look(exp_avg_sq, part)
        direction = first / second.sqrt_().add_(eps)
        error = (stored_first / stored_second.sqrt_().add_(eps)).sub_(direction).double()
        direction = direction.double()
        sums += torch.stack([torch.dot(error, error), torch.dot(direction, direction)])
    return sums * weight_of(exp_avg.values.numel())


def _is_simple(pair: Moments) -> bool:
    """Tell whether a CPU can decode and compare a pair without calling operators of this package for each chunk."""
    return all(
        each.values.device.type == "cpu"
        and each.values.dtype == torch.float32
        and (each.codec is None or cpu.knows(each.codec.kernel))
        for each in pair.moments
    )


def _sums_on_cpu(pair: Moments) -> Tensor:
    """As :func:`_sums`, in memory that is used again, and from a sample of smaller tensors, too."""
    numel = pair.exp_avg.values.numel()
    block_size = max(1 if each.codec is None else each.codec.block_size for each in pair.moments)
    taken, length = stretches_on_cpu(numel, block_size)
    if taken is not None:
        error, squares = _add_up(pair, torch.split(taken, max(CHUNK["cpu"] // length, 1)), length)
        if squares:
            weight = numel / (len(taken) * length)
            return torch.tensor([error * weight, squares * weight], dtype=torch.float64, device="cpu")
    count = max(CHUNK["cpu"] // STRETCH, 1)
    parts = [slice(start, start + count) for start in range(0, -(-numel // STRETCH), count)]
    return torch.tensor(_add_up(pair, parts, STRETCH), dtype=torch.float64, device="cpu")


def _add_up(pair: Moments, parts: Sequence[_Part], length: int) -> tuple[float, float]:
    """Return both sums over parts of a pair, whose stretches have so many elements."""
    error = squares = 0.0
    for part in parts:
        first, second = (take_stretches(each.values, part, length) for each in pair.moments)
        memory = scratch(1, first.numel())
        spare, direction, _, stored_first, stored_second, *_ = (each.view(-1) for each in memory.floats)
        for moment, values, out in zip(pair.moments, (first, second), (stored_first, stored_second), strict=True):
            kernel = None if moment.codec is None else moment.codec.kernel
            if kernel is None or moment.data is None:
                out.copy_(values)
            else:  # this overwrites the first three of the memory
                encoded = kernel.layout.split(moment.data, moment.values.numel())
                cpu.decode_into(kernel, kernel.layout.take(encoded, part, length), out)
        root = torch.sqrt(second, out=spare).add_(pair.eps)
        torch.div(first, root, out=direction)
        stored_first.div_(stored_second.sqrt_().add_(pair.eps)).sub_(direction)
        one, two = memory.doubles
        one.copy_(stored_first)
        two.copy_(direction)
        error += float(torch.dot(one, one))
        squares += float(torch.dot(two, two))
    return error, squares


def _parts(values: Tensor) -> list[_Part]:
    """Cut the stretches of a tensor that are measured into parts of a chunk each."""
    count = max(CHUNK.get(values.device.type, CHUNK["cuda"]) // STRETCH, 1)
    taken = stretches_of(values.numel())
    if taken is not None:
        return list(torch.split(taken.to(values.device), count))
    stretches = -(-values.numel() // STRETCH)
    return [slice(start, start + count) for start in range(0, stretches, count)]


def _look(moment: StoredMoment, part: _Part) -> tuple[Tensor, Tensor]:
    """Return the original and the decoded elements of a part, as copies in float32 or float64."""
    values, codec, data = moment
    dtype = torch.promote_types(values.dtype, torch.float32)
    original = take_stretches(values, part, STRETCH)
    if codec is None or data is None:
        return original.to(dtype, copy=True), original.to(dtype, copy=True)
    stored = codec.decode_stretches(codec.split(data, values.numel()), part, STRETCH, values.dtype)
    return original.to(dtype, copy=True), stored.to(dtype)
