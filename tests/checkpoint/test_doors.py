"""Through every door, a quantized checkpoint loads as ordinary tensors: the promised values, all else to the bit."""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Autoencoder, Diary, TwoOptimizers, quiet_trainer
from promises import assert_kept, assert_same, load, payloads_of, promise_for, promised_paths

from q8lightning import QuantizationCallback

RAW = frozenset({"table", "counts"})
CASES: dict[str, tuple[Callable[[], pl.LightningModule], bool]] = {
    "AdamW": (Autoencoder, False),
    "SGD with momentum": (lambda: Autoencoder("sgd"), False),
    "factored moments": (lambda: Autoencoder("factored"), False),
    "two optimizers": (TwoOptimizers, False),
    "weights only": (Autoencoder, True),
}


@dataclass
class Saved:
    """One training run, saved plain (``before``) and quantized (``file``).

    ``trainer`` is the one that saved the quantized file, after its fit.
    """

    make: Callable[[], pl.LightningModule]
    weights_only: bool
    preset: str
    file: Path
    before: dict[str, Any]
    trainer: pl.Trainer

    @property
    def promise(self) -> dict[str, Any]:
        """The checkpoint as it must load, without the summary."""
        return promise_for(self.before, self.preset, RAW)

    def new_trainer(self, **options: Any) -> pl.Trainer:
        return quiet_trainer(self.file.parent, **options)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.replace(" ", "-"))
def saved(request: pytest.FixtureRequest, preset: str, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    make, weights_only = CASES[request.param]
    folder = tmp_path_factory.mktemp("doors")

    def fit(*callbacks: pl.Callback) -> tuple[pl.Trainer, Path]:
        torch.manual_seed(1)
        best = ModelCheckpoint(folder / "run", "best", monitor="loss", save_weights_only=weights_only)
        trainer = quiet_trainer(
            folder, max_epochs=2, limit_val_batches=0, enable_checkpointing=True, callbacks=[best, Diary(), *callbacks]
        )
        trainer.fit(make())
        return trainer, Path(best.best_model_path)

    # The same folder twice, because the state of ModelCheckpoint, which is compared too, holds its path.
    _, plain = fit()
    before = load(plain)
    plain.unlink()
    trainer, file = fit(QuantizationCallback(preset))
    assert file == plain
    return Saved(make, weights_only, preset, file, before, trainer)


class Watch(pl.Callback):
    """Copies the live state at the moment when a stage starts: after everything was restored."""

    def __init__(self) -> None:
        self.live: dict[str, Any] = {}

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.live = copy.deepcopy(
            {
                "state_dict": pl_module.state_dict(),
                "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "global_step": trainer.global_step,
                "diary": next((each.state for each in trainer.callbacks if isinstance(each, Diary)), None),
            }
        )

    on_train_start = on_validation_start = on_test_start = on_predict_start = _watch


def test_what_the_preset_promises_is_encoded_and_nothing_else(saved: Saved) -> None:
    encoded = set(payloads_of(saved.file))
    assert encoded == promised_paths(saved.before, saved.preset, RAW)
    assert {"state_dict.encoder.0.weight", "state_dict.decoder.weight"} <= encoded


def test_torch_load_returns_the_promised_values_and_all_else_unchanged(saved: Saved) -> None:
    assert_kept(load(saved.file), saved.before, saved.preset, RAW)


def test_torch_load_with_memory_mapping_returns_the_same(saved: Saved) -> None:
    assert_kept(load(saved.file, mmap=True), saved.before, saved.preset, RAW)


def test_torch_load_without_restrictions_returns_the_same(saved: Saved) -> None:
    assert_kept(torch.load(saved.file, weights_only=False), saved.before, saved.preset, RAW)


def test_loaded_tensors_are_ordinary_and_own_no_more_than_their_memory(saved: Saved) -> None:
    for name, tensor in load(saved.file)["state_dict"].items():
        assert type(tensor) is torch.Tensor, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_load_from_checkpoint_returns_the_promised_model(saved: Saved) -> None:
    model_class = type(saved.make())
    model = model_class.load_from_checkpoint(saved.file, map_location="cpu", strict=True)
    assert_same(model.state_dict(), saved.promise["state_dict"])
    assert dict(model.hparams) == saved.before["hyper_parameters"]


def test_fit_resumes_from_the_promised_state(saved: Saved) -> None:
    watch, diary = Watch(), Diary()
    trainer = saved.new_trainer(max_epochs=3, limit_val_batches=0, callbacks=[watch, diary])
    model = saved.make()
    if saved.weights_only:
        with pytest.raises(KeyError, match="save_weights_only"):
            trainer.fit(model, ckpt_path=saved.file)
        return
    trainer.fit(model, ckpt_path=saved.file)
    promise = saved.promise
    for section in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(watch.live[section], promise[section], (section,))
    assert watch.live["global_step"] == saved.before["global_step"]
    assert_same(watch.live["diary"], promise["callbacks"]["Diary"])
    assert trainer.global_step > saved.before["global_step"]


def test_fit_resumes_with_the_callback_as_without(saved: Saved) -> None:
    if saved.weights_only:
        pytest.skip("a file of weights only is nothing to resume from")
    weights = []
    for callbacks in ([], [QuantizationCallback(saved.preset)]):
        model = saved.make()
        trainer = saved.new_trainer(max_epochs=3, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(model, ckpt_path=saved.file)
        weights.append(model.state_dict())
    assert_same(weights[1], weights[0])


@pytest.mark.parametrize("callbacks", [[], [QuantizationCallback()]], ids=["without-callback", "with-callback"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_loads_the_promised_weights(saved: Saved, stage: str, callbacks: list[pl.Callback]) -> None:
    watch = Watch()
    trainer = saved.new_trainer(callbacks=[watch, *callbacks])
    getattr(trainer, stage)(
        saved.make(), ckpt_path=str(saved.file), **({} if stage == "predict" else {"verbose": False})
    )
    assert_same(watch.live["state_dict"], saved.promise["state_dict"])


def test_the_trainer_that_saved_it_finds_its_best(saved: Saved) -> None:
    watch = Watch()
    saved.trainer.callbacks.append(watch)
    try:
        saved.trainer.test(ckpt_path="best", verbose=False)
    finally:
        saved.trainer.callbacks.remove(watch)
    assert_same(watch.live["state_dict"], saved.promise["state_dict"])


def test_a_fresh_process_needs_only_the_import(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback()])
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    script = (
        "import sys, torch, q8lightning\n"
        "checkpoint = torch.load(sys.argv[1], weights_only=True)\n"
        "torch.save(checkpoint, sys.argv[2])\n"  # all payloads decoded: a plain file
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "last.ckpt", tmp_path / "plain.ckpt"], check=True)
    assert not payloads_of(tmp_path / "plain.ckpt")
    assert payloads_of(tmp_path / "last.ckpt")
    assert_same(load(tmp_path / "plain.ckpt"), load(tmp_path / "last.ckpt"))
