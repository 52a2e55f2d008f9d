"""From a device to the host: one pass over the live memory of the device now, the copy to the host later."""

import mmap
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from q8lightning.system.advice import advise

ALIGNMENT = 64
"""Every copy starts at a multiple of this many bytes, as ``torch.save`` aligns records."""


_SPARE = 32
"""One part in so many is added: the next save may need a little more, and to lock memory takes a second."""


class HostMemory:
    """One stretch of host memory that is kept from save to save, a little larger than the largest needs.

    With a GPU its pages are locked. It is registered memory rather than torch's own pinned memory, which is rounded up
    to a power of two and cached until the process ends. Its pages are its own: registered memory that shares a page
    with other memory, or that is freed while it is registered, makes later registrations fail.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._unregister: weakref.finalize[..., Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return 0 if self._memory is None else self._memory.nbytes

    @torch.inference_mode(False)
    def take(self, nbytes: int) -> Tensor:
        """Return ``[nbytes]`` uint8; what an earlier call returned is no longer valid."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self.release()
            pages = mmap.mmap(-1, nbytes + nbytes // _SPARE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a wish: huge pages are locked in a fraction of the time
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(pages, dtype=torch.uint8)
            if _register(self._memory):
                # Also when nobody calls release: before the memory is unmapped.
                self._unregister = weakref.finalize(self, _unregister, self._memory)
                self._unregister.atexit = False  # CUDA may be torn down by then, and the process returns everything
        return self._memory[:nbytes]

    def release(self) -> None:
        """Give the memory back."""
        if self._unregister is not None:
            self._unregister()
        self._memory, self._unregister = None, None


def _register(memory: Tensor) -> bool:
    """Lock the pages of ``memory``; where that is not possible, copies to it are slower and nothing else."""
    if memory.nbytes == 0 or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.check_error(int(_cuda().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    except RuntimeError as error:
        with suppress(RuntimeError):  # or the next kernel of anybody would report the error once more
            torch.zeros(1, dtype=torch.uint8, device="cuda")
        advise(
            f"cannot lock {memory.nbytes:,} bytes of host memory for checkpoints ({error}); copies from the GPU take"
            " longer, in the background if async_save=True; raise the limit of locked memory (ulimit -l)"
        )
        return False
    return True


def _unregister(memory: Tensor) -> None:
    torch.cuda.check_error(int(_cuda().cudaHostUnregister(memory.data_ptr())))


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def take(nbytes: int, memory: HostMemory | None) -> Tensor:
    """Return ``[nbytes]`` uint8 of a memory that is kept, or new ones."""
    if memory is None or nbytes == 0:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return memory.take(nbytes)


class Transfer:
    """Takes storages of one device to the host in two steps, so that training waits for the first alone.

    ``start`` runs on the training thread: the memory that training may write to is copied within the device, which is
    over after one pass, and the moment is marked. ``finish`` runs on the thread that writes: a stream of its own waits
    for that moment and copies to the host. Between the two, this object keeps everything on the device alive; it lets
    go when the copies are complete, so that no allocator hands the memory out too early.

    Args:
        device: Where the storages are.
        location: What ``torch.save`` calls it.
    """

    def __init__(self, device: torch.device, location: str = "cpu") -> None:
        self.device = device
        self.location = location
        self._known: set[int] = set()
        self._live: dict[int, UntypedStorage] = {}
        self._sources: list[tuple[Tensor, list[tuple[int, int]]]] = []
        self._started: torch.cuda.Event | None = None

    def add(self, storage: UntypedStorage, private: bool) -> None:
        """Have a storage taken along, unless it is already.

        Args:
            storage: On this device.
            private: Nobody else writes to it, so that it needs no copy within the device and may be added later.
        """
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        if private:
            self._sources.append((_bytes_of(storage), [(key, storage.nbytes())]))
        else:
            self._live[key] = storage

    def add_frozen(self, frozen: Tensor, parts: list[tuple[int, int]]) -> None:
        """Have a tensor taken along that nobody else has.

        Args:
            frozen: Contiguous, on this device.
            parts: What it consists of, one after the other: a key for each part, and its bytes.
        """
        self._sources.append((_bytes_of(frozen.untyped_storage()), parts))

    def start(self) -> None:
        """Freeze what was added."""
        if self._live:
            # Sizes with the largest powers of two first: each copy starts at a multiple of its elements' size.
            live = sorted(self._live.items(), key=lambda item: -(item[1].nbytes() & -item[1].nbytes()))
            frozen = torch.cat([_bytes_of(storage) for _, storage in live])
            self._sources.append((frozen, [(key, storage.nbytes()) for key, storage in live]))
            self._live.clear()
        if self.device.type == "cuda":
            self._started = torch.cuda.current_stream(self.device).record_event()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that :meth:`finish` needs."""
        return sum(aligned(source.nbytes) for source, _ in self._sources)

    def finish(self, memory: Tensor) -> dict[int, UntypedStorage]:
        """Copy to the host, wait until it is done and return the copies by the storages' ``_cdata``.

        Args:
            memory: ``[nbytes]`` uint8 on the host; the copies are stretches of it.
        """
        stream = None if self._started is None else torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        starts = _starts(source for source, _ in self._sources)
        with torch.cuda.stream(stream):
            if stream is not None and self._started is not None:
                stream.wait_event(self._started)
            for (source, _), start in zip(self._sources, starts, strict=True):
                memory[start : start + source.nbytes].copy_(source, non_blocking=True)
            if stream is not None:
                stream.synchronize()
        copies = {}
        for (_, parts), start in zip(self._sources, starts, strict=True):
            for key, nbytes in parts:
                copies[key] = _part(memory, start, nbytes)
                start += nbytes
        self._sources.clear()
        return copies


def _starts(sources: Iterable[Tensor]) -> list[int]:
    starts = [0]
    for source in sources:
        starts.append(starts[-1] + aligned(source.nbytes))
    return starts[:-1]


def aligned(nbytes: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _part(memory: Tensor, start: int, nbytes: int) -> UntypedStorage:
    """Return a stretch of ``memory`` as a storage of its own, as ``torch.save`` writes whole storages."""
    if nbytes == 0:
        return UntypedStorage(0)  # type: ignore[no-untyped-call]
    return torch.frombuffer(memory.numpy()[start : start + nbytes], dtype=torch.uint8).untyped_storage()
