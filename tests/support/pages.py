"""Run the Python of a page in its order, as a reader would type it, with a small model where the page says ``model``.

    python -I tests/support/pages.py README.md

It needs the package alone, so that ``make package`` runs it in an environment that has nothing else.
"""

import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS = 4


class MyModel(pl.LightningModule):
    """The module of a reader: it brings its data, and ends each training after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = nn.Linear(64, 64)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.head(self.encoder(batch)).square().mean()
        self.log("loss", loss)
        self.trainer.should_stop = batch_idx >= STEPS
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.head(self.encoder(batch)).square().mean())

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(256, 64), batch_size=8)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def blocks_of(page: Path) -> list[str]:
    """Return the blocks of Python of a page of Markdown."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run all blocks one after the other in the working directory, and return the names that they leave."""
    names: dict[str, Any] = {"model": MyModel(), "MyModel": MyModel, "x": torch.randn(64, 64), "__name__": page.stem}
    for number, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)
    return names


if __name__ == "__main__":
    for path in sys.argv[1:]:
        names = run(Path(path).resolve())
        print(f"{path}: {len(blocks_of(Path(path)))} blocks ran, with {names['pl'].__name__} of {pl.__file__}")
