"""Make work lists: they tell each program of a launch which part of which tensor it handles.

A row of the list stands for a segment, several tiles of a tensor, and holds offsets from the first tensor. So the list
stays small enough for the caches. It depends on addresses and sizes only and is kept, so that later calls for the same
tensors cost their launch and nothing else.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends.kernels.launch import rows_of
from q8lightning.quantization.spec.layout import Layout
from q8lightning.system.ambient import lasting

SEGMENT = 16
"""Tiles of a segment. More would make shorter lists, and leave more programs of small tensors without work."""


class Group(NamedTuple):
    """Tensors that are handled together, as numbers.

    Attributes:
        addresses: The address of each tensor.
        numels: Its number of elements.
        dtypes: Its dtype.
        starts: Where its counterpart begins in a buffer that is aligned to 16 bytes, in bytes.
        numbers: The row of its statistics, and its number where a hash chooses blocks.
    """

    addresses: tuple[int, ...]
    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    numbers: tuple[int, ...]


class Launch(NamedTuple):
    """One launch of a group.

    Attributes:
        dtype: The dtype of its tensors.
        members: Its tensors, as indices in the group. Offsets count from the first of them.
        aligned: Whether all tensors and counterparts begin at multiples of 16 bytes and have a multiple of 16 elements.
        rows: Rows of a tile.
        warps: Warps of a program.
        work: ``[segments, columns]`` int64, the work list. The first column is the number of elements from there to the
            end of the tensor. Then follow offsets: of codecs, those of values, codes, scales and residual codes; else
            those of values and quantized values, and the number of the first block. The last column is the tensor's
            number.
        first: ``[members]`` int64, each tensor's first program.
        used: ``[members]`` int64, how many of its programs have work.
        numbers: ``[members]`` int64, each tensor's number.
    """

    dtype: torch.dtype
    members: tuple[int, ...]
    aligned: bool
    rows: int
    warps: int
    work: Tensor
    first: Tensor
    used: Tensor
    numbers: Tensor

    @property
    def programs(self) -> int:
        """Programs to launch."""
        return len(self.work) * SEGMENT

    @property
    def multiple(self) -> int:
        """The number of elements of which all offsets of values are multiples."""
        return 16 // self.dtype.itemsize if self.aligned else 1


def describe(tensors: Sequence[Tensor], starts: tuple[int, ...], numbers: tuple[int, ...] | None = None) -> Group:
    """Return what a work list depends on. Without ``numbers``, tensors are numbered in their order."""
    return Group(
        tuple(tensor.data_ptr() for tensor in tensors),
        tuple(tensor.numel() for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        starts,
        tuple(range(len(tensors))) if numbers is None else numbers,
    )


@lru_cache(maxsize=32)
@lasting()
def launches(group: Group, layout: Layout | None, row: int, settings: str, device: torch.device) -> tuple[Launch, ...]:
    """Return a launch for each dtype and alignment in a group. Empty tensors take part in none.

    Args:
        group: The tensors.
        layout: The layout of encoded counterparts; None for counterparts that are values of the same dtype.
        row: Elements of a row of a tile.
        settings: The kernel's name in ``launch.SETTINGS``.
        device: The device of the tensors.
    """
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, (address, numel, dtype, start, _) in enumerate(zip(*group, strict=True)):
        counterparts = (start,) if layout is None else layout.code_starts(start, numel)
        if numel:
            kinds.setdefault((dtype, not any(n % 16 for n in (address, numel, *counterparts))), []).append(index)
    return tuple(
        _launch(group, layout, row, settings, device, dtype, aligned, members)
        for (dtype, aligned), members in kinds.items()
    )


def _launch(
    group: Group,
    layout: Layout | None,
    row: int,
    settings: str,
    device: torch.device,
    dtype: torch.dtype,
    aligned: bool,
    members: list[int],
) -> Launch:
    rows, warps = rows_of(settings, row, dtype.itemsize)
    base, size, segment = group.addresses[members[0]], dtype.itemsize, rows * row * SEGMENT
    columns: list[tuple[int, ...]] = []
    for index in members:
        numel, start, number = group.numels[index], group.starts[index], group.numbers[index]
        offset = (group.addresses[index] - base) // size
        if layout is None:
            columns.append((numel, offset, start // size, 0, number))
        else:
            stages = layout.code_starts(start, numel)
            columns.append((numel, offset, stages[0], start // layout.scale_dtype.itemsize, stages[-1], number))
    if layout is None:
        advance = [-segment, segment, segment, segment // row, 0]
    else:
        codes, later = (segment // 8 * bits for bits in (layout.bits[0], layout.bits[-1]))
        advance = [-segment, segment, codes, segment // layout.block_size * layout.scales, later, 0]
    work, first, used = _work(columns, advance, rows * row, device)
    numbers = torch.tensor([group.numbers[index] for index in members], dtype=torch.int64, device=device)
    return Launch(dtype, tuple(members), aligned, rows, warps, work, first, used, numbers)


def _work(
    columns: list[tuple[int, ...]], advance: list[int], tile: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut tensors into segments, each ``advance`` further than the one before, column by column."""
    table = torch.tensor(columns, dtype=torch.int64, device="cpu")
    used = (table[:, 0] + tile - 1) // tile
    segments = (used + SEGMENT - 1) // SEGMENT
    first = segments.cumsum(0) - segments
    total = int(segments.sum())
    # The rest runs on the device, so that a row for each tensor is copied there, not one for each segment.
    start = torch.cat([table, first[:, None], segments[:, None]], dim=1).to(device)
    rows = torch.repeat_interleave(start[:, :-1], start[:, -1], dim=0, output_size=total)
    index = torch.arange(total, dtype=torch.int64, device=device) - rows[:, -1]
    work = rows[:, :-1] + index[:, None] * torch.tensor(advance, dtype=torch.int64, device=device)
    return work.contiguous(), (first * SEGMENT).to(device), used.to(device)
