"""Write, remove and link in the order of the calls, at once or in the background."""

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from q8lightning.checkpoint.encode.warn import WarningQueue
from q8lightning.checkpoint.file.link import link_checkpoint
from q8lightning.checkpoint.file.write import announce
from q8lightning.system.advice import advise
from q8lightning.system.paths import PathLike, check_is_there, local_path
from q8lightning.system.save_queue import BackgroundSaveError, BackgroundSaves
from q8lightning.trainer.checkpoint_io.chain import is_async, writes_where_told
from q8lightning.trainer.lightning_api.internals import WrappingCheckpointIO

_NOTEWORTHY = 0.1
"""Seconds of waiting that are worth a line in the log."""

Self = TypeVar("Self", bound="OrderedCheckpointIO")


class OrderedCheckpointIO(WrappingCheckpointIO):
    """Does what changes files in the order of the calls, and knows what is pending.

    Everything is done at once until the first save in the background. From then on, until :meth:`finish`, removals and
    links are done in the background as well, behind the saves before them.

    Args:
        checkpoint_io: What writes, reads and removes files.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        super().__init__(checkpoint_io)
        self.async_save = False
        """Whether saves are written in the background."""
        self.waits: list[float] = []
        """Seconds that each save held training until the save before it was written."""
        self.kept: Callable[[], AbstractContextManager[None]] = nullcontext
        """Keeps what removals, links and the end raise in the one process that does them, until all meet; set by the
        callback."""
        self._warnings = WarningQueue()
        self._background: BackgroundSaves | None = None  # made by the first save: before, a Trainer is pickled to spawn

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is pending: Trainers are pickled."""
        return {**self.__dict__, "_background": None}

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the saves; a failed one does not replace the error that the block ends with."""
        try:
            self.finish()
        except BackgroundSaveError as failure:
            if error is None:
                raise
            advise(str(failure))

    @property
    def base(self) -> CheckpointIO:
        """The wrapped CheckpointIO."""
        assert self.checkpoint_io is not None
        return self.checkpoint_io

    def write_in_order(self, path: PathLike, write: Callable[[], object]) -> None:
        """Call ``write``, which saves to ``path``, now or in the background."""
        if not self.async_save:
            write()
            return
        if self._background is None:
            self._background = BackgroundSaves()
            atexit.register(self._background.tell_at_exit)
        self._background.save(path, write)

    def wait_for_room(self, path: PathLike) -> None:
        """Wait until no save before that of ``path`` needs memory; if it is written now, wait for everything.

        Raises:
            BackgroundSaveError: If something in the background failed that was not reported yet.
        """
        if self._background is None:
            return
        if not self.async_save:
            self._background.wait()
            return
        seconds = self._background.wait_for_room()
        if seconds:
            self.waits.append(seconds)
        if seconds > _NOTEWORTHY:
            rank_zero_info(
                f"saving {os.fspath(path)} held training for {seconds:.3f} s, until the checkpoint before it was"
                " written; save less often, or to a faster disk, if that is too long"
            )

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the checkpoint at ``path`` after the saves before this; keep it if the last of them failed."""
        place = self.absolute(path) or path

        def remove() -> None:
            announce("removing", place)
            self.base.remove_checkpoint(place)  # type: ignore[arg-type]
            announce("removed", place)

        if self._background is None:
            with self.kept():
                remove()
        else:
            self._background.remove(path, remove)

    def link_checkpoint(self, target: PathLike, path: PathLike) -> None:
        """Make ``path`` a link to ``target``, in the order in which :meth:`remove_checkpoint` would remove it."""
        link = partial(link_checkpoint, os.path.abspath(target), os.path.abspath(path))
        if self._background is None:
            with self.kept():
                link()
        else:
            self._background.link(path, target, link)

    def absolute(self, path: PathLike) -> str | None:
        """Return the path of a local file that stays right when the working directory changes; None for another."""
        local = local_path(path) if writes_where_told(self) else None
        return None if local is None else os.path.abspath(local)

    def exists(self, path: PathLike) -> bool | None:
        """Whether there will be a file at ``path`` when nothing is pending; None if nothing pending changes it."""
        return None if self._background is None else self._background.exists(path)

    def settle(self, path: PathLike) -> None:
        """Wait until nothing pending changes ``path``, whether that succeeds or fails."""
        if self._background is not None:
            self._background.settle(path)

    def wait(self, path: PathLike | None = None) -> None:
        """Wait for everything in the background, or with ``path`` for what changes that path.

        Raises:
            BackgroundSaveError: If a save or removal failed that no save has reported yet.
        """
        if self._background is not None:
            self._background.wait(path)

    def wait_until_durable(self, path: PathLike | None = None) -> None:
        """Wait until the checkpoint at ``path`` is on the disk, or with None until all are.

        For a folder, wait for all that is in it. Only the process that writes has anything to wait for.

        Raises:
            BackgroundSaveError: If a save or removal failed that no save, load or wait has reported yet. It names the
                path, and is not raised again.
            FileNotFoundError: If there is nothing at ``path``, and no save of it is pending: it was never saved, it was
                removed, or its save failed and that has been reported.
            RuntimeError: If an AsyncCheckpointIO does the saving, because it does not say when it is done.
        """
        if is_async(self):
            raise RuntimeError(
                "AsyncCheckpointIO does not say when a checkpoint is durable; remove it from the Trainer's plugins and"
                " pass async_save=True to the QuantizationCallback or the QuantizedCheckpointIO"
            )
        self.wait(path)
        self._warnings.warn()
        if path is not None and writes_where_told(self):
            check_is_there(path)

    def finish(self) -> None:
        """Wait for everything in the background and give pinned memory back.

        Raises:
            BackgroundSaveError: The first failure that no save has reported yet. The others are warnings.
        """
        try:
            self.wait()
        finally:
            for error in () if self._background is None else self._background.unheard():
                advise(str(error))  # only one can be raised
            if self._background is not None:
                atexit.unregister(self._background.tell_at_exit)
            self._background = None
            self._release()
        self._warnings.warn()

    def _release(self) -> None:
        """Give back what only saves need."""

    def teardown(self) -> None:
        """Finish what is in the background and tear the wrapped CheckpointIO down."""
        try:
            with self.kept():
                self.finish()
        finally:
            self.base.teardown()
