"""Scratch memory of each thread that computes on the CPU, used again and again."""

import threading

import torch
from torch import Tensor

from q8lightning.system.ambient import lasting


class Scratch:
    """Memory to compute in, for a chunk of so many rows.

    Attributes:
        floats: ``[rows, width]`` float32 each.
        integers: The same memory as int32.
        bytes: ``[rows, width]`` uint8, in the memory of the third float.
        codes: ``[rows, width]`` uint8, two of them, in memory of their own: those of a short chunk must not meet what a
            longer one has in its floats.
        spare: ``[2 * rows * width]`` uint8, behind them.
        doubles: ``[rows * width]`` float64, two of them.
    """

    def __init__(self, memory: Tensor, codes: Tensor, rows: int, width: int) -> None:
        words = memory[: 4 * FLOATS * rows * width].view(torch.float32).view(FLOATS, rows, width)
        self.floats = words.unbind()
        self.integers = words.view(torch.int32).unbind()
        self.bytes = words[2].view(-1).view(torch.uint8)[: rows * width].view(rows, width)
        sizes = [rows * width, rows * width, 2 * rows * width]
        first, second, self.spare = codes[: _CODES * rows * width].split_with_sizes(sizes)
        self.codes = first.view(rows, width), second.view(rows, width)
        end = _BYTES * rows * width
        self.doubles = memory[end - 16 * rows * width : end].view(torch.float64).view(2, -1).unbind()


def scratch(rows: int, width: int) -> Scratch:
    """Return what this thread computes in until it asks again; what was left there is still there.

    It is kept, because the system gives new memory page by page, which takes longer than to compute in it; and so are
    views of it, because a model has many tensors of one size.
    """
    kept = _OF_THREAD
    if kept.memory.numel() < _BYTES * rows * width or len(kept.views) == _VIEWS:
        kept.views.clear()
        if kept.memory.numel() < _BYTES * rows * width:
            with lasting():
                kept.memory = torch.empty(_BYTES * rows * width, dtype=torch.uint8, device="cpu")
                kept.codes = torch.empty(_CODES * rows * width, dtype=torch.uint8, device="cpu")
    result = kept.views.get((rows, width))
    if result is None:
        with lasting():
            result = kept.views[rows, width] = Scratch(kept.memory, kept.codes, rows, width)
    return result


FLOATS = 6
"""How many float32 numbers of scratch there are for each element; even, so that the doubles begin where they may."""

_BYTES = 4 * FLOATS + 16
_CODES = 4
_VIEWS = 64


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.codes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.views: dict[tuple[int, int], Scratch] = {}


_OF_THREAD = _OfThread()
