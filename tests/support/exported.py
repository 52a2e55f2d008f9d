"""A small model that is trained with QAT and saved, and the weights that its forward pass used.

========  ==============================================
embed     Embedding, 96 x 64
up        Linear, 128 x 64, with a bias
down      Linear, 64 x 128, stored as in transformers' Conv1D: 128 x 64
norm      LayerNorm of 64, which no rule selects
head      Linear, tied to embed
========  ==============================================
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q8lightning import QATConfig, QuantizationCallback, WeightRule
from support.models import quiet_trainer
from support.straight_through import Trained


class Conv1D(nn.Module):
    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(into, out) / into**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, width)
        self.up, self.down, self.norm = nn.Linear(width, 128), Conv1D(width, 128), nn.LayerNorm(width)
        self.head = nn.Linear(width, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(x @ self.embed.weight[: x.shape[-1]])))))


class Seen(Trained):
    """A model that keeps the weights that its last validation used."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.seen: dict[str, Tensor] = {}

    def validation_step(self, batch: Tensor, index: int) -> None:
        named = self.net.named_parameters(remove_duplicate=False)
        self.seen = {name: parameter.detach().clone() for name, parameter in named}


class Saved(NamedTuple):
    """A checkpoint, the model, and the weights of the forward pass by their names in ``net``."""

    path: Path
    net: nn.Module
    weights: dict[str, Tensor]


def saved(
    folder: Path, *rules: WeightRule, checkpoint: Any = "resume", weights_only: bool = False, **config: Any
) -> Saved:
    """Train two steps and save; validate after that."""
    torch.manual_seed(0)
    model = Seen(Net())
    callback = QuantizationCallback(checkpoint, qat=QATConfig(rules, **config))
    trainer = quiet_trainer(folder, max_steps=2, limit_val_batches=0, callbacks=[callback])
    trainer.fit(model)
    trainer.save_checkpoint(folder / "qat.ckpt", weights_only=weights_only)
    trainer.limit_val_batches = 1
    trainer.validate(model, verbose=False)
    return Saved(folder / "qat.ckpt", model.net, model.seen)
