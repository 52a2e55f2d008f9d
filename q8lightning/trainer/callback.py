"""The callback: which part of the package works at which hook of a Trainer."""

import os
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl

from q8lightning.checkpoint.layout.sections import SUMMARY_KEY
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.metrics.recorder import Detail, Recorder
from q8lightning.qat.config import QATConfig
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.system.arguments import check_bool, names_arguments
from q8lightning.system.paths import check_is_there
from q8lightning.trainer.prepare.first_line import tell_what_comes
from q8lightning.trainer.prepare.warm_up import WarmUp, warm_up_for
from q8lightning.trainer.record.publish import harmless, print_totals
from q8lightning.trainer.record.save_losses import is_monitored
from q8lightning.trainer.save.door import SaveDoor, door_of, wait_until_durable
from q8lightning.trainer.save.install import check_installed_versions, check_policy, set_up, set_up_late
from q8lightning.trainer.train.training import QATTraining


@names_arguments
class QuantizationCallback(pl.Callback):
    """Saves every checkpoint of the Trainer quantized, three to four times smaller; everything loads as before.

    With ``qat`` it also trains with quantized weights. Forward and backward see values on the grid of their codes. The
    optimizer, and everybody else, sees full-precision masters.

    A Trainer of ``pytorch_lightning`` takes it as well, in a list: ``callbacks=[QuantizationCallback()]``.

    Whole checkpoints are quantized as soon as the Trainer has the callback, also before it runs and in the process that
    started others (``ddp_spawn``, ``ddp_fork``). Checkpoints of weights only are quantized from ``setup`` on, because
    Lightning calls no hook of a callback when it saves these. They stay plain before the Trainer's first run, in the
    setup of an earlier callback, and in the process that started others.

    Args:
        checkpoint: ``"resume"`` (3.0 bytes a parameter of AdamW in float32 instead of 12), ``"compact"`` (2.2 bytes),
            ``"precise"`` (4.1 bytes), a :class:`CheckpointPolicy`, or None to leave checkpoints as they are.
        async_save: Let training go on while a checkpoint is written. The checkpoint is the state at the call. When
            ``fit`` returns or fails, all checkpoints are complete. Later saves return when they are done.
        verify: Compare files with their checksums when the Trainer loads them.
        qat: Which weights to train quantized, and when: a :class:`QATConfig` or a mapping of its arguments. None to
            train as without the callback.
        log: What goes to all loggers and to ``trainer.callback_metrics``: what each save loses and saves, and with
            ``qat`` every ``log_every_n_steps`` what the weights lose. ``"kind"`` logs by kind of tensor, ``"tensor"``
            also each tensor, None nothing.

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
        self.recorder = Recorder(log)
        self.qat_training = None if qat is None else QATTraining(QATConfig.of(qat), self.recorder)
        """The part that trains with quantized weights; None without ``qat``."""
        self.policy = None if checkpoint is None else CheckpointPolicy.of(checkpoint)
        self.async_save = check_bool("async_save", async_save)
        self.verify = check_bool("verify", verify)
        self.restored = 0
        """How often the run was restored from a quantized checkpoint."""
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._warm_up: WarmUp | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the Trainer and what goes on in it: a copy may belong to another one."""
        return self.__dict__ | {"_trainer": None, "_warm_up": None}

    @property
    def qat(self) -> QATConfig | None:
        """Which weights are trained quantized, and when; None for none."""
        return None if self.qat_training is None else self.qat_training.config

    @property
    def statistics(self) -> Mapping[str, ErrorStatistics]:
        """What each weight lost when it was last measured, by parameter name; measured at steps that are logged."""
        return {} if self.qat_training is None else self.qat_training.statistics

    def codecs(self, trainer: pl.Trainer) -> dict[str, WeightCodec]:
        """Return the codec of each weight that the last step trained quantized, by name.

        Warns of weights that were replaced since, and leaves them out.
        """
        return {} if self.qat_training is None else self.qat_training.codecs(trainer)

    def inputs(self, trainer: pl.Trainer) -> dict[str, dict[str, str]]:
        """Return how the last step quantized inputs of modules, by the modules' names."""
        return {} if self.qat_training is None else self.qat_training.inputs(trainer)

    def wait_until_durable(self, path: str | os.PathLike[str] | None = None) -> None:
        """Wait until the checkpoint at ``path`` is on the disk, or with None until all are.

        Call it in all processes, as ``trainer.save_checkpoint``. Before it returns, callbacks hear of what is durable.

        Raises:
            BackgroundSaveError: If a save or removal failed that was not reported yet. It names the path.
            FileNotFoundError: If there is nothing at ``path``, and no save of it is pending.
            RuntimeError: If the Trainer has an AsyncCheckpointIO.
        """
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            wait_until_durable(trainer, path)
        elif path is not None:
            check_is_there(path)

    def on_checkpoint_durable(self, path: str) -> None:
        """Called when the checkpoint saved as ``path`` is on the disk; override it to upload the file.

        Any callback of the Trainer may have a method of this name. It is called on the thread that trains, in the
        process that wrote the file, once for each save, in their order. That is after the save if it is synchronous,
        otherwise after the next batch, save or :meth:`wait_until_durable`, or at the end of ``fit``. The Trainer raises
        what it raises; with several processes all do, at the next save or at the end. It is not called for a save that
        failed.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install what quantizes saves, once; warn of what the installed versions lack.

        With QAT this becomes the first callback, to put the masters back before the hooks of the others run.
        """
        check_installed_versions(trainer, self)
        if self.qat_training is not None:
            self.qat_training.check(trainer)
            trainer.callbacks = [self, *self._others(trainer)]  # type: ignore[attr-defined]
        self._trainer = weakref.ref(trainer)
        set_up(trainer, self, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, now that the model has its parameters; log what the callback will do."""
        if self.policy is not None:
            check_policy(trainer, self.policy)
        self.recorder.start_run()
        if (door := door_of(trainer)) is not None:
            door.losses.deferred = True
        quantized: Mapping[str, WeightCodec] = {}
        if self.qat_training is not None:
            self.qat_training.begin(trainer, pl_module, self._others(trainer))
            quantized = self.qat_training.trained.codecs(pl_module)
        self._warm_up = warm_up_for(trainer, quantized)
        with harmless(self.recorder, "describing the fit"):
            tell_what_comes(trainer, self.policy, quantized, self.async_save)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """From now on hooks follow before training changes what was saved."""
        if (door := door_of(trainer)) is not None:
            door.training = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Load the kernels of saves beside the first batch; let go of weights that a manual step may change any time.

        Not earlier: the processes that load data must be forked before the thread of the warm-up runs.
        """
        if (door := door_of(trainer)) is None:
            return
        if self._warm_up is not None:
            self._warm_up.start()
            door.warm_up, self._warm_up = self._warm_up, None
        if not pl_module.automatic_optimization:
            door.let_go()

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let go of the weights and the optimizer's state, which are about to change."""
        if (door := door_of(trainer)) is not None:
            door.let_go()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Publish what is known of saves and weights; tell callbacks which checkpoints are durable by now."""
        if self.qat_training is not None:
            self.qat_training.record(trainer)
            self.qat_training.publish(trainer, wait=is_monitored(trainer))
        if (door := door_of(trainer)) is not None:
            door.after_batch()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the weights that are evaluated quantized, or in the middle of a fit put the masters back."""
        if self.qat_training is not None:
            self.qat_training.begin_evaluation(trainer, pl_module, self._others(trainer))

    on_test_start = on_predict_start = on_validation_start

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masters back before the hooks of other callbacks run, and publish what is known of saves."""
        if self.qat_training is not None:
            self.qat_training.release()
            self.qat_training.publish(trainer, wait=True)
        if (door := door_of(trainer)) is not None:
            door.losses.publish_for_monitors()

    on_train_epoch_end = on_validation_epoch_end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masters back before the hooks of other callbacks run."""
        if self.qat_training is not None:
            self.qat_training.release()

    on_predict_epoch_end = on_test_epoch_end

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """From now on the weights may change without a hook."""
        if (door := door_of(trainer)) is not None:
            door.training = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the saves before any callback is torn down; publish the rest and print the totals."""
        if self.qat_training is not None:
            self.qat_training.publish(trainer, wait=True)
        try:
            if (door := door_of(trainer)) is not None:
                door.end_fit(partial(self._finish, door))
        finally:
            print_totals(trainer, self.recorder)

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
        """Install what quantizes saves if ``setup`` did not run here: before the first run, or if others ran it."""
        set_up_late(trainer, self)
        if self.qat_training is not None:
            self.qat_training.select_after_other_processes(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the masters back and finish the pending save, whose error must not replace the Trainer's."""
        door = door_of(trainer)
        if door is not None:
            door.join(exception)
        self._end_qat(trainer)
        if door is not None:
            door.fail(exception, partial(self._finish, door))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the masters back and finish the pending save, which some strategies do not (FSDP, ModelParallel)."""
        self._end_qat(trainer)
        if (door := door_of(trainer)) is not None:
            door.end(partial(self._finish, door))

    def _end_qat(self, trainer: pl.Trainer) -> None:
        if self.qat_training is not None:
            self.qat_training.end()
            self.qat_training.publish(trainer, wait=True)

    def _finish(self, door: SaveDoor) -> None:
        """Finish the saves if this callback has begun them."""
        if self.policy is not None:
            door.finish(end_background=self.async_save)

    def _others(self, trainer: pl.Trainer) -> list[pl.Callback]:
        return [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
