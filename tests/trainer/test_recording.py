"""What saves lose reaches loggers, ``callback_metrics``, the file and the end of fit; training does not notice."""

import csv
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from support.models import Autoencoder, quiet_trainer
from support.promises import load
from support.recorded import ours
from support.steps import Steps
from torch import Tensor

from q8lightning import CheckpointPolicy, QATConfig, QuantizationCallback, Rule, WeightRule
from q8lightning.metrics.recorder import Recorder, Saved

KINDS = ("weights", "exp_avg", "exp_avg_sq")
NAMES = {
    *(f"q8/{kind}/{name}" for kind in KINDS for name in ("sqnr_db", "relative_error")),
    "q8/update_direction_error",
    "q8/compression_ratio",
    "q8/save_stall_ms",
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*many workers", "ignore:.*is not empty", "ignore:.*ended before", "ignore:.*treespec", "ignore:.*ckpt_path"
)


class KeepLive(pl.Callback):
    """Keeps what is live whenever a checkpoint is made."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        optimizer = checkpoint["optimizer_states"][0]["state"]
        copies = {i: {key: x.clone() for key, x in state.items()} for i, state in optimizer.items()}
        weights = {name: x.clone() for name, x in checkpoint["state_dict"].items()}
        self.states.append({"step": checkpoint["global_step"], "weights": weights, "optimizer": copies})


def fitted(
    folder: Path, callback: QuantizationCallback, *others: pl.Callback, **options: Any
) -> tuple[pl.Trainer, Autoencoder]:
    """Train for four steps in two epochs, with a save after every second step."""
    torch.manual_seed(0)
    module = Autoencoder()
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "limit_train_batches": 2,
        "enable_checkpointing": True,
        "logger": CSVLogger(folder),
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
    }
    trainer = quiet_trainer(folder, callbacks=[callback, *others, saves], **(defaults | options))
    trainer.fit(module)
    return trainer, module


def rows_of(folder: Path) -> dict[int, dict[str, float]]:
    """Return what the CSV logger wrote, by step."""
    (file,) = folder.rglob("metrics.csv")
    rows: dict[int, dict[str, float]] = {}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            values = {name: float(value) for name, value in row.items() if value and name not in ("step", "epoch")}
            rows.setdefault(int(row["step"]), {}).update(values)
    return rows


def recorded(folder: Path) -> dict[int, dict[str, float]]:
    return {step: ours(row) for step, row in rows_of(folder).items() if ours(row)}


def numbers(tensor: Tensor) -> Any:
    return tensor.double().numpy().ravel()


def expected(live: dict[str, Any], saved: dict[str, Any]) -> dict[str, float]:
    """What NumPy says of a file and of the state that it was made of."""
    large = [name for name, x in live["weights"].items() if x.numel() >= 4096 and name.endswith("weight")]
    state = saved["optimizer_states"][0]["state"]
    moments = [i for i, each in live["optimizer"].items() if each["exp_avg"].numel() >= 4096]
    pairs = {"weights": [(live["weights"][name], saved["state_dict"][name]) for name in large]}
    for key in ("exp_avg", "exp_avg_sq"):
        pairs[key] = [(live["optimizer"][i][key], state[i][key]) for i in moments]
    result = {}
    for kind, tensors in pairs.items():
        assert tensors
        squares = sum(float((numbers(a) ** 2).sum()) for a, _ in tensors)
        error = sum(float(((numbers(b) - numbers(a)) ** 2).sum()) for a, b in tensors)
        result[f"q8/{kind}/sqnr_db"] = 10 * np.log10(squares / error)
        result[f"q8/{kind}/relative_error"] = np.sqrt(error / squares)
    error = squares = 0.0
    for i in moments:
        one, two = (
            numbers(each["exp_avg"]) / (np.sqrt(numbers(each["exp_avg_sq"])) + 1e-8)
            for each in (live["optimizer"][i], state[i])
        )
        error, squares = error + float(((two - one) ** 2).sum()), squares + float((one**2).sum())
    result["q8/update_direction_error"] = np.sqrt(error / squares)
    return result


# Loggers


@pytest.mark.parametrize("async_save", [False, True])
def test_a_logger_shows_what_each_save_lost_at_the_step_of_the_save(async_save: bool, tmp_path: Path) -> None:
    live = KeepLive()
    trainer, module = fitted(tmp_path, QuantizationCallback("compact", async_save=async_save), live)
    found = recorded(tmp_path)
    assert [state["step"] for state in live.states] == [2, 4]
    assert list(found) == [1, 3]  # Lightning logs what belongs to the step after which global_step is n at n - 1
    for (step, row), state in zip(found.items(), live.states, strict=True):
        assert set(row) == NAMES
        file = tmp_path / f"step={state['step']}.ckpt"
        for name, value in expected(state, load(file)).items():
            assert row[name] == pytest.approx(value, rel=1e-6 if "direction" not in name else 1e-5), name
        assert row["q8/compression_ratio"] > 1.5
        assert 0 < row["q8/save_stall_ms"] < 60_000
        assert rows_of(tmp_path)[step]["loss_step"] == pytest.approx(module.losses[step])  # the model's own
    assert {name: trainer.callback_metrics[name].item() for name in NAMES} == pytest.approx(found[3])


def test_every_logger_gets_the_values(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "one"), CSVLogger(tmp_path / "two")]
    fitted(tmp_path, QuantizationCallback(), logger=loggers)
    assert recorded(tmp_path / "one") == recorded(tmp_path / "two")
    assert set(recorded(tmp_path / "one")[1]) == NAMES


def test_tensorboard_shows_the_values_at_the_step_of_the_save(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = fitted(tmp_path, QuantizationCallback(), logger=TensorBoardLogger(tmp_path, name="board"))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    for name in NAMES:
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == [1, 3]
        assert scalars[-1].value == pytest.approx(float(trainer.callback_metrics[name]))


def test_values_of_each_tensor_are_logged_on_request(tmp_path: Path) -> None:
    trainer, module = fitted(tmp_path, QuantizationCallback("compact", log="tensor"))
    last = recorded(tmp_path)[3]
    assert set(last) > NAMES
    tensors = {name for name, x in module.named_parameters() if x.numel() >= 4096}
    assert {name for name in last if "sqnr" in name} - NAMES == {
        f"q8/{kind}/{name}/sqnr_db" for kind in KINDS for name in tensors
    }
    summary = load(tmp_path / "step=4.ckpt")["q8lightning"]["tensors"]
    for name in tensors:
        assert last[f"q8/weights/{name}/sqnr_db"] == pytest.approx(summary[f"state_dict.{name}"]["sqnr_db"])
        assert f"q8/exp_avg/{name}/relative_error" in trainer.callback_metrics


def test_nothing_is_logged_if_nothing_is_wanted(tmp_path: Path) -> None:
    qat = QATConfig([WeightRule(codebook="int4")])
    trainer, _ = fitted(tmp_path, QuantizationCallback(log=None, qat=qat))
    assert not recorded(tmp_path)
    assert not ours(trainer.callback_metrics)
    assert load(tmp_path / "step=4.ckpt")["q8lightning"]["metrics"]


@pytest.mark.parametrize("log", ["kinds", "", True, 1])
def test_a_wrong_detail_is_refused(log: Any) -> None:
    with pytest.raises(ValueError, match="log must be 'kind', 'tensor' or None, got"):
        QuantizationCallback(log=log)


def test_saves_by_hand_count_and_messages_of_the_trainer_to_itself_do_not(tmp_path: Path) -> None:
    callback = QuantizationCallback()
    trainer, module = fitted(tmp_path, callback, max_steps=2)
    before = dict(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / ".lr_find_1.ckpt")
    assert dict(trainer.callback_metrics) == before
    module.decoder.weight.data.mul_(torch.rand(64, 64))
    trainer.save_checkpoint(tmp_path / "by hand.ckpt", weights_only=True)
    after = dict(trainer.callback_metrics)
    assert after["q8/weights/sqnr_db"] != before["q8/weights/sqnr_db"]
    assert after["q8/exp_avg/sqnr_db"] == before["q8/exp_avg/sqnr_db"]  # a file of weights says nothing of it
    assert callback.recorder.totals.saves == 2


def test_a_trainer_that_is_used_again_records_each_save_once(tmp_path: Path) -> None:
    callback = QuantizationCallback()
    trainer, module = fitted(tmp_path, callback, max_epochs=1)
    trainer.validate(module, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert callback.recorder.totals.saves == 1  # of the second fit
    assert list(recorded(tmp_path)) == [1, 3]


# Those who watch values


@pytest.mark.parametrize("name", ["q8/compression_ratio", "q8/weights/sqnr_db"])
def test_early_stopping_can_watch_a_value(name: str, tmp_path: Path) -> None:
    stop = EarlyStopping(name, mode="max", stopping_threshold=1.0, check_on_train_epoch_end=True)
    trainer, _ = fitted(tmp_path, QuantizationCallback(), stop, max_epochs=5)
    assert trainer.global_step == 2
    assert stop.stopped_epoch == 0


def test_model_checkpoint_can_watch_a_value(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="q8/update_direction_error", every_n_epochs=1, save_top_k=1)
    fitted(tmp_path, QuantizationCallback(), best, max_epochs=4)
    errors = [row["q8/update_direction_error"] for row in recorded(tmp_path).values()]
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(min(errors))
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_values_stay_until_the_next_save(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("q8/w")})

        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert trainer.global_step < 2 or trainer.callback_metrics["q8/weights/sqnr_db"] > 0

    fitted(tmp_path, QuantizationCallback(), Look(), limit_val_batches=1, limit_train_batches=3, max_epochs=2)
    assert [bool(each) for each in seen] == [False, False, True, True, True, True]
    assert seen[2] == seen[3] != seen[4] == seen[5]


# Training does not notice


def test_recording_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    qat = QATConfig([WeightRule("*.weight", codebook="int4", block_size=64)])

    def weights(name: str, log: str | None, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
        (tmp_path / name).mkdir()
        _, module = fitted(tmp_path / name, QuantizationCallback("compact", log=log, qat=qat), **options)
        return module.losses, dict(module.state_dict())

    plain = weights("plain", None, logger=False)
    for name, log in (("kind", "kind"), ("tensor", "tensor")):
        losses, state = weights(name, log)
        assert losses == plain[0]
        assert all(torch.equal(state[key], plain[1][key]) for key in state)


def test_the_stall_is_the_time_that_the_call_held_the_training(steps: Steps, tmp_path: Path) -> None:
    steps.delay("opened", 0.5)
    for async_save in (False, True):
        trainer, _ = fitted(tmp_path, QuantizationCallback(async_save=async_save), max_steps=2)
        assert (trainer.callback_metrics["q8/save_stall_ms"] >= 500) == (not async_save)


# The file itself


def primitives(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and primitives(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(primitives, value))
    return value is None or type(value) in (bool, int, float, str)


def test_a_checkpoint_says_what_it_is_in_primitives(tmp_path: Path) -> None:
    policy = CheckpointPolicy(
        [
            Rule("state_dict.*", "softsign"),
            Rule("optimizer_states.*.exp_avg", [-1.0, -0.5, 0.0, 0.5, 1.0], 64),
            Rule("optimizer_states.*.exp_avg_sq", "log", 128),
        ],
        min_sqnr_db=None,
        max_update_direction_error=None,
    )
    trainer, _ = fitted(tmp_path, QuantizationCallback(policy))
    summary = load(tmp_path / "step=4.ckpt")["q8lightning"]
    assert primitives(summary)
    assert summary["format_version"] == 1
    assert summary["restored"] == 0
    assert CheckpointPolicy(**summary["policy"]) == policy
    for name, value in recorded(tmp_path)[3].items():
        if name != "q8/save_stall_ms":  # not known when the file is written
            assert summary["metrics"][name.removeprefix("q8/")] == pytest.approx(value, rel=2.0**-24), name
    sizes = summary["bytes"]
    assert sizes["encoded_original"] == 6 * 4 * 64 * 64
    assert (
        sizes["encoded_stored"]
        == sum(
            4096 * bits // 8 + scales  # five levels have codes of 3 bits
            for bits, scales in [(8, 4096 // 256 * 4), (3, 4096 // 64 * 4), (8, 4096 // 128 * 8)]
        )
        * 2
    )
    assert sizes["original"] - sizes["stored"] == sizes["encoded_original"] - sizes["encoded_stored"]
    assert trainer.callback_metrics["q8/compression_ratio"] == pytest.approx(sizes["original"] / sizes["stored"])
    assert len(summary["tensors"]) == 6


def test_it_counts_how_often_the_run_was_restored(tmp_path: Path) -> None:
    def resume(name: str, ckpt_path: Path | None, steps: int, checkpoint: str | None = "compact") -> int:
        callback = QuantizationCallback(checkpoint)
        trainer = quiet_trainer(tmp_path, max_steps=steps, max_epochs=-1, limit_val_batches=1, callbacks=[callback])
        module = Autoencoder()
        trainer.fit(module, ckpt_path=ckpt_path)
        if ckpt_path is not None:  # no restoring of the run
            trainer.validate(module, ckpt_path=tmp_path / "0.ckpt", verbose=False)
        trainer.save_checkpoint(tmp_path / name)
        return int(load(tmp_path / name).get("q8lightning", {}).get("restored", -1))

    assert resume("0.ckpt", None, 1) == 0
    assert resume("1.ckpt", tmp_path / "0.ckpt", 2) == 1
    assert resume("2.ckpt", tmp_path / "1.ckpt", 3) == 2
    assert resume("plain.ckpt", None, 1, None) == -1
    assert resume("3.ckpt", tmp_path / "plain.ckpt", 2) == 0


# The end of fit


def test_the_end_of_fit_says_what_saves_came_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, module = fitted(tmp_path, QuantizationCallback("compact"), TQDMProgressBar(), enable_progress_bar=True)
    printed = capsys.readouterr().out
    assert printed.count("q8lightning") == 1
    line = printed[printed.index("q8lightning:") :]
    summaries = [load(tmp_path / f"step={step}.ckpt")["q8lightning"] for step in (2, 4)]
    stored, original = (sum(each["bytes"][key] for each in summaries) for key in ("stored", "original"))
    worst = min((figures["sqnr_db"], path) for each in summaries for path, figures in each["tensors"].items())
    assert "saves 2" in line
    assert f"size {stored / 1e3:.1f} kB instead of {original / 1e3:.1f} kB" in line
    parameters = sum(each.numel() for each in module.parameters())
    assert f"bytes a parameter {stored / 2 / parameters:.2f} instead of {original / 2 / parameters:.2f}" in line
    assert f"longest stall {max(row['q8/save_stall_ms'] for row in recorded(tmp_path).values()):.0f} ms" in line
    assert f"SQNR {worst[0]:.1f} dB" in line


def test_it_says_so_through_rich_where_the_trainer_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(tmp_path, QuantizationCallback(), RichProgressBar(), enable_progress_bar=True)
    printed = capsys.readouterr().out
    assert "q8lightning:" not in printed
    assert "Epoch" not in printed[printed.rindex("saves") :], "a bar is drawn below it"
    table = [line for line in printed.splitlines() if "│" in line]
    assert any("saves" in line and "2" in line for line in table)
    assert any("longest stall" in line for line in table)


@pytest.mark.parametrize("options", [{"enable_progress_bar": False}, {"enable_progress_bar": True, "max_steps": 1}])
def test_it_prints_nothing_without_a_progress_bar_or_without_a_save(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fitted(tmp_path, QuantizationCallback(), **options)
    assert "q8lightning" not in capsys.readouterr().out
    said = [each.message for each in caplog.records if each.message.startswith("q8lightning: saves 2; size ")]
    assert len(said) == (0 if options["enable_progress_bar"] else 1), "without a bar it stands in the log"


def test_the_fit_begins_with_a_line_that_says_what_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said_by(name: str, callback: QuantizationCallback) -> tuple[str, Autoencoder]:
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            _, module = fitted(tmp_path / name, callback)
        (said,) = [each.message for each in caplog.records if each.message.startswith("QuantizationCallback: ")]
        return said, module

    said, module = said_by("compact", QuantizationCallback("compact", async_save=True))
    found = re.fullmatch(
        r".*by the preset compact, about (.*) bytes a parameter instead of 12\.00, .* on the CPU, .* background", said
    )
    assert found is not None, said
    elements = sum(each.numel() for each in module.parameters())
    sizes = load(tmp_path / "compact" / "step=4.ckpt")["q8lightning"]["bytes"]
    saved = sizes["original"] - sizes["stored"]
    assert float(found[1]) == pytest.approx(12 - saved / elements, abs=0.02)
    qat = QATConfig([WeightRule("*.weight", codebook="int4", block_size=64)])
    said, module = said_by("qat", QuantizationCallback(None, qat=qat))
    weights = [each.numel() for name, each in module.named_parameters() if name.endswith(".weight") and each.ndim > 1]
    assert said == (
        f"QuantizationCallback: QAT trains {len(weights)} weights as int4 in blocks of 64 ({sum(weights):,} elements)"
    )


def test_bytes_a_parameter_are_a_range_if_saves_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module = Autoencoder()
    parameters = sum(each.numel() for each in module.parameters())
    whole = ModelCheckpoint(tmp_path, filename="whole-{step}", every_n_train_steps=2)
    weights = ModelCheckpoint(tmp_path, filename="weights-{step}", save_weights_only=True, every_n_train_steps=1)
    callbacks = [QuantizationCallback(), TQDMProgressBar(), whole, weights]
    trainer = quiet_trainer(
        tmp_path,
        callbacks=callbacks,
        max_steps=2,
        limit_val_batches=0,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    trainer.fit(module)
    said = [load(tmp_path / f"{name}-step=2.ckpt")["q8lightning"]["bytes"] for name in ("weights", "whole")]
    stored, original = (" to ".join(f"{each[key] / parameters:.2f}" for each in said) for key in ("stored", "original"))
    assert f"bytes a parameter {stored} instead of {original};" in capsys.readouterr().out


def test_nothing_is_said_of_parameters_that_are_not_known() -> None:
    recorder = Recorder()
    for parameters, expected in ((0, None), (4, "3.00 instead of 12.00")):
        recorder.count(recorder.record(Saved([], [], 48, 12, parameters)), 0.0)
        assert dict(recorder.totals.lines()).get("bytes a parameter") == expected


def test_sizes_are_said_in_units_that_one_can_read() -> None:
    totals = Recorder().totals
    assert totals.lines() == []
    totals.saves, totals.original_bytes, totals.stored_bytes, totals.longest_stall = 3, 12_000_000_000, 999, 1.5
    lines = dict(totals.lines())
    assert lines["size"].startswith("999 bytes instead of 12.0 GB")
    assert lines["longest stall"] == "1500 ms"
    assert "worst tensor" not in lines
