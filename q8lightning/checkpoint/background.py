"""Saves and removals in the background: in the order in which they were asked for, one at a time."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


class BackgroundSaveError(RuntimeError):
    """A save or a removal that was left to the background failed; raised at the next save, load or at the end.

    Attributes:
        path: What was to be saved or removed.
    """

    def __init__(self, action: str, path: str | os.PathLike[str], error: BaseException) -> None:
        super().__init__(
            f"{action} {os.fspath(path)} in the background failed: {type(error).__name__}: {error}. Older checkpoints"
            " are untouched; make room or choose another place, and save again"
        )
        self.path = path


@dataclass(frozen=True)
class _Job:
    action: str
    path: str | os.PathLike[str]
    work: Callable[[], object]
    is_save: bool


class BackgroundSaves:
    """One queue and at most one thread, which lives as long as there is work.

    The thread is not a daemon: a process that ends in the usual way, by whatever exception, finishes what is queued.
    Nothing has to be shut down.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._last_save_failed = False
        self._error: BackgroundSaveError | None = None

    def wait_for_room(self) -> float:
        """Wait until no save is pending, so that two never need memory at once; return the seconds it took.

        Raises:
            BackgroundSaveError: If an earlier job failed.
        """
        start = time.perf_counter()
        with self._changed:
            waits = self._save_is_pending()
            self._changed.wait_for(lambda: not self._save_is_pending())
        self._raise_error()
        return time.perf_counter() - start if waits else 0.0

    def save(self, path: str | os.PathLike[str], write: Callable[[], object]) -> None:
        """Have ``write`` called, after everything that was asked for before."""
        self._add(_Job("saving", path, write, is_save=True))

    def remove(self, path: str | os.PathLike[str], remove: Callable[[], object]) -> None:
        """Have ``remove`` called after everything that was asked for before, unless the save before it failed."""
        self._add(_Job("removing", path, remove, is_save=False))

    def wait(self) -> None:
        """Wait until everything is done.

        Raises:
            BackgroundSaveError: If a job failed that nobody heard of yet.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
        self._raise_error()

    def _save_is_pending(self) -> bool:
        return any(job.is_save for job in (*self._queue, self._running) if job is not None)

    def _raise_error(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _add(self, job: _Job) -> None:
        with self._changed:
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="q8lightning saves", daemon=False)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = self._queue.popleft() if self._queue else None
                if self._running is None:
                    self._thread = None
                self._changed.notify_all()
                if self._running is None:
                    return
            self._do(self._running)

    def _do(self, job: _Job) -> None:
        if not job.is_save and self._last_save_failed:
            return  # a crash must never leave fewer whole checkpoints than before
        error: BaseException | None = None
        try:
            job.work()
        except BaseException as raised:  # whatever it is, the training must hear of it
            error = raised
        if job.is_save:
            self._last_save_failed = error is not None
        if error is not None:
            failure = BackgroundSaveError(job.action, job.path, error)
            failure.__cause__ = error
            with self._changed:
                self._error = self._error or failure
