"""The language model under LightningCLI: ``python examples/cli.py fit --config configs/resume.yaml``.

LightningCLI needs ``pip install "jsonargparse[signatures]"``.
"""

from char_lm import CharLM, PythonDocs
from lightning.pytorch.cli import LightningCLI

import q8lightning  # noqa: F401  lets the CLI load quantized checkpoints whether or not the config has the callback

if __name__ == "__main__":
    # Without this, LightningCLI refuses to run a second time where it has left its config.yaml.
    LightningCLI(CharLM, PythonDocs, save_config_kwargs={"overwrite": True})
