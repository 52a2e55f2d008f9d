"""What a save lost is published when it is known, at the step of the save, and training waits for none of it.

A CheckpointIO whose reports are completed late, by another thread, stands for saves in the background.
"""

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support import forked
from support.models import Autoencoder, in_two_processes, quiet_trainer
from support.recorded import Rows, Sees, ours

from q8lightning import QuantizationCallback, QuantizedCheckpointIO
from q8lightning.checkpoint.report import SaveReport
from q8lightning.metrics import CompressionRatio, ReconstructionSQNR, RelativeReconstructionError, UpdateDirectionError
from q8lightning.metrics.recorder import Loss, Recorded, Recorder, Saved

pytestmark = pytest.mark.filterwarnings("ignore:.*many workers", "ignore:.*is not empty", "ignore:.*treespec")

SQNR = "q8/weights/sqnr_db"


class Late(QuantizedCheckpointIO):
    """Says what its saves lost when it is told to, or some seconds after each."""

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__(checkpoint="compact")
        self.seconds = seconds
        self.withheld: list[tuple[Future[SaveReport], Future[SaveReport]]] = []

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        if not self.reports:
            return  # a message of the Trainer to itself
        late: Future[SaveReport] = Future()
        self.withheld.append((late, self.reports.pop()))
        self.reports.append(late)
        if self.seconds is not None:
            threading.Timer(self.seconds, self.tell).start()

    def tell(self) -> None:
        """Complete all reports, in a thread of its own."""

        def complete() -> None:
            while self.withheld:
                late, report = self.withheld.pop(0)
                late.set_result(report.result())

        thread = threading.Thread(target=complete)
        thread.start()
        thread.join()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "withheld": []}


class At(pl.Callback):
    """Calls something after a batch, in the hook of a callback that comes after ours."""

    def __init__(self, calls: dict[int, Callable[[pl.Trainer], object]]) -> None:
        self.calls = calls

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.calls.get(trainer.global_step, lambda _: None)(trainer)


def fit(folder: Path, io: QuantizedCheckpointIO, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Train for two epochs of four steps and log every one."""
    defaults: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0, "log_every_n_steps": 1, "plugins": [io]}
    callback = options.pop("callback", None) or QuantizationCallback("compact")
    trainer = quiet_trainer(folder, callbacks=[callback, *callbacks], **(defaults | options))
    trainer.fit(Autoencoder())
    return trainer


def save(name: str = "a.ckpt") -> Callable[[pl.Trainer], object]:
    return lambda trainer: trainer.save_checkpoint(Path(trainer.default_root_dir) / name)


def test_values_come_with_the_next_steps_logs_once_they_are_known_at_the_step_of_the_save(tmp_path: Path) -> None:
    io, rows = Late(), Rows()
    seen: dict[int, bool] = {}

    def look(trainer: pl.Trainer) -> None:
        seen[trainer.global_step] = SQNR in trainer.callback_metrics

    def look_and_tell(trainer: pl.Trainer) -> None:
        look(trainer)
        io.tell()

    fit(tmp_path, io, At({1: save(), 2: look, 3: look_and_tell, 4: look}), logger=rows)
    assert seen == {2: False, 3: False, 4: True}
    assert rows.steps == [0]
    position = next(i for i, (_, row) in enumerate(rows.rows) if SQNR in row)
    assert [step for step, _ in (rows.rows[position - 1], rows.rows[position + 1])] == [2, 3]


def test_training_waits_for_nothing_and_the_end_publishes_the_rest(tmp_path: Path) -> None:
    class TellsAtTheEnd(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert SQNR not in trainer.callback_metrics
            threading.Timer(0.3, io.tell).start()

    io, rows = Late(), Rows()
    trainer = fit(tmp_path, io, At({n: save() for n in range(1, 9)}), TellsAtTheEnd(), logger=rows)
    assert trainer.global_step == 8
    assert rows.steps == [*range(8)]
    assert SQNR in trainer.callback_metrics
    assert trainer.callbacks[0].recorder.totals.saves == 8  # type: ignore[attr-defined]


def test_the_thread_that_knows_computes(tmp_path: Path) -> None:
    threads: list[int] = []

    class Spy(Recorder):
        def record(self, save: Saved) -> Recorded:
            threads.append(threading.get_ident())
            return super().record(save)

    io, callback = Late(), QuantizationCallback("compact")
    callback.recorder = Spy()
    fit(tmp_path, io, At({2: save(), 3: lambda _: io.tell()}), callback=callback)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_a_save_outside_of_a_fit_publishes_before_it_returns(tmp_path: Path) -> None:
    io = Late(seconds=0.2)
    trainer = fit(tmp_path, io)
    assert SQNR not in trainer.callback_metrics
    save()(trainer)
    assert SQNR in trainer.callback_metrics


@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_validation_end"])
def test_early_stopping_waits_for_what_it_watches_when_it_looks(when: str, tmp_path: Path) -> None:
    io = Late(seconds=0.3)
    stop = EarlyStopping(SQNR, mode="max", stopping_threshold=1.0, check_on_train_epoch_end=when.startswith("on_train"))
    start = time.perf_counter()
    trainer = fit(tmp_path, io, At({4: save()}), stop, limit_val_batches=1)
    assert time.perf_counter() - start >= 0.3
    assert trainer.global_step == 4


@pytest.mark.parametrize("in_background", [False, True])
def test_a_model_checkpoint_sees_what_another_has_saved_in_the_same_hook(in_background: bool, tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "all", save_top_k=-1)
    best = ModelCheckpoint(tmp_path / "best", monitor=SQNR, mode="max")
    io = QuantizedCheckpointIO(checkpoint="compact") if in_background else Late(seconds=0.1)
    callback = QuantizationCallback("compact", async_save=in_background)
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 1}
    trainer = fit(tmp_path, io, first, best, callback=callback, **options)
    assert best.best_model_score is not None
    assert len(best.best_k_models) == 1
    assert SQNR in trainer.callback_metrics


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_save_that_failed_is_no_row_and_no_warning(
    how: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class Fails(Late):
        def tell(self) -> None:
            for late, _ in self.withheld:
                if how == "cancelled":
                    late.cancel()
                else:
                    late.set_exception(OSError("no space left on device"))

    io, rows = Fails(), Rows()
    trainer = fit(tmp_path, io, At({2: save(), 3: lambda _: io.tell()}), logger=rows)
    assert trainer.state.finished
    assert not rows.steps
    assert not [each for each in recwarn if "log=None" in str(each.message)]
    assert trainer.callbacks[0].recorder.totals.saves == 0  # type: ignore[attr-defined]


def test_a_run_that_dies_publishes_what_is_pending(tmp_path: Path) -> None:
    class Dies(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                threading.Timer(0.2, io.tell).start()
                raise FloatingPointError("the cause")

    io, rows = Late(), Rows()
    with pytest.raises(FloatingPointError, match="the cause"):
        fit(tmp_path, io, At({2: save()}), Dies(), logger=rows)
    assert rows.steps == [1]


def test_a_copy_of_the_trainer_has_nothing_pending(tmp_path: Path) -> None:
    copies: list[pl.Trainer] = []

    def make(trainer: pl.Trainer) -> None:
        assert io.withheld
        copies.extend([copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))])
        io.tell()

    io = Late()
    fit(tmp_path, io, AtModule({2: save(), 3: make}))
    for each in copies:
        each.save_checkpoint(tmp_path / "copy.ckpt")
        assert torch.load(tmp_path / "copy.ckpt", weights_only=True)["q8lightning"]["tensors"]


class AtModule(At):
    """The same, and a copy does nothing: what it calls cannot be pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {"calls": {}}

    def __deepcopy__(self, memo: Any) -> "AtModule":
        return AtModule({})


# One row


def test_saves_of_one_step_have_one_row(tmp_path: Path) -> None:
    rows = Rows()
    saves = [
        ModelCheckpoint(tmp_path / "a", every_n_train_steps=4, save_top_k=-1, save_last=True),
        ModelCheckpoint(tmp_path / "b", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    ]
    trainer = fit(tmp_path, QuantizedCheckpointIO(checkpoint="compact"), *saves, logger=rows, enable_checkpointing=True)
    assert rows.steps == [1, 3, 5, 7]
    assert trainer.callbacks[0].recorder.totals.saves == 10  # type: ignore[attr-defined]


def test_a_save_of_one_step_that_lost_something_else_says_what(tmp_path: Path) -> None:
    def weights_only(trainer: pl.Trainer) -> None:
        save("all.ckpt")(trainer)
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    rows = Rows()
    fit(tmp_path, QuantizedCheckpointIO(checkpoint="compact"), At({2: weights_only}), logger=rows)
    first, second = (row for _, row in rows.rows if ours(row))
    assert rows.steps == [1, 1]
    assert SQNR in first
    assert [*second] == ["q8/compression_ratio"]


def test_the_same_step_of_a_second_fit_is_a_row_again(tmp_path: Path) -> None:
    rows, io = Rows(), QuantizedCheckpointIO(checkpoint="compact")
    for _ in range(2):
        torch.manual_seed(0)
        fit(tmp_path, io, At({2: save()}), logger=rows)
    assert rows.steps == [1, 1]


# Several processes


def train_in_two_processes(folder: Path, watched: bool) -> None:
    stop = EarlyStopping(SQNR, mode="max", stopping_threshold=1.0, check_on_train_epoch_end=True)
    fit(
        folder,
        Late(seconds=0.5),
        At({2: save()}),
        Sees(folder),
        *([stop] if watched else []),
        logger=Rows(),
        limit_train_batches=2,
        max_epochs=3,
        **in_two_processes(),
    )


@pytest.mark.parametrize("watched", [True, False])
def test_two_processes_see_the_same_values_at_the_same_moment(watched: bool, tmp_path: Path) -> None:
    assert forked.run(train_in_two_processes, tmp_path, watched) == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert found[0] == found[1]
    seen, steps, rows = found[0]
    assert rows == [1]
    assert SQNR in seen[-1]
    assert steps == (2 if watched else 6)
    assert not watched or SQNR in seen[0]


# The numbers


def test_they_are_those_of_the_metrics() -> None:
    """To the last bits: only the order of float64 additions may differ."""
    numbers = torch.rand(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    losses = [Loss(("weights", "exp_avg")[i % 2], f"p{i}", row.tolist()) for i, row in enumerate(numbers)]
    directions = numbers[:7, :2]
    recorded = Recorder("tensor").record(Saved(losses, directions.tolist(), 4000, 1000))
    expected: dict[str, float] = {}
    metrics = (("sqnr_db", ReconstructionSQNR), ("relative_error", RelativeReconstructionError))
    for name, cls in metrics:
        for kind, rows in (("weights", numbers[::2]), ("exp_avg", numbers[1::2])):
            metric = cls()
            metric.update_from_statistics(rows)
            expected[f"q8/{kind}/{name}"] = float(metric.compute())
        for loss, row in zip(losses, numbers, strict=True):
            metric = cls()
            metric.update_from_statistics(row)
            expected[f"q8/{loss.kind}/{loss.name}/{name}"] = float(metric.compute())
    direction, ratio = UpdateDirectionError(), CompressionRatio()
    direction.update_from_sums(directions)
    ratio.update(4000, 1000)
    expected |= {
        "q8/update_direction_error": float(direction.compute()),
        "q8/compression_ratio": float(ratio.compute()),
    }
    assert recorded.values == pytest.approx(expected, rel=1e-14)
    worst = min((expected[f"q8/{loss.kind}/{loss.name}/sqnr_db"], loss.kind, loss.name) for loss in losses)
    assert recorded.worst is not None
    assert recorded.worst[1:] == worst[1:]
