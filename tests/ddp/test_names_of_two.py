"""Two processes agree on the names of files that one of them is still writing, wait together, and one is told."""

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import processes
from support.models import Waves, quiet_trainer
from support.promises import load
from support.steps import announced

from q8lightning import QuantizationCallback

STEPS = 4


class Notes(pl.Callback):
    """Waits in every process, reads what it waited for, and notes what it hears of."""

    def __init__(self, callback: QuantizationCallback, saving: ModelCheckpoint, folder: Path) -> None:
        self.callback, self.saving, self.folder = callback, saving, folder
        self.steps: list[int] = []
        self.heard: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.saving.best_model_path:
            self.callback.wait_until_durable(self.saving.best_model_path)
            self.steps.append(load(self.saving.best_model_path)["global_step"])
        if index == STEPS - 1:
            with pytest.raises(FileNotFoundError, match=r"never\.ckpt"):
                self.callback.wait_until_durable(self.folder / "never.ckpt")

    def on_checkpoint_durable(self, path: str) -> None:
        self.heard.append(os.path.basename(path))


def train(rank: int, folder: Path) -> tuple[list[list[str]], list[int], list[str]]:
    """Train with two ModelCheckpoints over one folder and a slow writer; return names, steps and what was heard."""
    torch.manual_seed(0)
    wave = ModelCheckpoint(folder, monitor="wave", mode="min", every_n_train_steps=1, save_top_k=-1)
    rise = ModelCheckpoint(folder, monitor="rise", mode="max", every_n_train_steps=1)
    callback = QuantizationCallback(async_save=True)
    notes = Notes(callback, wave, folder)
    trainer = quiet_trainer(
        folder,
        max_steps=STEPS,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[callback, notes, wave, rise],
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
    )
    with announced() as steps, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps.delay("opened", 0.03)
        trainer.fit(Waves(STEPS))
    return [list(map(os.path.basename, each.best_k_models)) for each in (wave, rise)], notes.steps, notes.heard


def test_two_processes_agree_on_names_wait_together_and_one_is_told(tmp_path: Path) -> None:
    (names, steps, heard), (other_names, other_steps, other_heard) = processes.run(train, 2, tmp_path)
    last = [f"epoch=0-step={STEPS}.ckpt", f"epoch=0-step={STEPS}-v1.ckpt"]
    assert names == other_names
    assert names[0] == [f"epoch=0-step={step}.ckpt" for step in range(1, STEPS + 1)]
    assert names[1] == last[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*names[0], *names[1]})
    assert steps == other_steps == [1, 2, 3]
    assert len(heard) == 2 * STEPS
    assert heard[-2:] == last
    assert other_heard == []
