"""Saves, and what is to follow them, in the background: in the order in which they were asked for, one at a time."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from q8lightning.system.paths import PathLike, is_within, place_of, target_of


class BackgroundSaveError(RuntimeError):
    """A save, or what was to follow one, failed in the background; raised at the next save, load, wait or at the end.

    Attributes:
        path: What was to be saved, removed or linked.
    """

    def __init__(self, action: str, path: PathLike, error: BaseException) -> None:
        super().__init__(
            f"{action} {os.fspath(path)} in the background failed: {type(error).__name__}: {error}. Older checkpoints"
            " are untouched; make room or choose another place, and save again"
        )
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        """Other processes hear of it too: by its message, which is all that can always be pickled."""
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
        self._errors: deque[BackgroundSaveError] = deque()

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

    def save(self, path: PathLike, write: Callable[[], object]) -> None:
        """Have ``write`` called, after everything that was asked for before."""
        self._add(_Job("saving", path, write, place_of(path), is_save=True))

    def remove(self, path: PathLike, remove: Callable[[], object]) -> None:
        """Have ``remove`` called after everything that was asked for before, unless the save before it failed."""
        self._add(_Job("removing", path, remove, place_of(path)))

    def link(self, path: PathLike, target: PathLike, link: Callable[[], object]) -> None:
        """Have ``link`` called after everything that was asked for before, unless the save before it failed."""
        self._add(_Job("linking", path, link, place_of(path), links_to=place_of(target)))

    def exists(self, path: PathLike) -> bool | None:
        """Whether there will be something at ``path`` when all is done; None if nothing that is queued changes it."""
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
        """Wait until everything is done, or with ``path`` until nothing is queued any more that changes it.

        Raises:
            BackgroundSaveError: If a job failed, of this path or another, that nobody heard of yet.
        """
        if path is None:
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)
        else:
            self.settle(path)
        self._raise_error()

    def unheard(self) -> list[BackgroundSaveError]:
        """Return the errors that have not been raised, once."""
        with self._changed:
            errors = [*self._errors]
            self._errors.clear()
        return errors

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
                pass  # no thread to be had: the system has no more, or the interpreter is shutting down
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
        except BaseException as error:  # whatever it is, the training must hear of it
            self._note(job, error)
        else:
            if job.is_save:
                self._last_save_failed = False

    def _note(self, job: _Job, error: BaseException) -> None:
        """Keep an error; not where it was caught, or it and the content of the save would keep each other alive."""
        if job.is_save:
            self._last_save_failed = True
        failure = BackgroundSaveError(job.action, job.path, error)
        failure.__cause__ = error
        with self._changed:
            self._errors.append(failure)
