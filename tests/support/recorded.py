"""What processes see of the values that saves publish."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger


def ours(values: Mapping[str, Any]) -> dict[str, float]:
    """Return those of some values that q8lightning published."""
    return {name: float(value) for name, value in values.items() if name.startswith("q8/")}


class Rows(DummyLogger):
    """A logger that keeps all rows, ours and Lightning's, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, **_: Any) -> None:  # type: ignore[override]
        self.rows.append((step, metrics))

    @property
    def steps(self) -> list[int | None]:
        """The steps of rows with our values."""
        return [step for step, row in self.rows if ours(row)]


class Sees(pl.Callback):
    """Writes what its process sees: our values at the end of each epoch and of the run, the steps, and our rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(ours(trainer.callback_metrics))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        rows = [step for logger in trainer.loggers if isinstance(logger, Rows) for step in logger.steps]
        found = [*self.seen, ours(trainer.callback_metrics)], trainer.global_step, rows
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")
