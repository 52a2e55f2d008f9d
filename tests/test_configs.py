"""The configurations run through a real LightningCLI, and the demo runs from end to end."""

import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from support import forked

from q8lightning import QuantizedTensor, export_quantized, keep_encoded
from q8lightning.checkpoint.policy import PRESETS

ROOT = Path(__file__).parent.parent
CODECS = {
    "resume": ("linear", 4),
    "compact": ("softsign", 0),
    "custom_policy": ("linear", 8),
    "async_save": ("linear", 4),
}
"""The codec of weights, and the bits of its residual."""


SMALL = (
    *("--trainer.max_steps=100", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--model.width=64", "--model.heads=2", "--model.depth=1"),
    *("--model.context=16", "--data.context=16", "--data.batch_size=2"),
)


def fit(config: str, folder: str, *more: str) -> None:
    """Do what ``python examples/cli.py fit --config=...`` does, in a process that has imported Lightning already."""
    os.chdir(folder)
    script = ROOT / "examples" / "cli.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), "fit", f"--config={config}", *SMALL, *more]
    with open("said", "w") as said, redirect_stdout(said), redirect_stderr(said):
        runpy.run_path(str(script), run_name="__main__")


def run(name: str, folder: Path) -> None:
    """Train a small model with one of the configurations."""
    assert forked.run(fit, str(ROOT / "configs" / f"{name}.yaml"), str(folder)) == 0, (folder / "said").read_text()


@pytest.mark.parametrize("name", CODECS)
def test_a_configuration_trains_and_saves_what_it_says(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)
    *older, path = sorted((tmp_path / "runs" / name).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(older) == (name == "async_save"), "it saves twice in 100 steps"
    with keep_encoded():
        state = torch.load(path, weights_only=True)["state_dict"]
    feed_forward = state["model.blocks.0.feed_forward.0.weight"]
    embedding = state["model.embed.weight"]
    assert (feed_forward.codec.name, feed_forward.codec.residual_bits) == CODECS[name]
    assert isinstance(embedding, QuantizedTensor) == (name != "custom_policy")  # it leaves the embedding as it is


def test_the_same_command_runs_a_second_time(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "resume.yaml")
    for _ in range(2):
        ran = forked.run(fit, config, str(tmp_path), "--trainer.max_steps=1")
        assert ran == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "runs" / "resume" / "config.yaml").exists(), "what the second run wrote over"


def fail(config: str, folder: str) -> None:
    """Do what :func:`fit` does, and write down what the program ends with."""
    try:
        fit(config, folder)
    except SystemExit as end:
        Path(folder, "end").write_text(f"{end.code}\n")
    except BaseException as error:
        Path(folder, "end").write_text(f"{type(error).__name__}\n{error}\n")


TYPOS = {
    "a key of a rule": ("custom_policy", "codec: softsign", "codek: softsign", "rules[2] has the key 'codek'"),
    "a codec": ("custom_policy", "codec: log", "codec: lgo", "rules[3]: rule for 'optimizer_states.*.exp_avg_sq'"),
    "a codebook of QAT": ("qat_int4", "codebook: int4", "codebook: imt4", "weights[0]"),
}


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_in_a_rule_ends_in_the_one_line_that_says_it(name: str, tmp_path: Path) -> None:
    config, right, wrong, message = TYPOS[name]
    text = (ROOT / "configs" / f"{config}.yaml").read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong, 1))
    assert forked.run(fail, str(tmp_path / "wrong.yaml"), str(tmp_path)) == 0
    (line,) = (tmp_path / "end").read_text().splitlines()
    assert line.startswith(f"error: {message}")


QAT = {
    "qat_int4": {"model.blocks.0.qkv.weight": ("int4", 64, None), "model.embed.weight": None},
    "qat_mixed": {
        "model.blocks.0.qkv.weight": ("linear", 64, 0),
        "model.blocks.0.feed_forward.0.weight": ("normal_float4", 64, None),
        "model.embed.weight": ("linear", 256, None),
    },
}


@pytest.mark.parametrize("name", QAT)
def test_a_configuration_trains_with_the_quantized_weights_it_says(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)
    (path,) = (tmp_path / "runs" / name).glob("*.ckpt")
    entries = torch.load(path, weights_only=True)["q8lightning"]["qat"]
    for parameter, expected in QAT[name].items():
        entry = entries.get(parameter)
        got = entry and (entry["codebook"], entry["block_size"], entry["axis"])
        assert got == expected, parameter
    export_quantized(path, tmp_path / "codes.pt", format="codes")
    assert (tmp_path / "codes.pt").stat().st_size < path.stat().st_size


def test_the_demo_ends_with_its_tables(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "train_char_lm.py")
    options = ["--steps=3", "--resume-steps=2", "--batch-size=2", "--folder=demo", "--picture=demo.png"]
    command = [sys.executable, script, *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    output = result.stdout
    for words in ("bytes a parameter", "update direction", "Resumed for 2 steps on the same batches", "val_loss"):
        assert words in output
    assert {path.stem for path in (tmp_path / "demo").glob("*.ckpt")} == {"plain", *PRESETS}
    assert "step 3/3" in output, "a bar counts the steps of its fit"
    assert output.count("step 2/2") == 1 + len(PRESETS), "also after a resume"
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
