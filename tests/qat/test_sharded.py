"""Sharded parameters are trained quantized as whole ones are, whatever the number of processes.

Every case is trained in one process and in several, with the same data in each. Losses and masters must be the same,
bit for bit (``support/sharded_training.py`` says why they can be).
"""

import math
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from support import processes
from support.sharded_training import ROWS, Case, Trace, fully, run_cases, train, whole
from support.straight_through import Adversaries, Trained
from torch import Tensor, nn
from torch.nn import functional as F

import q8lightning
from q8lightning import QATConfig, WeightRule
from q8lightning.qat.rules import FreezeRule

FLAT = QATConfig([WeightRule(codebook="int4", block_size=32)])


def even() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64))


def uneven() -> nn.Module:
    """Rows of 64, 7 and 3 elements, divided in parts of different sizes; the last layer has one row, on one process."""
    return nn.Sequential(nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))


def short_blocks() -> nn.Module:
    """Rows of 100 elements, which end with a short block."""
    return nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 33))


class Experts(nn.Module):
    """Bare parameters of rank 3."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.down = nn.Parameter(torch.randn(3, 32, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.expand(4, -1, -1) @ self.up)[:3] @ self.down


def partly_frozen() -> nn.Module:
    net = even()
    net[0].weight.requires_grad_(False)
    return net


class Same(nn.Linear):
    """A layer whose initial values are the same in any number of processes."""

    def reset_parameters(self) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for each in (self.weight, self.bias):
            values: Any = torch.linspace(-0.3, 0.5, math.prod(each.shape)).sin().view(each.shape)
            if each.is_meta:
                continue
            if isinstance(each, DTensor):
                values = distribute_tensor(values, each.device_mesh, each.placements)
            with torch.no_grad():
                each.copy_(values)


def same() -> nn.Module:
    return nn.Sequential(Same(64, 7), nn.Tanh(), Same(7, 5))


def on_meta(net: nn.Module, mesh: Any) -> None:
    net.to("meta")
    fully(net, mesh)


def only_the_first(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net[0], mesh=mesh)  # type: ignore[index]


def compiled(net: nn.Module, mesh: Any) -> None:
    for each in (net[0], net[3]):  # type: ignore[index]
        each.compile(backend="aot_eager")
    fully(net, mesh)


def offloaded(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    fully(net, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def replicated(mesh: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


class Hooked(Trained):
    """Looks at its weights, and writes to them, in hooks between forward and backward and between steps."""

    notes: dict[str, Any]

    def look(self, where: str) -> None:
        seen = self.notes.setdefault(where, [])
        seen.append([whole(each).sum().item() for each in self.net.parameters()])

    def on_before_backward(self, loss: Tensor) -> None:
        self.look("before backward")

    def on_train_batch_start(self, *_: Any) -> None:
        self.look("batch start")

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for each in self.net.parameters():
                each.clamp_(-0.11, 0.11)


class InStep(Trained):
    """Writes to its weights in the middle of a step, with the masters in place."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.loss(batch)
        with q8lightning.masters(self), torch.no_grad():
            for each in self.net.parameters():
                each.mul_(0.5)
        return super().training_step(batch, index)


class PastTheTrainer(Adversaries):
    """Steps optimizers of torch, of which the Trainer does not know when they step."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers(use_pl_optimizer=False)


KEPT = partial(fully, reshard_after_forward=False)
RAMP = QATConfig(ROWS.weights, start_step=1, ramp=4, end_step=6)
VALIDATED = {"val_check_interval": 1, "num_sanity_val_steps": 1, "max_steps": 8}

RAW = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0}

CASES: dict[str, Case] = {
    "validated": Case(even, options={"val_check_interval": 2, "num_sanity_val_steps": 1}, validate=True),
    "accumulated": Case(
        even,
        options={
            "accumulate_grad_batches": 3,
            "gradient_clip_val": 0.001,
            "gradient_clip_algorithm": "value",
            "max_steps": 3,
        },
    ),
    "uneven": Case(uneven, QATConfig([WeightRule(codebook="int2", block_size=32, axis=0)])),
    "short blocks": Case(short_blocks, QATConfig([WeightRule(codebook="linear", block_size=32, axis=0)])),
    "rank 3": Case(Experts),
    "flat, rank 1": Case(even, QATConfig([WeightRule(codebook="int4", block_size=32)], min_rank=1)),
    "frozen": Case(partly_frozen, QATConfig(ROWS.weights, freeze=[FreezeRule("*3.weight", 2)])),
    "ramp": Case(even, RAMP, options=VALIDATED),
    "ramp, kept": Case(even, RAMP, KEPT, options=VALIDATED),
    "ramp of flat blocks": Case(even, QATConfig(FLAT.weights, ramp=5)),
    "outside": Case(even, shard=only_the_first),
    "meta": Case(same, shard=on_meta),
    "compiled": Case(even, shard=compiled, options={"max_steps": 3}),
    "offloaded": Case(even, shard=offloaded),
    "two optimizers": Case(even, FLAT, model=Adversaries),
    "two optimizers, one plain": Case(even, QATConfig(FLAT.weights, exclude=["*d.weight"]), model=Adversaries),
    "two optimizers past the Trainer": Case(
        even, QATConfig(FLAT.weights, exclude=["*d.weight"]), model=PastTheTrainer, options=RAW
    ),
    "hooks": Case(even, model=Hooked),
    "hooks, kept": Case(even, shard=KEPT, model=Hooked),
    "kept": Case(even, shard=KEPT, options={"val_check_interval": 2}, validate=True),
    "masters in a step": Case(even, model=InStep, options={"max_steps": 3}),
    "masters in a step, kept": Case(even, shard=KEPT, model=InStep, options={"max_steps": 3}),
    "bf16-true": Case(even, options={"precision": "bf16-true"}),
    "DDP": Case(even, ddp=True, options={"val_check_interval": 2}),
}
OF_FOUR: dict[str, Case] = {
    "validated": CASES["validated"],
    "uneven": CASES["uneven"],
    "ramp": CASES["ramp"],
    "hybrid": Case(even, mesh=replicated, options={"val_check_interval": 2}),
    "hybrid, uneven": Case(uneven, CASES["uneven"].qat, mesh=replicated),
}


@cache
def came_to(count: int) -> list[dict[str, Any]]:
    """Train all cases in so many processes, started once."""
    cases = OF_FOUR if count == 4 else CASES
    folder = Path(mkdtemp())
    return processes.run(run_cases, count, count, cases, [*cases], folder, limit=240)


@cache
def alone(name: str, cases: str = "CASES") -> Trace:
    return train(globals()[cases][name], Path(mkdtemp()))


def check_same(traces: list[Any], expected: Trace) -> None:
    assert len(traces) > 1
    for trace in traces:
        assert isinstance(trace, Trace), trace
        assert trace.losses == expected.losses
        assert trace.evaluated == expected.evaluated
        assert trace.notes == expected.notes
        assert list(trace.weights) == list(expected.weights)
        for name, value in expected.weights.items():
            assert (trace.weights[name] == value).all(), name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str) -> None:
    check_same([each[name] for each in came_to(2)], alone(name))


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_train_as_one(name: str) -> None:
    check_same([each[name] for each in came_to(4)], alone(name, "OF_FOUR"))
