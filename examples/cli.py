"""The language model under LightningCLI: ``python examples/cli.py fit --config configs/resume.yaml``."""

from char_lm import CharLM, PythonDocs
from lightning.pytorch.cli import LightningCLI

import q8lightning  # noqa: F401  lets the CLI load quantized checkpoints whether or not the config has the callback

if __name__ == "__main__":
    LightningCLI(CharLM, PythonDocs)
