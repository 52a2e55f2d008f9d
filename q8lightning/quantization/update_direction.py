"""How far stored moments turn the direction in which Adam steps, ``exp_avg / (sqrt(exp_avg_sq) + eps)``.

The error of a small second moment counts here as much as it changes the step; the error of the tensors themselves
cannot see it. Of large tensors a quarter is looked at (``sampling.py``): training stands still meanwhile, and their
ratio of error to signal is known to well under a percent from that.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backend import has_kernels, update_directions
from q8lightning.quantization.codec import Codec
from q8lightning.quantization.coding import Coding
from q8lightning.quantization.packing import kept_index, unpack
from q8lightning.quantization.sampling import STRETCH, stretches_of, weight_of

CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Elements that are decoded and compared at a time: on a CPU they stay in the caches, on a GPU the scratch stays under
half a gigabyte."""


class StoredMoment(NamedTuple):
    """A moment and what is stored in its place.

    Attributes:
        values: ``[numel]`` float, the original.
        codec: How it is encoded; None if it is stored as it is.
        data: ``[nbytes]`` uint8, what :func:`q8lightning.quantization.packing.pack` returned for it; None if it is
            stored as it is.
    """

    values: Tensor
    codec: Codec | None = None
    data: Tensor | None = None


class Moments(NamedTuple):
    """The moments of one parameter, of one size, on one device.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment, its elements in the same order.
        eps: The optimizer's.
    """

    exp_avg: StoredMoment
    exp_avg_sq: StoredMoment
    eps: float = 1e-8

    @property
    def moments(self) -> tuple[StoredMoment, StoredMoment]:
        """Both."""
        return self[:2]


def update_direction_sums(pairs: Sequence[Moments]) -> Tensor:
    """Return how far each parameter's update direction is off after decoding; a GPU is not waited for.

    Args:
        pairs: At least one; all on one device.

    Returns:
        ``[len(pairs), 2]`` float64 on their device: the sum of squared differences between the direction of what is
        stored and that of the original, and the sum of squares of the original one, in squared units of the learning
        rate. Zeros for empty tensors; NaN where a moment has no numbers, or where both moments and ``eps`` are zero.
        Directions are float32 (float64 for moments that are), the sums float64.
    """
    sums = torch.empty(len(pairs), 2, dtype=torch.float64, device=pairs[0].exp_avg.values.device)
    alike: dict[Hashable, list[int]] = {}
    for index, pair in enumerate(pairs):
        alike.setdefault(_likeness(pair), []).append(index)
    for likeness, members in alike.items():
        chosen = [pairs[index] for index in members]
        part = torch.stack([_sums(pair) for pair in chosen]) if likeness is None else _sums_in_a_launch(chosen)
        sums[kept_index(tuple(members), sums.device)] = part
    return sums


def _likeness(pair: Moments) -> Hashable:
    """Return what pairs of one launch have in common, None for those that no launch takes."""
    memory = {each.data.untyped_storage()._cdata for each in pair.moments if each.data is not None}
    if len(memory) > 1 or not all(has_kernels(each.values) and each.values.is_contiguous() for each in pair.moments):
        return None
    return *memory, *((each.values.dtype, each.codec) for each in pair.moments), pair.eps


def _sums_in_a_launch(pairs: Sequence[Moments]) -> Tensor:
    sums = torch.empty(len(pairs), 2, dtype=torch.float64, device=pairs[0].exp_avg.values.device)
    stored = [each.data for each in pairs[0].moments if each.data is not None]
    buffer = torch.empty(0, dtype=torch.uint8, device=sums.device)
    if stored:
        buffer.set_(stored[0].untyped_storage())
    first, second = ([pair.moments[i] for pair in pairs] for i in range(2))
    update_directions().update_direction_sums(
        ([each.values for each in first], [each.values for each in second]),
        (_starts(first), _starts(second)),
        (_coding(first[0]), _coding(second[0])),
        buffer,
        pairs[0].eps,
        sums,
    )
    return sums


def _starts(moments: list[StoredMoment]) -> tuple[int, ...]:
    return tuple(0 if each.data is None else int(each.data.storage_offset()) for each in moments)


def _coding(moment: StoredMoment) -> Coding | None:
    return None if moment.codec is None else moment.codec.coding


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


_Part = slice | Tensor
"""Stretches of a tensor: a range of them, or their numbers."""


def _parts(values: Tensor) -> list[_Part]:
    """Cut what is looked at into parts of a chunk each."""
    count = max(CHUNK.get(values.device.type, CHUNK["cuda"]) // STRETCH, 1)
    taken = stretches_of(values.numel())
    if taken is not None:
        return list(torch.split(taken.to(values.device), count))
    stretches = -(-values.numel() // STRETCH)
    return [slice(start, start + count) for start in range(0, stretches, count)]


def _look(moment: StoredMoment, part: _Part) -> tuple[Tensor, Tensor]:
    """Return original and decoded elements, copies in float32 or float64."""
    values, codec, data = moment
    dtype = torch.promote_types(values.dtype, torch.float32)
    original = _rows(values, part, STRETCH)
    if codec is None or data is None:
        return original.to(dtype, copy=True), original.to(dtype, copy=True)
    codes, scales, *residual = unpack(data, codec, values.numel())
    scales = _rows(scales, part, STRETCH // codec.block_size)
    stored = codec.decode(
        (_rows(codes, part, STRETCH), scales, *(_rows(r, part, STRETCH) for r in residual)), values.dtype
    )
    return original.to(dtype, copy=True), stored.to(dtype)


def _rows(x: Tensor, part: _Part, stretch: int) -> Tensor:
    """Return the rows of a part, of which a stretch has so many."""
    if isinstance(part, slice):
        return x[part.start * stretch : part.stop * stretch]
    whole = x[: x.shape[0] // stretch * stretch]
    return whole.view(-1, stretch, *x.shape[1:])[part].flatten(0, 1)
