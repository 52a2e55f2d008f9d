"""Two processes train as with autograd, and both hold the same masters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.models import quiet_trainer
from support.straight_through import Call, Trained, as_it_is, straight_through
from torch import nn

from q8lightning import QATConfig, QuantizationCallback, WeightRule


class Reports(Trained):
    """Writes the losses and weights of each process to a file."""

    def __init__(self, folder: Path, call: Call = as_it_is) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), call=call)
        self.folder = folder

    def on_train_end(self) -> None:
        report = (self.losses, [parameter.detach() for parameter in self.net.parameters()])
        torch.save(report, self.folder / f"{self.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_with_autograd(accumulate: int, tmp_path: Path) -> None:
    def train(name: str, *callbacks: Any, call: Call = as_it_is) -> list[Any]:
        torch.manual_seed(0)
        (tmp_path / name).mkdir()
        trainer = quiet_trainer(
            tmp_path,
            max_steps=4,
            devices=2,
            strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.05,
            limit_val_batches=0,
            max_epochs=-1,
            callbacks=list(callbacks),
        )
        trainer.fit(Reports(tmp_path / name, call))
        return [torch.load(tmp_path / name / f"{rank}.pt", weights_only=True) for rank in range(2)]

    expected = train("autograd", call=straight_through("int4", 64))
    qat = QATConfig([WeightRule(codebook="int4", block_size=64)])
    got = train("callback", QuantizationCallback(qat=qat))
    assert got[0][0] != got[1][0]  # each process has data of its own
    for (losses, weights), (expected_losses, expected_weights) in zip(got, expected, strict=True):
        assert losses == expected_losses
        assert all(map(torch.equal, weights, expected_weights))
    assert all(map(torch.equal, got[0][1], got[1][1]))
