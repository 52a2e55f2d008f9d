"""Live state is never touched: saving every step changes neither the training nor what was handed over to be saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.models import Autoencoder, Diary, TwoOptimizers, quiet_trainer
from support.promises import assert_same, payloads_of, same_bits, tensors

from q8lightning import QuantizationCallback, QuantizedCheckpointIO

MODELS = {"AdamW": Autoencoder, "SGD": lambda: Autoencoder("sgd"), "two": TwoOptimizers}


def train(folder: Path, name: str, *callbacks: pl.Callback) -> tuple[pl.Trainer, Autoencoder]:
    torch.manual_seed(2)
    every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    model = MODELS[name]()
    trainer = quiet_trainer(
        folder, max_epochs=2, limit_val_batches=0, enable_checkpointing=True, callbacks=[every_step, *callbacks]
    )
    trainer.fit(model)
    return trainer, model


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Autoencoder]:
    """A model trained and saved without the callback."""
    return request.param, train(tmp_path_factory.mktemp("plain"), request.param)[1]


def test_training_is_bit_identical_with_and_without_the_callback(
    plain: tuple[str, Autoencoder], preset: str, tmp_path: Path
) -> None:
    name, expected = plain
    _, model = train(tmp_path, name, QuantizationCallback(preset))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 8
    assert all(payloads_of(file) for file in files)
    assert model.losses == expected.losses
    assert len(set(model.losses)) == len(model.losses) >= 8  # it did train
    assert_same(model.state_dict(), expected.state_dict())


def test_random_numbers_are_not_drawn_by_saving(preset: str, tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, "AdamW", QuantizationCallback(preset))
    state = torch.get_rng_state()
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert torch.equal(torch.get_rng_state(), state)


class Snapshot:
    """Everything about a checkpoint that saving it could change: containers, objects, memory and values."""

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.containers = self._containers(checkpoint)
        self.tensors = [
            (path, tensor, tensor.data_ptr(), tensor._version, tensor.stride(), tensor.detach().clone())
            for path, tensor in tensors(checkpoint)
        ]

    def _containers(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return id(value), type(value), [(key, self._containers(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return id(value), type(value), [self._containers(item) for item in value]
        return id(value), type(value)

    def assert_unchanged(self) -> None:
        assert self._containers(self.checkpoint) == self.containers
        assert len(self.tensors) > 10
        for path, tensor, address, version, stride, values in self.tensors:
            assert tensor.data_ptr() == address, path
            assert tensor._version == version, f"{path} was written to"
            assert tensor.stride() == stride, path
            assert same_bits(tensor, values), path


class Remembering(Autoencoder):
    """Takes a snapshot of the checkpoint at the last moment before the CheckpointIO gets it."""

    snapshot: Snapshot | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.snapshot = Snapshot(checkpoint)


def test_neither_the_checkpoint_handed_over_nor_the_live_tensors_change(preset: str, tmp_path: Path) -> None:
    model = Remembering()
    trainer = quiet_trainer(
        tmp_path, max_steps=3, limit_val_batches=0, callbacks=[QuantizationCallback(preset), Diary()]
    )
    trainer.fit(model)
    live = Snapshot({"model": model.state_dict(keep_vars=True), "optimizer": trainer.optimizers[0].state_dict()})

    trainer.save_checkpoint(tmp_path / "last.ckpt")

    assert model.snapshot is not None
    assert "q8lightning" not in model.snapshot.checkpoint
    model.snapshot.assert_unchanged()
    live.assert_unchanged()
    # The snapshot is of the live tensors, not of copies, or this test would show nothing.
    assert model.snapshot.checkpoint["state_dict"]["decoder.weight"].data_ptr() == model.decoder.weight.data_ptr()
    for parameter in model.parameters():
        assert any(parameter is each for group in trainer.optimizers[0].param_groups for each in group["params"])


def test_the_io_alone_leaves_what_it_saves_as_it_is(preset: str, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(64, 64), "exp_avg_sq": torch.rand(64, 64)}
    checkpoint = {
        "state_dict": {"weight": weight.detach(), "tied": weight.detach()},
        "optimizer_states": [{"state": {0: state, 1: {}}, "param_groups": [{"params": [0, 1], "betas": (0.9, 0.99)}]}],
        "tuple": (torch.randn(4096), [torch.randn(4096)]),
        "more": [{"deep": torch.randn(64)} for _ in range(9)],
    }
    snapshot = Snapshot(checkpoint)
    QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert len(payloads_of(tmp_path / "a.ckpt")) == 4
    snapshot.assert_unchanged()
