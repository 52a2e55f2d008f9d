"""The CheckpointIO that every save of a Trainer or of Fabric passes: it encodes what the policy selects."""

import atexit
import gc
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.encode.select.leaves import WHOLE, Shard
from q8lightning.checkpoint.encode.select.model_names import ModelNames, names_in
from q8lightning.checkpoint.encode.start import SaveStarter
from q8lightning.checkpoint.encode.warn import WarningQueue
from q8lightning.checkpoint.file.link import link_checkpoint
from q8lightning.checkpoint.file.write import announce
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sharded.ranks import Ranks, talking
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.system.advice import advise
from q8lightning.system.paths import check_is_there, keeping, local_path
from q8lightning.system.private_names import check_names
from q8lightning.system.save_queue import BackgroundSaveError, BackgroundSaves
from q8lightning.trainer.durable_io import DurableCheckpointIO, is_ours, make_durable
from q8lightning.trainer.io_chain import chain_of, check_not_async, is_async, writes_where_told
from q8lightning.trainer.lightning_internals import WrappingCheckpointIO
from q8lightning.trainer.load import load
from q8lightning.trainer.twins import count_as_twins

_EXACT = (".lr_find_", ".scale_batch_size_", ".temp.ckpt")
"""Names of files, by how they begin, that the Trainer loads again a moment later: the tuner's, and those of processes
that were spawned. They must come back exactly."""

_URGENT = ("hpc_ckpt_",)
"""Names of files, by how they begin, that the Trainer saves when SLURM is about to end the process."""

_REPORTS = 8
"""How many reports of saves are kept until they are read."""

_NOTEWORTHY = 0.1
"""Seconds of waiting that are worth a line in the log."""


class QuantizedCheckpointIO(WrappingCheckpointIO):
    """Saves checkpoints quantized through the CheckpointIO that it wraps; loading needs nothing special.

    The callback installs it. ``Trainer(plugins=[QuantizedCheckpointIO()])`` and ``Fabric(plugins=[...])`` do the same,
    and its methods work without either. Passed by itself it does not know the model: except for BatchNorm's running
    statistics, only the policy's rules then tell buffers from weights. Nor does it know the Trainer's callbacks: with
    ``async_save``, two ModelCheckpoints need different folders or names.

    Fabric's checkpoints have keys of the user's own. What ``state_dict()`` returns is a module's state wherever it
    stands, a mapping with ``state`` and ``param_groups`` an optimizer's, and the rules for Lightning's sections apply
    to them (docs/fabric.md).

    With ``async_save`` and without a Trainer, end with :meth:`finish`, or use it as a context manager, which does that.
    A process that does neither still writes everything before it ends, and prints what failed.

    Args:
        checkpoint_io: What writes, reads and removes files. Lightning's default is replaced by a durable version of it,
            also at the end of a chain of wrappers.
        checkpoint: A preset, ``"resume"``, ``"compact"`` or ``"precise"``, or a policy.
        async_save: Return from a save as soon as training may go on without changing what is saved; one thread copies
            it to the host and writes it. Removals wait for the saves before them, loads for everything. At most one
            save is in flight, and the next one waits for it. A save that fails raises at the next save, load or wait,
            or at :meth:`finish`, which the Trainer's teardown calls.
        verify: Compare files with their checksums when they are loaded.

    Raises:
        ValueError: If there is no such preset, ``checkpoint_io`` is no CheckpointIO, or ``async_save`` would wrap an
            AsyncCheckpointIO.
    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO | None = None,
        checkpoint: Preset | CheckpointPolicy = "resume",
        async_save: bool = False,
        verify: bool = True,
    ) -> None:
        if checkpoint_io is not None and not hasattr(checkpoint_io, "save_checkpoint"):
            raise ValueError(
                f"checkpoint_io is a CheckpointIO, which writes the files, got {checkpoint_io!r}; presets and policies"
                ' have a name of their own, as in QuantizedCheckpointIO(checkpoint="compact")'
            )
        check_names(["saving"])
        count_as_twins(QuantizedCheckpointIO)  # a Trainer of pytorch_lightning accepts only its own CheckpointIOs
        super().__init__(checkpoint_io or DurableCheckpointIO())
        self.policy = CheckpointPolicy.of(checkpoint)
        self.async_save = async_save
        self.verify = verify
        self.describe_model: Callable[[], ModelNames] | None = None
        """Returns what only the model knows, at each save; set by the callback."""
        self.optimizer_device: torch.device | None = None
        """The GPU on which optimizer states are decoded when they are loaded; set by the callback."""
        self.moment: Callable[[], Hashable] | None = None
        """Names the moment of the training; set by the callback. Saves of one moment are encoded once, and the caller
        calls :meth:`let_go` before training changes what was saved. Where this is None or returns None,
        :meth:`let_go` is not called, and each save waits until it is encoded."""
        self.waits: list[float] = []
        """Seconds that each save held training until the save before it was written."""
        self.reports: deque[Future[SaveReport]] = deque(maxlen=_REPORTS)
        """What the last saves lost, in their order. Any thread completes them; a save that fails cancels its own."""
        self.kept: Callable[[], AbstractContextManager[None]] = nullcontext
        """Keeps what removals, links and the end raise in the one process that does them, until all meet; set by the
        callback."""
        self.durable: deque[str] | None = None
        """Paths of checkpoints that became durable. The caller takes them out; None if it does not want them."""
        self.telling = False
        """Whether they are being taken out at the moment."""
        self._warnings = WarningQueue()
        self._said_nothing = False
        self._background: BackgroundSaves | None = None  # made by the first save: before, a Trainer is pickled to spawn
        self._memory = HostMemory()
        self._starter = SaveStarter()
        make_durable(self)
        if async_save:
            check_not_async(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to saves that go on: Trainers are pickled."""
        fresh: dict[str, Any] = {
            "_background": None,
            "_memory": HostMemory(),
            "reports": deque(maxlen=_REPORTS),
            "telling": False,
        }
        return {**self.__dict__, **fresh}

    def __enter__(self) -> "QuantizedCheckpointIO":
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

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Encode a copy of ``checkpoint`` and save it to ``path``.

        Raises:
            BackgroundSaveError: If an earlier save in the background failed; nothing is saved then.
        """
        if is_exact(path):
            self._wait()
            self.base.save_checkpoint(checkpoint, path, storage_options=storage_options)  # type: ignore[arg-type]
            return
        names = self.describe_model() if self.describe_model is not None else names_in(checkpoint)
        save = self._start(checkpoint, path, names)
        known: Future[SaveReport] = Future()
        self.reports.append(known)
        place = self._fixed(path) if self.async_save else None
        if place is not None:
            os.makedirs(os.path.dirname(place), exist_ok=True)  # as a save that writes at once does
        self._hand_over(path, partial(self._write, save, known, path, storage_options, place))

    def save_shards(
        self,
        checkpoint: dict[str, Any],
        shards: Mapping[int, Shard],
        path: str | os.PathLike[str],
        names: ModelNames,
        ranks: Ranks,
        write: Callable[[Save, HostMemory], SaveReport],
    ) -> None:
        """Save a checkpoint in shards as :meth:`save_checkpoint` saves a whole one; called in all processes.

        Args:
            checkpoint: The part that this process writes.
            shards: What its tensors are a part of, by their ids.
            path: The folder.
            names: What is known of the model.
            ranks: The processes.
            write: Writes the folder, in the background if saves do. Returns what the whole checkpoint lost.

        Raises:
            BackgroundSaveError: In all processes, if an earlier save in the background failed in one of them.
        """
        with talking():
            save = ranks.together(lambda: self._start(checkpoint, path, names, shards))
        known: Future[SaveReport] = Future()
        if ranks.is_first:
            self.reports.append(known)

        def write_own() -> None:
            try:
                with talking():
                    report = write(save, self._memory)
                self._starter.learn(save)
                if ranks.is_first:
                    self._warnings.add(report)
                    known.set_result(report)
            finally:
                known.cancel()  # does nothing if it is completed
            if ranks.is_first and self.durable is not None:
                self.durable.append(os.fspath(path))

        self._hand_over(path, write_own)

    def _start(
        self,
        checkpoint: Mapping[str, Any],
        path: str | os.PathLike[str],
        names: ModelNames,
        shards: Mapping[int, Shard] = WHOLE,
    ) -> Save:
        """Encode or copy what training may change."""
        with _without_collection():
            save = self._starter.start(
                checkpoint,
                self.policy,
                names,
                None if self.moment is None else self.moment(),
                live=self.async_save,
                stand_ins=self._only_pickles,
                wait_for_room=partial(self._wait_for_room, path),
                shards=shards,
            )
        announce("frozen", path)
        return save

    def _hand_over(self, path: str | os.PathLike[str], write: Callable[[], object]) -> None:
        """Write a save that was started, now or in the background."""
        if self.async_save:
            if self._background is None:
                self._background = BackgroundSaves()
                atexit.register(self._background.tell_at_exit)
            self._background.save(path, write)
            if os.path.basename(path).startswith(_URGENT):
                self._wait()
        else:
            write()
        if not self._starter.is_waited_for:
            self._starter.let_go()
        self._warnings.warn()

    def let_go(self) -> None:
        """Wait until training may change the tensors that were saved last; called before it does.

        Gives the warnings of saves that are written by now.
        """
        self._starter.let_go()
        self._warnings.warn()

    @property
    def _only_pickles(self) -> bool:
        """Whether the wrapped CheckpointIO surely does nothing with a checkpoint but to write it at once."""
        return is_ours(self.base, "save_checkpoint")

    def _fixed(self, path: str | os.PathLike[str]) -> str | None:
        """Return the absolute path of a local file, so that a change of the working directory does not matter."""
        local = local_path(path) if writes_where_told(self) else None
        return None if local is None else os.path.abspath(local)

    def _write(
        self,
        save: Save,
        known: "Future[SaveReport]",
        path: str | os.PathLike[str],
        storage_options: Any | None,
        place: str | None = None,
    ) -> None:
        """Fetch the content of a save and write it, on any thread.

        Args:
            save: The save.
            known: Completed with what it lost; cancelled if it fails before.
            path: Where to, as the caller said it.
            storage_options: For the wrapped CheckpointIO.
            place: The absolute path of a local file; see :meth:`_fixed`.
        """
        memory = self._memory if self._only_pickles else None  # others may keep what they are given
        try:
            with save.fetch(memory) as content, keeping(place and os.path.dirname(place)):
                announce("fetched", path)
                self._starter.learn(save)
                self._warnings.add(save.report)
                known.set_result(save.report)
                if not save.report.tensors:
                    self._say_nothing(path)
                self.base.save_checkpoint(content, place or path, storage_options=storage_options)  # type: ignore[arg-type]
        finally:
            known.cancel()  # does nothing if it is completed
        if self.durable is not None:
            self.durable.append(os.fspath(path))

    def _say_nothing(self, path: str | os.PathLike[str]) -> None:
        """Log once that a file is not smaller, where no callback has checked the policy before."""
        if self.moment is None and not self._said_nothing:
            self._said_nothing = True
            rank_zero_info(
                f"q8lightning has quantized nothing in {os.fspath(path)}: no tensor of at least"
                f" {self.policy.min_numel} elements has a rule and becomes smaller. The file is as large as without"
            )

    def load_checkpoint(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the checkpoint at ``path``, decoded; further arguments go to the wrapped CheckpointIO.

        With ``verify``, payloads are compared with their checksums, and the rest of a local file with the zip's.

        Raises:
            CorruptCheckpointError: If the content is not what was saved.
            NewerFormatError: If the file was written in a later format than this version reads.
            BackgroundSaveError: If a save in the background failed.
        """
        self._wait()
        return load(self.base, path, self.verify, self.optimizer_device, *args, **kwargs)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the checkpoint at ``path`` after the saves before this; keep it if the last of them failed."""
        if self._background is None:
            with self.kept():
                self._remove(path)
        else:
            self._background.remove(path, partial(self._remove, self._fixed(path) or path))

    def _remove(self, path: str | os.PathLike[str]) -> None:
        announce("removing", path)
        self.base.remove_checkpoint(path)  # type: ignore[arg-type]
        announce("removed", path)

    def link_checkpoint(self, target: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Make ``path`` a link to ``target``, in the order in which :meth:`remove_checkpoint` would remove it."""
        link = partial(link_checkpoint, os.path.abspath(target), os.path.abspath(path))
        if self._background is None:
            with self.kept():
                link()
        else:
            self._background.link(path, target, link)

    def exists(self, path: str | os.PathLike[str]) -> bool | None:
        """Whether there will be a file at ``path`` when nothing is pending; None if nothing pending changes it."""
        return None if self._background is None else self._background.exists(path)

    def settle(self, path: str | os.PathLike[str]) -> None:
        """Wait until nothing pending changes ``path``, whether that succeeds or fails."""
        if self._background is not None:
            self._background.settle(path)

    def wait_until_durable(self, path: str | os.PathLike[str] | None = None) -> None:
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
        if self._background is not None:
            self._background.wait(path)
        self._warnings.warn()
        if path is not None and writes_where_told(self):
            check_is_there(path)

    def finish(self) -> None:
        """Wait for everything in the background and give pinned memory back.

        Raises:
            BackgroundSaveError: The first failure that no save has reported yet. The others are warnings.
        """
        try:
            self._wait()
        finally:
            for error in () if self._background is None else self._background.unheard():
                advise(str(error))  # only one can be raised
            if self._background is not None:
                atexit.unregister(self._background.tell_at_exit)
            self._background = None
            self._starter.release()
            self._memory.release()
        self._warnings.warn()

    def teardown(self) -> None:
        """Finish what is in the background and tear the wrapped CheckpointIO down."""
        try:
            with self.kept():
                self.finish()
        finally:
            self.base.teardown()

    def wait(self, path: str | os.PathLike[str] | None = None) -> None:
        """Wait for everything in the background, or with ``path`` for what changes that path.

        Raises:
            BackgroundSaveError: If a save or removal failed that no save has reported yet.
        """
        self._wait(path)

    def _wait(self, path: str | os.PathLike[str] | None = None) -> None:
        if self._background is not None:
            self._background.wait(path)

    def _wait_for_room(self, path: str | os.PathLike[str]) -> None:
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


def is_exact(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name must come back exactly, because the Trainer loads it again a moment later."""
    return os.path.basename(path).startswith(_EXACT)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from collecting garbage, which can take longer than the rest of what training waits for."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_quantized_io(checkpoint_io: CheckpointIO | None) -> QuantizedCheckpointIO | None:
    """Return the :class:`QuantizedCheckpointIO` in a chain of wrappers, if there is one."""
    return next((each for each in chain_of(checkpoint_io) if isinstance(each, QuantizedCheckpointIO)), None)
