"""What reports never breaks what it reports: a save, a fit, or the exception that a run died of.

| what fails | what goes on |
|---|---|
| a logger in ``log_metrics``, in ``save``, on a value that is not finite | the save; the other loggers get the values |
| a logger, in a run that dies of something else | the exception of the run is what the user sees |
| the computation of what saves or quantized weights lose | the save and the fit |
| ``trainer.callback_metrics`` | the save; loggers get the values |
| the summary at the end of fit | the fit |

One warning a run says each of these; where warnings are errors, the log does.
"""

import io
import math
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from support.models import Autoencoder, quiet_trainer
from torch import Tensor

from q8lightning import CheckpointPolicy, QATConfig, QuantizationCallback, Rule, WeightRule
from q8lightning.metrics.recorder import Recorder


class Keeps(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if any(name.startswith("q8/") for name in metrics):
            self.rows.append(metrics)


class Finished(Keeps):
    """As wandb after ``wandb.finish()``, for what is not Lightning's own: that would end the run itself."""

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if any(name.startswith("q8/") for name in metrics):
            raise RuntimeError("Run is finished.")


class Disconnected(Keeps):
    """Takes values and cannot send ours."""

    def save(self) -> None:
        if self.rows:
            self.rows.clear()
            raise ConnectionError("no route to host")


class Finite(Keeps):
    """As loggers that send JSON."""

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError("Out of range float values are not JSON compliant")
        super().log_metrics(metrics)


class Diverges(Autoencoder):
    """Dies in its third step."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if self.global_step == 2:
            raise FloatingPointError("the cause")
        return super().training_step(batch, index)


def run(
    folder: Path, *callbacks: Any, model: Callable[[], Any] = Autoencoder, log: Any = "kind", **options: Any
) -> tuple[Any, list[str]]:
    """Train for four steps, save twice, and return the Trainer and what we warned of."""
    callback = QuantizationCallback("compact", log=log, qat=options.pop("qat", None))
    trainer = quiet_trainer(folder, callbacks=[callback, *callbacks], max_steps=4, limit_val_batches=0, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model())
        trainer.save_checkpoint(folder / "one.ckpt")
        trainer.save_checkpoint(folder / "two.ckpt")
    for name in ("one", "two"):
        assert "q8lightning" in torch.load(folder / f"{name}.ckpt", weights_only=True)
    return trainer, [str(each.message) for each in caught if "pass log=None" in str(each.message)]


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Finished, "logging to Finished, trainer.loggers[1], failed: RuntimeError: Run is finished. Training and"),
        (Disconnected, "logging to Disconnected, trainer.loggers[1], failed: ConnectionError: no route to host."),
    ],
)
def test_a_logger_that_fails_is_one_warning(cls: type[Keeps], says: str, tmp_path: Path) -> None:
    one, two = Keeps(), Keeps()
    trainer, said = run(tmp_path, logger=[one, cls(), two])
    assert len(said) == 1
    assert said[0].startswith(says)
    assert len(one.rows) == len(two.rows) == 2
    assert trainer.callback_metrics["q8/weights/sqnr_db"] > 30


def test_two_loggers_that_fail_are_two_warnings_and_a_second_run_says_so_again(tmp_path: Path) -> None:
    trainer, said = run(tmp_path, logger=[Finished(), Finished()])
    assert len(said) == 2
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(trainer.lightning_module)
    with pytest.warns(UserWarning, match=r"trainer\.loggers\[0\]"):
        trainer.save_checkpoint(tmp_path / "three.ckpt")


@pytest.mark.parametrize("log", ["kind", "tensor"])
def test_a_ratio_of_what_lost_nothing_is_for_callback_metrics_only(log: str, tmp_path: Path) -> None:
    class Zeros(Autoencoder):
        def on_train_end(self) -> None:
            for parameter in self.parameters():
                parameter.data.zero_()

    policy = CheckpointPolicy([Rule("state_dict.*", "softsign")])
    finite = Finite()
    callback = QuantizationCallback(policy, log=log)  # type: ignore[arg-type]
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=1, limit_val_batches=0, logger=finite)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pass log=None")
        trainer.fit(Zeros())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.callback_metrics["q8/weights/sqnr_db"] == math.inf
    assert "q8/weights/sqnr_db" not in finite.rows[0]
    assert finite.rows[0]["q8/weights/relative_error"] == 0
    assert finite.rows[0]["q8/compression_ratio"] > 1


@pytest.mark.parametrize("warnings_are_errors", [False, True])
def test_the_exception_of_the_run_is_what_the_user_sees(warnings_are_errors: bool, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[QuantizationCallback(), OnExceptionCheckpoint(tmp_path, "died")],
        enable_checkpointing=True,
        logger=Finished(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if warnings_are_errors:
            warnings.filterwarnings("error", message=".*pass log=None")
        with pytest.raises(FloatingPointError, match="the cause"):
            trainer.fit(Diverges())
    assert "q8lightning" in torch.load(tmp_path / "died.ckpt", weights_only=True)


def test_where_warnings_are_errors_the_log_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = run(tmp_path, logger=Finished())
    trainer.callbacks[0].recorder.start_run()
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_checkpoint(tmp_path / "three.ckpt")
    assert "logging to Finished, trainer.loggers[0], failed" in caplog.text


@pytest.mark.parametrize("qat", [None, QATConfig([WeightRule(codebook="int4")])], ids=["float", "qat"])
def test_a_computation_that_fails_is_one_warning(
    qat: QATConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("nothing there")

    # No state is known for which it fails; it must not matter if there is one.
    monkeypatch.setattr(Recorder, "losses", fail)
    _, said = run(tmp_path, qat=qat, logger=Keeps(), log_every_n_steps=1)
    assert len(said) == (1 if qat is None else 2)
    assert "computing what a save lost failed: ZeroDivisionError: nothing there" in said[-1]


def test_callback_metrics_that_fail_are_one_warning(tmp_path: Path) -> None:
    keeps = Keeps()
    callback = QuantizationCallback()
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_steps=1, limit_val_batches=0, logger=keeps)
    trainer.fit(Autoencoder())

    class Raises(dict[str, Any]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise LookupError("no samples of this class")

    trainer._logger_connector._callback_metrics = Raises()
    with pytest.warns(UserWarning, match=r"putting values into trainer\.callback_metrics failed: LookupError: no samp"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert len(keeps.rows) == 1


class Closes(ProgressBar):
    """A progress bar of a run whose output is gone."""

    def __init__(self, output: io.StringIO) -> None:
        super().__init__()
        self.output = output

    def on_train_end(self, *args: Any) -> None:
        self.output.close()


def test_an_output_that_is_closed_does_not_end_the_fit(tmp_path: Path) -> None:
    class Saves(Autoencoder):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    output = io.StringIO()
    with redirect_stdout(output):
        trainer, said = run(tmp_path, Closes(output), model=Saves, enable_progress_bar=True)
    assert trainer.state.finished
    assert len(said) == 1
    assert "printing what all saves come to failed: ValueError: I/O operation on closed file" in said[0]
