"""Through every door, a quantized checkpoint loads as ordinary tensors: the promised values, all else to the bit.

What runs, all of it with AdamW, SGD, factored moments, two optimizers, and with weights only:

| package | presets |
|---|---|
| lightning.pytorch | resume, compact |
| pytorch_lightning | compact |
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.models import Autoencoder, quiet_trainer
from support.packages import PACKAGES, Package, package
from support.promises import assert_kept, assert_same, load, payloads_of, promise_for, promised_paths

from q8lightning import QuantizationCallback

RAW = frozenset({"table", "counts"})
CASES: dict[str, tuple[Callable[[Any], pl.LightningModule], bool]] = {
    "AdamW": (lambda models: models.Autoencoder(), False),
    "SGD with momentum": (lambda models: models.Autoencoder("sgd"), False),
    "factored moments": (lambda models: models.Autoencoder("factored"), False),
    "two optimizers": (lambda models: models.TwoOptimizers(), False),
    "weights only": (lambda models: models.Autoencoder(), True),
}
RUNS = [
    *((PACKAGES[0], preset, case) for preset in ("resume", "compact") for case in CASES),
    *((PACKAGES[1], "compact", case) for case in CASES),
]


@dataclass
class Saved:
    """One training run, saved plain (``before``) and quantized (``file``).

    ``trainer`` is the one that saved the quantized file, after its fit.
    """

    package: Package
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
        trainer: pl.Trainer = self.package.models.quiet_trainer(self.file.parent, **options)
        return trainer


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: "-".join(run).replace(" ", "-"))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    name, preset, case = request.param
    of = package(name)
    models = of.models
    make, weights_only = partial(CASES[case][0], models), CASES[case][1]
    folder = tmp_path_factory.mktemp("doors")

    def fit(*callbacks: pl.Callback) -> tuple[pl.Trainer, Path]:
        torch.manual_seed(1)
        best = of.pl.callbacks.ModelCheckpoint(folder / "run", "best", monitor="loss", save_weights_only=weights_only)
        trainer = models.quiet_trainer(
            folder,
            max_epochs=2,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[best, models.Diary(), *callbacks],
        )
        assert type(trainer).__module__.startswith(name)
        trainer.fit(make())
        return trainer, Path(best.best_model_path)

    # The same folder twice, because the state of ModelCheckpoint, which is compared too, holds its path.
    _, plain = fit()
    before = load(plain)
    plain.unlink()
    trainer, file = fit(QuantizationCallback(preset))
    assert file == plain
    return Saved(of, make, weights_only, preset, file, before, trainer)


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
                "diary": next((each.state for each in trainer.callbacks if type(each).__name__ == "Diary"), None),
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
    watch, diary = Watch(), saved.package.models.Diary()
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
        "assert not {'pytorch_lightning', 'lightning_fabric'} & set(sys.modules)\n"
        "checkpoint = torch.load(sys.argv[1], weights_only=True)\n"
        "torch.save(checkpoint, sys.argv[2])\n"  # all payloads decoded: a plain file
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "last.ckpt", tmp_path / "plain.ckpt"], check=True)
    assert not payloads_of(tmp_path / "plain.ckpt")
    assert payloads_of(tmp_path / "last.ckpt")
    assert_same(load(tmp_path / "plain.ckpt"), load(tmp_path / "last.ckpt"))
