"""Work lists: which program of one launch handles which part of which tensor.

A list depends on nothing but addresses and sizes. It is made once and kept, so a group whose tensors stay where they
are costs its launch and nothing else.
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
"""Tiles to a row of a work list: rows are few enough for the caches, and no tensor wastes more programs than these."""


class Group(NamedTuple):
    """Tensors that are to be handled together, as numbers.

    Attributes:
        addresses: Where each tensor begins.
        numels: How many elements it has.
        dtypes: Of which dtype.
        starts: Where its counterpart begins, in bytes from the beginning of a buffer that is aligned to 16 bytes.
        numbers: What it is called: the row of its statistics, and its number where blocks are chosen by a hash.
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
        members: Which tensors of the group take part; offsets count from the first of them.
        aligned: Whether all of them begin at multiples of 16 bytes, as do their counterparts, and have a multiple of 16
            elements; the compiler must know.
        rows: Blocks a program handles.
        warps: Warps of a program.
        work: ``[segments, columns]`` int64: elements left from there to the end of the tensor, then offsets. The last
            column is the tensor's number; where nothing is encoded, the number of the first block is before it.
        first: ``[members]`` int64, each member's first program.
        used: ``[members]`` int64, how many programs have work in it.
        numbers: ``[members]`` int64, their numbers.
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
        """Of how many elements the offsets of its tensors are multiples."""
        return 16 // self.dtype.itemsize if self.aligned else 1


def describe(tensors: Sequence[Tensor], starts: tuple[int, ...], numbers: tuple[int, ...] | None = None) -> Group:
    """Return what a work list depends on; without ``numbers``, tensors are numbered as they come."""
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
    """Return a launch for each dtype and alignment in ``group``; empty tensors take part in none.

    Args:
        group: The tensors.
        layout: How the bytes of their counterparts lie; None if the counterparts are tensors of the same dtype.
        row: Elements of a row of a tile.
        settings: What the kernel is called in ``SETTINGS``.
        device: Where the tensors are.
    """
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, (address, numel, dtype, start, _) in enumerate(zip(*group, strict=True)):
        counterpart = start + (layout.scale_bytes(numel) if layout is not None else 0)
        if numel:
            kinds.setdefault((dtype, not any(n % 16 for n in (address, numel, counterpart))), []).append(index)
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
            codes = start + layout.scale_bytes(numel)
            columns.append((numel, offset, codes, start // 4, codes + numel, number))
    if layout is None:
        advance = [-segment, segment, segment, segment // row, 0]
    else:
        advance = [-segment, segment, segment, segment // layout.block_size * layout.scales, segment, 0]
    work, first, used = _work(columns, advance, rows * row, device)
    numbers = torch.tensor([group.numbers[index] for index in members], dtype=torch.int64, device=device)
    return Launch(dtype, tuple(members), aligned, rows, warps, work, first, used, numbers)


def _work(
    columns: list[tuple[int, ...]], advance: list[int], tile: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut tensors into segments; ``advance`` is how far each column moves on from one to the next."""
    table = torch.tensor(columns, dtype=torch.int64, device="cpu")
    used = (table[:, 0] + tile - 1) // tile
    segments = (used + SEGMENT - 1) // SEGMENT
    first = segments.cumsum(0) - segments
    total = int(segments.sum())
    # The rest on the device: what travels there is a row for each tensor, not for each segment.
    start = torch.cat([table, first[:, None], segments[:, None]], dim=1).to(device)
    rows = torch.repeat_interleave(start[:, :-1], start[:, -1], dim=0, output_size=total)
    index = torch.arange(total, dtype=torch.int64, device=device) - rows[:, -1]
    work = rows[:, :-1] + index[:, None] * torch.tensor(advance, dtype=torch.int64, device=device)
    return work.contiguous(), (first * SEGMENT).to(device), used.to(device)
