"""With ``async_save=True`` training goes on at once, and nothing else changes: not the state that is saved, not the
order of saves and removals, not what is on the disk when ``fit`` returns or fails."""

import copy
import gc
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from support.calls import calls_of
from support.files import checkpoint, names
from support.models import Autoencoder, Diary, quiet_trainer, saving_trainer
from support.promises import assert_same, load, payloads_of, same_bits
from support.steps import Steps, our_threads
from torch import Tensor, nn

from q8lightning import BackgroundSaveError, CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO
from q8lightning.checkpoint.encode.run import Run

FULL = OSError(28, "No space left on device")


def value_of(path: Path) -> float:
    state = load(path)["state_dict"]
    assert bool((state["weight"] == state["bias"][0]).all())
    return float(state["bias"][0])


# The state at the call


def test_a_save_returns_before_the_file_is_there(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    gate = steps.hold("opened")
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    gate.set()
    io.finish()
    assert value_of(tmp_path / "a.ckpt") == 1
    assert [step for step, _ in steps.seen] == [
        "frozen",
        "fetched",
        "opened",
        "written",
        "flushed",
        "renamed",
        "durable",
    ]


def test_without_it_the_file_is_there_when_the_save_returns(steps: Steps, tmp_path: Path) -> None:
    QuantizedCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    assert steps.seen[-1] == ("durable", "a.ckpt")


def test_nothing_that_changes_after_the_call_is_in_the_file(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    live: dict[str, Any] = {
        "state_dict": {"weight": torch.ones(64, 64), "bias": torch.ones(64)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(64, 64)}}}],
        "loops": {"batches": {"seen": 5, "list": [1, 2, {"deep": torch.ones(3)}]}},
        "callbacks": {"Diary": {"words": ["a"], "numbers": {1, 2}, "tuple": ([1], torch.ones(2))}},
        "module": nn.Linear(3, 3),
    }
    before = copy.deepcopy(live)
    QuantizedCheckpointIO().save_checkpoint(before, tmp_path / "expected.ckpt")
    gate = steps.hold("fetched")
    io.save_checkpoint(live, tmp_path / "a.ckpt")
    for tensor in (
        *live["state_dict"].values(),
        *live["optimizer_states"][0]["state"][0].values(),
        live["loops"]["batches"]["list"][2]["deep"],
        live["callbacks"]["Diary"]["tuple"][1],
        *(parameter.data for parameter in live["module"].parameters()),
    ):
        tensor.fill_(-7)
    live["loops"]["batches"]["seen"] = 6
    live["loops"]["batches"]["list"].append(3)
    live["callbacks"]["Diary"]["words"].append("b")
    live["callbacks"]["Diary"]["numbers"].add(3)
    live["callbacks"]["Diary"]["tuple"][0].append(2)
    live["state_dict"]["more"] = torch.ones(2)
    gate.set()
    io.finish()
    found, expected = (torch.load(tmp_path / name, weights_only=False) for name in ("a.ckpt", "expected.ckpt"))
    assert_same(found.pop("module").state_dict(), expected.pop("module").state_dict())
    assert_same(found, expected)


class SaveAndGoOn(pl.Callback):
    """Saves after every batch, and keeps a copy of what was handed over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.live.append(copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=False)))
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_every_file_of_a_training_is_the_same_as_if_training_had_waited(preset: str, tmp_path: Path) -> None:
    saver = SaveAndGoOn(tmp_path)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=12,
        limit_val_batches=0,
        callbacks=[saver, Diary(), QuantizationCallback(preset, async_save=True)],
    )
    trainer.fit(Autoencoder())
    names_of_model = trainer.strategy.checkpoint_io.describe_model()  # type: ignore[attr-defined]
    for step, live in enumerate(saver.live, start=1):
        waiting = QuantizedCheckpointIO(checkpoint=preset)
        waiting.describe_model = lambda: names_of_model
        waiting.save_checkpoint(live, tmp_path / "expected.ckpt")
        assert_same(load(tmp_path / f"{step}.ckpt"), load(tmp_path / "expected.ckpt"))
        assert payloads_of(tmp_path / f"{step}.ckpt")


def test_two_hundred_steps_with_a_save_at_each_train_the_same_weights(tmp_path: Path) -> None:
    def train(*callbacks: pl.Callback) -> Autoencoder:
        torch.manual_seed(6)
        model = Autoencoder()
        trainer = quiet_trainer(
            tmp_path, max_steps=200, limit_val_batches=0, enable_checkpointing=bool(callbacks), callbacks=[*callbacks]
        )
        trainer.fit(model)
        return model

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    saved, plain = train(saving, QuantizationCallback(async_save=True)), train()
    assert names(tmp_path) == ["step=200.ckpt"]
    assert saved.losses == plain.losses
    assert len(set(plain.losses)) == 200
    assert_same(saved.state_dict(), plain.state_dict())


# One pause of training


class SavesTwice(pl.Callback):
    """Saves twice after each batch; in between, it may change a weight."""

    def __init__(self, folder: Path, change: Callable[[Tensor], object]) -> None:
        self.folder, self.change = folder, change

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"one-{trainer.global_step}.ckpt")
        with torch.no_grad():
            self.change(pl_module.layer.weight)
        trainer.save_checkpoint(self.folder / f"two-{trainer.global_step}.ckpt")


class SavesAverage(ModelCheckpoint):
    """Saves twice each time, the second time with other weights in place."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        pl_module.layer.weight.data.mul_(2)
        self._save_checkpoint(trainer, f"{self.dirpath}/two-{trainer.global_step}.ckpt")


def once_more(folder: Path) -> list[pl.Callback]:
    """Three files a step: of two ModelCheckpoints, and the last one of the first."""
    return [
        ModelCheckpoint(folder, "one-{step}", every_n_train_steps=1, save_top_k=-1, save_last=True),
        ModelCheckpoint(folder, "two-{step}", every_n_train_steps=1, save_top_k=-1, monitor="step"),
    ]


def average(folder: Path) -> list[pl.Callback]:
    return [SavesAverage(folder, "one-{step}", every_n_train_steps=1, save_top_k=-1)]


SAVES: dict[str, tuple[Callable[[Path], list[pl.Callback]], int, int]] = {
    "ModelCheckpoints": (once_more, 1, 1),
    "nothing happens": (lambda folder: [SavesTwice(folder, lambda x: x)], 2, 1),
    "changed": (lambda folder: [SavesTwice(folder, lambda x: x.mul_(2))], 2, 2),
    "changed through data": (lambda folder: [SavesTwice(folder, lambda x: x.data.mul_(2))], 2, 2),
    "changed by numpy": (lambda folder: [SavesTwice(folder, lambda x: np.multiply(x, 2, out=x.numpy()))], 2, 2),
    "changed by a subclass": (average, 2, 2),
}
"""Callbacks that save twice a step, how often that is encoded, and by what factor a weight differs then."""


@pytest.mark.parametrize("async_save", [True, False], ids=["async", "synchronous"])
@pytest.mark.parametrize(("callbacks", "encodings", "factor"), SAVES.values(), ids=SAVES)
def test_saves_of_one_pause_are_encoded_once_and_of_another_state_again(
    callbacks: Callable[[Path], list[pl.Callback]], encodings: int, factor: int, async_save: bool, tmp_path: Path
) -> None:
    policy = replace(CheckpointPolicy.of("compact"), min_numel=1)
    saving = callbacks(tmp_path)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=3,
        limit_val_batches=0,
        enable_checkpointing=isinstance(saving[0], ModelCheckpoint),
        callbacks=[*saving, QuantizationCallback(policy, async_save=async_save)],
    )
    with calls_of(Run.__init__) as runs:  # how often it encodes has no other sign
        trainer.fit(BoringModel())
    assert len(runs) == 3 * encodings
    for step in range(1, 4):
        one, two = (load(next(tmp_path.glob(f"{name}-*{step}.ckpt")))["state_dict"] for name in ("one", "two"))
        assert torch.equal(two["layer.weight"], one["layer.weight"] * factor)
        assert_same({**two, "layer.weight": 0}, {**one, "layer.weight": 0})


class SwapsForValidation(pl.Callback):
    """Puts other weights in place for each validation, as averages of weights are."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.layer.weight.data.mul_(2)


@pytest.mark.parametrize("async_save", [True, False], ids=["async", "synchronous"])
def test_saves_of_two_hooks_are_encoded_each_although_no_step_is_between(async_save: bool, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path,
        max_steps=3,
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        callbacks=[
            ModelCheckpoint(tmp_path, "one-{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(tmp_path, "two-{step}", save_top_k=-1, save_on_train_epoch_end=False),
            SwapsForValidation(),
            QuantizationCallback(replace(CheckpointPolicy.of("compact"), min_numel=1), async_save=async_save),
        ],
    )
    trainer.fit(BoringModel())
    for step in range(1, 4):
        one, two = (load(tmp_path / f"{name}-step={step}.ckpt")["state_dict"] for name in ("one", "two"))
        assert torch.equal(two["layer.weight"], one["layer.weight"] * 2)


# One queue


def test_a_second_save_waits_for_the_first_and_the_wait_is_reported(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = steps.hold("opened")
    io.save_checkpoint(checkpoint(1), tmp_path / "1.ckpt")
    timer = threading.Timer(0.3, gate.set)
    timer.start()
    with caplog.at_level("INFO"):
        io.save_checkpoint(checkpoint(2), tmp_path / "2.ckpt")
    assert steps.seen.index(("durable", "1.ckpt")) < steps.seen.index(("frozen", "2.ckpt")), "two at once"
    io.finish()
    assert len(io.waits) == 1
    assert 0.2 < io.waits[0] < 10
    assert "2.ckpt held training for 0." in caplog.text
    assert (value_of(tmp_path / "1.ckpt"), value_of(tmp_path / "2.ckpt")) == (1, 2)


def test_a_save_that_finds_the_queue_empty_does_not_count_as_waiting(io: QuantizedCheckpointIO, tmp_path: Path) -> None:
    for value in (1, 2):
        io.save_checkpoint(checkpoint(value), tmp_path / "a.ckpt")
        io.finish()
    assert io.waits == []


def test_an_older_file_is_removed_after_the_newer_one_is_durable(steps: Steps, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max")
    saving_trainer(tmp_path, saving, QuantizationCallback(async_save=True), max_steps=5).fit(Autoencoder())
    for old, new in ((1, 3), (2, 4), (3, 5)):
        assert steps.seen.index(("durable", f"step={new}.ckpt")) < steps.seen.index(("removing", f"step={old}.ckpt"))
    assert names(tmp_path) == ["step=4.ckpt", "step=5.ckpt"]


def test_an_older_file_stays_if_the_newer_one_failed(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    steps.fail("written", "2.ckpt", FULL)
    io.save_checkpoint(checkpoint(1), tmp_path / "1.ckpt")
    io.save_checkpoint(checkpoint(2), tmp_path / "2.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(BackgroundSaveError):
        io.finish()
    assert names(tmp_path) == ["1.ckpt"]
    assert value_of(tmp_path / "1.ckpt") == 1


def test_after_a_save_that_went_well_files_are_removed_again(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    steps.fail("written", "2.ckpt", FULL)
    io.save_checkpoint(checkpoint(1), tmp_path / "1.ckpt")
    io.save_checkpoint(checkpoint(2), tmp_path / "2.ckpt")
    with pytest.raises(BackgroundSaveError):
        io.save_checkpoint(checkpoint(3), tmp_path / "3.ckpt")
    io.save_checkpoint(checkpoint(3), tmp_path / "3.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    io.finish()
    assert names(tmp_path) == ["3.ckpt"]


def test_loading_waits_for_the_save(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    gate = steps.hold("opened")
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    threading.Timer(0.2, gate.set).start()
    assert float(io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["bias"][0]) == 1


def test_removing_what_is_still_being_saved_leaves_nothing(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    gate = steps.hold("opened")
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    gate.set()
    io.finish()
    assert names(tmp_path) == []


# Errors


def trainer_that_saves_every_step(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    return quiet_trainer(
        folder,
        **{"max_steps": 4, "limit_val_batches": 0, "enable_checkpointing": True, **options},
        callbacks=[*callbacks, saving, QuantizationCallback(async_save=True)],
    )


@pytest.mark.parametrize(("failing", "reached"), [(2, 3), (4, 4)], ids=["at the next save", "at the end"])
def test_an_error_of_the_worker_reaches_the_training(failing: int, reached: int, steps: Steps, tmp_path: Path) -> None:
    steps.fail("flushed", f"step={failing}.ckpt", FULL)
    trainer = trainer_that_saves_every_step(tmp_path)
    with pytest.raises(BackgroundSaveError, match=rf"step={failing}\.ckpt in the background .*No space left") as error:
        trainer.fit(Autoencoder())
    assert error.value.__cause__ is FULL
    assert trainer.global_step == reached
    assert names(tmp_path) == [f"step={step}.ckpt" for step in range(1, reached) if step != failing]
    assert our_threads() == []


def test_an_error_is_raised_once(io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path) -> None:
    steps.fail("opened", "a.ckpt", FULL)
    io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    with pytest.raises(BackgroundSaveError):
        io.load_checkpoint(tmp_path / "b.ckpt")
    io.finish()


class Interrupt(pl.Callback):
    def __init__(self, error: BaseException, step: int = 2) -> None:
        self.error, self.step = error, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError("mine"), ValueError), (KeyboardInterrupt(), SystemExit)],
    ids=["exception", "ctrl-c"],
)
def test_a_training_that_breaks_off_finishes_the_pending_save(
    error: BaseException, raised: type[BaseException], steps: Steps, tmp_path: Path
) -> None:
    gate = steps.hold("flushed")
    threading.Timer(0.5, gate.set).start()
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_that_saves_every_step(tmp_path, Interrupt(error, step=1))
    try:
        with pytest.raises(raised):
            trainer.fit(Autoencoder())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert names(tmp_path) == ["step=1.ckpt"]
    assert load(tmp_path / "step=1.ckpt")["global_step"] == 1
    assert our_threads() == []


def test_the_error_of_the_training_is_not_hidden_by_one_of_the_worker(steps: Steps, tmp_path: Path) -> None:
    steps.fail("opened", "step=2.ckpt", FULL)
    trainer = trainer_that_saves_every_step(tmp_path, Interrupt(ValueError("mine")))
    with pytest.warns(UserWarning, match=r"step=2\.ckpt .*No space left"), pytest.raises(ValueError, match="mine"):
        trainer.fit(Autoencoder())


TRAINING = """
import os, signal, sys, threading
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import q8lightning
from test_background import Autoencoder, trainer_that_saves_every_step
import lightning.pytorch as pl

class Terminate(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

trainer_that_saves_every_step(Path(sys.argv[1]), Terminate()).fit(Autoencoder())
"""


def test_sigterm_finishes_the_pending_save(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", TRAINING, str(tmp_path), str(here), str(here.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert "Received SIGTERM" in result.stderr, result.stderr[-2000:]
    found = names(tmp_path)
    assert found in (["step=1.ckpt", "step=2.ckpt"], ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"])
    for step, name in enumerate(found, start=1):
        assert load(tmp_path / name)["global_step"] == step


AFTERWARDS = """
import sys, torch
from q8lightning import QuantizedCheckpointIO
io = QuantizedCheckpointIO(async_save=True)
io.save_checkpoint({"state_dict": {"weight": torch.ones(2000, 1000)}}, sys.argv[1])
raise ValueError("the last thing that happens")
"""


def test_a_process_that_ends_by_an_error_finishes_the_pending_save_without_being_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AFTERWARDS, str(tmp_path / "a.ckpt")]
    assert subprocess.run(command, capture_output=True, timeout=100, check=False).returncode == 1
    assert bool((load(tmp_path / "a.ckpt")["state_dict"]["weight"] == 1).all())


# Beside the rest of Lightning


def test_saves_after_fit_are_there_when_they_return(steps: Steps, tmp_path: Path) -> None:
    trainer = trainer_that_saves_every_step(tmp_path)
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert steps.seen[-1] == ("durable", "own.ckpt")


def test_what_slurm_waits_for_is_there_when_the_save_returns(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    io.save_checkpoint(checkpoint(1), tmp_path / "hpc_ckpt_1.ckpt")
    assert steps.seen[-1] == ("durable", "hpc_ckpt_1.ckpt")


def test_a_strategy_that_forgets_the_io_at_its_teardown_loses_nothing(steps: Steps, tmp_path: Path) -> None:
    """As FSDP's and ModelParallel's do; the callback ends the work all the same."""

    class Forgets(SingleDeviceStrategy):
        def teardown(self) -> None:
            """Leave the CheckpointIO as it is."""

    gate = steps.hold("flushed")
    threading.Timer(0.5, gate.set).start()
    trainer_that_saves_every_step(tmp_path, max_steps=1, strategy=Forgets("cpu")).fit(Autoencoder())
    assert steps.seen[-1] == ("durable", "step=1.ckpt")
    assert our_threads() == []


class SlowIO(TorchCheckpointIO):
    """Writes as Lightning does, a little later, and keeps what it was given."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.threads.append(threading.current_thread())
        time.sleep(0.1)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_another_checkpoint_io_writes_in_the_background_too(tmp_path: Path) -> None:
    slow = SlowIO()
    trainer = trainer_that_saves_every_step(tmp_path, plugins=[slow])
    trainer.fit(Autoencoder())
    assert len(slow.threads) == 4
    assert threading.main_thread() not in slow.threads
    assert names(tmp_path) == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]
    assert all(load(tmp_path / f"step={step}.ckpt")["global_step"] == step for step in (1, 2, 3, 4))


def test_remote_paths_are_written_in_the_background_too(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path
) -> None:
    gate, path = steps.hold("fetched"), f"memory://{tmp_path.name}/a.ckpt"
    io.save_checkpoint(checkpoint(3), path)
    gate.set()
    assert bool((io.load_checkpoint(path)["state_dict"]["bias"] == 3).all())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "refused",
    [
        lambda folder: QuantizedCheckpointIO(AsyncCheckpointIO(), async_save=True),
        lambda folder: trainer_that_saves_every_step(folder, plugins=[AsyncCheckpointIO()]).fit(Autoencoder()),
    ],
    ids=["plugin", "callback"],
)
def test_two_ways_of_saving_in_the_background_are_refused(refused: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"remove AsyncCheckpointIO .* or pass async_save=False"):
        refused(tmp_path)


def test_a_trainer_that_has_not_begun_can_be_pickled(io: QuantizedCheckpointIO, tmp_path: Path) -> None:
    """As the spawn launchers do."""
    again = pickle.loads(pickle.dumps(io))
    again.save_checkpoint(checkpoint(4), tmp_path / "a.ckpt")
    again.finish()
    assert value_of(tmp_path / "a.ckpt") == 4


def test_what_has_saved_can_be_pickled(tmp_path: Path) -> None:
    io = QuantizedCheckpointIO()
    io.save_checkpoint({"state_dict": {"weight": torch.ones(64, 64)}}, tmp_path / "a.ckpt")
    again = pickle.loads(pickle.dumps(io))
    again.save_checkpoint({"state_dict": {"weight": torch.ones(64, 64)}}, tmp_path / "b.ckpt")
    assert again.reports[-1].result() == io.reports[-1].result()


def test_tied_tensors_are_tied_in_the_file(io: QuantizedCheckpointIO, tmp_path: Path) -> None:
    memory = torch.arange(300.0)
    state: dict[str, Tensor] = {"a": memory[:200], "b": memory[100:].view(10, 20), "c": memory[:200]}
    io.save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
    io.finish()
    after = load(tmp_path / "a.ckpt")["state_dict"]
    assert all(same_bits(after[name], state[name]) for name in state)
    after["a"][150] = -1
    assert after["b"].flatten()[50] == -1
    assert after["c"][150] == -1


# Whatever happens between the call and the write


def test_a_relative_path_is_that_of_the_call(
    io: QuantizedCheckpointIO, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    io.save_checkpoint(checkpoint(1), "a.ckpt")
    io.wait_until_durable()
    gate = steps.hold("fetched")
    io.save_checkpoint(checkpoint(2), "b.ckpt")
    io.remove_checkpoint("a.ckpt")
    io.link_checkpoint("b.ckpt", "last.ckpt")
    monkeypatch.chdir(tmp_path / "there")
    gate.set()
    io.finish()
    assert names(tmp_path / "here") == ["b.ckpt", "last.ckpt"]
    assert value_of(tmp_path / "here" / "last.ckpt") == 2
    assert names(tmp_path / "there") == []


def test_without_a_thread_a_save_is_done_at_once(
    io: QuantizedCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
        assert names(tmp_path) == ["a.ckpt"]
        io.remove_checkpoint(tmp_path / "a.ckpt")
        assert names(tmp_path) == []
        io.wait_until_durable()
    io.save_checkpoint(checkpoint(2), tmp_path / "b.ckpt")
    io.finish()
    assert value_of(tmp_path / "b.ckpt") == 2


def test_the_content_of_a_failed_save_is_kept_no_longer_than_its_error(tmp_path: Path) -> None:
    content: list[weakref.ref[Tensor]] = []

    class Notes(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], *_: Any, **__: Any) -> None:
            content.append(weakref.ref(checkpoint["tensor"]))
            raise OSError(28, "No space left on device")

    io = QuantizedCheckpointIO(Notes(), async_save=True)
    gc.collect()
    gc.disable()
    try:
        io.save_checkpoint({**checkpoint(1), "tensor": torch.ones(8)}, tmp_path / "a.ckpt")
        with pytest.raises(BackgroundSaveError):
            io.finish()
        assert content[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("async_save", [False, True])
def test_python_looks_for_no_garbage_while_a_checkpoint_is_encoded(
    async_save: bool, steps: Steps, tmp_path: Path
) -> None:
    io = QuantizedCheckpointIO(async_save=async_save)
    early: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if not steps.seen:
            early.append(phase)

    many = [(i, [i]) for i in range(5000)]
    gc.collect()
    gc.callbacks.append(note)
    try:
        io.save_checkpoint({**checkpoint(1), "hyper_parameters": {"many": many}}, tmp_path / "a.ckpt")
    finally:
        gc.callbacks.remove(note)
    assert early.count("start") <= 1, "only when it is over: all the looks take longer than all else"
    assert gc.isenabled()
    io.finish()
