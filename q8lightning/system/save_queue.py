"""Run saves, removals and links in the background, one at a time, in the order of the calls."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from q8lightning.system.paths import PathLike, is_within, place_of, target_of


class BackgroundSaveError(RuntimeError):
    """A save, removal or link failed in the background; raised at the next save, load, wait or at the end.

    Attributes:
        path: The path to save, remove or link.
    """

    def __init__(self, action: str, path: PathLike, error: BaseException) -> None:
        super().__init__(
            f"{action} {os.fspath(path)} in the background failed: {type(error).__name__}: {error}. Older checkpoints"
            " are untouched; make room or choose another place, and save again"
        )
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the message and the path for other processes; the cause may not be picklable."""
        return type(self).__new__, (type(self), *self.args), {"path": os.fspath(self.path)}


@dataclass(frozen=True)
class _Job:
    action: str
    path: PathLike
    work: Callable[[], object]
    place: str
    is_save: bool = False
    links_to: str | None = None


class BackgroundSaves:
    """A queue with at most one thread, which lives while there is work.

    The thread is not a daemon, so a process that ends normally or by an exception finishes what is queued. Nothing has
    to be shut down.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._last_save_failed = False
        self._errors: deque[BackgroundSaveError] = deque()

    def wait_for_room(self) -> float:
        """Wait until no save is pending, so that two never need memory at once; return the seconds of waiting.

        Raises:
            BackgroundSaveError: If an earlier job failed.
        """
        start = time.perf_counter()
        with self._changed:
            waits = self._save_is_pending()
            self._changed.wait_for(lambda: not self._save_is_pending())
        self._raise_error()
        return time.perf_counter() - start if waits else 0.0

    def save(self, path: PathLike, write: Callable[[], object]) -> None:
        """Queue a save: call ``write`` after everything before it."""
        self._add(_Job("saving", path, write, place_of(path), is_save=True))

    def remove(self, path: PathLike, remove: Callable[[], object]) -> None:
        """Queue a removal: call ``remove`` after everything before it, unless the last save failed."""
        self._add(_Job("removing", path, remove, place_of(path)))

    def link(self, path: PathLike, target: PathLike, link: Callable[[], object]) -> None:
        """Queue a link: call ``link`` after everything before it, unless the last save failed."""
        self._add(_Job("linking", path, link, place_of(path), links_to=place_of(target)))

    def exists(self, path: PathLike) -> bool | None:
        """Whether there will be something at ``path`` when the queue is empty; None if nothing queued changes it."""
        place = place_of(path)
        with self._changed:
            jobs = self._jobs()
        for each in dict.fromkeys((place, target_of(place))):
            for job in reversed(jobs):
                if is_within(each, job.place):
                    return self._exists_after(job)
        return None

    def settle(self, path: PathLike) -> None:
        """Wait until nothing is queued that changes ``path``, what it links to, or what is in it."""
        place = place_of(path)
        with self._changed:
            self._changed.wait_for(lambda: not self._is_pending(place))

    def wait(self, path: PathLike | None = None) -> None:
        """Wait until the queue is empty, or with ``path`` until nothing queued changes that path.

        Raises:
            BackgroundSaveError: If a job of any path failed that was not reported yet.
        """
        if path is None:
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)
        else:
            self.settle(path)
        self._raise_error()

    def unheard(self) -> list[BackgroundSaveError]:
        """Return the errors that were not reported yet; they count as reported then."""
        with self._changed:
            errors = [*self._errors]
            self._errors.clear()
        return errors

    def tell_at_exit(self) -> None:
        """Print what failed and was not reported yet, when the process ends and nobody else will hear of it."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
        for error in self.unheard():
            print(f"q8lightning: error: {error}", file=sys.stderr)

    def _jobs(self) -> list[_Job]:
        return [*(() if self._running is None else (self._running,)), *self._queue]

    def _is_pending(self, place: str) -> bool:
        places = {place, target_of(place)}
        return any(is_within(each, job.place) or is_within(job.place, each) for each in places for job in self._jobs())

    def _save_is_pending(self) -> bool:
        return any(job.is_save for job in self._jobs())

    def _exists_after(self, job: _Job) -> bool:
        if job.links_to is None:
            return job.is_save
        there = self.exists(job.links_to)
        return os.path.exists(job.links_to) if there is None else there

    def _raise_error(self) -> None:
        with self._changed:
            if self._errors:
                raise self._errors.popleft()

    def _add(self, job: _Job) -> None:
        with self._changed:
            self._queue.append(job)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name="q8lightning saves", daemon=False)
            try:
                self._thread.start()
            except RuntimeError:
                pass  # the system has no more threads, or the interpreter is shutting down
            else:
                return
        self._work()

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
        try:
            job.work()
        except BaseException as error:  # the training must hear of any error
            self._note(job, error)
        else:
            if job.is_save:
                self._last_save_failed = False

    def _note(self, job: _Job, error: BaseException) -> None:
        """Keep an error.

        Not in the frame that caught it: the error and the content of the save would keep each other alive.
        """
        if job.is_save:
            self._last_save_failed = True
        failure = BackgroundSaveError(job.action, job.path, error)
        failure.__cause__ = error
        with self._changed:
            self._errors.append(failure)
