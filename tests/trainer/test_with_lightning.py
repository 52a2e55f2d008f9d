"""Beside Lightning's own machinery (averaging, links, other CheckpointIOs, the tuner) the promises hold as well."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.tuner import Tuner
from support.disk import Disk
from support.models import Autoencoder, batches, quiet_trainer, saving_trainer
from support.promises import (
    assert_kept,
    assert_same,
    load,
    payloads,
    payloads_of,
    promise_for,
    promised_paths,
    same_bits,
)

from q8lightning import QuantizationCallback, QuantizedCheckpointIO

RAW = frozenset({"table", "counts"})


class RecordingIO(TorchCheckpointIO):
    """A user's own CheckpointIO: writes as Lightning does and keeps account of what passes."""

    def __init__(self) -> None:
        self.saved: dict[str, dict[str, Any]] = {}
        self.loaded: list[str] = []
        self.removed: list[str] = []
        self.torn_down = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.saved[Path(path).name] = checkpoint
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.loaded.append(Path(path).name)
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.removed.append(Path(path).name)
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.torn_down += 1


# Weight averaging


@pytest.mark.parametrize(
    "average",
    [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5), lambda: EMAWeightAveraging(decay=0.5, use_buffers=False)],
    ids=["mean", "ema", "ema-without-buffers"],
)
def test_averaged_and_current_weights_are_both_quantized_and_restored(
    average: Any, preset: str, tmp_path: Path
) -> None:
    def fit(max_steps: int, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> None:
        torch.manual_seed(3)
        saving = ModelCheckpoint(tmp_path / "run", "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path,
            max_steps=max_steps,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[average(), saving, *callbacks],
        )
        trainer.fit(Autoencoder(), ckpt_path=ckpt_path)

    file = tmp_path / "run" / "step=4.ckpt"
    fit(4)
    before = load(file)
    file.unlink()
    fit(4, QuantizationCallback(preset))
    after = load(file)
    assert not same_bits(before["state_dict"]["decoder.weight"], before["current_model_state"]["decoder.weight"])
    assert_kept(after, before, preset, RAW)
    encoded = set(payloads_of(file))
    assert encoded == promised_paths(before, preset, RAW)
    assert {"state_dict.decoder.weight", "current_model_state.decoder.weight"} <= encoded

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            averaging = next(each for each in trainer.callbacks if isinstance(each, WeightAveraging))
            self.current = copy.deepcopy(pl_module.state_dict())
            self.average = copy.deepcopy(averaging._average_model.module.state_dict())  # type: ignore[union-attr]

    watch = Watch()
    fit(5, QuantizationCallback(preset), watch, ckpt_path=file)
    promise = promise_for(before, preset, RAW)
    assert_same(watch.current, promise["current_model_state"])
    for name, tensor in promise["state_dict"].items():
        assert same_bits(watch.average[name], tensor), name


# ModelCheckpoint


def test_the_last_checkpoint_is_a_link_that_resumes(preset: str, tmp_path: Path) -> None:
    def fit(max_steps: int, ckpt_path: str | None = None) -> pl.Trainer:
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
        trainer = quiet_trainer(
            tmp_path,
            max_steps=max_steps,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[saving, QuantizationCallback(preset)],
        )
        trainer.fit(Autoencoder(), ckpt_path=ckpt_path)
        return trainer

    fit(4)
    last = tmp_path / "last.ckpt"
    assert last.is_symlink()
    assert os.readlink(last) == "step=4.ckpt"
    assert_same(load(last), load(tmp_path / "step=4.ckpt"))
    assert payloads_of(last)
    before = (tmp_path / "step=4.ckpt").read_bytes()
    assert fit(8, ckpt_path="last").global_step == 8
    assert os.readlink(last) == "step=8.ckpt"
    assert load(last)["global_step"] == 8
    assert (tmp_path / "step=4.ckpt").read_bytes() == before


def test_saving_over_a_link_replaces_the_link_not_the_file_behind_it(tmp_path: Path) -> None:
    """As ``save_last=True`` does in a folder where an earlier run had ``save_last="link"``."""
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback()])
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    best = (tmp_path / "best.ckpt").read_bytes()
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    trainer.lightning_module.decoder.weight.data.zero_()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert bool((load(tmp_path / "last.ckpt")["state_dict"]["decoder.weight"] == 0).all())
    assert (tmp_path / "best.ckpt").read_bytes() == best


def test_old_checkpoints_are_removed_as_before(preset: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", monitor="step", mode="max", every_n_train_steps=1, save_top_k=2)
    saving_trainer(tmp_path, saving, QuantizationCallback(preset), max_steps=4).fit(Autoencoder())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3.ckpt", "step=4.ckpt"]


# Other CheckpointIOs


def test_a_users_own_checkpoint_io_does_all_the_work(preset: str, tmp_path: Path) -> None:
    own = RecordingIO()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    trainer = saving_trainer(tmp_path, saving, QuantizationCallback(preset), max_steps=2, plugins=[own])
    trainer.fit(Autoencoder())
    installed = trainer.strategy.checkpoint_io
    assert type(installed) is QuantizedCheckpointIO
    assert installed.checkpoint_io is own
    assert list(own.saved) == ["step=1.ckpt", "step=2.ckpt"]
    assert all(payloads(checkpoint) for checkpoint in own.saved.values()), "it was not encoded before it was handed on"
    assert own.removed == ["step=1.ckpt"]
    assert own.torn_down == 1
    trainer.test(ckpt_path="best", verbose=False)
    assert own.loaded == ["step=2.ckpt"]


class WatchedAsyncIO(AsyncCheckpointIO):
    """Lightning's AsyncCheckpointIO, remembering what it was given and what it ran on."""

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io)
        self.given: list[dict[str, Any]] = []
        self.executors: list[ThreadPoolExecutor | None] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.given.append(checkpoint)
        super().save_checkpoint(checkpoint, *args, **kwargs)
        self.executors.append(self._executor)


@pytest.mark.parametrize("base", [lambda: None, TorchCheckpointIO, RecordingIO], ids=["default", "plain", "own"])
def test_asynchronous_saves_get_payloads_and_are_finished_when_fit_returns(
    base: Any, preset: str, tmp_path: Path
) -> None:
    def fit(plugin: CheckpointIO, *callbacks: pl.Callback) -> pl.Trainer:
        torch.manual_seed(4)
        saving = ModelCheckpoint(tmp_path / "run", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path,
            max_steps=3,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[saving, *callbacks],
            plugins=[plugin],
        )
        trainer.fit(Autoencoder())
        return trainer

    files = [tmp_path / "run" / f"step={step}.ckpt" for step in (1, 2, 3)]
    fit(AsyncCheckpointIO())
    before = [load(file) for file in files]
    for file in files:
        file.unlink()
    asynchronous = WatchedAsyncIO(base())
    fit(asynchronous, QuantizationCallback(preset))
    assert len(asynchronous.given) == 3
    assert all(promised_paths(before[0], preset, RAW) == set(payloads(each)) for each in asynchronous.given)
    assert asynchronous._executor is None, "teardown was not forwarded"
    assert None not in asynchronous.executors
    for file, plain in zip(files, before, strict=True):
        assert_kept(load(file), plain, preset, RAW)


def test_the_default_behind_another_wrapper_is_made_durable(tmp_path: Path, disk: Disk) -> None:
    trainer = quiet_trainer(
        tmp_path,
        max_steps=1,
        limit_val_batches=0,
        callbacks=[QuantizationCallback()],
        plugins=[AsyncCheckpointIO()],
    )
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.strategy.checkpoint_io.teardown()
    assert payloads_of(tmp_path / "last.ckpt")
    assert [call for call, _ in disk.calls] == ["flush file", "rename", "flush folder"]


# The tuner saves the live weights and restores them a moment later


class Tunable(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3
        self.batch_size = 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return batches(16, size=self.batch_size)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_the_tuner_restores_the_weights_to_the_bit(search: str, preset: str, tmp_path: Path) -> None:
    own, model = RecordingIO(), Tunable()
    before = copy.deepcopy(model.state_dict())
    trainer = quiet_trainer(
        tmp_path, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback(preset)], plugins=[own]
    )
    if search == "lr_find":
        Tuner(trainer).lr_find(model, num_training=4)
    else:
        Tuner(trainer).scale_batch_size(model, max_trials=2, steps_per_trial=1)
        assert model.batch_size > 2
    assert len(own.saved) == 1
    name, checkpoint = own.saved.popitem()
    assert name.startswith(f".{search}_")
    assert not payloads(checkpoint)
    assert "q8lightning" not in checkpoint
    assert own.loaded == own.removed == [name]
    assert_same(model.state_dict(), before)

    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert payloads_of(tmp_path / "last.ckpt")
