"""With ``async_save=True`` every ModelCheckpoint chooses the names, and keeps the files, that it would without it.

What is covered, each with a slow writer, as a synchronous and as a background run, compared by names, by what the
callbacks say and by what is in the files (``COMBINATIONS``):

| ModelCheckpoints                                     | what could go wrong                                        |
|------------------------------------------------------|------------------------------------------------------------|
| two over one folder                                  | both get one path, and one removes the other's file        |
| two monitors, top 1, default names                   | the same, and the best is gone                             |
| a constant name, top 2                               | the best is overwritten                                    |
| a name that is free again                            | the file that had it is still being removed                |
| ``save_last`` True, "link", both, a name of its own  | ``last.ckpt`` is another's, or a link to nowhere           |
| a link without version counter over another's file   | the file is written over the newer link                    |
| weights-only beside whole ones                       | one is loaded for the other                                |
| ``enable_version_counter=False``                     | saves and removals of one path change places               |
| ``save_top_k=-1``, ``save_on_exception``, an         | names are chosen while the run breaks off                  |
| OnExceptionCheckpoint                                |                                                            |
| a ``file_exists`` of the user's own                  | it looks at the disk                                       |
| callbacks that are added while the fit runs          | nobody told them                                           |

Two processes are in ``tests/ddp``.
"""

import copy
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from support.audit import listening
from support.files import checkpoint
from support.models import Waves, quiet_trainer
from support.promises import assert_same, load
from support.steps import Steps

from q8lightning import BackgroundSaveError, QuantizationCallback, QuantizedCheckpointIO

SLOW = 0.03
"""Seconds that each file waits before it is written: longer than anything that training does between two saves."""

STEPS = 4


def every_step(folder: Path, *arguments: Any, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, *arguments, every_n_train_steps=1, **options)


class OwnNames(ModelCheckpoint):
    """Asks the disk itself whether a name is taken."""

    def file_exists(self, filepath: Any, trainer: pl.Trainer) -> bool:
        return os.path.exists(filepath)


class NoNames(ModelCheckpoint):
    """Takes every name."""

    def file_exists(self, filepath: Any, trainer: pl.Trainer) -> bool:
        return False


class StepLast(ModelCheckpoint):
    """Links a file of its own for each step, and removes the link before."""

    CHECKPOINT_NAME_LAST = "{step}-last"


class Adds(pl.Callback):
    """Adds callbacks when the fit has begun."""

    def __init__(self, *callbacks: pl.Callback) -> None:
        self.callbacks = callbacks

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 1:
            trainer.callbacks.extend(self.callbacks)  # type: ignore[attr-defined]


class Breaks(pl.Callback):
    """Ends the run by an exception."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 3:
            raise ValueError("mine")


RISE: dict[str, Any] = {"monitor": "rise", "mode": "max"}
WAVE: dict[str, Any] = {"monitor": "wave", "mode": "min"}
Callbacks = Callable[[Path], list[pl.Callback]]
COMBINATIONS: dict[str, Callbacks] = {
    "two over one folder": lambda f: [every_step(f, save_top_k=-1), every_step(f, **RISE)],
    "two monitors, top 1": lambda f: [every_step(f, **RISE), every_step(f, **WAVE)],
    "two monitors, top 2": lambda f: [every_step(f, **WAVE, save_top_k=2), every_step(f, **RISE, save_top_k=2)],
    "a constant name, top 2": lambda f: [every_step(f, "best", **RISE, save_top_k=2)],
    "a constant name, twice": lambda f: [every_step(f, "best", **RISE), every_step(f, "best", **WAVE)],
    "a name that is free again": lambda f: [
        every_step(f, "{turn:.0f}", auto_insert_metric_name=False, **RISE),
        every_step(f, "{turn:.0f}", auto_insert_metric_name=False),
    ],
    "save_last": lambda f: [every_step(f, save_last=True, **RISE), every_step(f, save_last=True, save_top_k=0)],
    "links": lambda f: [every_step(f, save_last="link", **RISE), every_step(f, save_last="link", **WAVE)],
    "save_last and a link": lambda f: [every_step(f, save_last=True), every_step(f, save_last="link", **WAVE)],
    "a link and save_last": lambda f: [every_step(f, save_last="link"), every_step(f, save_last=True, **WAVE)],
    "a link over another's file": lambda f: [
        every_step(f, "{step}", save_last=True, enable_version_counter=False),
        every_step(f, "{step}b", save_last="link", enable_version_counter=False, **WAVE),
    ],
    "links for each step": lambda f: [StepLast(f, "{step}", every_n_train_steps=1, save_last="link", **RISE)],
    "weights only beside whole": lambda f: [
        every_step(f),
        every_step(f, save_weights_only=True, save_last=True, **RISE),
    ],
    "without versions": lambda f: [
        every_step(f, enable_version_counter=False, **WAVE),
        every_step(f, enable_version_counter=False, **RISE),
    ],
    "on exception": lambda f: [
        Breaks(),
        ModelCheckpoint(f, every_n_train_steps=2, save_on_exception=True, save_last="link"),
        ModelCheckpoint(f, "step=2", every_n_train_steps=2, save_on_exception=True, **RISE),
        OnExceptionCheckpoint(f, "step=2"),
    ],
    "the user's own": lambda f: [
        OwnNames(f, every_n_train_steps=1, save_top_k=-1),
        OwnNames(f, every_n_train_steps=1, **RISE),
        NoNames(f, every_n_train_steps=1, **WAVE),
    ],
    "added later": lambda f: [Adds(every_step(f, save_top_k=-1), every_step(f, **RISE)), every_step(f, **WAVE)],
}


def run(folder: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """Train for a few steps; return the Trainer."""
    torch.manual_seed(0)
    trainer = quiet_trainer(
        folder, max_steps=STEPS, limit_val_batches=0, enable_checkpointing=True, callbacks=callbacks, **options
    )
    breaks = any(isinstance(each, Breaks) for each in callbacks)
    with pytest.raises(ValueError, match="mine") if breaks else nullcontext():
        trainer.fit(Waves(STEPS))
    return trainer


def outcome(trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
    """Return what a run leaves: what each callback says, and what is in each file."""

    def name(path: str) -> str:
        return os.path.relpath(path, folder) if path else ""

    said = [
        (
            name(each.best_model_path),
            name(each.last_model_path),
            name(each.kth_best_model_path),
            {name(path): float(score) for path, score in each.best_k_models.items()},
        )
        for each in trainer.checkpoint_callbacks
        if isinstance(each, ModelCheckpoint)
    ]
    links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    files = {path.name: load(path) for path in sorted(folder.iterdir()) if path.exists()}
    contents = {name: (file["global_step"], sorted(file), file["state_dict"]) for name, file in files.items()}
    return {"said": said, "links": links, "files": contents}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_names_and_files_are_those_of_a_synchronous_run(combination: str, steps: Steps, tmp_path: Path) -> None:
    def leaves(async_save: bool) -> dict[str, Any]:
        steps.delay("opened", SLOW * async_save)
        folder = tmp_path / str(async_save)
        callbacks = COMBINATIONS[combination](folder)
        trainer = run(folder, [QuantizationCallback(async_save=async_save), *callbacks])
        assert not any({"file_exists", "_link_checkpoint"} & vars(each).keys() for each in trainer.checkpoint_callbacks)
        return outcome(trainer, folder)

    expected, found = leaves(False), leaves(True)
    assert found["said"] == expected["said"]
    assert found["links"] == expected["links"]
    assert found["files"].keys() == expected["files"].keys()
    assert_same(found["files"], expected["files"])
    assert len(found["files"]) > 1 or combination == "without versions"


@pytest.mark.parametrize("checkpoint", ["resume", None], ids=["same policy", "none"])
def test_a_plugin_that_saves_in_the_background_needs_the_callback_to_know_the_names(
    checkpoint: str | None, steps: Steps, tmp_path: Path
) -> None:
    steps.delay("opened", SLOW)
    plugin = QuantizedCheckpointIO(async_save=True)
    callbacks = COMBINATIONS["two over one folder"](tmp_path)
    run(tmp_path, [QuantizationCallback(checkpoint), *callbacks], plugins=[plugin])
    plugin.wait_until_durable()
    assert len(list(tmp_path.iterdir())) == STEPS + 1


# What the queue knows


def test_a_path_is_taken_by_whatever_name_it_goes_and_free_when_it_is_to_be_removed(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to("folder")
    (tmp_path / "file.ckpt").symlink_to("folder/a.ckpt")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "folder" / "a.ckpt"
    same = [path, str(path), f"file://{path}", "folder/a.ckpt", "linked/a.ckpt", "./linked/../folder/a.ckpt"]
    gate = steps.hold("opened")
    assert [io.exists(each) for each in same] == [None] * len(same)
    io.save_checkpoint(checkpoint(), path)
    assert [io.exists(each) for each in (*same, "file.ckpt")] == [True] * (len(same) + 1)
    assert io.exists("folder/b.ckpt") is None
    io.remove_checkpoint("linked/a.ckpt")
    assert [io.exists(each) for each in (*same, "file.ckpt")] == [False] * (len(same) + 1)
    gate.set()
    io.settle("file.ckpt")
    assert not path.exists()
    assert io.exists(path) is None


def test_a_name_is_free_again_when_its_save_failed(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    steps.fail("written", "a.ckpt", OSError(28, "No space left on device"))
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    io.settle(tmp_path / "a.ckpt")
    assert io.exists(tmp_path / "a.ckpt") is None
    assert not (tmp_path / "a.ckpt").exists()
    with pytest.raises(BackgroundSaveError, match=r"a\.ckpt"):
        io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")


def test_remote_names_are_taken_too_and_unknown_schemes_are_the_users(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    gate, path = steps.hold("fetched"), f"memory://{tmp_path.name}/a.ckpt"
    io.save_checkpoint(checkpoint(), path)
    assert io.exists(path)
    assert io.exists("mystore://a.ckpt") is None
    gate.set()
    io.wait_until_durable(path)


# Links


@pytest.mark.parametrize("fails", [False, True], ids=["durable", "failed"])
def test_a_link_leads_to_a_whole_file_at_every_moment(
    fails: bool, io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    last, old, new = (tmp_path / name for name in ("last.ckpt", "1.ckpt", "2.ckpt"))
    io.save_checkpoint(checkpoint(1), old)
    io.link_checkpoint(old, last)
    io.wait_until_durable(last)
    gate = steps.hold("opened")
    if fails:
        steps.fail("written", new.name, OSError(28, "No space left on device"))
    io.save_checkpoint(checkpoint(2), new)
    io.link_checkpoint(new, last)
    io.remove_checkpoint(old)
    assert io.exists(last)
    assert os.readlink(last) == "1.ckpt"
    assert float(load(last)["state_dict"]["weight"][0, 0]) == 1
    gate.set()
    io.settle(last)
    assert os.readlink(last) == ("1.ckpt" if fails else "2.ckpt")
    assert float(load(last)["state_dict"]["weight"][0, 0]) == (1 if fails else 2)
    assert not list(tmp_path.glob(".*"))


def test_a_link_takes_the_place_of_whatever_is_there_and_is_a_copy_where_there_are_none(
    io: QuantizedCheckpointIO, tmp_path: Path
) -> None:
    last = tmp_path / "deeper" / "last.ckpt"
    (last / "a folder").mkdir(parents=True)
    io.save_checkpoint(checkpoint(1), tmp_path / "1.ckpt")
    io.link_checkpoint(tmp_path / "1.ckpt", last)
    io.settle(last)
    assert os.readlink(last) == os.path.join("..", "1.ckpt")
    with listening(_refuse_links):
        io.link_checkpoint(tmp_path / "1.ckpt", last)
        io.finish()
    assert not last.is_symlink()
    assert last.read_bytes() == (tmp_path / "1.ckpt").read_bytes()


def _refuse_links(event: str, _: tuple[Any, ...]) -> None:
    if event == "os.symlink":
        raise OSError(1314, "A required privilege is not held by the client")


# Beside the callbacks


class Looks(pl.Callback):
    """Copies the ModelCheckpoints in the middle of a fit, while their next names are pending."""

    def __init__(self) -> None:
        self.copies: list[Checkpoint] = []
        self.knew: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 2:
            for each in trainer.checkpoint_callbacks:
                self.copies += [copy.deepcopy(each), pickle.loads(pickle.dumps(each))]
                self.knew.append("file_exists" in vars(each))


class Own(ModelCheckpoint):
    """Has a method of its own in its place from the beginning."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.file_exists = self.ask  # type: ignore[method-assign]

    def ask(self, filepath: Any, trainer: pl.Trainer) -> bool:
        return os.path.exists(filepath)


def test_callbacks_can_be_copied_in_the_middle_and_are_as_before_afterwards(steps: Steps, tmp_path: Path) -> None:
    steps.delay("opened", SLOW)
    looks, usual, own = Looks(), every_step(tmp_path, save_top_k=-1), Own(tmp_path, **RISE)
    trainer = run(tmp_path, [QuantizationCallback(async_save=True), looks, usual, own])
    assert looks.knew == [True, True]
    assert "file_exists" not in vars(usual)
    assert vars(own)["file_exists"] == own.ask
    for each in looks.copies:
        assert isinstance(each, ModelCheckpoint)
        assert each.file_exists(usual.best_model_path, trainer)
        assert not each.file_exists(tmp_path / "never.ckpt", trainer)
        assert each.file_exists.__self__ is each  # type: ignore[attr-defined]
