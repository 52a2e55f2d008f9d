"""Add to checkpoints what no hook of a callback could add: Lightning calls none when only weights are saved."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

Describe = Callable[[pl.Trainer, Mapping[str, Any]], dict[str, Any]]
"""Returns what to add to a checkpoint."""


class DescribedSaves:
    """Stands in for the ``save_checkpoint`` of a Trainer's strategy, which every save passes.

    Args:
        trainer: Whose saves.
        describe: Asked at each save.
        save: What somebody else put in the place of the strategy's method; None for the method.
    """

    def __init__(self, trainer: pl.Trainer, describe: Describe, save: Callable[..., Any] | None) -> None:
        self.save = save
        self._trainer = trainer
        self._describe = describe

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save a copy of the checkpoint with the description."""
        checkpoint = {**checkpoint, **self._describe(self._trainer, checkpoint)}
        if self.save is None:
            strategy = self._trainer.strategy
            type(strategy).save_checkpoint(strategy, checkpoint, *args, **kwargs)
        else:
            self.save(checkpoint, *args, **kwargs)


def describe_saves(trainer: pl.Trainer, describe: Describe) -> None:
    """Add to every save from now on what ``describe`` returns; also after the run."""
    save = vars(trainer.strategy).get("save_checkpoint")
    if isinstance(save, DescribedSaves):
        save = save.save
    trainer.strategy.save_checkpoint = DescribedSaves(trainer, describe, save)  # type: ignore[method-assign]
