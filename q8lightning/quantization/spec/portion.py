"""The part of a tensor that one process holds: a box, and which blocks of the whole lie in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """A border between the parts of two processes that runs through a block.

    Attributes:
        dim: The dimension that is cut.
        place: Where the part of the second process begins.
    """

    dim: int
    place: int


@dataclass(frozen=True)
class Portion:
    """Where the part of a process lies in a whole tensor.

    Attributes:
        shape: Of the whole.
        starts: Where the part begins, for each dimension.
        sizes: Its shape; a part may be empty.
        borders: For each dimension, where the parts of other processes begin, 0 aside; the same in all processes.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    borders: tuple[tuple[int, ...], ...]

    @property
    def is_whole(self) -> bool:
        """Whether every process holds all of the tensor."""
        return not any(self.borders)

    def cut(self, block_size: int, axis: int | None) -> Cut | None:
        """Return a border that runs through a block; None if every block lies in one part, and parts are whole blocks.

        Args:
            block_size: Elements of a block of the whole tensor.
            axis: The axis of the channels, not negative, or None; see
                :class:`~q8lightning.quantization.codecs.weight.WeightCodec`.
        """
        along = self._along(axis)
        divided = [dim for dim in along if self.borders[dim]]
        if not divided:
            return None
        inner = max(divided)  # what lies inside of it is contiguous in a part
        place = along.index(inner)
        width = math.prod(self.shape[dim] for dim in along[place + 1 :])
        borders = list(self.borders[inner])
        if math.prod(self.shape[dim] for dim in along[:place]) > 1:
            borders.append(self.shape[inner])  # the next stretch of the same part begins elsewhere
        broken = next((border for border in borders if border * width % block_size), None)
        return None if broken is None else Cut(inner, broken)

    def block_numbers(self, block_size: int, axis: int | None) -> Tensor:
        """Return which blocks of the whole lie in the part, in the order in which they lie there.

        Args:
            block_size: As for :meth:`cut`, which returned None.
            axis: Likewise.

        Returns:
            ``[blocks]`` int64: numbers as those of all blocks of the whole, row by row, where a row begins a new block.
        """
        along = self._along(axis)
        row, whole_row = (math.prod(shape[dim] for dim in along) for shape in (self.sizes, self.shape))
        first = torch.arange(-(-row // block_size), dtype=torch.int64, device="cpu") * block_size
        where, stride = torch.zeros_like(first), 1
        for dim in reversed(along):
            where += (first % self.sizes[dim] + self.starts[dim]) * stride if self.sizes[dim] else 0
            first, stride = first // max(self.sizes[dim], 1), stride * self.shape[dim]
        numbers = where // block_size
        if axis is None:
            return numbers
        rows = torch.arange(self.sizes[axis], dtype=torch.int64, device="cpu") + self.starts[axis]
        return (rows[:, None] * -(-whole_row // block_size) + numbers).reshape(-1)

    def _along(self, axis: int | None) -> Sequence[int]:
        """Return the dimensions along which blocks run, the outermost first."""
        return [dim for dim in range(len(self.shape)) if dim != axis]


def pieces(length: int, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return where a dimension of ``length`` is divided, ``(start, size)`` each, as ``torch.chunk`` does.

    Args:
        length: Elements.
        counts: Into how many parts it is divided, those again into so many, and so on.

    Returns:
        ``prod(counts)`` parts; those of the first division lie together. The last ones may be empty.
    """
    parts = [(0, length)]
    for count in counts:
        parts = [part for start, size in parts for part in _chunks(start, size, count)]
    return parts


def _chunks(start: int, size: int, count: int) -> list[tuple[int, int]]:
    step = -(-size // count)
    ends = [min(i * step, size) for i in range(count + 1)]
    return [(start + begin, end - begin) for begin, end in pairwise(ends)]
