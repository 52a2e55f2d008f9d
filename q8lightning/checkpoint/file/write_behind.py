"""Send to the disk what is written while more is being written, so that little is left to wait for at the end."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import IO, Any, cast

STEP = 2**25
"""Bytes that are sent to the disk at a time. The kernel alone begins when a tenth of the memory waits to be written."""

_START = 2
"""``SYNC_FILE_RANGE_WRITE``: begin to write these pages, and do not wait for them."""


class WriteBehind:
    """A binary file whose content a thread sends to the disk as it grows. Small files need no thread.

    It changes nothing but when the disk works. The content is durable once it is flushed. What went wrong is raised by
    the flush, or by the next write.

    Args:
        file: Open for writing, positioned at its end.
        send: Sends a stretch to the disk. It takes the file's descriptor, the start of the stretch, and its bytes.
    """

    def __init__(self, file: IO[bytes], send: Callable[[int, int, int], object] | None = None) -> None:
        self._file = file
        self._send_range = send or _send_range
        self._changed = threading.Condition()
        self._written = self._sent = file.tell()
        self._ended = False
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write ``data`` (bytes-like).

        Raises:
            OSError: If it cannot be written, or if what was written before could not be sent to the disk.
        """
        written = self._file.write(data)
        self._written += written
        if self._written - self._sent >= STEP:
            with self._changed:
                if self._error is not None:
                    raise self._error
                self._changed.notify()
            if self._thread is None and not self._ended:
                self._start()
        return written

    def __getattr__(self, name: str) -> Any:
        """Everything else is the file's."""
        return getattr(self._file, name)

    def _start(self) -> None:
        thread = threading.Thread(target=self._send, name="q8lightning write-behind", daemon=True)
        with suppress(RuntimeError):  # without a thread, all is sent at the end
            thread.start()
            self._thread = thread

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._written - self._sent >= STEP)
                if self._ended:
                    return
                start, end = self._sent, self._written
            try:
                self._send_range(self._file.fileno(), start, end - start)
            except OSError as error:
                with self._changed:
                    self._error, self._ended = error, True
                return
            self._sent = end

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()  # before the file is closed, whose descriptor it uses
        if kind is None and self._error is not None:
            raise self._error


def _send_range(descriptor: int, start: int, nbytes: int) -> None:
    sync_file_range = _sync_file_range()
    if sync_file_range is None:
        # It waits, for the whole file, and writes the journal each time; still better than all at the end.
        getattr(os, "fdatasync", os.fsync)(descriptor)
    else:
        # A hint. What the disk refuses is reported by fsync.
        sync_file_range(descriptor, start, nbytes, _START)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return the C library's function, None where there is none."""
    if sys.platform != "linux":
        return None
    with suppress(AttributeError, OSError):
        function = ctypes.CDLL(None).sync_file_range
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        return cast("Callable[[int, int, int, int], int]", function)
    return None
