"""Saves that come before the callback's setup, or without one, are quantized like any other; weights-only ones are not.

| who saves | whole checkpoint | weights only |
|---|---|---|
| before the first run of the Trainer | quantized | plain, as documented: no hook is called |
| a callback earlier in the list, in its setup | quantized | plain |
| another Trainer that has the same callback | quantized | plain |
| the process that started others (``ddp_fork``; ``ddp_spawn`` takes the same way) | quantized | plain |
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from support import forked
from support.models import Autoencoder, in_two_processes, quiet_trainer
from support.packages import PACKAGES, package
from support.promises import assert_kept, load, payloads_of

from q8lightning import QATConfig, QuantizationCallback, QuantizedCheckpointIO, WeightRule
from q8lightning.trainer.checkpoint_io.durable import DurableCheckpointIO

RAW = frozenset({"table", "counts"})


def connected(folder: Path, *callbacks: Any, name: str = PACKAGES[0], **options: Any) -> Any:
    """Return a Trainer that has its model and has not run."""
    models = package(name).models
    torch.manual_seed(5)
    trainer = models.quiet_trainer(folder, callbacks=list(callbacks), max_steps=2, limit_val_batches=0, **options)
    trainer.strategy.connect(models.Autoencoder())
    return trainer


def before_any_run(folder: Path, name: str, *callbacks: Any, **save: Any) -> None:
    connected(folder, *callbacks, name=name).save_checkpoint(folder / "a.ckpt", **save)


def in_the_setup_of_an_earlier_callback(folder: Path, name: str, *callbacks: Any, **save: Any) -> None:
    class Early(package(name).pl.Callback):  # type: ignore[misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.save_checkpoint(folder / "a.ckpt", **save)

    trainer = connected(folder, Early(), *callbacks, name=name)
    trainer.fit(trainer.lightning_module)


def in_another_trainer(folder: Path, name: str, *callbacks: Any, **save: Any) -> None:
    trainer = connected(folder, *callbacks, name=name)
    trainer.fit(trainer.lightning_module)
    before_any_run(folder, name, *callbacks, **save)


WAYS: list[Callable[..., None]] = [before_any_run, in_the_setup_of_an_earlier_callback, in_another_trainer]


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_save_without_a_setup_keeps_what_the_preset_promises(
    way: Callable[..., None], async_save: bool, name: str, preset: str, tmp_path: Path
) -> None:
    way(tmp_path, name)
    before = load(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").unlink()
    way(tmp_path, name, QuantizationCallback(preset, async_save=async_save))
    assert_kept(load(tmp_path / "a.ckpt"), before, preset, RAW)
    assert "state_dict.decoder.weight" in payloads_of(tmp_path / "a.ckpt")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_weights_alone_stay_plain_without_a_setup(way: Callable[..., None], tmp_path: Path) -> None:
    """What the docstring says: there is no hook that could install anything."""
    way(tmp_path, PACKAGES[0], QuantizationCallback(), weights_only=True)
    assert not payloads_of(tmp_path / "a.ckpt")
    assert QuantizationCallback.__doc__ is not None
    assert "weights only are quantized from ``setup``" in " ".join(QuantizationCallback.__doc__.split())


def test_one_callback_quantizes_for_two_trainers_in_turn(tmp_path: Path) -> None:
    callback = QuantizationCallback()
    one, two = connected(tmp_path, callback), connected(tmp_path, callback)
    for index, trainer in enumerate([one, two, one, two]):
        trainer.save_checkpoint(tmp_path / f"{index}.ckpt")
        assert "state_dict.decoder.weight" in payloads_of(tmp_path / f"{index}.ckpt")
        assert type(trainer.strategy.checkpoint_io) is QuantizedCheckpointIO
        assert type(trainer.strategy.checkpoint_io.base) is DurableCheckpointIO
    one.fit(one.lightning_module)
    one.save_checkpoint(tmp_path / "fitted.ckpt")
    assert load(tmp_path / "fitted.ckpt")["global_step"] == 2


def test_the_plugin_knows_the_model_before_setup_too(tmp_path: Path) -> None:
    """Alone it could not tell the buffer ``table`` from a weight."""
    trainer = connected(tmp_path, QuantizationCallback(), plugins=[QuantizedCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "state_dict.decoder.weight" in payloads_of(tmp_path / "a.ckpt")
    assert "state_dict.table" not in payloads_of(tmp_path / "a.ckpt")


class OwnShards(ModelParallelStrategy):
    """Writes its checkpoints in a way of its own."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_what_setup_refuses_is_refused_before_setup_too(tmp_path: Path) -> None:
    plugin = QuantizedCheckpointIO(checkpoint="compact")
    trainer = connected(tmp_path, QuantizationCallback("resume"), plugins=[plugin])
    with pytest.raises(ValueError, match="another policy"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = connected(tmp_path, QuantizationCallback("resume"))
    trainer._accelerator_connector.strategy = OwnShards()
    with pytest.raises(ValueError, match="without the Trainer's CheckpointIO"):
        QuantizationCallback().on_save_checkpoint(trainer, Autoencoder(), {"state_dict": {}})


def start_two_processes_and_save(folder: Path, qat: bool) -> None:
    config = QATConfig([WeightRule(codebook="int4")]) if qat else None
    trainer = quiet_trainer(
        folder,
        max_steps=2,
        limit_val_batches=0,
        callbacks=[QuantizationCallback("compact", qat=config)],
        **in_two_processes(),
    )
    model: pl.LightningModule = Autoencoder()
    trainer.fit(model)
    trainer.save_checkpoint(folder / "whole.ckpt")
    torch.save(model.state_dict(), folder / "weights.pt")


@pytest.mark.parametrize("qat", [False, True], ids=["float", "qat"])
def test_the_process_that_started_others_quantizes_too(qat: bool, tmp_path: Path) -> None:
    assert forked.run(start_two_processes_and_save, tmp_path, qat) == 0
    saved, weights = load(tmp_path / "whole.ckpt"), load(tmp_path / "weights.pt")
    assert "state_dict.decoder.weight" in payloads_of(tmp_path / "whole.ckpt")
    assert (saved["state_dict"]["decoder.weight"] - weights["decoder.weight"]).abs().max() < 0.01
    entries = saved["q8lightning"].get("qat") or {}
    assert ("decoder.weight" in entries) == qat


def test_another_io_that_the_user_puts_in_its_place_after_setup_stays(tmp_path: Path) -> None:
    trainer = connected(tmp_path, QuantizationCallback())
    trainer.fit(trainer.lightning_module)
    trainer.strategy.checkpoint_io = plain = TorchCheckpointIO()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.strategy.checkpoint_io is plain
    assert not payloads_of(tmp_path / "a.ckpt")
