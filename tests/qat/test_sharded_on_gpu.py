"""On a GPU, one process with FSDP2 and NCCL trains sharded weights as one without does whole ones, bit for bit.

What is gathered there is gathered on streams of its own, which must see the quantized values.
"""

from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from support import processes
from support.sharded_training import Case, Trace, fully, run_cases, train, whole
from support.straight_through import Trained
from torch import Tensor, nn

from q8lightning import QATConfig, WeightRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 1024
QAT = QATConfig([WeightRule(codebook="int4", block_size=64, axis=0)])
GPU = {"accelerator": "gpu", "val_check_interval": 2, "max_steps": 6}


def net() -> nn.Module:
    """Wide layers: to gather one takes longer than to launch what comes next."""
    layers: list[nn.Module] = [nn.Linear(64, WIDTH)]
    for _ in range(6):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 64))


class Between(Trained):
    """Has the masters put back between forward and backward, so that backward gathers what was quantized again."""

    notes: dict[str, Any]

    def on_before_backward(self, loss: Tensor) -> None:
        self.notes.setdefault("seen", []).append(sum(whole(each).double().sum().item() for each in self.parameters()))


CASES: dict[str, Case] = {
    "sharded": Case(net, QAT, options=GPU),
    "ramp": Case(net, QATConfig(QAT.weights, ramp=4), options=GPU),
    "kept": Case(net, QAT, partial(fully, reshard_after_forward=False), options=GPU, validate=True),
    "between": Case(net, QAT, model=Between, options=GPU),
    "accumulated": Case(net, QAT, options={**GPU, "accumulate_grad_batches": 2}),
    "half": Case(net, QAT, options={**GPU, "precision": "bf16-true"}),
}


@cache
def came_to() -> dict[str, Any]:
    return processes.run(run_cases, 1, 1, CASES, [*CASES], Path(mkdtemp()), limit=400)[0]


@pytest.mark.parametrize("name", CASES)
def test_sharded_weights_train_as_whole_ones(name: str) -> None:
    trace, expected = came_to()[name], train(CASES[name], Path(mkdtemp()))
    assert isinstance(trace, Trace), trace
    assert trace.notes == expected.notes
    assert trace.losses == expected.losses
    assert trace.evaluated == expected.evaluated
    for weight, value in expected.weights.items():
        assert (trace.weights[weight] == value).all(), weight
