"""A training that is killed at any moment leaves its newest complete checkpoint, and whatever has a name is right.

Ten random moments by default; ``Q8LIGHTNING_CRASHES=50`` for more.
"""

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from support import forked
from support.models import Autoencoder, Diary, saving_trainer
from support.promises import assert_same
from support.steps import step_of

from q8lightning import QuantizationCallback, QuantizedCheckpointIO
from q8lightning.checkpoint.file.write import STEPS, write_checkpoint

CRASHES = int(os.environ.get("Q8LIGHTNING_CRASHES", "10"))
TRAINING_STEPS = 40
KILLED_AT = 4
"""The training step whose save is killed, in the tests that name the step of the save."""


def train(folder: Path, async_save: bool, save_top_k: int, kill: tuple[str, int] | None = None) -> None:
    """Train, saving after every step; note down what became of the saves; be killed at a step of one of them."""
    warnings.filterwarnings("ignore")
    import torch

    notes = os.open(folder / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "q8lightning.save":
            step, path = arguments
            number = step_of(Path(path))
            os.write(notes, f"{step} {number}\n".encode())  # the kernel keeps it, whatever becomes of the process
            if kill is not None and step == kill[0] and number >= kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    torch.manual_seed(9)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=save_top_k, monitor="step", mode="max")
    callbacks = saving, Diary(), QuantizationCallback(async_save=async_save)
    trainer = saving_trainer(folder, *callbacks, max_steps=TRAINING_STEPS)
    trainer.fit(Autoencoder())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """The checkpoint of each step, from a training that nobody killed."""
    folder = tmp_path_factory.mktemp("expected")
    assert forked.run(train, folder, False, -1) == 0
    return lambda step: values_of(folder / f"step={step}.ckpt")


def values_of(path: Path) -> dict[str, Any]:
    checkpoint = QuantizedCheckpointIO().load_checkpoint(path)
    checkpoint["callbacks"] = {"Diary": checkpoint["callbacks"]["Diary"]}  # ModelCheckpoint's state has the folder
    summary = checkpoint["q8lightning"]  # and a size that depends on how many checkpoints are kept
    del summary["bytes"], summary["metrics"]["compression_ratio"]
    return checkpoint


def assert_survived(folder: Path, expected: Callable[[int], dict[str, Any]]) -> list[int]:
    """Check what a killed training left; return the steps that there are checkpoints of."""
    notes = [line.split() for line in (folder / "notes").read_text().splitlines()]
    durable = [int(step) for what, step in notes if what == "durable"]
    found = sorted(map(step_of, folder.glob("step=*.ckpt")))
    assert max(found, default=0) >= max(durable, default=0), "a checkpoint was lost that had been called durable"
    for step in found:
        assert_same(values_of(folder / f"step={step}.ckpt"), expected(step))
    write_checkpoint({}, folder / "next.ckpt")
    left = {"notes", "next.ckpt", *(f"step={step}.ckpt" for step in found)}
    assert {path.name for path in folder.iterdir()} == left, "the next save leaves no temporary file"
    return found


@pytest.mark.parametrize("async_save", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step_of_a_save_leaves_a_whole_checkpoint(
    step: str, async_save: bool, expected: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    # With one checkpoint kept, the save of step 4 is followed by the removal of that of step 3.
    number = KILLED_AT - 1 if step in ("removing", "removed") else KILLED_AT
    assert forked.run(train, tmp_path, async_save, 1, (step, number)) == -signal.SIGKILL
    found = assert_survived(tmp_path, expected)
    if STEPS.index(step) < STEPS.index("renamed"):
        whole = [KILLED_AT - 1]
    elif step == "removed":
        whole = [KILLED_AT]
    else:
        whole = [KILLED_AT - 1, KILLED_AT]
    if async_save and step == "frozen":  # the removal before it may still have been under way
        found = found[-1:]
    assert found == whole


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    expected: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    chance, crashes = random.Random(0), []
    while len(crashes) < CRASHES:
        folder = tmp_path / str(len(crashes))
        folder.mkdir()
        process = forked.start(train, folder, len(crashes) % 2 == 0, 1)
        while process.is_alive() and not list(folder.glob("step=*.ckpt")):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.join()
        crashes.append(process.exitcode)
        assert assert_survived(folder, expected)
    assert crashes.count(-signal.SIGKILL) > CRASHES / 2, "most trainings ended before they were killed"
