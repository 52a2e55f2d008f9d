"""The CheckpointIO that every save of a Trainer or of Fabric passes: it encodes what the policy selects."""

import gc
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.encode.select.leaves import WHOLE, Shard
from q8lightning.checkpoint.encode.select.model_names import ModelNames, names_in
from q8lightning.checkpoint.encode.start import SaveStarter
from q8lightning.checkpoint.file.write import announce
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sharded.ranks import Ranks, talking
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.system.arguments import check_bool, names_arguments
from q8lightning.system.paths import PathLike, keeping
from q8lightning.system.private_names import check_names
from q8lightning.trainer.checkpoint_io.chain import chain_of, check_not_async
from q8lightning.trainer.checkpoint_io.durable import DurableCheckpointIO, is_ours, make_durable
from q8lightning.trainer.checkpoint_io.file_names import is_exact, is_urgent
from q8lightning.trainer.checkpoint_io.in_order import OrderedCheckpointIO
from q8lightning.trainer.checkpoint_io.load import load
from q8lightning.trainer.lightning_api.both_packages import register_in_both

_REPORTS = 8
"""How many reports of saves are kept until they are read."""


@names_arguments
class QuantizedCheckpointIO(OrderedCheckpointIO):
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
        register_in_both(QuantizedCheckpointIO)  # a Trainer of pytorch_lightning accepts only its own CheckpointIOs
        super().__init__(checkpoint_io or DurableCheckpointIO())
        self.policy = CheckpointPolicy.of(checkpoint)
        self.async_save = check_bool("async_save", async_save)
        self.verify = check_bool("verify", verify)
        self.describe_model: Callable[[], ModelNames] | None = None
        """Returns what only the model knows, at each save; set by the callback."""
        self.optimizer_device: torch.device | None = None
        """The GPU on which optimizer states are decoded when they are loaded; set by the callback."""
        self.pause: Callable[[], Hashable] | None = None
        """Tells in which pause of training a save is made; set by the callback. Saves of one pause are encoded once,
        and the caller calls :meth:`let_go` before training changes what was saved. Where this is None or returns None,
        :meth:`let_go` is not called, and each save waits until it is encoded."""
        self.reports: deque[Future[SaveReport]] = deque(maxlen=_REPORTS)
        """What the last saves lost, in their order. Any thread completes them; a save that fails cancels its own."""
        self.on_durable: Callable[[str], object] | None = None
        """Called with the path of each checkpoint that became durable, on any thread; set by the callback."""
        self._said_nothing = False
        self._memory = HostMemory()
        self._starter = SaveStarter()
        make_durable(self)
        if async_save:
            check_not_async(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to saves that go on: Trainers are pickled."""
        return {**super().__getstate__(), "_memory": HostMemory(), "reports": deque(maxlen=_REPORTS)}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Encode a copy of ``checkpoint`` and save it to ``path``.

        Raises:
            BackgroundSaveError: If an earlier save in the background failed; nothing is saved then.
        """
        if is_exact(path):
            self.wait()
            self.base.save_checkpoint(checkpoint, path, storage_options=storage_options)  # type: ignore[arg-type]
            return
        names = self.describe_model() if self.describe_model is not None else names_in(checkpoint)
        save = self._encode(checkpoint, path, names)
        place = self.absolute(path) if self.async_save else None
        if place is not None:
            os.makedirs(os.path.dirname(place), exist_ok=True)  # as a save that writes at once does

        def write(tell: Callable[[SaveReport], None]) -> None:
            memory = self._memory if self._only_pickles else None  # others may keep what they are given
            with save.fetch(memory) as content, keeping(place and os.path.dirname(place)):
                announce("fetched", path)
                tell(save.report)
                if not save.report.tensors:
                    self._say_nothing(path)
                self.base.save_checkpoint(content, place or path, storage_options=storage_options)  # type: ignore[arg-type]

        self._hand_over(path, save, write)

    def save_shards(
        self,
        checkpoint: dict[str, Any],
        shards: Mapping[int, Shard],
        path: PathLike,
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
            save = ranks.together(lambda: self._encode(checkpoint, path, names, shards))

        def write_own(tell: Callable[[SaveReport], None]) -> None:
            with talking():
                report = write(save, self._memory)
            tell(report)

        self._hand_over(path, save, write_own, ranks.is_first)

    def _encode(
        self, checkpoint: Mapping[str, Any], path: PathLike, names: ModelNames, shards: Mapping[int, Shard] = WHOLE
    ) -> Save:
        """Encode or copy what training may change."""
        with _without_collection():
            save = self._starter.start(
                checkpoint,
                self.policy,
                names,
                None if self.pause is None else self.pause(),
                live=self.async_save,
                stand_ins=self._only_pickles,
                wait_for_room=partial(self.wait_for_room, path),
                shards=shards,
            )
        announce("frozen", path)
        return save

    def _hand_over(
        self,
        path: PathLike,
        save: Save,
        write: Callable[[Callable[[SaveReport], None]], None],
        is_first: bool = True,
    ) -> None:
        """Write what was encoded, at once or in the background, and tell what it lost and when it is durable.

        Args:
            path: Where to, as the caller said it.
            save: What was encoded.
            write: Writes it. It calls what it is given with what the save lost, once that is known.
            is_first: Whether this process tells.
        """
        report: Future[SaveReport] = Future()
        if is_first:
            self.reports.append(report)

        def tell(lost: SaveReport) -> None:
            self._starter.learn(save)
            if is_first:
                self._warnings.add(lost)
                report.set_result(lost)

        def write_and_tell() -> None:
            try:
                write(tell)
            finally:
                report.cancel()  # does nothing if it is completed
            if is_first and self.on_durable is not None:
                self.on_durable(os.fspath(path))

        self.write_in_order(path, write_and_tell)
        if self.async_save and is_urgent(path):
            self.wait()
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

    def _say_nothing(self, path: PathLike) -> None:
        """Log once that a file is not smaller, where no callback has checked the policy before."""
        if self.pause is None and not self._said_nothing:
            self._said_nothing = True
            rank_zero_info(
                f"q8lightning has quantized nothing in {os.fspath(path)}: no tensor of at least"
                f" {self.policy.min_numel} elements has a rule and becomes smaller. The file is as large as without"
            )

    def load_checkpoint(self, path: PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the checkpoint at ``path``, decoded; further arguments go to the wrapped CheckpointIO.

        With ``verify``, payloads are compared with their checksums, and the rest of a local file with the zip's.

        Raises:
            CorruptCheckpointError: If the content is not what was saved.
            NewerFormatError: If the file was written in a later format than this version reads.
            BackgroundSaveError: If a save in the background failed.
        """
        self.wait()
        return load(self.base, path, self.verify, self.optimizer_device, *args, **kwargs)

    def _release(self) -> None:
        """Forget the plan, and give pinned memory back."""
        self._starter.release()
        self._memory.release()


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
