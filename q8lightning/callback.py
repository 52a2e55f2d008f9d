"""The callback: its hooks decide when, the wings decide what."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from q8lightning.checkpoint.background import BackgroundSaveError
from q8lightning.checkpoint.codes import CODES_KEY, describe_codes
from q8lightning.checkpoint.io import QuantizedCheckpointIO, check_not_async, find_quantized_io
from q8lightning.checkpoint.payload import FORMAT_VERSION
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.state_dict import SUMMARY_KEY, ModelNames
from q8lightning.qat.config import QATConfig
from q8lightning.qat.fake_quantizer import FakeQuantizer
from q8lightning.qat.selection import check_optimizers
from q8lightning.qat.windows import Windows
from q8lightning.quantization.reference import ErrorStatistics
from q8lightning.quantization.weight_codec import WeightCodec


class _QATHooks(pl.Callback):
    """The part of the callback that trains with quantized weights; ``qat.windows`` says when they are in place."""

    def __init__(self, qat: QATConfig | Mapping[str, Any] | None) -> None:
        self.qat = None if qat is None else QATConfig.of(qat)
        self.codecs: dict[str, WeightCodec] = {}
        """How each weight is quantized, by name; kept after the run for whoever saves a checkpoint then."""
        self._windows: Windows | None = None
        self._logged: Mapping[str, ErrorStatistics] = {}

    @property
    def statistics(self) -> Mapping[str, ErrorStatistics]:
        """What each weight lost when it was last measured, at the steps that a logger sees; by parameter name."""
        return {} if self._windows is None else self._windows.quantizer.statistics

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that hold no ordinary parameters; become the first callback, which releases before any."""
        if self.qat is None:
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                "QAT changes parameters in place and needs a strategy that keeps them whole on each device, got"
                f" {type(trainer.strategy).__name__}; use DDP or a single device, or remove qat"
            )
        others = _other_callbacks(trainer, self)
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the weights, or refuse, now that the model and its optimizers are on their device."""
        if self.qat is not None:
            self._open(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the weights, or in the middle of a fit put the masters back."""
        if self.qat is not None and self._windows is None:
            self._open(trainer, pl_module)
        self._release(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Hand the signal-to-noise ratio of the weights to the loggers, if it was measured for them."""
        if self.statistics is not self._logged and self.statistics:
            self._logged = self.statistics
            sums = torch.stack([torch.stack(each[:2]).cpu() for each in self.statistics.values()]).sum(dim=0)
            lost, of = sums.tolist()
            sqnr = 10 * math.log10(of / lost) if lost and of else math.inf
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that Lightning logs metrics at
            for logger in trainer.loggers:
                logger.log_metrics({"qat/weights_sqnr_db": sqnr}, step=step)

    def _release(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Put the masters back before the hooks of other callbacks run."""
        if self._windows is not None:
            self._windows.quantizer.release()

    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_train_epoch_end = _release

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the masters back and let go of the model."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the masters back and let go of the model."""
        self._close()

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.qat is not None
        self._close()
        fitting = trainer.state.fn == "fit"
        every = max(getattr(trainer, "log_every_n_steps", 1), 1)
        quantizer = FakeQuantizer(pl_module, self.qat)
        try:
            check_optimizers(trainer.optimizers if fitting else (), quantizer.weights)
        except ValueError:
            quantizer.close()
            raise
        self.codecs = quantizer.codecs
        self._windows = Windows(
            quantizer,
            trainer.precision_plugin,
            owners=[pl_module, getattr(trainer, "datamodule", None), *_other_callbacks(trainer, self)],
            step=lambda: trainer.global_step if fitting else None,
            manual=fitting and not pl_module.automatic_optimization,
            measure=lambda: bool(trainer.loggers) and trainer.global_step % every == 0,
        )

    def _close(self) -> None:
        if self._windows is not None:
            self._windows.close()
        self._windows = None


class QuantizationCallback(_QATHooks):
    """Saves every checkpoint of the Trainer quantized, three to four times smaller; everything loads as before.

    With ``qat`` it also trains with quantized weights: forward and backward see values on the grid of their codes, the
    optimizer updates full-precision masters, which everybody else sees too.

    Args:
        checkpoint: ``"resume"`` (4.1 bytes a parameter of AdamW in float32 instead of 12), ``"compact"`` (3.1 bytes),
            a :class:`CheckpointPolicy`, or None to leave checkpoints as they are.
        async_save: Let training go on while a checkpoint is written: it is the state at the call all the same. When
            ``fit`` returns, however it ends, all checkpoints are complete. Saves after that return when they are done.
        verify: Compare files with their checksums when the Trainer loads them.
        qat: Which weights to train quantized, and when; None for none.

    Raises:
        ValueError: If there is no such preset; when the Trainer starts, if the policy or a pattern of ``qat`` matches
            nothing in the model, the strategy does not save through a CheckpointIO, or QAT cannot work with the
            strategy, the optimizer or a parameter.
        BackgroundSaveError: From the Trainer, at the next save or at the end, if a save in the background failed.
        TypeError: When the Trainer starts, if it is not one of ``lightning.pytorch``.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QuantizationCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        checkpoint: str | CheckpointPolicy | None = "resume",
        *,
        async_save: bool = False,
        verify: bool = True,
        qat: QATConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(qat)
        self.policy = None if checkpoint is None else CheckpointPolicy.of(checkpoint)
        self.async_save = async_save
        self.verify = verify

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the quantizing CheckpointIO around the one that the Trainer has, once."""
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                f"q8lightning works with a Trainer of lightning.pytorch, got one of {type(trainer).__module__};"
                " replace `import pytorch_lightning` by `import lightning.pytorch`"
            )
        super().setup(trainer, pl_module, stage)
        if self.policy is None:
            installed = find_quantized_io(trainer.strategy.checkpoint_io) if self.qat is not None else None
            if installed is not None:  # the user's own
                installed.describe_model = lambda: _names(trainer, self.codecs)
            return
        _check_strategy(trainer.strategy)
        installed = find_quantized_io(trainer.strategy.checkpoint_io)
        if installed is None:
            installed = QuantizedCheckpointIO(trainer.strategy.checkpoint_io, self.policy, verify=self.verify)
            trainer.strategy.checkpoint_io = installed
        elif installed.policy != self.policy:
            raise ValueError(
                "the Trainer has a QuantizedCheckpointIO with another policy than the QuantizationCallback;"
                " give the policy to one of them and remove the other"
            )
        installed.describe_model = lambda: _names(trainer, self.codecs)
        installed.optimizer_device = trainer.strategy.root_device if stage == "fit" else None
        if self.async_save:
            check_not_async(trainer.strategy.checkpoint_io)
            installed.async_save = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a policy that would quantize nothing, now that the model has its parameters."""
        if self.policy is not None:
            self.policy.check_matches(name for name, _ in pl_module.named_parameters())
        super().on_fit_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say how weights are quantized in checkpoints that no CheckpointIO encodes."""
        if self.policy is None and self.codecs:
            state = checkpoint["state_dict"]
            described = describe_codes(state, state, self.codecs)
            checkpoint[SUMMARY_KEY] = {"format_version": FORMAT_VERSION, CODES_KEY: described}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the masters back; finish the pending save, whose error must not take the place of the one on its way."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self._finish(trainer)
        except BackgroundSaveError as error:
            rank_zero_warn(str(error))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish the pending save where the strategy does not tear its CheckpointIO down (FSDP, ModelParallel)."""
        super().teardown(trainer, pl_module, stage)
        self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        installed = None if self.policy is None else find_quantized_io(trainer.strategy.checkpoint_io)
        if installed is not None:
            if self.async_save:
                installed.async_save = False  # who saves outside of the Trainer's loops wants the file, not a promise
            installed.finish()


def _other_callbacks(trainer: pl.Trainer, callback: pl.Callback) -> list[pl.Callback]:
    return [each for each in trainer.callbacks if each is not callback]  # type: ignore[attr-defined]


def _check_strategy(strategy: Strategy) -> None:
    """Raise ValueError for strategies whose saves bypass the CheckpointIO: nothing would be quantized."""
    remedy = None
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":
        remedy = 'pass FSDPStrategy(state_dict_type="full")'
    elif isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        remedy = "pass ModelParallelStrategy(save_distributed_checkpoint=False)"
    elif isinstance(strategy, DeepSpeedStrategy):
        remedy = "use another strategy"
    if remedy is not None:
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints without the Trainer's CheckpointIO, so they cannot be"
            f" quantized; {remedy}, or remove the QuantizationCallback (or pass it checkpoint=None)"
        )


def _names(trainer: pl.Trainer, quantized: Mapping[str, WeightCodec]) -> ModelNames:
    module = trainer.lightning_module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return ModelNames(
        parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
        optimizer_parameters=tuple(
            tuple(names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"])
            for optimizer in trainer.optimizers
        ),
        quantized=quantized,
    )
