"""Bring storages from a device to the host: freeze them on the device now, copy them to the host later."""

import mmap
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from q8lightning.system.advice import advise

ALIGNMENT = 64
"""Bytes. Each copy starts at a multiple of this, as ``torch.save`` aligns records."""


_SPARE = 32
"""Memory is larger than needed by one part in so many: the next save may need a little more, and locking takes a
second."""


class HostMemory:
    """One stretch of host memory that is kept from save to save, a little larger than the largest save needs.

    With a GPU its pages are locked. It is registered memory, because torch's own pinned memory is rounded up to a power
    of two and cached until the process ends. It shares no page with other memory and is unregistered before it is
    freed, because otherwise later registrations fail.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._unregister: weakref.finalize[..., Any] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes that are held."""
        return 0 if self._memory is None else self._memory.nbytes

    @torch.inference_mode(False)
    def take(self, nbytes: int) -> Tensor:
        """Return ``[nbytes]`` uint8; the memory of earlier calls is no longer valid."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self.release()
            pages = mmap.mmap(-1, nbytes + nbytes // _SPARE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # if possible: huge pages are locked in a fraction of the time
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(pages, dtype=torch.uint8)
            if _register(self._memory):
                # Without a call of release, this runs before the memory is unmapped.
                self._unregister = weakref.finalize(self, _unregister, self._memory)
                self._unregister.atexit = False  # CUDA may be torn down by then, and the system takes all memory back
        return self._memory[:nbytes]

    def release(self) -> None:
        """Give the memory back."""
        if self._unregister is not None:
            self._unregister()
        self._memory, self._unregister = None, None


def _register(memory: Tensor) -> bool:
    """Lock the pages of ``memory``; if that is not possible, only copies to it are slower."""
    if memory.nbytes == 0 or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.check_error(int(_cuda().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    except RuntimeError as error:
        with suppress(RuntimeError):  # clears the error, or the next kernel would report it again
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
    """Return ``[nbytes]`` uint8 of ``memory``; None for new memory."""
    if memory is None or nbytes == 0:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return memory.take(nbytes)


class Transfer:
    """Brings storages of one device to the host in two steps, of which training waits only for the first.

    ``start`` runs on the training thread. It copies memory that training may write to within the device and marks the
    moment. ``finish`` runs on the thread that writes. On a stream of its own it waits for that moment and copies to the
    host. In between, this object keeps everything on the device alive, so that no allocator hands the memory out.

    Args:
        device: The device of the storages.
        location: Its name in files of ``torch.save``.
    """

    def __init__(self, device: torch.device, location: str = "cpu") -> None:
        self.device = device
        self.location = location
        self._known: set[int] = set()
        self._live: dict[int, UntypedStorage] = {}
        self._sources: list[tuple[Tensor, list[tuple[int, int]]]] = []
        self._started: torch.cuda.Event | None = None

    def add(self, storage: UntypedStorage, private: bool) -> None:
        """Add a storage; each is brought once.

        Args:
            storage: A storage of this device.
            private: Nothing else writes to it. It then needs no copy within the device, and may be added after
                ``start``.
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
        """Add a tensor to which there is no other reference, whose parts become storages.

        Args:
            frozen: Contiguous, on this device.
            parts: The key and the bytes of each part, one part after the other.
        """
        self._sources.append((_bytes_of(frozen.untyped_storage()), parts))

    def start(self) -> None:
        """Freeze all that was added so far."""
        if self._live:
            # Sorted by the power of two in their sizes: each copy then starts at a multiple of its elements' size.
            live = sorted(self._live.items(), key=lambda item: -(item[1].nbytes() & -item[1].nbytes()))
            frozen = torch.cat([_bytes_of(storage) for _, storage in live])
            self._sources.append((frozen, [(key, storage.nbytes()) for key, storage in live]))
            self._live.clear()
        if self.device.type == "cuda":
            self._started = torch.cuda.current_stream(self.device).record_event()

    @property
    def nbytes(self) -> int:
        """The bytes of host memory that :meth:`finish` needs."""
        return sum(aligned(source.nbytes) for source, _ in self._sources)

    def finish(self, memory: Tensor) -> dict[int, UntypedStorage]:
        """Copy everything to the host; return the copies by the keys of the originals.

        The key of a storage is its ``_cdata``.

        Args:
            memory: ``[nbytes]`` uint8 on the host, which the copies lie in.
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
