"""What fails in one of two processes is raised in both, where they meet, and none of them hangs.

| what fails, on rank 0 unless said | is raised in both |
|---|---|
| a save in the background | at the next save, or at the end of the fit |
| a save that is waited for, also by an interrupt or a BaseException | at that save |
| a save, by the work of rank 1 | at that save |
| making a checkpoint, in a hook | at that save |
| a removal | at the next save |
| ``on_checkpoint_durable`` | at the next save, or at the end |
| a wait until something is durable | at the wait |
| warnings that are errors, when training goes on | at the next save, or at the end |
| a save in the background of a validation | at its teardown |

Afterwards both save again, which ends in a deadlock if one of them missed a meeting.
"""

import errno
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from support import processes
from support.audit import listening
from support.models import Autoencoder, quiet_trainer
from support.promises import load
from support.steps import Steps, announced

from q8lightning import BackgroundSaveError, QuantizationCallback

STEPS = 4
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trainer_of_two(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    """Return this process's Trainer of the two, which saves after every step."""
    options = {"save_top_k": -1, "strategy": "ddp", "limit_val_batches": 0} | options
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=options.pop("save_top_k"))
    return quiet_trainer(
        folder,
        max_steps=STEPS,
        enable_checkpointing=True,
        callbacks=[*callbacks, saving],
        devices=2,
        **options,
    )


@contextmanager
def quiet() -> Iterator[Steps]:
    with warnings.catch_warnings(), announced() as steps:
        warnings.simplefilter("ignore")
        yield steps


def caught(call: Callable[[], object]) -> dict[str, Any] | None:
    """Return what is raised, its message and the message of its cause; None if nothing is."""
    try:
        call()
    except BaseException as error:
        cause = error.__cause__
        return {"type": type(error).__name__, "message": str(error), "cause": f"{type(cause).__name__}: {cause}"}
    return None


def fit_and_go_on(trainer: pl.Trainer, folder: Path) -> tuple[Any, int]:
    """Return what the fit raised and the step that it got to, and save once more."""
    failure = caught(lambda: trainer.fit(Autoencoder()))
    trainer.save_checkpoint(folder / "after.ckpt")
    return failure, trainer.global_step


def same_failure(ended: list[Any]) -> dict[str, Any]:
    """Check that both processes raised the same error at the same step, and return it."""
    (first, step), (second, other_step) = ended
    assert step == other_step
    assert first["type"] == second["type"]
    assert first["message"] == second["message"]
    assert second["cause"].startswith("OtherRankError: rank 0 raised this:\nTraceback")
    return {**second, "step": step}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.ckpt")}


# Saves


def fail_a_save(rank: int, folder: Path, async_save: bool, number: int) -> Any:
    with quiet() as steps:
        steps.fail("opened", f"step={number}.ckpt", FULL)
        return fit_and_go_on(trainer_of_two(folder, QuantizationCallback(async_save=async_save)), folder)


@pytest.mark.parametrize("number", [2, STEPS], ids=["at-the-next-save", "at-the-end"])
def test_a_background_save_that_failed_is_raised_in_both(number: int, tmp_path: Path) -> None:
    failure = same_failure(processes.run(fail_a_save, 2, tmp_path, True, number))
    assert failure["type"] == "BackgroundSaveError"
    assert f"step={number}.ckpt in the background failed: OSError: [Errno 28] No space left" in failure["message"]
    assert "The above exception was the direct cause" in failure["cause"]  # the disk's own error, on rank 0
    assert failure["step"] == min(number + 1, STEPS)
    assert names(tmp_path) == {"after.ckpt", *(f"step={step}.ckpt" for step in range(1, number))}
    assert load(tmp_path / "step=1.ckpt")["global_step"] == 1
    assert load(tmp_path / "after.ckpt")["global_step"] == failure["step"]


def test_a_save_that_failed_at_once_is_raised_in_both(tmp_path: Path) -> None:
    failure = same_failure(processes.run(fail_a_save, 2, tmp_path, False, 3))
    assert failure["type"] == "OSError"
    assert failure["step"] == 3
    assert names(tmp_path) == {"after.ckpt", "step=1.ckpt", "step=2.ckpt"}


class Unpicklable(BaseException):
    """What torch.distributed.checkpoint raises is a BaseException too; this one cannot be sent as it is."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"{what} {code}")


def interrupt_a_save(rank: int, folder: Path, error: BaseException | None, async_save: bool) -> Any:
    with quiet() as steps:
        steps.fail("frozen", "step=2.ckpt", Unpicklable(7, "it broke") if error is None else error)
        trainer = trainer_of_two(folder, QuantizationCallback(async_save=async_save))
        return caught(lambda: trainer.fit(Autoencoder())), trainer.interrupted, trainer.global_step


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_an_interrupt_in_the_save_of_one_process_ends_both(async_save: bool, tmp_path: Path) -> None:
    for failure, interrupted, step in processes.run(interrupt_a_save, 2, tmp_path, KeyboardInterrupt(), async_save):
        assert failure["type"] == "SystemExit"  # as Lightning ends a fit that was interrupted
        assert interrupted
        assert step == 2
    assert names(tmp_path) == {"step=1.ckpt"}


def test_what_cannot_be_pickled_is_told_by_its_message(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Unpicklable(7, "it broke")))
    (first, _, _), (second, _, _) = processes.run(interrupt_a_save, 2, tmp_path, None, False)
    assert (first["type"], first["message"]) == ("Unpicklable", "it broke 7")
    assert second["type"] == "OtherRankError"
    assert second["message"].startswith("rank 0 failed: ")
    assert second["message"].endswith("Unpicklable: it broke 7")
    assert second["cause"].startswith("OtherRankError: rank 0 raised this:\nTraceback")


class SecondFails(DDPStrategy):
    """A user's strategy, whose second process has work of its own in a save."""

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.global_rank == 1 and str(filepath).endswith("step=2.ckpt"):
            raise ValueError("the second has no room")


def fail_in_the_second(rank: int, folder: Path) -> Any:
    with quiet():
        return fit_and_go_on(trainer_of_two(folder, QuantizationCallback(), strategy=SecondFails()), folder)


def test_what_fails_in_the_second_process_reaches_the_first(tmp_path: Path) -> None:
    (first, step), (second, other_step) = processes.run(fail_in_the_second, 2, tmp_path)
    assert step == other_step == 2
    assert (second["type"], second["message"]) == (first["type"], first["message"])
    assert first["message"] == "the second has no room"
    assert first["cause"].startswith("OtherRankError: rank 1 raised this:\nTraceback")
    assert second["cause"] == "NoneType: None"


class FailsToMakeIt(pl.Callback):
    """Has something to add to checkpoints, and once cannot, in some of the processes."""

    def __init__(self, ranks: set[int]) -> None:
        self.ranks = ranks

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        rank = trainer.global_rank
        if trainer.global_step == 2 and rank in self.ranks:
            self.ranks.remove(rank)
            raise LookupError(f"rank {rank} has nothing to add")


def fail_to_make_a_checkpoint(rank: int, folder: Path, ranks: set[int]) -> Any:
    callbacks = [FailsToMakeIt(ranks), QuantizationCallback(async_save=True)]
    with quiet():
        return fit_and_go_on(trainer_of_two(folder, *callbacks), folder)


@pytest.mark.parametrize("ranks", [{0}, {1}, {0, 1}], ids=["first", "second", "both"])
def test_a_checkpoint_that_a_process_cannot_make_ends_both(ranks: set[int], tmp_path: Path) -> None:
    ended = processes.run(fail_to_make_a_checkpoint, 2, tmp_path, ranks)
    for rank, (failure, step) in enumerate(ended):
        told = rank if rank in ranks else 1 - rank
        assert (failure["type"], failure["message"]) == ("LookupError", f"rank {told} has nothing to add")
        assert failure["cause"].startswith("OtherRankError") == (rank not in ranks)
        assert step == 2
    assert "step=1.ckpt" in names(tmp_path)


def send_an_interrupt_to_both(rank: int, folder: Path, step: str, async_save: bool) -> tuple[Any, bool]:
    """Do as Ctrl-C in a terminal, when the first process gets to a step of its second save."""
    (folder / f"pid{rank}").write_text(str(os.getpid()))

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "q8lightning.save" and arguments[0] == step and arguments[1].endswith("step=2.ckpt"):
            for each in (0, 1):
                os.kill(int((folder / f"pid{each}").read_text()), signal.SIGINT)

    with quiet(), listening(hear):
        trainer = trainer_of_two(folder, QuantizationCallback(async_save=async_save))
        return caught(lambda: trainer.fit(Autoencoder())), trainer.interrupted


@pytest.mark.parametrize("step", ["frozen", "written"])
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_an_interrupt_of_both_leaves_what_was_there(async_save: bool, step: str, tmp_path: Path) -> None:
    ended = processes.run_to_the_end(send_an_interrupt_to_both, 2, tmp_path, step, async_save, limit=40)
    for each in ended:
        assert each.exitcode == 0, each.error
        failure, interrupted = each.value
        assert interrupted
        assert failure["type"] == "SystemExit" or "onnection" in failure["message"]
    assert ended[0].value[0]["type"] == "SystemExit"
    assert "step=1.ckpt" in names(tmp_path)
    assert all(load(tmp_path / name)["global_step"] in (1, 2, 3) for name in names(tmp_path))


# What follows saves


def fail_to_remove(rank: int, folder: Path, async_save: bool) -> Any:
    with quiet() as steps:
        steps.fail("removing", "step=1.ckpt", PermissionError(errno.EACCES, "not yours"))
        return fit_and_go_on(trainer_of_two(folder, QuantizationCallback(async_save=async_save), save_top_k=1), folder)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_removal_that_failed_is_raised_in_both_at_a_later_save(async_save: bool, tmp_path: Path) -> None:
    failure = same_failure(processes.run(fail_to_remove, 2, tmp_path, async_save))
    assert "not yours" in failure["message"]
    assert failure["step"] in ((3, 4) if async_save else (3,))
    assert "step=1.ckpt" in names(tmp_path)


class Uploads(pl.Callback):
    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at

    def on_checkpoint_durable(self, path: str) -> None:
        if path.endswith(self.fails_at):
            raise ConnectionError(f"cannot upload {self.fails_at}")


def fail_to_upload(rank: int, folder: Path, async_save: bool, number: int) -> Any:
    with quiet():
        callback = QuantizationCallback(async_save=async_save)
        return fit_and_go_on(trainer_of_two(folder, callback, Uploads(f"step={number}.ckpt")), folder)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("number", [2, STEPS])
def test_what_on_checkpoint_durable_raises_is_raised_in_both(number: int, async_save: bool, tmp_path: Path) -> None:
    failure = same_failure(processes.run(fail_to_upload, 2, tmp_path, async_save, number))
    assert failure["type"] == "ConnectionError"
    assert failure["step"] in range(number, STEPS + 1)
    assert f"step={number}.ckpt" in names(tmp_path)


def end_while_a_save_is_written(rank: int, folder: Path) -> tuple[Any, bool]:
    with quiet() as steps:
        steps.delay("opened", 0.5)
        callback = QuantizationCallback(async_save=True)
        failure = caught(lambda: trainer_of_two(folder, callback, Uploads("step=1.ckpt")).fit(Autoencoder()))
        return failure, (folder / "step=2.ckpt").exists()


def test_no_process_ends_before_what_the_other_writes_is_there(tmp_path: Path) -> None:
    """Lightning's launcher kills all processes of a node when one has failed."""
    for failure, is_there in processes.run(end_while_a_save_is_written, 2, tmp_path):
        assert failure["message"] == "cannot upload step=1.ckpt"
        assert is_there


class Waits(pl.Callback):
    """Waits after every step for what was saved; returns in ``caught`` what that raises."""

    def __init__(self, folder: Path, callback: QuantizationCallback) -> None:
        self.folder, self.callback = folder, callback
        self.caught: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step:
            path = self.folder / f"step={trainer.global_step}.ckpt"
            self.caught.append(caught(lambda: self.callback.wait_until_durable(path)))


def fail_while_they_wait(rank: int, folder: Path) -> Any:
    with quiet() as steps:
        steps.fail("opened", "step=1.ckpt", FULL)
        steps.fail("opened", "step=2.ckpt", KeyError("another"))
        callback = QuantizationCallback(async_save=True)
        waits = Waits(folder, callback)
        trainer = trainer_of_two(folder, callback, waits)
        trainer.fit(Autoencoder())
        return waits.caught


def test_a_wait_raises_in_both_and_training_may_go_on(tmp_path: Path) -> None:
    first, second = processes.run(fail_while_they_wait, 2, tmp_path)
    assert [None if each is None else each["message"] for each in first] == [
        None if each is None else each["message"] for each in second
    ]
    assert [each is None for each in first] == [False, False, True]
    assert "No space left" in second[0]["message"]
    assert "KeyError: 'another'" in second[1]["message"]
    assert names(tmp_path) == {"step=3.ckpt", "step=4.ckpt"}


class NotFinite(pl.Callback):
    """Makes a weight that no codec holds, before the second save; the warning is an error in the process that saves."""

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            pl_module.decoder.weight.data[0, 0] = float("inf")


def let_warnings_be_errors(rank: int, folder: Path, async_save: bool) -> Any:
    trainer = trainer_of_two(folder, QuantizationCallback(async_save=async_save), NotFinite())
    with quiet():
        warnings.filterwarnings("error", message=".*infinity")
        failure = caught(lambda: trainer.fit(Autoencoder()))
    with quiet():
        trainer.save_checkpoint(folder / "after.ckpt")
    return failure, trainer.global_step


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_warning_that_is_an_error_is_raised_in_both(async_save: bool, tmp_path: Path) -> None:
    failure = same_failure(processes.run(let_warnings_be_errors, 2, tmp_path, async_save))
    assert "decoder.weight" in failure["message"]


class SavesInValidation(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "validation.ckpt")


def fail_in_validation(rank: int, folder: Path) -> Any:
    with quiet() as steps:
        steps.fail("opened", "validation.ckpt", FULL)
        callbacks = [QuantizationCallback(async_save=True), SavesInValidation(folder)]
        trainer = trainer_of_two(folder, *callbacks, limit_val_batches=1)
        failure = caught(lambda: trainer.validate(Autoencoder(), verbose=False))
        trainer.save_checkpoint(folder / "after.ckpt")
        return failure, 0


def test_a_background_save_of_a_validation_that_failed_is_raised_in_both(tmp_path: Path) -> None:
    failure = same_failure(processes.run(fail_in_validation, 2, tmp_path))
    assert failure["type"] == BackgroundSaveError.__name__
    assert names(tmp_path) == {"after.ckpt"}


# What it costs


class Counts(DDPStrategy):
    """Counts what the processes say to each other through the strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().broadcast(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().reduce(*args, **kwargs)


def count_messages(rank: int, folder: Path) -> list[int]:
    """Return how many messages more a fit of four steps takes than one of two, in the same epoch.

    Without saves and with one after each step; both plain and with the callback.
    """

    def messages(steps: int, saves: bool, callbacks: list[Any]) -> int:
        strategy, path = Counts(), folder / f"{steps}{saves}{len(callbacks)}"
        trainer = quiet_trainer(
            folder,
            max_steps=steps,
            limit_val_batches=0,
            callbacks=[*callbacks, *([ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1)] if saves else [])],
            enable_checkpointing=saves,
            devices=2,
            use_distributed_sampler=False,
            strategy=strategy,
        )
        with quiet():
            trainer.fit(Autoencoder())
        return strategy.calls

    callbacks = [QuantizationCallback(async_save=True)]
    return [messages(4, saves, each) - messages(2, saves, each) for saves in (False, True) for each in ([], callbacks)]


def test_steps_cost_no_communication_and_saves_few_messages(tmp_path: Path) -> None:
    for plain, ours, plain_saving, ours_saving in processes.run(count_messages, 2, tmp_path):
        assert ours == plain
        # Whether something failed, what was lost, and which names are pending; at the end of the epoch, what is known.
        assert 2 * 3 - 1 <= ours_saving - plain_saving <= 2 * 3 + 1
