"""One of two processes is killed at a step of a save: every checkpoint that had its name before is whole and resumes.

The one that lives is told by gloo that the other has gone, finishes what it is writing, and ends; it does not hang.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import processes
from support.models import Autoencoder, Diary, quiet_trainer, saving_trainer
from support.promises import assert_same, load
from support.steps import step_of

from q8lightning import QuantizationCallback
from q8lightning.checkpoint.file.write import STEPS, write_checkpoint
from q8lightning.tools import verify

TRAINING_STEPS = 6
KILLED_AT = 4


def train(rank: int, folder: Path, async_save: bool, kill: tuple[int, str] | None = None, keep: int = 1) -> int:
    """Train, saving after every step; have a rank killed when the fourth save gets to a step."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(9)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=keep, monitor="step", mode="max")
    callbacks = saving, Diary(), QuantizationCallback(async_save=async_save)
    trainer = saving_trainer(folder, *callbacks, max_steps=TRAINING_STEPS, devices=2, strategy="ddp")
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if kill is not None:
        kill_at(folder, *kill)
    trainer.fit(Autoencoder())
    return trainer.global_step


def kill_at(folder: Path, victim: int, step: str) -> None:
    """Kill a rank when this process gets to ``step`` with the fourth checkpoint, or the removal that follows it."""
    number = KILLED_AT - 1 if step in ("removing", "removed") else KILLED_AT

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "q8lightning.save" and arguments[0] == step and step_of(Path(arguments[1])) == number:
            os.kill(int((folder / f"pid{victim}").read_text()), signal.SIGKILL)

    sys.addaudithook(hear)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """The checkpoint of each step, from a training that nobody killed."""
    folder = tmp_path_factory.mktemp("expected")
    assert processes.run(train, 2, folder, False, None, -1) == [TRAINING_STEPS] * 2
    return lambda step: state_of(folder / f"step={step}.ckpt")


def state_of(path: Path) -> dict[str, Any]:
    checkpoint = load(path)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")}


def assert_survived(folder: Path, expected: Callable[[int], dict[str, Any]]) -> list[int]:
    """Check that what has a name is whole and right, and that the next save tidies up; return the steps."""
    found = sorted(map(step_of, folder.glob("step=*.ckpt")))
    for step in found:
        path = folder / f"step={step}.ckpt"
        assert verify(path).is_whole
        assert_same(state_of(path), expected(step))
    write_checkpoint({}, folder / "next.ckpt")
    left = {"pid0", "pid1", "next.ckpt", *(f"step={step}.ckpt" for step in found)}
    assert {path.name for path in folder.iterdir()} == left
    return found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("async_save", [True, False], ids=["async", "sync"])
def test_the_process_that_writes_is_killed(
    async_save: bool, step: str, expected: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    first, second = processes.run_to_the_end(train, 2, tmp_path, async_save, (0, step))
    assert first.exitcode == -signal.SIGKILL
    assert second.exitcode == 1
    found = assert_survived(tmp_path, expected)
    named = STEPS.index(step) >= STEPS.index("renamed")
    assert found[-1] == (KILLED_AT if named else KILLED_AT - 1)


@pytest.mark.parametrize("step", ["frozen", "opened", "durable"])
@pytest.mark.parametrize("async_save", [True, False], ids=["async", "sync"])
def test_the_other_process_is_killed(
    async_save: bool, step: str, expected: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    first, second = processes.run_to_the_end(train, 2, tmp_path, async_save, (1, step))
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 1
    assert "closed by peer" in first.error or "reset by peer" in first.error
    assert assert_survived(tmp_path, expected)[-1] >= KILLED_AT  # what was being written is finished


def resume(rank: int, folder: Path, name: str) -> tuple[int, list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Autoencoder()
        options: dict[str, Any] = {"max_steps": TRAINING_STEPS, "limit_val_batches": 0, "devices": 2, "strategy": "ddp"}
        trainer = quiet_trainer(folder, callbacks=[Diary(), QuantizationCallback()], **options)
        trainer.fit(model, ckpt_path=folder / name)
        return trainer.global_step, model.losses


def test_what_a_killed_training_leaves_resumes_in_both(tmp_path: Path) -> None:
    processes.run_to_the_end(train, 2, tmp_path, True, (0, "written"))
    found = processes.run(resume, 2, tmp_path, f"step={KILLED_AT - 1}.ckpt")
    assert [(step, len(losses)) for step, losses in found] == [(TRAINING_STEPS, TRAINING_STEPS - KILLED_AT + 1)] * 2
