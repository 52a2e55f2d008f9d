"""Describe how weights were trained quantized in checkpoints that are not encoded.

No hook of a callback can do that, because Lightning calls none when only weights are saved.
"""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.layout.sections import CODES_KEY, INPUTS_KEY, STATE_DICT, SUMMARY_KEY
from q8lightning.checkpoint.qat_codes import describe_codes
from q8lightning.trainer.save.describe_model import Quantizes


class DescribeSave:
    """Stands in for the ``save_checkpoint`` of a Trainer's strategy, which every save passes.

    Args:
        trainer: The Trainer that saves.
        callback: Knows how the weights are quantized.
        save: What other code put in place of the strategy's method; None for the method itself.
    """

    def __init__(self, trainer: pl.Trainer, callback: Quantizes, save: Callable[..., Any] | None) -> None:
        self.save = save
        self._trainer = trainer
        self._callback = callback

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save a copy of the checkpoint that has the description."""
        checkpoint = {**checkpoint, **self._describe(checkpoint)}
        if self.save is None:
            strategy = self._trainer.strategy
            type(strategy).save_checkpoint(strategy, checkpoint, *args, **kwargs)
        else:
            self.save(checkpoint, *args, **kwargs)

    def _describe(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        codecs = self._callback.codecs(self._trainer)
        state = checkpoint.get(STATE_DICT)
        if not codecs or not isinstance(state, Mapping):
            return {}
        summary = {"format_version": FORMAT_VERSION, "policy": None, "restored": self._callback.restored}
        inputs = self._callback.inputs(self._trainer)
        described = {CODES_KEY: describe_codes(state, codecs, {}), **({INPUTS_KEY: inputs} if inputs else {})}
        return {SUMMARY_KEY: summary | described}


def describe_saves(trainer: pl.Trainer, callback: Quantizes) -> None:
    """Describe the weights in every save from now on, also after the run."""
    save = vars(trainer.strategy).get("save_checkpoint")
    if isinstance(save, DescribeSave):
        save = save.save
    trainer.strategy.save_checkpoint = DescribeSave(trainer, callback, save)  # type: ignore[method-assign]
