"""When a checkpoint is on the disk can be waited for, and is told; what keeps it from getting there is said."""

import errno
import os
import pickle
import re
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from support.calls import calls_of
from support.files import checkpoint
from support.models import Shrink, quiet_trainer
from support.promises import load
from support.steps import Steps
from torch import nn

from q8lightning import BackgroundSaveError, QuantizationCallback, QuantizedCheckpointIO
from q8lightning.checkpoint.file.read import read_checkpoint
from q8lightning.checkpoint.staging.copier import Copier
from q8lightning.trainer.checkpoint_io.durable import DurableCheckpointIO

FULL = OSError(errno.ENOSPC, "No space left on device")
SLOW = 0.03


def open_later(gate: threading.Event) -> None:
    threading.Timer(0.05, gate.set).start()


# Waiting


@pytest.mark.parametrize("what", ["the path", "its folder", "a link", "everything"])
def test_whoever_waits_finds_the_file(what: str, io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    (tmp_path / "link").symlink_to(path)
    gate = steps.hold("opened")
    io.save_checkpoint(checkpoint(), path)
    open_later(gate)
    waited_for = {"the path": str(path), "its folder": tmp_path, "a link": tmp_path / "link", "everything": None}
    io.wait_until_durable(waited_for[what])
    assert steps.seen[-1] == ("durable", "a.ckpt")
    assert load(path)


def test_a_file_that_is_there_is_not_waited_for(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    io.wait_until_durable(tmp_path / "a.ckpt")
    steps.hold("opened")
    io.save_checkpoint(checkpoint(), tmp_path / "b.ckpt")
    io.wait_until_durable(tmp_path / "a.ckpt")
    assert ("durable", "b.ckpt") not in steps.seen


@pytest.mark.parametrize("place", ["{}", "file://{}", "memory://{}"])
def test_what_nobody_saves_is_there_or_missing(place: str, io: QuantizedCheckpointIO, tmp_path: Path) -> None:
    path = place.format(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no save of it is pending.*a\.ckpt"):
        io.wait_until_durable(path)
    io.save_checkpoint(checkpoint(), path)
    io.wait_until_durable(path)
    io.remove_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
        io.wait_until_durable(path)
    io.wait_until_durable()


def test_who_waits_hears_once_of_a_save_that_failed(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    steps.fail("written", "a.ckpt", FULL)
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    with pytest.raises(BackgroundSaveError, match=r"a\.ckpt .*No space left") as error:
        io.wait_until_durable(tmp_path / "a.ckpt")
    assert error.value.path == tmp_path / "a.ckpt"
    with pytest.raises(FileNotFoundError):
        io.wait_until_durable(tmp_path / "a.ckpt")
    io.wait_until_durable()


def test_no_failure_hides_another(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    steps.fail("removing", "old.ckpt", FULL)
    steps.fail("written", "a.ckpt", FULL)
    gate = steps.hold("removing")
    io.save_checkpoint(checkpoint(), tmp_path / "old.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    io.save_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    gate.set()
    for name in ("old", "a"):
        with pytest.raises(BackgroundSaveError, match=rf"{name}\.ckpt"):
            io.wait_until_durable(tmp_path / "a.ckpt")


def test_failures_that_the_end_cannot_raise_are_warnings(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    steps.fail("removing", "old.ckpt", FULL)
    steps.fail("removing", "older.ckpt", FULL)
    gate = steps.hold("removing")
    io.save_checkpoint(checkpoint(), tmp_path / "old.ckpt")
    for name in ("old.ckpt", "older.ckpt"):
        io.remove_checkpoint(tmp_path / name)
    gate.set()
    with pytest.warns(UserWarning, match=r"older\.ckpt"), pytest.raises(BackgroundSaveError, match=r"old\.ckpt"):
        io.finish()


def test_the_error_reaches_other_processes(tmp_path: Path) -> None:
    error = BackgroundSaveError("saving", tmp_path / "a.ckpt", FULL)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.path) == (BackgroundSaveError, str(error), str(error.path))


def test_nobody_can_wait_for_another_background(tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(AsyncCheckpointIO())
    with pytest.raises(RuntimeError, match=r"AsyncCheckpointIO does not say .* async_save=True"):
        io.wait_until_durable()
    io.teardown()


def test_a_callback_waits_for_nothing_before_and_after_a_run(tmp_path: Path) -> None:
    callback = QuantizationCallback(async_save=True)
    callback.wait_until_durable()
    with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
        callback.wait_until_durable(tmp_path / "a.ckpt")
    trainer = train(tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback.wait_until_durable(tmp_path / "a.ckpt")
    callback.wait_until_durable()


# Being told


def train(folder: Path, callback: QuantizationCallback, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(
        folder,
        **{"max_steps": 3, "limit_val_batches": 0, "enable_checkpointing": True, **options},
        callbacks=[callback, *callbacks, ModelCheckpoint(folder, "{step}", every_n_train_steps=1)],
    )
    trainer.fit(Shrink(nn.Linear(64, 64)))
    return trainer


class Reads(Checkpoint):
    """Reads the best checkpoint in the hook in which it has been saved; runs behind the ModelCheckpoints."""

    def __init__(self, callback: QuantizationCallback) -> None:
        self.callback = callback
        self.steps: list[int] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        self.callback.wait_until_durable(path)
        self.steps.append(torch.load(path, weights_only=True)["global_step"])


@pytest.mark.parametrize("preset", ["resume", None])
def test_a_file_can_be_read_in_the_hook_in_which_it_is_saved(preset: str | None, steps: Steps, tmp_path: Path) -> None:
    steps.delay("opened", SLOW)
    callback = QuantizationCallback(preset, async_save=True)
    reads = Reads(callback)
    saving = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    trainer = quiet_trainer(
        tmp_path, max_epochs=2, limit_val_batches=0, enable_checkpointing=True, callbacks=[callback, saving, reads]
    )
    trainer.fit(Shrink(nn.Linear(64, 64)))
    assert reads.steps == [4, 8]


class Told(pl.Callback):
    """Notes what it is told, that it is true, and who tells; may refuse."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.heard: list[str] = []
        self.torn_down: int | None = None

    def on_checkpoint_durable(self, path: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.heard.append(os.path.basename(path))
        assert f"step={load(path)['global_step']}.ckpt" == self.heard[-1], "it is there, and whole"
        if self.refuses == self.heard[-1]:
            raise ConnectionError("no upload today")

    def teardown(self, *_: Any, **__: Any) -> None:
        self.torn_down = len(self.heard)


class Uploads(Told, QuantizationCallback):
    """The same as a subclass of ours."""

    def __init__(self, async_save: bool) -> None:
        QuantizationCallback.__init__(self, async_save=async_save)
        Told.__init__(self)

    def teardown(self, *arguments: Any, **options: Any) -> None:
        QuantizationCallback.teardown(self, *arguments, **options)


THREE = ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("async_save", [False, True])
def test_every_callback_is_told_of_each_file_once_in_their_order(
    async_save: bool, steps: Steps, tmp_path: Path
) -> None:
    steps.delay("opened", SLOW * async_save)
    ours, before, after = Uploads(async_save), Told(), Told()
    trainer = quiet_trainer(
        tmp_path,
        max_steps=3,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[before, ours, after, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)],
    )
    trainer.fit(Shrink(nn.Linear(64, 64)))
    assert before.heard == ours.heard == after.heard == THREE
    assert before.torn_down == after.torn_down == 3, "told before anything is torn down"
    (tmp_path / "own").mkdir()
    trainer.save_checkpoint(tmp_path / "own" / "step=3.ckpt")
    assert before.heard == ours.heard == [*THREE, "step=3.ckpt"], "saves after the fit, too"


@pytest.mark.parametrize("async_save", [False, True])
def test_files_are_told_of_in_their_order_though_a_hook_saves_and_waits(
    async_save: bool, steps: Steps, tmp_path: Path
) -> None:
    class SavesMore(Told):
        def on_checkpoint_durable(self, path: str) -> None:
            super().on_checkpoint_durable(path)
            if len(self.heard) in (1, 3):
                folder = tmp_path / f"more{len(self.heard)}"
                folder.mkdir()
                trainer.save_checkpoint(folder / f"step={trainer.global_step}.ckpt")
                callback.wait_until_durable()

    steps.delay("opened", SLOW * async_save)
    callback, saves, after = QuantizationCallback(async_save=async_save), SavesMore(), Told()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [callback, saves, after, saving]
    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(Shrink(nn.Linear(64, 64)))
    assert len(saves.heard) == 5
    assert after.heard == saves.heard


def test_a_synchronous_save_is_told_of_when_it_returns(tmp_path: Path) -> None:
    told, heard = Told(), []

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step={trainer.global_step}.ckpt")
            heard.append(list(told.heard))

    callbacks = [QuantizationCallback(), told, Saves()]
    quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=callbacks).fit(Shrink(nn.Linear(64, 64)))
    assert heard == [THREE[:1], THREE[:2]]


def test_a_file_is_told_of_after_the_next_batch_though_nothing_else_is_saved(tmp_path: Path) -> None:
    told, callback, heard = Told(), QuantizationCallback(async_save=True), []

    class SavesOnce(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
            heard.append(list(told.heard))
            if index == 1:
                trainer.save_checkpoint(tmp_path / "step=1.ckpt")
                find(trainer).settle(tmp_path / "step=1.ckpt")

    trainer = quiet_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=[callback, told, SavesOnce()])
    trainer.fit(Shrink(nn.Linear(64, 64)))
    assert heard == [[], [], ["step=1.ckpt"], ["step=1.ckpt"]]


def find(trainer: pl.Trainer) -> QuantizedCheckpointIO:
    assert isinstance(trainer.strategy.checkpoint_io, QuantizedCheckpointIO)
    return trainer.strategy.checkpoint_io


def test_a_save_that_failed_is_not_told_of_and_the_one_before_it_is(steps: Steps, tmp_path: Path) -> None:
    steps.delay("opened", SLOW)
    steps.fail("written", "step=2.ckpt", FULL)
    told = Told()
    with pytest.raises(BackgroundSaveError, match=r"step=2\.ckpt"):
        train(tmp_path, QuantizationCallback(async_save=True), told)
    assert told.heard == ["step=1.ckpt"]


@pytest.mark.parametrize("async_save", [False, True])
def test_what_the_hook_raises_stops_the_training_and_undoes_no_save(async_save: bool, tmp_path: Path) -> None:
    refuses, other = Told("step=2.ckpt"), Told()
    with pytest.raises(ConnectionError, match="no upload today"):
        train(tmp_path, QuantizationCallback(async_save=async_save), refuses, other)
    assert refuses.heard == other.heard, "one that raises keeps nothing from the others"
    assert refuses.heard in (THREE[:2], THREE)
    assert refuses.heard[-1] in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("warnings_are", ["default", "error"])
def test_what_the_hook_raises_does_not_hide_what_the_training_died_of(
    warnings_are: Literal["default", "error"], steps: Steps, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
            if index == 1:
                gate.set()
                raise ValueError("mine")

    gate, told = steps.hold("opened"), Told("step=1.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings(warnings_are, "Told.on_checkpoint_durable")
        with pytest.raises(ValueError, match="mine"):
            train(tmp_path, QuantizationCallback(async_save=True), told, Breaks())
    said = caplog.text if warnings_are == "error" else " ".join(str(each.message) for each in caught)
    assert re.search(r"step=1\.ckpt.*no upload today", said)
    assert told.heard == ["step=1.ckpt"]


def test_a_copy_of_the_callback_belongs_to_no_trainer(tmp_path: Path) -> None:
    callback = QuantizationCallback()
    train(tmp_path, callback)
    pickled = pickle.dumps(callback)
    assert b"lightning.pytorch.trainer.trainer" not in pickled
    pickle.loads(pickled).wait_until_durable()


# Folders


def test_the_folder_is_there_when_the_save_returns(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    gate = steps.hold("fetched")
    io.save_checkpoint(checkpoint(), tmp_path / "new" / "a.ckpt")
    assert (tmp_path / "new").is_dir()
    gate.set()
    io.wait_until_durable(tmp_path / "new" / "a.ckpt")


@pytest.mark.parametrize("step", ["removing", "opened", "written"], ids=["before", "opened", "written"])
def test_a_folder_that_is_removed_before_the_file_is_written_is_named_and_stays_away(
    step: str, io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    gate, folder = steps.hold(step), tmp_path / "run"
    if step == "removing":
        io.save_checkpoint(checkpoint(), tmp_path / "1.ckpt")
        io.remove_checkpoint(tmp_path / "1.ckpt")
    io.save_checkpoint(checkpoint(), folder / "2.ckpt")
    while step not in {seen for seen, _ in steps.seen}:
        time.sleep(0.001)
    shutil.rmtree(folder)
    gate.set()
    message = rf"saving {re.escape(str(folder / '2.ckpt'))} .*the folder was removed before .*{re.escape(str(folder))}'"
    with pytest.raises(BackgroundSaveError, match=message):
        io.finish()
    assert not folder.exists()


# Beneath


class Plain(DurableCheckpointIO):
    """Overrides nothing."""


class Changes(DurableCheckpointIO):
    """Overrides both, as somebody does who keeps or changes what passes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().load_checkpoint(path, *args, **kwargs)


@pytest.mark.parametrize("kind", [DurableCheckpointIO, Plain, Changes])
def test_a_subclass_is_as_fast_where_it_changes_nothing(kind: type[DurableCheckpointIO], tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(kind())
    # Speed has no other sign that a test could rely on.
    with calls_of(Copier.fetch) as fetches:
        io.save_checkpoint(checkpoint(3), tmp_path / "a.ckpt")
    with calls_of(read_checkpoint) as reads:
        assert bool((io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["weight"] == 3).all())
    assert [fetch["memory"] is not None for fetch in fetches] == [kind is not Changes]
    assert len(reads) == (kind is not Changes)


def test_storage_options_go_by_keyword(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Strict(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, *, storage_options: Any = None) -> None:  # type: ignore[override]
            seen.append(storage_options)

    class Over(DurableCheckpointIO, Strict):
        """Writes to what is remote, or wants options, as the stricter class does."""

    QuantizedCheckpointIO(Over()).save_checkpoint(checkpoint(), tmp_path / "a.ckpt", {"key": 1})
    QuantizedCheckpointIO(Over()).save_checkpoint(checkpoint(), f"memory://{tmp_path}/a.ckpt")
    assert seen == [{"key": 1}, None]


def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "saving.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": Shrink(nn.Linear(64, 64))}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.isdigit()]
    assert printed == ["1", "2"]
    assert len(list(Path("uploaded").iterdir())) == 3
