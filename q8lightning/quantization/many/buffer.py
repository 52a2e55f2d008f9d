"""One buffer for the bytes of many encoded tensors: where each lies, and what is done with all of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends.cpu_memory import new_tensor
from q8lightning.system.ambient import lasting

ALIGNMENT = 16
"""Bytes. Codes begin at multiples of it, because kernels write so many at once."""


class BufferLayout(NamedTuple):
    """Where the data of several tensors lies in one buffer.

    Attributes:
        starts: Where that of each begins, in bytes.
        nbytes: Where the last ends.
        gaps: int64 on the device: the bytes between them.
        cuts: The sizes of all gaps and data, in turns.
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
        sizes: For each tensor the bytes of its scales and of all its data.
        device: Where the gaps are wanted.
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
    device = layout.gaps.device
    if device.type == "cpu":
        buffer = new_tensor(layout.nbytes, torch.uint8)
    else:
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    return buffer.index_fill_(0, layout.gaps, 0)  # or they would carry into the file whatever was in memory before


def split(buffer: Tensor, cuts: list[int]) -> list[Tensor]:
    """Return the stretches of data in a buffer, without the gaps."""
    return list(buffer.split_with_sizes(cuts)[1::2])  # in one call: each slice would take a microsecond


def copy_together(data: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Copy ``data`` of one device into a buffer of its own, so that it keeps nothing else alive.

    Args:
        data: ``[nbytes]`` uint8 each, as an ``EncodedBuffer`` has it; at least one.

    Returns:
        The buffer and the sizes of its stretches, of gaps and data in turns.
    """
    layout = lay_out(tuple((0, each.nbytes) for each in data), data[0].device)
    buffer = allocate(layout)
    torch._foreach_copy_(split(buffer, layout.cuts), list(data))
    return buffer, layout.cuts


@lru_cache(maxsize=16)
@lasting()
def kept_index(members: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the numbers as an index, ``[members]`` int64 on a device."""
    # Kept, because to copy it there waits for the device.
    return torch.tensor(members, dtype=torch.int64, device=device)
