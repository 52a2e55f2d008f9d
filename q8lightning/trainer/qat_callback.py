"""The part of the callback that trains with quantized weights."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from q8lightning.metrics.recorder import PREFIX, Detail, Loss, Recorder
from q8lightning.qat.config import QATConfig
from q8lightning.qat.fake_quantizer import FakeQuantizer
from q8lightning.qat.selection import check_optimizers
from q8lightning.qat.trained import TrainedWeights
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.trainer.engagement import Windows
from q8lightning.trainer.recording import harmless, publish
from q8lightning.trainer.twins import is_a

QAT_PREFIX = f"{PREFIX}/qat"
"""What the names of values begin with that are measured while training, not when a checkpoint is saved."""


class QATCallback(pl.Callback):
    """The part of the callback that trains with quantized weights; ``qat.windows`` says when they are in place."""

    def __init__(self, qat: QATConfig | Mapping[str, Any] | None, log: Detail | None) -> None:
        self.recorder = Recorder(log)
        self.qat = None if qat is None else QATConfig.of(qat)
        self._trained = TrainedWeights()
        """Kept after the run for whoever saves a checkpoint then."""
        self._windows: Windows | None = None
        self._logged: Mapping[str, ErrorStatistics] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what hangs on the run that goes on: a copy may be made, or pickled, in the middle of it."""
        return self.__dict__ | {"_windows": None}

    @property
    def statistics(self) -> Mapping[str, ErrorStatistics]:
        """What each weight lost when it was last measured, at the steps that a logger sees; by parameter name."""
        return {} if self._windows is None else self._windows.quantizer.statistics

    def codecs(self, trainer: pl.Trainer) -> dict[str, WeightCodec]:
        """Return how each weight is quantized by name, none after a step in float; warn of those that were replaced."""
        pl_module, steps = trainer.lightning_module, trainer.global_step
        if steps and self.qat is not None and not self.qat.active(steps - 1):
            return {}
        replaced = self._trained.replaced(pl_module)
        if replaced:
            rank_zero_warn(
                f"{', '.join(replaced)} was replaced since it was last trained with quantized weights; checkpoints hold"
                " it and do not say that it is quantized, and exports write it as it is. Train or validate with it"
                " before saving, if it should be"
            )
        return self._trained.codecs(pl_module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that hold no ordinary parameters; become the first callback, which releases before any."""
        if self.qat is None:
            return
        if is_a(trainer.strategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy):
            raise ValueError(
                "QAT changes parameters in place and needs a strategy that keeps them whole on each device, got"
                f" {type(trainer.strategy).__name__}; use DDP or a single device, or remove qat"
            )
        others = other_callbacks(trainer, self)
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
        """Record what the weights lost, if it was measured in this step."""
        if self.statistics is not self._logged and self.statistics:
            self._logged = self.statistics
            with harmless(self.recorder, "computing what quantized weights lose"):
                rows = torch.stack([torch.stack(each).cpu() for each in self.statistics.values()]).tolist()
                losses = [Loss("weights", name, row) for name, row in zip(self.statistics, rows, strict=True)]
                publish(trainer, self.recorder, self.recorder.losses(losses, QAT_PREFIX))

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
        quantizer = FakeQuantizer(pl_module, self.qat)
        try:
            check_optimizers(trainer.optimizers if fitting else (), quantizer.weights)
        except ValueError:
            quantizer.close()
            raise
        self._trained = TrainedWeights(tuple(quantizer.weights))
        self._windows = Windows(
            quantizer,
            trainer.precision_plugin,
            owners=[pl_module, getattr(trainer, "datamodule", None), *other_callbacks(trainer, self)],
            step=lambda: trainer.global_step if fitting else None,
            manual=fitting and not pl_module.automatic_optimization,
            measure=lambda: self.recorder.detail is not None and trainer._logger_connector.should_update_logs,
            follow=lambda: self._follow(trainer, quantizer),
        )

    def _select_after_other_processes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out how weights are quantized that processes trained which this one started; they have told nothing."""
        if self.qat is not None and not self._trained.weights and trainer.state.fn == "fit" and trainer.state.finished:
            quantizer = FakeQuantizer(pl_module, self.qat)
            self._trained = TrainedWeights(tuple(quantizer.weights))
            quantizer.close()

    def _follow(self, trainer: pl.Trainer, quantizer: FakeQuantizer) -> None:
        """Let the selection follow a model whose layers were added, removed or replaced, and say what that changed."""
        if not quantizer.follow():
            return
        check_optimizers(trainer.optimizers if trainer.state.fn == "fit" else (), quantizer.weights)
        self._trained = TrainedWeights(tuple(quantizer.weights))
        if quantizer.change is not None:
            rank_zero_warn(
                f"the model has changed since its last step, and QAT follows it: {quantizer.change}. Exclude by name"
                " what should not be quantized; give what should be a rule"
            )

    def _close(self) -> None:
        if self._windows is not None:
            self._windows.close()
        self._windows = None


def other_callbacks(trainer: pl.Trainer, callback: pl.Callback) -> list[pl.Callback]:
    return [each for each in trainer.callbacks if each is not callback]  # type: ignore[attr-defined]
