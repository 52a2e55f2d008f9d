"""Callback, plugin or neither: the CheckpointIO is installed once, around the one that is there, or not at all."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from support.models import Autoencoder, Diary, quiet_trainer
from support.promises import WEIGHTS, assert_kept, assert_same, load, payloads_of, same_bits, stored

from q8lightning import CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO, Rule

RAW = frozenset({"table", "counts"})
WITHOUT_MODEL = frozenset({"counts"})
"""A plugin alone cannot tell the large float buffer from a weight."""


def chain(trainer: pl.Trainer) -> list[type[CheckpointIO]]:
    """Return the types of the CheckpointIOs from the outermost to the one that writes."""
    types: list[type[CheckpointIO]] = []
    each: CheckpointIO | None = trainer.strategy.checkpoint_io
    while each is not None:
        types.append(type(each))
        each = each.checkpoint_io if isinstance(each, _WrappingCheckpointIO) else None
    return types


def fit(folder: Path, **options: Any) -> pl.Trainer:
    torch.manual_seed(5)
    trainer = quiet_trainer(folder, max_steps=2, limit_val_batches=0, **options)
    trainer.fit(Autoencoder())
    return trainer


def plain_checkpoint(folder: Path) -> dict[str, Any]:
    fit(folder).save_checkpoint(folder / "plain.ckpt")
    return load(folder / "plain.ckpt")


def test_the_callback_alone_installs_it(preset: str, tmp_path: Path) -> None:
    trainer = fit(tmp_path, callbacks=[QuantizationCallback(preset)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert chain(trainer).count(QuantizedCheckpointIO) == 1
    assert_kept(load(tmp_path / "last.ckpt"), plain_checkpoint(tmp_path), preset, RAW)


def test_the_plugin_alone_works(preset: str, tmp_path: Path) -> None:
    trainer = fit(tmp_path, plugins=[QuantizedCheckpointIO(checkpoint=preset)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert chain(trainer).count(QuantizedCheckpointIO) == 1
    assert_kept(load(tmp_path / "last.ckpt"), plain_checkpoint(tmp_path), preset, WITHOUT_MODEL)


def test_the_plugin_around_another_works(preset: str, tmp_path: Path) -> None:
    plugin = QuantizedCheckpointIO(AsyncCheckpointIO(), checkpoint=preset)
    trainer = fit(tmp_path, plugins=[plugin])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.strategy.checkpoint_io.teardown()
    assert chain(trainer)[:2] == [QuantizedCheckpointIO, AsyncCheckpointIO]
    assert set(load(tmp_path / "last.ckpt")) == {*plain_checkpoint(tmp_path), "q8lightning"}


@pytest.mark.parametrize(
    "wrap", [lambda io: io, AsyncCheckpointIO], ids=["as the plugin", "inside an asynchronous plugin"]
)
def test_plugin_and_callback_of_one_policy_install_it_once(wrap: Any, preset: str, tmp_path: Path) -> None:
    plugin = wrap(QuantizedCheckpointIO(checkpoint=preset))
    trainer = fit(tmp_path, plugins=[plugin], callbacks=[QuantizationCallback(preset)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.strategy.checkpoint_io.teardown()
    assert trainer.strategy.checkpoint_io is plugin
    assert chain(trainer).count(QuantizedCheckpointIO) == 1
    # Together with the callback it knows the model's buffers.
    assert "state_dict.table" not in payloads_of(tmp_path / "last.ckpt")
    assert "state_dict.decoder.weight" in payloads_of(tmp_path / "last.ckpt")


def test_plugin_and_callback_of_different_policies_are_refused(tmp_path: Path) -> None:
    plugin = QuantizedCheckpointIO(checkpoint="resume")
    with pytest.raises(ValueError, match="another policy"):
        fit(tmp_path, plugins=[plugin], callbacks=[QuantizationCallback("compact")])


def test_an_equal_policy_is_the_same_policy(tmp_path: Path) -> None:
    def policy() -> CheckpointPolicy:
        return CheckpointPolicy([Rule("state_dict.*", "softsign")])

    trainer = fit(
        tmp_path, plugins=[QuantizedCheckpointIO(checkpoint=policy())], callbacks=[QuantizationCallback(policy())]
    )
    assert chain(trainer).count(QuantizedCheckpointIO) == 1


def test_every_stage_of_one_trainer_installs_it_once(tmp_path: Path) -> None:
    trainer = fit(tmp_path, callbacks=[QuantizationCallback()])
    installed = trainer.strategy.checkpoint_io
    model = trainer.lightning_module
    trainer.validate(model, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(model)
    trainer.predict(model)
    assert trainer.strategy.checkpoint_io is installed
    assert chain(trainer).count(QuantizedCheckpointIO) == 1


def test_one_callback_serves_one_trainer_after_another(tmp_path: Path) -> None:
    callback = QuantizationCallback()
    for name in ("one.ckpt", "two.ckpt"):
        fit(tmp_path, callbacks=[callback]).save_checkpoint(tmp_path / name)
    assert_same(load(tmp_path / "two.ckpt"), load(tmp_path / "one.ckpt"))


def test_a_callback_with_no_policy_changes_nothing(tmp_path: Path) -> None:
    trainer = fit(tmp_path, callbacks=[QuantizationCallback(checkpoint=None)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert chain(trainer) == [TorchCheckpointIO]
    assert_same(load(tmp_path / "last.ckpt"), plain_checkpoint(tmp_path))


def test_the_callback_leaves_no_state_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = fit(tmp_path, callbacks=[QuantizationCallback(), Diary()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert set(load(tmp_path / "last.ckpt")["callbacks"]) == {"Diary"}


def test_a_checkpoint_saved_with_the_callback_resumes_without_it(preset: str, tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[QuantizationCallback(preset)]).save_checkpoint(tmp_path / "last.ckpt")
    trainer = quiet_trainer(tmp_path, max_steps=4, limit_val_batches=0)
    trainer.fit(Autoencoder(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 4
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert list(load(tmp_path / "plain.ckpt")) == list(plain_checkpoint(tmp_path))


def test_a_plain_checkpoint_resumes_with_the_callback(preset: str, tmp_path: Path) -> None:
    before = plain_checkpoint(tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback(preset)])
    trainer.fit(Autoencoder(), ckpt_path=tmp_path / "plain.ckpt")
    assert_same(trainer.lightning_module.state_dict(), before["state_dict"])
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    assert_kept(load(tmp_path / "quantized.ckpt"), before, preset, RAW)


def test_the_io_works_without_a_trainer(preset: str, tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(checkpoint=preset)
    weight = torch.randn(64, 64)
    path = tmp_path / "folder" / "a.ckpt"
    io.save_checkpoint({"state_dict": {"weight": weight}, "words": ["kept"]}, path)
    loaded = io.load_checkpoint(path)
    assert same_bits(loaded["state_dict"]["weight"], stored(weight, *WEIGHTS[preset][:3]))
    assert loaded["words"] == ["kept"]
    io.remove_checkpoint(path)
    assert not path.exists()
    io.teardown()


def test_the_io_says_as_lightning_does_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not found"):
        QuantizedCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")


def test_storage_options_meet_the_wrapped_io(tmp_path: Path) -> None:
    """Lightning's default refuses them; so does ours, instead of ignoring them."""
    with pytest.raises(TypeError, match="storage_options"):
        QuantizedCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "a.ckpt", storage_options={"x": 1})


def test_remote_paths_go_through_fsspec(preset: str, tmp_path: Path) -> None:
    path = f"memory://{tmp_path.name}/last.ckpt"
    trainer = fit(tmp_path, callbacks=[QuantizationCallback(preset)])
    trainer.save_checkpoint(path)
    assert not list(tmp_path.rglob("*.ckpt"))
    after = trainer.strategy.checkpoint_io.load_checkpoint(path)
    assert_kept(after, plain_checkpoint(tmp_path), preset, RAW)
