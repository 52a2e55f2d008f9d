"""Memory that CPU tensors are written to: in huge pages where it is large, and a scratch that is used again."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from q8lightning.system.ambient import lasting

HUGE = 2**23
"""Bytes from which on memory is asked for in huge pages; less is often in memory that was freed before."""


def new_tensor(numel: int, dtype: torch.dtype) -> Tensor:
    """Return a new tensor, in huge pages if it is large: to touch 4 KiB at a time would take longer than to decode."""
    values = torch.empty(numel, dtype=dtype, device="cpu")
    _advise(values.data_ptr(), values.nbytes)
    return values


def scratch(numel: int, floats: int, doubles: int = 0) -> tuple[Tensor, Tensor]:
    """Return memory to compute in until this thread asks for it again, with whatever was left there.

    It is kept, because the system gives new memory page by page, which takes longer than to compute there.

    Returns:
        ``[floats, numel]`` float32 and ``[doubles, numel]`` float64.
    """
    wide = numel + numel % 2  # so that doubles begin where they may
    nbytes = wide * (4 * floats + 8 * doubles)
    memory: Tensor | None = getattr(_OF_THREAD, "memory", None)
    if memory is None or memory.numel() < nbytes:
        with lasting():
            memory = _OF_THREAD.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    first, second = memory[: 4 * wide * floats], memory[4 * wide * floats : nbytes]
    return first.view(torch.float32).view(floats, wide), second.view(torch.float64).view(doubles, wide)


_OF_THREAD = threading.local()


def use_huge_pages(memory: memoryview) -> None:
    """Ask for huge pages for memory that nobody has written to yet; no more than a hint."""
    _advise(ctypes.addressof(ctypes.c_byte.from_buffer(memory)), memory.nbytes)


def _advise(address: int, nbytes: int) -> None:
    madvise = _madvise()
    if madvise is not None and nbytes >= HUGE:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, length, mmap.MADV_HUGEPAGE)  # a hint: what it returns makes no difference


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise, None where there are no huge pages to ask for."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int]", madvise)
