"""The door that every save of a Trainer passes: encode what the policy selects, hand the rest of the work on."""

import gc
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from q8lightning.checkpoint.encode.checkpoint import warn_of_passed_over, warn_of_refused
from q8lightning.checkpoint.encode.find import WHOLE, ModelNames, Shard, names_in
from q8lightning.checkpoint.encode.guard import warn_of_guarded
from q8lightning.checkpoint.encode.outline import outline_of
from q8lightning.checkpoint.encode.plan import Plan
from q8lightning.checkpoint.encode.planner import plan_save
from q8lightning.checkpoint.encode.run import Run
from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.file.link import link_checkpoint
from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.file.read import read_checkpoint, read_elsewhere
from q8lightning.checkpoint.file.write import announce
from q8lightning.checkpoint.format import check_version
from q8lightning.checkpoint.integrity import without_verification
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sections import summary_in
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.system.advice import advise
from q8lightning.system.paths import check_is_there, keeping, local_path
from q8lightning.system.private_names import check_names
from q8lightning.system.save_queue import BackgroundSaves
from q8lightning.trainer.durable_io import DurableCheckpointIO, is_ours, make_durable
from q8lightning.trainer.io_chain import chain_of, check_not_async, is_async, writes_where_told
from q8lightning.trainer.lightning_internals import WrappingCheckpointIO
from q8lightning.trainer.twins import count_as_twins

_MESSAGES = (".lr_find_", ".scale_batch_size_", ".temp.ckpt")
"""Files by which the Trainer hands live weights to itself (the tuner) or to the process that started it (spawn) a
moment later; they must come back exactly."""

_URGENT = ("hpc_ckpt_",)
"""What the Trainer saves when SLURM is about to end the process."""


_REPORTS = 8
"""How many saves back one can ask what they lost."""

_NOTEWORTHY = 0.1
"""Seconds of waiting that are worth a line in the log."""


class QuantizedCheckpointIO(WrappingCheckpointIO):
    """Saves checkpoints quantized, through whatever CheckpointIO it wraps; loading needs nothing special.

    The callback installs it; ``Trainer(plugins=[QuantizedCheckpointIO()])`` does the same, and its methods work without
    a Trainer. Passed by itself it does not know the model: buffers other than BatchNorm's running statistics are then
    told from weights by nothing but the policy's rules. Nor does it know the Trainer's callbacks: with ``async_save``,
    two ModelCheckpoints need folders or names of their own.

    Args:
        checkpoint_io: What writes, reads and removes files. Lightning's default is replaced by a durable version of it,
            also where another wrapper stands between.
        checkpoint: A preset, ``"resume"`` or ``"compact"``, or a policy.
        async_save: Return from a save as soon as training can go on without changing what is saved; one thread copies
            it to the host and writes it. Removals wait for the saves before them, loads for everything. One save at
            most is in flight, a second one waits. A save that fails raises at the next save, load or wait, or at
            :meth:`finish`, which the Trainer's teardown calls.
        verify: Compare files with their checksums when they are loaded.

    Raises:
        ValueError: If there is no such preset, ``checkpoint_io`` is no CheckpointIO, or ``async_save`` is to wrap an
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
        count_as_twins(QuantizedCheckpointIO)  # a Trainer of pytorch_lightning takes it for one of its CheckpointIOs
        super().__init__(checkpoint_io or DurableCheckpointIO())
        self.policy = CheckpointPolicy.of(checkpoint)
        self.async_save = async_save
        self.verify = verify
        self.describe_model: Callable[[], ModelNames] | None = None
        """Asked at each save for what only the model knows; set by the callback."""
        self.optimizer_device: torch.device | None = None
        """Where optimizer states are decoded when they are loaded, and stay, if it is a GPU; set by the callback."""
        self.moment: Callable[[], Hashable] | None = None
        """Names the moment of the training, for whoever calls :meth:`let_go` before it goes on to change what was
        saved; saves of one moment are encoded once. Where it or what it returns is None, nobody does: each save waits
        until it is encoded. Set by the callback."""
        self.waits: list[float] = []
        """Seconds for which saves in the background held training up, each until the one before it was written."""
        self.reports: deque[Future[SaveReport]] = deque(maxlen=_REPORTS)
        """What the last saves lost, in their order, for whoever takes it: completed when it is known, by any thread;
        cancelled with a save that fails."""
        self.durable: deque[str] | None = None
        """Paths of checkpoints that became durable, for whoever empties it; None while nobody does."""
        self.telling = False
        """Whether somebody is emptying it at the moment."""
        self._warned: set[tuple[str, str]] = set()
        self._unsaid: deque[SaveReport] = deque()
        self._background: BackgroundSaves | None = None  # not before it is needed: a Trainer is pickled for spawn
        self._memory, self._copies = HostMemory(), HostMemory()
        self._plan: Plan | None = None
        self._run: Run | None = None
        self._moment: Hashable = None
        make_durable(self)
        if async_save:
            check_not_async(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what saves found out and what is being written: Trainers are pickled."""
        left_out = {"_plan": None, "_run": None, "_background": None, "telling": False}
        fresh = {
            "reports": deque(maxlen=_REPORTS),
            "_unsaid": deque(),
            "_memory": HostMemory(),
            "_copies": HostMemory(),
        }
        return {**self.__dict__, **left_out, **fresh}

    @property
    def base(self) -> CheckpointIO:
        """The wrapped CheckpointIO."""
        assert self.checkpoint_io is not None
        return self.checkpoint_io

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Encode a copy of ``checkpoint``, which is left as it is, and save it to ``path``.

        Raises:
            BackgroundSaveError: If an earlier save in the background failed; nothing is saved then.
        """
        if is_message(path):
            self._wait()
            self.base.save_checkpoint(checkpoint, path, storage_options=storage_options)  # type: ignore[arg-type]
            return
        with _without_collection():
            save = self._start(checkpoint, path, self._names_for(checkpoint))
        known: Future[SaveReport] = Future()
        self.reports.append(known)
        place = self._fixed(path) if self.async_save else None
        if place is not None:
            os.makedirs(os.path.dirname(place), exist_ok=True)  # as if it were written now
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
        """Save a checkpoint in shards, in all processes at once, as :meth:`save_checkpoint` does a whole one.

        Args:
            checkpoint: What this process writes.
            shards: What the tensors are a part of, by their ids.
            path: The folder.
            names: What is known of the model.
            ranks: The processes.
            write: Writes the folder, in the background if saves do; returns what the whole checkpoint lost.

        Raises:
            BackgroundSaveError: In all processes, if an earlier save in the background failed in one of them.
        """

        def start() -> Save:
            with _without_collection():
                return self._start(checkpoint, path, names, shards)

        save = ranks.together(start)
        known: Future[SaveReport] = Future()
        if ranks.is_first:
            self.reports.append(known)

        def write_own() -> None:
            try:
                report = write(save, self._memory)
                if self._plan is save.plan:
                    self._plan = save.next_plan
                if ranks.is_first:
                    self._unsaid.append(report)
                    known.set_result(report)
            finally:
                known.cancel()
            if ranks.is_first and self.durable is not None:
                self.durable.append(os.fspath(path))

        self._hand_over(path, write_own)

    def _hand_over(self, path: str | os.PathLike[str], write: Callable[[], None]) -> None:
        """Write a save that is on its way, now or in the background."""
        announce("frozen", path)
        if self.async_save:
            if self._background is None:
                self._background = BackgroundSaves()
            self._background.save(path, write)
            if os.path.basename(path).startswith(_URGENT):
                self._wait()
        else:
            write()
        if self._moment is None:
            self.let_go()
        self._warn()

    def _names_for(self, checkpoint: Mapping[str, Any]) -> ModelNames:
        return self.describe_model() if self.describe_model is not None else names_in(checkpoint)

    def _start(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        names: ModelNames,
        shards: Mapping[int, Shard] = WHOLE,
    ) -> Save:
        """Encode or copy what training may change; return the save, to be written at any time."""
        if type(checkpoint) is not dict:
            checkpoint = dict(checkpoint)
        outline, tensors = outline_of(checkpoint)
        plan = self._plan
        if plan is None or not plan.fits(checkpoint, outline, self.policy, names):
            plan = self._plan = plan_save(checkpoint, outline, tensors, self.policy, names, shards)
        moment = None if self.moment is None else self.moment()
        run, live = self._run, self.async_save
        if run is None or moment is None or moment != self._moment or not run.is_of(plan, tensors, live):
            self._run = None
            self._wait_for_room(path)
            run = Run(plan, tensors, live, self._copies)
        self._run, self._moment = run, moment
        return Save(run, checkpoint, tensors, names, live, self._only_pickles)

    def let_go(self) -> None:
        """Let training change the tensors that were saved last; called before it does.

        Waits for the device to have encoded them. Warns of what is stored otherwise than the policy's rules say.
        """
        run, self._run, self._moment = self._run, None, None
        if run is not None:
            run.let_go()
        self._warn()

    def _warn(self) -> None:
        """Warn of what was stored otherwise, after the checkpoint was written or queued: warnings may be errors.

        Of what the guard did, each tensor is named once; that nothing is encoded is said once.
        """
        while self._unsaid:
            report = self._unsaid.popleft()
            warn_of_refused(report.refused)
            new = [each for each in report.guarded if (each.path, each.remedy) not in self._warned]
            self._warned |= {(each.path, each.remedy) for each in new}
            warn_of_guarded(new)
            if report.passed_over and ("", "") not in self._warned:
                self._warned.add(("", ""))
                warn_of_passed_over(report.passed_over)

    @property
    def _only_pickles(self) -> bool:
        """Whether the wrapped CheckpointIO surely does nothing with a checkpoint but to write it at once."""
        return is_ours(self.base, "save_checkpoint")

    def _fixed(self, path: str | os.PathLike[str]) -> str | None:
        """Return the absolute path of a file, which another working directory does not change; None if it has none."""
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
        memory = self._memory if self._only_pickles else None  # others may keep what they are given
        try:
            with save.fetch(memory) as content, keeping(place and os.path.dirname(place)):
                announce("fetched", path)
                if self._plan is save.plan:
                    self._plan = save.next_plan
                self._unsaid.append(save.report)
                known.set_result(save.report)
                self.base.save_checkpoint(content, place or path, storage_options=storage_options)  # type: ignore[arg-type]
        finally:
            known.cancel()  # nothing happens if it is known
        if self.durable is not None:
            self.durable.append(os.fspath(path))

    def load_checkpoint(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the checkpoint at ``path``, decoded; further arguments go to the wrapped CheckpointIO.

        Payloads are compared with their checksums; of local files, everything else with the sums of the zip.

        Raises:
            CorruptCheckpointError: If the content is not what was saved.
            NewerFormatError: If the file was written in a later format than this version reads.
            BackgroundSaveError: If a save in the background failed.
        """
        self._wait()
        with explained(path):
            checkpoint = self._load(path, local_path(path), *args, **kwargs)
        check_version(summary_in(checkpoint))
        return checkpoint

    def _load(self, path: str | os.PathLike[str], local_path: str | None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        load: Callable[..., dict[str, Any]] = self.base.load_checkpoint
        if local_path is None or not os.path.isfile(local_path):
            with nullcontext() if self.verify else without_verification():
                return load(path, *args, **kwargs)
        if not is_ours(self.base, "load_checkpoint"):  # it may do something with the tensors
            if self.verify:
                checkpoint: dict[str, Any] = read_elsewhere(local_path, partial(load, path, *args, **kwargs))
                return checkpoint
            with without_verification():
                return load(path, *args, **kwargs)
        device = self.optimizer_device
        checkpoint = read_checkpoint(
            local_path,
            lambda file: load(file, *args, **kwargs),
            self.verify,
            device if device is not None and device.type == "cuda" else None,
        )
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the checkpoint at ``path``, after the saves before and not at all if the last of them failed."""
        if self._background is None:
            self._remove(path)
        else:
            self._background.remove(path, partial(self._remove, self._fixed(path) or path))

    def _remove(self, path: str | os.PathLike[str]) -> None:
        announce("removing", path)
        self.base.remove_checkpoint(path)  # type: ignore[arg-type]
        announce("removed", path)

    def link_checkpoint(self, target: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Let ``path`` be a link to ``target``, when :meth:`remove_checkpoint` would remove it."""
        link = partial(link_checkpoint, os.path.abspath(target), os.path.abspath(path))
        if self._background is None:
            link()
        else:
            self._background.link(path, target, link)

    def exists(self, path: str | os.PathLike[str]) -> bool | None:
        """Whether ``path`` is taken when everything is done; None if nothing that is pending changes it."""
        return None if self._background is None else self._background.exists(path)

    def settle(self, path: str | os.PathLike[str]) -> None:
        """Wait until nothing that is pending changes ``path``, whether it goes well or not."""
        if self._background is not None:
            self._background.settle(path)

    def wait_until_durable(self, path: str | os.PathLike[str] | None = None) -> None:
        """Wait until the checkpoint at ``path`` is on the disk, or with None until all are; return at once if it is.

        Of a folder, wait until all that is in it is there. In other processes than the one that writes, nothing is
        pending.

        Raises:
            BackgroundSaveError: If a save or removal failed that no save, load or wait has reported yet; it names
                which, and nobody reports it again.
            FileNotFoundError: If nobody is saving ``path`` and there is nothing: it was never saved, it was removed, or
                its save failed and that has been reported.
            RuntimeError: If an AsyncCheckpointIO does the saving, which does not say when it is done.
        """
        if is_async(self):
            raise RuntimeError(
                "AsyncCheckpointIO does not say when a checkpoint is durable; remove it from the Trainer's plugins and"
                " pass async_save=True to the QuantizationCallback or the QuantizedCheckpointIO"
            )
        if self._background is not None:
            self._background.wait(path)
        self._warn()
        if path is not None and writes_where_told(self):
            check_is_there(path)

    def finish(self) -> None:
        """Wait for everything in the background and give pinned memory back.

        Raises:
            BackgroundSaveError: If something failed that no save has reported yet. Of what failed after it, there are
                warnings.
        """
        try:
            self._wait()
        finally:
            for error in () if self._background is None else self._background.unheard():
                advise(str(error))  # one of them can be raised
            self._background = None
            self._plan = self._run = None
            self._memory.release()
            self._copies.release()
        self._warn()

    def teardown(self) -> None:
        """Finish what is in the background and tear the wrapped CheckpointIO down."""
        try:
            self.finish()
        finally:
            self.base.teardown()

    def wait(self) -> None:
        """Wait for everything in the background.

        Raises:
            BackgroundSaveError: If something failed that no save has reported yet.
        """
        self._wait()

    def _wait(self) -> None:
        if self._background is not None:
            self._background.wait()

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


def is_message(path: str | os.PathLike[str]) -> bool:
    """Whether the Trainer hands live weights to itself in a file of this name: they must come back exactly."""
    return os.path.basename(path).startswith(_MESSAGES)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from looking for garbage, which can take longer than all else that training waits for."""
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
