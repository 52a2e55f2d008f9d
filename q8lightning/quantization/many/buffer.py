"""Lay out the bytes of many encoded tensors in one buffer."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.system.ambient import lasting

ALIGNMENT = 16
"""Codes begin at multiples of so many bytes, because kernels write as many at once."""


class BufferLayout(NamedTuple):
    """The places of several tensors' data in one buffer.

    Attributes:
        starts: Where the data of each tensor begins, in bytes.
        nbytes: The size of the buffer.
        gaps: int64 on the device, the indices of the bytes between the data.
        cuts: The sizes of gap and data, gap and data, and so on.
    """

    starts: tuple[int, ...]
    nbytes: int
    gaps: Tensor
    cuts: list[int]


@lru_cache(maxsize=16)
@lasting()
def lay_out(sizes: tuple[tuple[int, int], ...], device: torch.device) -> BufferLayout:
    """Lay out the data of tensors so that their codes are aligned.

    Args:
        sizes: For each tensor the bytes of its scales, and of all its data.
        device: The device of the buffer.
    """
    starts: list[int] = []
    gaps: list[int] = []
    cuts: list[int] = []
    end = 0
    for scale_bytes, size in sizes:
        start = end + -(end + scale_bytes) % ALIGNMENT
        starts.append(start)
        gaps += range(end, start)
        cuts += (start - end, size)
        end = start + size
    return BufferLayout(tuple(starts), end, torch.tensor(gaps, dtype=torch.int64, device=device), cuts)


def allocate(layout: BufferLayout) -> Tensor:
    """Return a new buffer."""
    return torch.empty(layout.nbytes, dtype=torch.uint8, device=layout.gaps.device)


def clear_gaps(buffer: Tensor, layout: BufferLayout) -> None:
    """Write zeros to the gaps of a buffer: otherwise old memory would end up in the file.

    Called when the data is there: to touch new memory first takes long, and several threads write the data.
    """
    buffer.index_fill_(0, layout.gaps, 0)


def split(buffer: Tensor, cuts: list[int]) -> list[Tensor]:
    """Return the data of each tensor in a buffer."""
    return list(buffer.split_with_sizes(cuts)[1::2])  # one call, since each slice would take a microsecond


def copy_together(data: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Copy the data of tensors into a buffer of its own, so that it keeps nothing else alive.

    Args:
        data: ``[nbytes]`` uint8 each, as ``EncodedBuffer.data`` has it, all on one device; at least one.

    Returns:
        The buffer, and its :attr:`BufferLayout.cuts`.
    """
    layout = lay_out(tuple((0, each.nbytes) for each in data), data[0].device)
    buffer = allocate(layout)
    torch._foreach_copy_(split(buffer, layout.cuts), list(data))
    clear_gaps(buffer, layout)
    return buffer, layout.cuts


@lru_cache(maxsize=16)
@lasting()
def kept_index(members: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as an index, ``[members]`` int64 on a device; kept, because copying it there waits."""
    return torch.tensor(members, dtype=torch.int64, device=device)
