"""Train with quantized weights: the part that a callback with ``qat`` has."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from q8lightning.metrics.recorder import Recorder
from q8lightning.qat.config import QATConfig
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.qat.select.checks import check_optimizers
from q8lightning.qat.select.trained_weights import TrainedWeights
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.trainer.lightning_api.internals import logs_next_step
from q8lightning.trainer.lightning_api.model import WeakStructure
from q8lightning.trainer.lightning_api.strategies import check_qat
from q8lightning.trainer.record.weight_losses import WeightLosses
from q8lightning.trainer.train.engage import Engagement


class _KnownCodecs:
    """The codecs of the weights that were trained quantized, valid until the model or the selection changes."""

    def __init__(self, trained: TrainedWeights, module: pl.LightningModule) -> None:
        self.trained = trained
        self.structure = WeakStructure(module)
        self.replaced = trained.replaced(module)
        self.codecs = trained.codecs(module)


class QATTraining:
    """Selects the weights of each run, engages them around its steps, and knows afterwards how they were quantized.

    Args:
        config: Says which weights are trained quantized, and when.
        recorder: Computes what they lose.
    """

    def __init__(self, config: QATConfig, recorder: Recorder) -> None:
        self.config = config
        self.trained = TrainedWeights()
        """The weights of the last run, for checkpoints that are saved after it."""
        self._recorder = recorder
        self._engagement: Engagement | None = None
        self._known: _KnownCodecs | None = None
        self._losses = WeightLosses(recorder)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the run in progress: a copy may be made in the middle of it."""
        return self.__dict__ | {"_engagement": None, "_known": None}

    @property
    def statistics(self) -> Mapping[str, ErrorStatistics]:
        """What each weight lost when it was last measured, by parameter name; measured at steps that are logged."""
        return {} if self._engagement is None else self._engagement.quantizer.statistics

    def codecs(self, trainer: pl.Trainer) -> dict[str, WeightCodec]:
        """Return the codec of each weight that the last step trained quantized, by name.

        Warns of weights that were replaced since, and leaves them out.
        """
        pl_module, steps = trainer.lightning_module, trainer.global_step
        if steps and not self.config.active(steps - 1):
            return {}
        known = self._known
        if known is None or known.trained is not self.trained or not known.structure.is_that_of(pl_module):
            known = self._known = _KnownCodecs(self.trained, pl_module)
        if known.replaced:
            rank_zero_warn(
                f"{', '.join(known.replaced)} was replaced since it was last trained with quantized weights;"
                " checkpoints hold it and do not say that it is quantized, and exports write it as it is. Train or"
                " validate with it before saving, if it should be"
            )
        return dict(known.codecs)

    def inputs(self, trainer: pl.Trainer) -> dict[str, dict[str, str]]:
        """Return how the last step quantized inputs of modules, by the modules' names."""
        steps = trainer.global_step
        return {} if steps and not self.config.active(steps - 1) else self.trained.inputs

    def check(self, trainer: pl.Trainer) -> None:
        """Raise ValueError if the Trainer's strategy cannot train weights quantized."""
        check_qat(trainer.strategy)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, others: Sequence[pl.Callback]) -> None:
        """Select the weights and begin to engage them around every step.

        Args:
            trainer: The Trainer, which has moved model and optimizers to their device.
            pl_module: The model.
            others: The other callbacks, whose hooks may look at weights between steps.

        Raises:
            ValueError: If a pattern matches nothing, or a weight or an optimizer cannot be trained so.
        """
        self.end()
        fitting = trainer.state.fn == "fit"
        quantizer = FakeQuantizer(pl_module, self.config)
        try:
            check_optimizers(trainer.optimizers if fitting else (), quantizer.weights)
        except ValueError:
            quantizer.close()
            raise
        self.trained = TrainedWeights(tuple(quantizer.weights), tuple(quantizer.modules))
        self._engagement = Engagement(
            quantizer,
            trainer.precision_plugin,
            owners=[pl_module, getattr(trainer, "datamodule", None), *others],
            step=lambda: trainer.global_step if fitting else None,
            manual=fitting and not pl_module.automatic_optimization,
            measure=lambda: self._recorder.detail is not None and logs_next_step(trainer),
            follow=lambda: self._follow(trainer, quantizer),
        )

    def begin_evaluation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, others: Sequence[pl.Callback]
    ) -> None:
        """Begin as :meth:`begin` does, or in the middle of a fit put the masters back before other hooks run."""
        if self._engagement is None:
            self.begin(trainer, pl_module, others)
        self.release()

    def release(self) -> None:
        """Put the masters back, until the next step."""
        if self._engagement is not None:
            self._engagement.quantizer.release()

    def end(self) -> None:
        """Put the masters back and let go of the model."""
        if self._engagement is not None:
            self._engagement.close()
        self._engagement = None

    def record(self, trainer: pl.Trainer) -> None:
        """Have what the weights lost in the step that ended copied to the host, if it was measured.

        What is lost of sharded weights is added up over the processes first: all of them call this at once.
        """
        if self._engagement is not None:
            self._engagement.quantizer.add_up_statistics()
        self._losses.take(trainer, self.statistics)

    def publish(self, trainer: pl.Trainer, wait: bool) -> None:
        """Publish what the host knows of that; with ``wait`` wait for everything."""
        self._losses.publish(trainer, wait)

    def select_after_other_processes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the weights again if other processes trained them: those told this one nothing."""
        if not self.trained.weights and trainer.state.fn == "fit" and trainer.state.finished:
            quantizer = FakeQuantizer(pl_module, self.config)
            self.trained = TrainedWeights(tuple(quantizer.weights), tuple(quantizer.modules))
            quantizer.close()

    def _follow(self, trainer: pl.Trainer, quantizer: FakeQuantizer) -> None:
        """Let the selection follow added, removed or replaced layers, and warn of what that changes."""
        if not quantizer.follow():
            return
        check_optimizers(trainer.optimizers if trainer.state.fn == "fit" else (), quantizer.weights)
        self.trained = TrainedWeights(tuple(quantizer.weights), tuple(quantizer.modules))
        if quantizer.change is not None:
            rank_zero_warn(
                f"the model has changed since its last step, and QAT follows it: {quantizer.change}. Exclude by name"
                " what should not be quantized; give what should be a rule"
            )
