"""The callback: what is installed, saved, counted and told at which of a Trainer's hooks."""

import os
import weakref
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from q8lightning.checkpoint.encode.leaves import ModelNames
from q8lightning.checkpoint.encode.state_dict import SUMMARY_KEY
from q8lightning.checkpoint.payload import FORMAT_VERSION
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.checkpoint.qat_codes import CODES_KEY, describe_codes
from q8lightning.metrics.recorder import Detail
from q8lightning.qat.config import QATConfig
from q8lightning.system.paths import check_is_there
from q8lightning.system.save_queue import BackgroundSaveError
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.described_saves import describe_saves
from q8lightning.trainer.io_chain import check_not_async
from q8lightning.trainer.pending_names import (
    begin_to_tell,
    leave_callbacks_alone,
    let_callbacks_know,
    tell_callbacks,
    wait_until_durable,
)
from q8lightning.trainer.publishing import print_totals, warn_safely
from q8lightning.trainer.qat_callback import QATCallback
from q8lightning.trainer.recording import (
    begin_to_defer,
    publish_before_a_look,
    publish_known,
    publish_rest,
    watch_of,
    watch_saves,
)
from q8lightning.trainer.twins import is_a
from q8lightning.trainer.warm_up import WarmUp


class QuantizationCallback(QATCallback):
    """Saves every checkpoint of the Trainer quantized, three to four times smaller; everything loads as before.

    With ``qat`` it also trains with quantized weights: forward and backward see values on the grid of their codes, the
    optimizer updates full-precision masters, which everybody else sees too.

    A Trainer of ``pytorch_lightning`` takes it as well, in a list: ``callbacks=[QuantizationCallback()]``.

    Whole checkpoints are quantized from the moment on when the Trainer has the callback, also before it runs and in the
    process that started others (``ddp_spawn``, ``ddp_fork``). Checkpoints of weights only are quantized from ``setup``
    on: Lightning calls no hook of a callback when it saves these, so that before the Trainer's first run, in the setup
    of an earlier callback, and in the process that started others they stay plain.

    Args:
        checkpoint: ``"resume"`` (4.1 bytes a parameter of AdamW in float32 instead of 12), ``"compact"`` (3.1 bytes),
            a :class:`CheckpointPolicy`, or None to leave checkpoints as they are.
        async_save: Let training go on while a checkpoint is written: it is the state at the call all the same. When
            ``fit`` returns, however it ends, all checkpoints are complete. Saves after that return when they are done.
        verify: Compare files with their checksums when the Trainer loads them.
        qat: A :class:`QATConfig`, or a mapping of its arguments: which weights to train quantized, and when. None for
            none.
        log: What each save loses and saves, and with ``qat`` every ``log_every_n_steps`` what the weights lose, goes to
            all loggers and to ``trainer.callback_metrics`` when it is known: by kind of tensor (``"kind"``), for each
            one too (``"tensor"``), or not at all (None).

    Raises:
        ValueError: If there is no such preset; when the Trainer starts, if the policy or a pattern of ``qat`` matches
            nothing in the model, the strategy does not save through a CheckpointIO, or QAT cannot work with the
            strategy, the optimizer or a parameter.
        BackgroundSaveError: From the Trainer, at the next save or at the end, if a save in the background failed.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QuantizationCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        checkpoint: Preset | CheckpointPolicy | None = "resume",
        *,
        async_save: bool = False,
        verify: bool = True,
        qat: QATConfig | Mapping[str, Any] | None = None,
        log: Detail | None = "kind",
    ) -> None:
        super().__init__(qat, log)
        self.policy = None if checkpoint is None else CheckpointPolicy.of(checkpoint)
        self.async_save = async_save
        self.verify = verify
        self.restored = 0
        """How often the run was restored from a quantized checkpoint."""
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._warm_up: WarmUp | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out whose callback this is, and what it does for that one."""
        return {**super().__getstate__(), "_trainer": None, "_warm_up": None}

    def wait_until_durable(self, path: str | os.PathLike[str] | None = None) -> None:
        """Wait until the checkpoint at ``path`` is on the disk, or with None until all are; return at once if it is.

        To be called in all processes, as ``trainer.save_checkpoint`` is. Callbacks then hear of what is durable.

        Raises:
            BackgroundSaveError: If a save or removal failed that was not reported yet; it names which.
            FileNotFoundError: If nobody is saving ``path`` and there is nothing.
            RuntimeError: If the Trainer has an AsyncCheckpointIO.
        """
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            wait_until_durable(trainer, path)
        elif path is not None:
            check_is_there(path)

    def on_checkpoint_durable(self, path: str) -> None:
        """Called when the checkpoint saved as ``path`` is on the disk; override it to upload the file.

        Any other callback of the Trainer may have a method of this name too. It is called on the thread that trains,
        in the process that wrote the file, once for each save in their order: after the save if it is synchronous,
        otherwise after the next batch, save or :meth:`wait_until_durable`, or at the end of ``fit``. What it raises is
        raised by the Trainer; a checkpoint that could not be saved is not announced.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the quantizing CheckpointIO around the one that the Trainer has, once."""
        super().setup(trainer, pl_module, stage)
        self._trainer = weakref.ref(trainer)
        installed = self._install(trainer)
        if installed is None:
            return
        if self.policy is not None and self.async_save:
            check_not_async(trainer.strategy.checkpoint_io)
            installed.async_save = True
        installed.optimizer_device = _optimizer_device(trainer.strategy) if stage == "fit" else None
        watch_saves(trainer, installed, self.recorder)
        begin_to_tell(installed)
        let_callbacks_know(trainer)

    def _install(self, trainer: pl.Trainer) -> QuantizedCheckpointIO | None:
        """Return the quantizing CheckpointIO of a Trainer, this callback's or the user's own, which knows the model."""
        strategy = trainer.strategy
        if self.policy is not None:
            _check_strategy(strategy)
        elif is_a(strategy, DeepSpeedStrategy):
            return None  # it never saves through a CheckpointIO
        installed = find_quantized_io(strategy.checkpoint_io)
        if installed is None and self.policy is not None:
            installed = QuantizedCheckpointIO(strategy.checkpoint_io, self.policy, verify=self.verify)
            strategy.checkpoint_io = installed
        elif installed is not None and self.policy not in (None, installed.policy):
            raise ValueError(
                "the Trainer has another QuantizationCallback, or a QuantizedCheckpointIO, with another policy than"
                " this QuantizationCallback; give the policy to one of them and remove the other"
            )
        if installed is not None:
            installed.describe_model = DescribeModel(trainer, self)
        elif self.qat is not None:
            describe_saves(trainer, self._description)
        return installed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a policy that would quantize nothing, now that the model has its parameters."""
        if self.policy is not None:
            self.policy.check_matches(name for name, _ in pl_module.named_parameters())
        self.recorder.start_run()
        begin_to_defer(trainer)
        super().on_fit_start(trainer, pl_module)
        self._warm_up = _warm_up_for(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Load the kernels of saves beside the first batch: the processes that load data have been started by then."""
        warm_up, self._warm_up = self._warm_up, None
        watch = watch_of(trainer)
        if warm_up is not None and watch is not None:
            watch.warm_up = warm_up
            warm_up.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Publish what is known of saves; tell callbacks which checkpoints are durable by now, and which are not."""
        super().on_train_batch_end(trainer, pl_module, *args)
        publish_known(trainer)
        let_callbacks_know(trainer)
        tell_callbacks(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish what is known of saves before callbacks look."""
        super().on_validation_epoch_end(trainer, pl_module)
        publish_before_a_look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish what is known of saves before callbacks look."""
        super().on_train_epoch_end(trainer, pl_module)
        publish_before_a_look(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the saves before any callback is torn down; publish the rest, and say what they came to."""
        try:
            self._finish(trainer)
        finally:
            publish_rest(trainer, together=True)
            print_totals(trainer, self.recorder)
        tell_callbacks(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count how often the run was restored from a quantized checkpoint."""
        summary = checkpoint.get(SUMMARY_KEY)
        if trainer.state.fn == "fit" and isinstance(summary, Mapping):
            self.restored = summary.get("restored", 0) + (summary.get("policy", True) is not None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Install what quantizes if nothing was set up: before the first run, or where other processes ran."""
        if watch_of(trainer) is None and not self._is_installed(trainer):
            self._install(trainer)
        self._select_after_other_processes(trainer, pl_module)

    def _description(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return what checkpoints that no CheckpointIO encodes say of the weights that were trained quantized."""
        codecs = self.codecs(trainer)
        state = checkpoint.get("state_dict")
        if not codecs or not isinstance(state, Mapping):
            return {}
        described = describe_codes(state, state, codecs)
        summary = {"format_version": FORMAT_VERSION, "policy": None, "restored": self.restored, CODES_KEY: described}
        return {SUMMARY_KEY: summary}

    def _is_installed(self, trainer: pl.Trainer) -> bool:
        installed = find_quantized_io(trainer.strategy.checkpoint_io)
        describe = None if installed is None else installed.describe_model
        return isinstance(describe, DescribeModel) and describe.trainer is trainer and describe.callback is self

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the masters back; finish the pending save, whose error must not take the place of the one on its way."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self._finish(trainer)
        except BackgroundSaveError as error:
            warn_safely(str(error))
        publish_rest(trainer, together=False)
        tell_callbacks(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish the pending save where the strategy does not tear its CheckpointIO down (FSDP, ModelParallel)."""
        super().teardown(trainer, pl_module, stage)
        self._finish(trainer)
        publish_rest(trainer, together=False)
        tell_callbacks(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        installed = None if self.policy is None else find_quantized_io(trainer.strategy.checkpoint_io)
        if installed is not None:
            if self.async_save:
                installed.async_save = False  # who saves outside of the Trainer's loops wants the file, not a promise
            try:
                installed.finish()
            finally:
                leave_callbacks_alone(trainer)


def _check_strategy(strategy: Strategy) -> None:
    """Raise ValueError for strategies whose saves bypass the CheckpointIO: nothing would be quantized."""
    remedy = None
    if is_a(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":
        remedy = 'pass FSDPStrategy(state_dict_type="full")'
    elif is_a(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        remedy = "pass ModelParallelStrategy(save_distributed_checkpoint=False)"
    elif is_a(strategy, DeepSpeedStrategy):
        remedy = "use another strategy"
    if remedy is not None:
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints without the Trainer's CheckpointIO, so they cannot be"
            f" quantized; {remedy}, or remove the QuantizationCallback (or pass it checkpoint=None)"
        )


def _warm_up_for(trainer: pl.Trainer, pl_module: pl.LightningModule) -> WarmUp | None:
    """Return what loads the kernels of a Trainer's saves; None if this process needs none."""
    installed, strategy = find_quantized_io(trainer.strategy.checkpoint_io), trainer.strategy
    device = _optimizer_device(strategy)  # what is sharded is saved from the host
    if installed is None or device is None or device.type != "cuda":
        return None
    if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return None
    return WarmUp(installed.policy, pl_module, strategy.optimizers, device, installed.async_save)


def _optimizer_device(strategy: Strategy) -> torch.device | None:
    """Return where a strategy wants optimizer states as they are in the file; None if it distributes them itself."""
    return None if is_a(strategy, FSDPStrategy, ModelParallelStrategy) else strategy.root_device


class DescribeModel:
    """Tells a CheckpointIO at each save what only the Trainer and the callback know; goes with them when pickled."""

    def __init__(self, trainer: pl.Trainer, callback: QuantizationCallback) -> None:
        self.trainer = trainer
        self.callback = callback

    def __call__(self) -> ModelNames:
        """Return the names of the parameters as they are now, and how they are quantized."""
        module = self.trainer.lightning_module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return ModelNames(
            parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
            optimizer_parameters=tuple(
                tuple(names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"])
                for optimizer in self.trainer.optimizers
            ),
            quantized=self.callback.codecs(self.trainer),
            restored=self.callback.restored,
        )
