"""A Trainer of ``pytorch_lightning`` works as one of ``lightning.pytorch``.

| with the standalone package | where |
|---|---|
| saving and loading through every door | ``test_doors.py`` |
| CheckpointIOs: none, plain, asynchronous, the plugin, the plugin in a wrapper; with and without the callback | here |
| strategies that save past the CheckpointIO, or cannot train with quantized weights | here |
| the summary through rich, logging | here |
| training with quantized weights, and when they are in place | here |
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from support.packages import PACKAGES, package
from support.promises import load

from q8lightning import QATConfig, QuantizationCallback, QuantizedCheckpointIO, WeightRule
from q8lightning.trainer.checkpoint_io.durable import DurableCheckpointIO
from q8lightning.trainer.checkpoint_io.quantized import find_quantized_io
from q8lightning.trainer.lightning_api.both_packages import is_a, is_exactly_a, twin_of
from q8lightning.trainer.train import user_code

pytestmark = pytest.mark.filterwarnings("ignore")
STANDALONE = "pytorch_lightning"
ASKED_FOR: list[type] = [
    AsyncCheckpointIO,
    CheckpointIO,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    RichProgressBar,
    TorchCheckpointIO,
    _WrappingCheckpointIO,
]


@pytest.fixture(scope="module")
def other() -> Any:
    """The standalone package."""
    return package(STANDALONE).pl


def fitted(name: str, folder: Path, *callbacks: Any, model: str = "Autoencoder", **options: Any) -> Any:
    """Train for two steps with one of the packages; return the Trainer."""
    models = package(name).models
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "callbacks": list(callbacks)}
    trainer = models.quiet_trainer(folder, **(defaults | options))
    trainer.fit(getattr(models, model)())
    return trainer


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


# Classes


@pytest.mark.parametrize("cls", ASKED_FOR, ids=lambda cls: cls.__name__)
def test_every_class_that_is_asked_for_has_a_twin(cls: type, other: Any) -> None:
    twin = twin_of(cls)
    assert twin is not None
    assert twin is not cls
    assert (twin.__name__, twin.__module__.split(".")[0]) in {
        (cls.__name__, STANDALONE),
        (cls.__name__, "lightning_fabric"),
    }


def test_an_object_of_either_package_is_what_it_is(other: Any) -> None:
    for io in (AsyncCheckpointIO(), other.plugins.AsyncCheckpointIO()):
        assert is_a(io, _WrappingCheckpointIO)
        assert is_a(io, TorchCheckpointIO, AsyncCheckpointIO)
        assert not is_a(io, TorchCheckpointIO)
    assert is_exactly_a(other.plugins.TorchCheckpointIO(), TorchCheckpointIO)
    assert not is_exactly_a(DurableCheckpointIO(), TorchCheckpointIO)
    assert twin_of(QuantizationCallback) is None


# Checkpoints


PLUGINS: dict[str, Callable[[Any], list[Any]]] = {
    "none": lambda plugins: [],
    "plain": lambda plugins: [plugins.TorchCheckpointIO()],
    "asynchronous": lambda plugins: [plugins.AsyncCheckpointIO()],
    "the plugin": lambda plugins: [QuantizedCheckpointIO()],
    "the plugin in a wrapper": lambda plugins: [plugins.AsyncCheckpointIO(QuantizedCheckpointIO())],
    "the plugin around a wrapper": lambda plugins: [QuantizedCheckpointIO(plugins.AsyncCheckpointIO())],
}


@pytest.mark.parametrize("with_callback", [True, False], ids=["callback", "no callback"])
@pytest.mark.parametrize("plugins", PLUGINS)
def test_the_checkpoint_io_stands_where_it_stands_with_the_other_package(
    plugins: str, with_callback: bool, tmp_path: Path
) -> None:
    if not with_callback and "plugin" not in plugins:
        pytest.skip("nothing of ours")
    chains, files = [], []
    for name in PACKAGES:
        callbacks = [QuantizationCallback()] if with_callback else []
        trainer = fitted(name, tmp_path, *callbacks, plugins=PLUGINS[plugins](package(name).pl.plugins))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        trainer.strategy.checkpoint_io.teardown()
        chain, io = [], trainer.strategy.checkpoint_io
        while io is not None:
            chain.append(type(io).__name__)
            io = getattr(io, "checkpoint_io", None)
        assert find_quantized_io(trainer.strategy.checkpoint_io) is not None
        chains.append(chain)
        files.append(load(tmp_path / f"{name}.ckpt"))
    assert chains[0] == chains[1]
    assert chains[1].count("QuantizedCheckpointIO") == 1
    assert chains[1][-1] == "DurableCheckpointIO"
    assert files[0]["q8lightning"]["policy"] == files[1]["q8lightning"]["policy"]
    assert same(files[0]["state_dict"], files[1]["state_dict"])


def test_saves_in_the_background_are_refused_around_the_other_ones_background(other: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="async_save=True does what AsyncCheckpointIO does"):
        fitted(
            STANDALONE,
            tmp_path,
            QuantizationCallback(async_save=True),
            plugins=[other.plugins.AsyncCheckpointIO()],
        )


def test_saves_in_the_background_are_complete_when_fit_returns(other: Any, tmp_path: Path) -> None:
    saves = other.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fitted(STANDALONE, tmp_path, QuantizationCallback(async_save=True), saves, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert all("q8lightning" in load(path) for path in tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("name", "qat"),
    [("DeepSpeedStrategy", None), ("DeepSpeedStrategy", {}), ("FSDPStrategy", {})],
)
def test_a_strategy_that_cannot_work_is_refused(name: str, qat: Any, other: Any, tmp_path: Path) -> None:
    cls = getattr(other.strategies, name)
    options = {"FSDPStrategy": {"state_dict_type": "sharded"}}
    # deepspeed is not installed where there is no GPU
    strategy = cls(**options[name]) if name in options else object.__new__(cls)
    trainer = package(STANDALONE).models.quiet_trainer(tmp_path)
    trainer._accelerator_connector.strategy = strategy
    says = "without the Trainer's CheckpointIO" if qat is None else "QAT needs a strategy that keeps parameters whole"
    with pytest.raises(ValueError, match=says) as error:
        QuantizationCallback(qat=qat).setup(trainer, package(STANDALONE).models.Autoencoder(), "fit")
    assert name in str(error.value)


def test_values_reach_loggers_and_the_end_of_fit(
    other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fitted(
        STANDALONE,
        tmp_path,
        QuantizationCallback(),
        other.callbacks.RichProgressBar(),
        enable_progress_bar=True,
        enable_checkpointing=True,
        logger=other.loggers.CSVLogger(tmp_path),
    )
    # The steps of 8 and 4 bits are 1/1905 of a scale: 71.6 dB for values spread evenly, as layers begin with.
    assert trainer.callback_metrics["q8/weights/sqnr_db"] > 60
    assert "q8/weights/sqnr_db" in next(tmp_path.rglob("metrics.csv")).read_text()
    assert any("saves" in line and "│" in line for line in capsys.readouterr().out.splitlines())


# Training with quantized weights


@pytest.mark.parametrize("model", ["Autoencoder", "TwoOptimizers"])
def test_training_with_quantized_weights_gives_the_same_bits(model: str, tmp_path: Path) -> None:
    weights, losses, entries = [], [], []
    for name in PACKAGES:
        callback = QuantizationCallback(qat=QATConfig([WeightRule(codebook="int4", block_size=64)]))
        trainer = fitted(name, tmp_path, callback, model=model)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        weights.append(trainer.lightning_module.state_dict())
        losses.append(trainer.lightning_module.losses)
        entries.append(set(load(tmp_path / "a.ckpt")["q8lightning"]["qat"]))
    assert losses[0] == losses[1]
    assert same(weights[0], weights[1])
    assert entries[0] == entries[1] >= {"encoder.0.weight", "decoder.weight"}


@pytest.mark.parametrize("name", PACKAGES)
def test_lightnings_own_hooks_do_not_release_weights_between_windows(name: str) -> None:
    """Weights would be quantized once for each batch instead of once for each step of the optimizer."""
    pl, models = package(name).pl, package(name).models
    owners = [models.Shrink(torch.nn.Linear(64, 64)), pl.LightningDataModule(), pl.callbacks.ModelCheckpoint()]
    for hooks in (user_code.BETWEEN, user_code.AFTER_BACKWARD, user_code.ACCUMULATING, user_code.EVALUATING):
        assert not user_code.somebody_runs(hooks, owners)
    assert user_code.somebody_runs(
        user_code.ACCUMULATING, [*owners, pl.callbacks.LambdaCallback(on_train_batch_end=print)]
    )
    assert user_code.somebody_runs(user_code.ACCUMULATING, [*owners, models.Diary()])
