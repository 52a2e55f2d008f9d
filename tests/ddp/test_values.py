"""Two processes see the same values at the same moments, decide alike, keep the same files, and one of them logs."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from support import processes
from support.models import Autoencoder, quiet_trainer
from support.promises import load, payloads_of
from torch.distributed.fsdp import fully_shard

from q8lightning import QATConfig, QuantizationCallback, WeightRule

KINDS = ("weights", "exp_avg", "exp_avg_sq")
NAMES = {
    *(f"q8/{kind}/{name}" for kind in KINDS for name in ("sqnr_db", "relative_error")),
    "q8/update_direction_error",
    "q8/compression_ratio",
    "q8/save_stall_ms",
}
QAT = {"q8/qat/weights/sqnr_db", "q8/qat/weights/relative_error"}
EPOCHS = 6


class Sharded(Autoencoder):
    """Sharded over the processes by FSDP2."""

    def configure_model(self) -> None:
        for part in (self.encoder, self.decoder):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Report(pl.Callback):
    """Keeps what the process sees at the end of each epoch, and what it hears of."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.heard: list[str] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("q8/")})

    def on_checkpoint_durable(self, path: str) -> None:
        self.heard.append(Path(path).name)


def train(rank: int, folder: Path, async_save: bool, whole_shards: bool) -> dict[str, Any]:
    """Train two steps an epoch with a save after each; one callback keeps the best two by what saves lost."""
    torch.manual_seed(0)
    monitored = {"monitor": "q8/weights/sqnr_db", "mode": "min", "every_n_epochs": 1}
    each = ModelCheckpoint(folder / "each", "{step}", every_n_train_steps=1, save_top_k=1)
    best = ModelCheckpoint(folder / "best", "{step}", save_top_k=2, save_last="link", **monitored)
    stop = EarlyStopping("q8/compression_ratio", mode="max", patience=2, min_delta=9.0, check_on_train_epoch_end=True)
    qat = None if whole_shards else QATConfig([WeightRule(codebook="int4")])
    report, logger = Report(), CSVLogger(folder, name="", version="logs")
    strategy = partial(ModelParallelStrategy, 2, 1, save_distributed_checkpoint=False) if whole_shards else DDPStrategy
    trainer = quiet_trainer(
        folder,
        max_epochs=EPOCHS,
        limit_train_batches=2,
        limit_val_batches=1,
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=[QuantizationCallback(async_save=async_save, qat=qat), report, each, best, stop],
        logger=logger,
        devices=2,
        strategy=strategy(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Sharded() if whole_shards else Autoencoder())
    scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    return {
        "seen": report.seen,
        "steps": trainer.global_step,
        "heard": report.heard,
        "scores": scores,
        "last": Path(best.last_model_path).name,
        "logs": isinstance(logger.experiment, ExperimentWriter),
    }


CASES = {"ddp": (False, False), "ddp-async": (True, False), "fsdp2": (False, True), "fsdp2-async": (True, True)}


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], bool]:
    """The folder, what each process returned, and whether FSDP2 trained."""
    folder = tmp_path_factory.mktemp(request.param)
    async_save, whole_shards = CASES[request.param]
    return folder, processes.run(train, 2, folder, async_save, whole_shards), whole_shards


def test_both_see_the_same_values(trained: Any) -> None:
    _, (first, second), whole_shards = trained
    assert first["seen"] == second["seen"]
    assert set(first["seen"][-1]) == (NAMES if whole_shards else NAMES | QAT)


def test_both_stop_at_the_same_step(trained: Any) -> None:
    _, (first, second), _ = trained
    assert first["steps"] == second["steps"] == 6  # the ratio of the third epoch is not better than that of the first


def test_both_keep_the_same_checkpoints_and_their_link(trained: Any) -> None:
    folder, (first, second), _ = trained
    assert first["scores"] == second["scores"]
    assert first["last"] == second["last"] == "last.ckpt"
    files = {path.name for path in (folder / "best").iterdir()}
    assert len(first["scores"]) == 2
    assert files == {*first["scores"], "last.ckpt"}
    assert {path.name for path in (folder / "each").iterdir()} == {"step=6.ckpt"}
    assert all(payloads_of(folder / "best" / name) for name in files)
    assert (folder / "best" / "last.ckpt").is_symlink()
    assert load(folder / "best" / "last.ckpt")["global_step"] in (4, 6)


def test_one_process_logs_and_hears_of_files(trained: Any) -> None:
    folder, (first, second), _ = trained
    assert first["logs"]
    assert not second["logs"]
    assert "q8/weights/sqnr_db" in (folder / "logs" / "metrics.csv").read_text()
    assert first["heard"][:2] == ["step=1.ckpt", "step=2.ckpt"]
    assert second["heard"] == []
