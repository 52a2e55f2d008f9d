"""Checkpoints of real Trainers, and a way to run commands in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from support import forked
from support.models import Autoencoder, quiet_trainer

from q8lightning import QuantizationCallback
from q8lightning.cli.main import main


@pytest.fixture(scope="package", autouse=True)
def _server() -> None:
    """Have the processes of later tests ready by then."""
    forked.prepare()


@dataclass(frozen=True)
class Result:
    """What a command returned and printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command as the shell would, with wide lines."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # --help and the like
            status = int(exit.code or 0)
        return Result(status, *capsys.readouterr())

    return run


def trained(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    """Return a Trainer that has trained two steps, the same ones every time."""
    torch.manual_seed(5)
    trainer = quiet_trainer(folder, max_steps=2, limit_val_batches=0, callbacks=list(callbacks))
    trainer.fit(Autoencoder())
    return trainer


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a Trainer saved without q8lightning."""
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    trained(path.parent).save_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint, saved by a Trainer with the callback and the preset compact."""
    path = tmp_path_factory.mktemp("packed") / "packed.ckpt"
    trained(path.parent, QuantizationCallback("compact")).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def by_callback(preset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint, saved by a Trainer with the callback."""
    path = tmp_path_factory.mktemp("callback") / f"{preset}.ckpt"
    trained(path.parent, QuantizationCallback(preset)).save_checkpoint(path)
    return path
