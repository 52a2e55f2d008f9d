"""Measure how far stored moments turn Adam's steps, ``exp_avg / (sqrt(exp_avg_sq) + eps)``.

The error of a small second moment counts here as much as it changes the step, while the error of the tensor does not
show it. Of a large tensor an eighth is measured (``sampling.py``), because training waits meanwhile, and a sample tells
the ratio of error to signal as well as the whole.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from operator import itemgetter
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
from q8lightning.system.workers import batches, share_out

CHUNK = {"cpu": 2**16, "cuda": 2**24}
"""Elements that are decoded and compared at a time. They fit into the caches of a CPU; on a GPU, scratch stays under
half a gigabyte."""

_TOGETHER = 2**20
"""Elements up to which a thread of a CPU measures pairs in one go."""

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
            sums[kept_index(tuple(members), sums.device)] = _sums_alone(chosen)
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


def _sums_alone(pairs: Sequence[Moments]) -> Tensor:
    """Measure pairs that no launch takes; on a CPU in several threads, small ones together."""
    groups: dict[Hashable, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault((*(each.codec for each in pair.moments), pair.eps) if _is_simple(pair) else i, []).append(i)
    most = min(_TOGETHER, sum(pair.exp_avg.values.numel() for pair in pairs) // (4 * torch.get_num_threads()))
    jobs, sizes, order = [], [], list[int]()
    for members in groups.values():
        for batch in batches([pairs[i].exp_avg.values.numel() for i in members], most):
            some = [pairs[members[place]] for place in batch]
            jobs.append(partial(_sums_on_cpu, some) if _is_simple(some[0]) else partial(_sums, some[0]))
            sizes.append(sum(x.nbytes for x in (pair.exp_avg.values for pair in some) if x.device.type == "cpu"))
            order += (members[place] for place in batch)
    rows = torch.cat([each.view(-1, 2) for each in share_out(jobs, sizes)]).unbind()
    # Sorted on the host: an index that is copied to a GPU would be waited for.
    return torch.stack([row for _, row in sorted(zip(order, rows, strict=True), key=itemgetter(0))])


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


class _Piece(NamedTuple):
    """Some of a pair of moments.

    Attributes:
        pair: Its number.
        part: Which stretches.
        length: Elements of a stretch.
        numel: Elements of all these stretches.
    """

    pair: int
    part: _Part
    length: int
    numel: int


def _sums_on_cpu(pairs: Sequence[Moments]) -> Tensor:
    """As :func:`_sums` of several pairs that differ in their values only, from samples of smaller tensors, too.

    Returns:
        ``[pairs, 2]`` float64.
    """
    block_size = max(1 if each.codec is None else each.codec.block_size for each in pairs[0].moments)
    sums, weights = [[0.0, 0.0] for _ in pairs], [1.0 for _ in pairs]
    pieces: list[_Piece] = []
    for i, pair in enumerate(pairs):
        numel = pair.exp_avg.values.numel()
        taken, length = stretches_on_cpu(numel, block_size)
        if taken is None:
            pieces += _whole(i, numel)
            continue
        weights[i] = numel / (len(taken) * length)
        pieces += (
            _Piece(i, some, length, len(some) * length) for some in torch.split(taken, max(CHUNK["cpu"] // length, 1))
        )
    _add_up(pairs, pieces, block_size, sums)
    unseen = [
        i for i, (weight, (_, squares)) in enumerate(zip(weights, sums, strict=True)) if weight > 1 and not squares
    ]
    for i in unseen:
        sums[i], weights[i] = [0.0, 0.0], 1.0
    _add_up(pairs, [each for i in unseen for each in _whole(i, pairs[i].exp_avg.values.numel())], block_size, sums)
    return torch.tensor(
        [[weight * each for each in two] for weight, two in zip(weights, sums, strict=True)],
        dtype=torch.float64,
        device="cpu",
    )


def _whole(pair: int, numel: int) -> Iterator[_Piece]:
    """Yield all of a pair, a chunk at a time."""
    step = max(CHUNK["cpu"] // STRETCH, 1)
    for start in range(0, -(-numel // STRETCH), step):
        yield _Piece(pair, slice(start, start + step), STRETCH, min(step * STRETCH, numel - start * STRETCH))


def _add_up(pairs: Sequence[Moments], pieces: Sequence[_Piece], block_size: int, sums: list[list[float]]) -> None:
    """Add what is found in these pieces to the sums of their pairs, small pieces together."""
    batch: list[_Piece] = []
    for i, piece in enumerate(pieces):
        batch.append(piece)
        following = pieces[i + 1].numel if i + 1 < len(pieces) else CHUNK["cpu"]
        # Behind a short block, the next piece's blocks would begin at the wrong place.
        if piece.numel % block_size or sum(each.numel for each in batch) + following > CHUNK["cpu"]:
            for each, (error, squares) in zip(batch, _compare(pairs, batch), strict=True):
                sums[each.pair][0] += error
                sums[each.pair][1] += squares
            batch.clear()


def _compare(pairs: Sequence[Moments], pieces: Sequence[_Piece]) -> list[tuple[float, float]]:
    """Return the two sums of each piece."""
    numel = sum(piece.numel for piece in pieces)
    memory = scratch(2, numel)  # two rows: what is decoded lies behind all that decoding fewer elements overwrites
    spare, direction, _, *stored = (each[0] for each in memory.floats)
    originals = []
    for side, out in zip(range(2), stored, strict=False):
        moments = [pairs[piece.pair].moments[side] for piece in pieces]
        places = [piece[1:3] for piece in pieces]
        values = [take_stretches(each.values, *place) for each, place in zip(moments, places, strict=True)]
        originals.append(torch.cat(values))
        kernel = None if moments[0].codec is None else moments[0].codec.kernel
        if kernel is None:
            out.copy_(originals[side])
            continue
        encoded = [kernel.layout.views(each.data, each.values.numel()) for each in moments if each.data is not None]
        taken = [kernel.layout.take(each, *place) for each, place in zip(encoded, places, strict=True)]
        cpu.decode_into(kernel, tuple(map(torch.cat, zip(*taken, strict=True))), out)
    (first, second), (stored_first, stored_second, *_) = originals, stored
    torch.div(first, torch.sqrt(second, out=spare).add_(pairs[0].eps), out=direction)
    stored_first.div_(stored_second.sqrt_().add_(pairs[0].eps)).sub_(direction)
    one, two = (each[:numel] for each in memory.doubles)
    sizes = [piece.numel for piece in pieces]
    errors, directions = torch.split(one.copy_(stored_first), sizes), torch.split(two.copy_(direction), sizes)
    return [(float(e.dot(e)), float(d.dot(d))) for e, d in zip(errors, directions, strict=True)]


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
    stored = codec.decode_stretches(data, values.numel(), part, STRETCH, values.dtype)
    return original.to(dtype, copy=True), stored.to(dtype)
