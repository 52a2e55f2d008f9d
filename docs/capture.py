"""Run the commands of docs/cli.md and put what they print under them.

    python docs/capture.py

This trains the example language model for 30 steps, and saves it with and without the callback. In the folder of these
files it runs every line of the page that begins with ``$ q8lightning``, in their order. Each such line has a block of
its own, which is rewritten. A block that ends with a line ``...`` shows only the beginning of the output. The block
after a block of Python shows what that prints.
"""

import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import lightning.pytorch as pl

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

from char_lm import CharLM, PythonDocs  # noqa: E402

from q8lightning import QATConfig, QuantizationCallback, WeightRule  # noqa: E402
from q8lightning.cli.main import main  # noqa: E402

BLOCK = re.compile(r"```console\n\$ (q8lightning [^\n]*)\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"(```python\n)(.*?)(```\n\n```\n)(.*?)```", re.DOTALL)
SHOWN = 16
"""Lines of an output that is not wanted as a whole."""
DURATION = re.compile(r"; \d+\.\d s$")
"""The time that a command took, which is left out: for files this small it says nothing."""


def train(folder: Path) -> None:
    """Save the example model as ``plain.ckpt``, by the callback as ``epoch1.ckpt``, and with QAT as ``qat.ckpt``."""
    qat = QATConfig([WeightRule("*.qkv.weight", "int4", 32)])
    callbacks_of = {
        "plain.ckpt": [],
        "epoch1.ckpt": [QuantizationCallback()],
        "qat.ckpt": [QuantizationCallback(qat=qat)],
    }
    for name, callbacks in callbacks_of.items():
        pl.seed_everything(1)
        trainer = pl.Trainer(
            max_steps=30, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(CharLM(width=64, depth=2, heads=2, decay_steps=60), PythonDocs())
        trainer.save_checkpoint(folder / name)


def output_of(command: str) -> str:
    """Run a command in this process and return what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        main(shlex.split(command)[1:])
    return "\n".join(DURATION.sub("", line.rstrip()) for line in printed.getvalue().splitlines())


def renew(block: re.Match[str]) -> str:
    """Return a block with the output that its command has now."""
    command, before = block.groups()
    output = output_of(command)
    if before.endswith("\n...\n"):
        output = "\n".join([*output.splitlines()[:SHOWN], "..."])
    return f"```console\n$ {command}\n{output}\n```"


def renew_python(block: re.Match[str]) -> str:
    """Return a block of Python, and after it what it prints now."""
    begin, code, between, _ = block.groups()
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    return f"{begin}{code}{between}{printed.getvalue()}```"


def capture(page: Path) -> None:
    """Renew the page, and the picture that it shows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder)
        back = os.getcwd()
        os.chdir(folder)  # so that the page shows names of files only
        try:
            text = PYTHON.sub(renew_python, BLOCK.sub(renew, page.read_text()))
        finally:
            os.chdir(back)
        shutil.copy(folder / "error.png", page.with_suffix(".png"))
    page.write_text(text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    capture(HERE / "cli.md")
