"""The callback: which part of the package works at which hook of a Trainer."""

import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl

from q8lightning.checkpoint.layout.sections import SUMMARY_KEY
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.metrics.recorder import Detail, Recorder
from q8lightning.qat.config import QATConfig
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.system.paths import check_is_there
from q8lightning.system.private_names import Part, check_names
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.describe_fit import tell_what_comes
from q8lightning.trainer.describe_saves import describe_saves
from q8lightning.trainer.install import finish_saves, install, is_installed, warm_up_for
from q8lightning.trainer.io_chain import check_not_async
from q8lightning.trainer.lightning_internals import saves_in_shards
from q8lightning.trainer.model_structure import in_state_dict
from q8lightning.trainer.moments import Moments
from q8lightning.trainer.pending_names import (
    begin_to_tell,
    let_callbacks_know,
    tell_callbacks,
    wait_until_durable,
)
from q8lightning.trainer.publishing import harmless, print_totals, warn_safely
from q8lightning.trainer.qat_training import QATTraining
from q8lightning.trainer.recording import (
    defer_publishing,
    failures_of,
    is_watched,
    join_others,
    publish_for_monitors,
    publish_known,
    publish_rest,
    start_warm_up,
    watch_of,
    watch_saves,
)
from q8lightning.trainer.strategies import bypasses_io, check_qat, optimizer_device
from q8lightning.trainer.warm_up import WarmUp


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
        self.async_save = async_save
        self.verify = verify
        self.restored = 0
        """How often the run was restored from a quantized checkpoint."""
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._warm_up: WarmUp | None = None
        self._moments = Moments()

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
            wait_until_durable(trainer, path, failures_of(trainer))
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
        check_names(self._parts(trainer), warn_safely)
        if self.qat_training is not None:
            check_qat(trainer.strategy)
            trainer.callbacks = [self, *self._others(trainer)]  # type: ignore[attr-defined]
        self._trainer = weakref.ref(trainer)
        installed = self._install(trainer)
        if installed is None:
            return
        if self.policy is not None and self.async_save:
            check_not_async(trainer.strategy.checkpoint_io)
            installed.async_save = True
        installed.optimizer_device = optimizer_device(trainer.strategy) if stage == "fit" else None
        watch_saves(trainer, installed, self.recorder)
        begin_to_tell(installed)
        let_callbacks_know(trainer)

    def _parts(self, trainer: pl.Trainer) -> list[Part]:
        """Return the parts of the package that this callback uses, for :func:`check_names`."""
        asked: dict[Part, bool] = {
            "sharded": self.policy is not None and saves_in_shards(trainer.strategy),
            "background": self.policy is not None and self.async_save,
            "logging": self.recorder.detail is not None,
            "qat": self.qat is not None,
        }
        return [part for part, is_asked in asked.items() if is_asked]

    def _install(self, trainer: pl.Trainer) -> QuantizedCheckpointIO | None:
        installed = install(trainer, self, self.policy, self.verify)
        if installed is None and self.qat_training is not None and not bypasses_io(trainer.strategy):
            describe_saves(trainer, self)
        if installed is not None:
            installed.moment = self._moments
        return installed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a policy that would quantize nothing, now that the model has its parameters."""
        if self.policy is not None:
            sharded = saves_in_shards(trainer.strategy)
            self.policy.check_matches(in_state_dict(name, sharded=sharded) for name, _ in pl_module.named_parameters())
        self.recorder.start_run()
        defer_publishing(trainer)
        quantized: Mapping[str, WeightCodec] = {}
        if self.qat_training is not None:
            self.qat_training.begin(trainer, pl_module, self._others(trainer))
            quantized = self.qat_training.trained.codecs(pl_module)
        self._warm_up = warm_up_for(trainer, quantized)
        with harmless(self.recorder, "describing the fit"):
            tell_what_comes(trainer, self.policy, quantized, self.async_save)

    def on_train_start(self, *_: Any) -> None:
        """Begin to count moments: from now on hooks follow before training changes what was saved."""
        self._moments.begin()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Load the kernels of saves beside the first batch; let go of weights that a manual step may change any time.

        Not earlier: the processes that load data must be forked before the thread of the warm-up runs.
        """
        self._moments.end_one()
        if self._warm_up is not None:
            start_warm_up(trainer, self._warm_up)
            self._warm_up = None
        if not pl_module.automatic_optimization:
            self._let_go(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let go of the weights and the optimizer's state, which are about to change."""
        self._let_go(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the weights that are evaluated quantized, or in the middle of a fit put the masters back."""
        self._moments.end_one()
        if self.qat_training is not None:
            self.qat_training.begin_evaluation(trainer, pl_module, self._others(trainer))

    on_test_start = on_predict_start = on_validation_start

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masters back before the hooks of other callbacks run, and publish what is known of saves."""
        self._moments.end_one()
        if self.qat_training is not None:
            self.qat_training.release()
            self.qat_training.publish(trainer, wait=True)
        publish_for_monitors(trainer)

    on_train_epoch_end = on_validation_epoch_end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masters back before the hooks of other callbacks run."""
        if self.qat_training is not None:
            self.qat_training.release()

    on_predict_epoch_end = on_test_epoch_end

    def on_validation_end(self, *_: Any) -> None:
        """End a moment: another callback may have swapped weights for the validation and swap them back now."""
        self._moments.end_one()

    def on_train_end(self, *_: Any) -> None:
        """Stop counting moments: from now on the weights may change without a hook."""
        self._moments.end()

    def _let_go(self, trainer: pl.Trainer) -> None:
        installed = find_quantized_io(trainer.strategy.checkpoint_io)
        if installed is not None:
            with failures_of(trainer).kept():
                installed.let_go()
        self._moments.end_one()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Publish what is known of saves; tell callbacks which checkpoints are durable by now."""
        self._moments.end_one()
        if self.qat_training is not None:
            self.qat_training.record(trainer)
            self.qat_training.publish(trainer, wait=is_watched(trainer))
        publish_known(trainer)
        let_callbacks_know(trainer)
        with failures_of(trainer).kept():
            tell_callbacks(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the saves before any callback is torn down; publish the rest and print the totals."""
        if self.qat_training is not None:
            self.qat_training.publish(trainer, wait=True)
        failures = failures_of(trainer)
        try:
            with failures.kept():
                self._finish(trainer)
        finally:
            publish_rest(trainer, together=True)
            print_totals(trainer, self.recorder)
        with failures.kept():
            tell_callbacks(trainer)
        failures.meet()

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
        if watch_of(trainer) is None and not is_installed(trainer, self):
            self._install(trainer)
        if self.qat_training is not None:
            self.qat_training.select_after_other_processes(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the masters back and finish the pending save, whose error must not replace the Trainer's."""
        join_others(trainer, exception)
        self._end_qat(trainer)
        self._moments.end()
        try:
            self._finish(trainer)
        except Exception as error:  # a save, or a warning that is an error
            warn_safely(str(error))
        publish_rest(trainer, together=False)
        tell_callbacks(trainer)
        failures = failures_of(trainer)
        for each in failures.forget():
            warn_safely(f"{type(each).__name__}: {each}")
        if failures.ends_all(exception):  # launchers kill the process that writes when another has ended
            with suppress(RuntimeError):  # it has
                trainer.strategy.barrier()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the masters back and finish the pending save, which some strategies do not (FSDP, ModelParallel)."""
        failures = failures_of(trainer)
        self._end_qat(trainer)
        with failures.kept():
            self._finish(trainer)
        publish_rest(trainer, together=False)
        with failures.kept():
            tell_callbacks(trainer)
        failures.meet_if_due()

    def _end_qat(self, trainer: pl.Trainer) -> None:
        if self.qat_training is not None:
            self.qat_training.end()
            self.qat_training.publish(trainer, wait=True)

    def _others(self, trainer: pl.Trainer) -> list[pl.Callback]:
        return [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]

    def _finish(self, trainer: pl.Trainer) -> None:
        if self.policy is not None:
            finish_saves(trainer, end_background=self.async_save)
