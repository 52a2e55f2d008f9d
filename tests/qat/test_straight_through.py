"""Training with the callback is, bit for bit, training with an autograd straight-through function on the weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.straight_through import (
    Adversaries,
    StraightThrough,
    Trained,
    as_it_is,
    assert_trained_alike,
    straight_through,
    trained,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from q8lightning import QATConfig, QuantizationCallback, WeightRule


class ByHand(nn.Module):
    """A module that calls ``weight`` for every weight, for cases in which ``functional_call`` cannot replace them."""

    by_hand: tuple[str, int] | None = None

    def weight(self, weight: Tensor) -> Tensor:
        return weight if self.by_hand is None else StraightThrough.apply(weight, *self.by_hand)


class Checkpointed(ByHand):
    """Computes its activations again during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def inner(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.weight(self.first.weight), self.first.bias))
        return torch.tanh(F.linear(x, self.weight(self.second.weight), self.second.bias))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Tied(ByHand):
    """An embedding that is the output layer, too, and a module that is called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.shared = nn.Linear(32, 32)
        self.again = self.shared
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if self.by_hand is None:
            return self.head(self.again(torch.tanh(self.shared(self.embed(tokens)))))
        embed, shared = self.weight(self.embed.weight), self.weight(self.shared.weight)
        x = torch.tanh(F.linear(F.embedding(tokens, embed), shared, self.shared.bias))
        return F.linear(F.linear(x, shared, self.shared.bias), embed)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Conv1d(1, 12, 5), nn.BatchNorm1d(12), nn.ConvTranspose1d(12, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.norm(self.down(x[:, None]))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 16)
        return self.attend(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.view(-1, 4, 16))[0]


class Experts(nn.Module):
    """Bare parameters of rank 3, used without a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.down = nn.Parameter(torch.randn(4, 32, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.expand(4, -1, -1) @ self.up) @ self.down


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Tanh(), nn.Linear(128, 64))


NETS = {
    "linear": linear,
    "checkpointed": Checkpointed,
    "tied": Tied,
    "convolutions": Convolutions,
    "attention": Attention,
    "recurrent": Recurrent,
    "experts": Experts,
}
TOKENS = torch.arange(48).view(4, 12)


def check_same(
    folder: Path, net: nn.Module, codebook: str, block_size: int, batch: Tensor | None = None, **options: Any
):
    """Train one copy with autograd's estimator and one with the callback and compare every bit."""
    optimizer = options.pop("optimizer", "adamw")
    reference, call = copy.deepcopy(net), straight_through(codebook, block_size)
    if isinstance(reference, ByHand):
        reference.by_hand, call = (codebook, block_size), as_it_is
    options = {"max_steps": 6} | options
    callback = QuantizationCallback(qat=QATConfig([WeightRule(codebook=codebook, block_size=block_size)]))

    def copied() -> Trained:
        return Trained(copy.deepcopy(net), batch, optimizer=optimizer)

    expected = trained(lambda: Trained(reference, batch, call, optimizer), folder, **options)
    assert_trained_alike(trained(copied, folder, callback, **options), expected)
    in_float = trained(copied, folder, **options)
    assert in_float.losses != expected.losses  # so that quantization makes a difference that a test could miss


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_module_trains_as_with_autograd(name: str, tmp_path: Path) -> None:
    check_same(tmp_path, NETS[name](), "int4", 32, TOKENS if name == "tied" else None)


@pytest.mark.parametrize(
    ("codebook", "block_size"),
    [("linear", 256), ("softsign", 128), ("dynamic", 64), ("normal_float4", 64), ("int2", 32), ("fp8_e4m3", 4096)],
)
def test_every_codebook_trains_as_with_autograd(codebook: str, block_size: int, tmp_path: Path) -> None:
    check_same(tmp_path, linear(), codebook, block_size)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3, "max_steps": 4},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value", "optimizer": "sgd"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"val_check_interval": 2, "num_sanity_val_steps": 1},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "val_check_interval": 3},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_way_to_train_is_as_with_autograd(options: dict[str, Any], tmp_path: Path) -> None:
    check_same(tmp_path, linear(), "int4", 64, **options)


def test_two_optimizers_in_one_step_train_as_with_autograd(tmp_path: Path) -> None:
    expected = trained(lambda: Adversaries(straight_through("int4", 64)), tmp_path, max_steps=12)
    callback = QuantizationCallback(qat=QATConfig([WeightRule(codebook="int4", block_size=64)]))
    assert_trained_alike(trained(Adversaries, tmp_path, callback, max_steps=12), expected)


def perceptron(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, up, bias)), down)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return perceptron(x, self.up.weight, self.up.bias, self.down.weight)


@pytest.mark.parametrize(("backend", "in_place"), [("aot_eager", True), ("aot_eager", False), ("inductor", False)])
def test_a_compiled_model_trains_as_with_autograd(backend: str, in_place: bool, tmp_path: Path) -> None:
    """With ``fullgraph=True``: nothing of the callback is in the graph, so nothing breaks it or makes it invalid."""
    torch._dynamo.reset()
    net, function = Perceptron(), torch.compile(perceptron, backend=backend, fullgraph=True)

    def call(net: Perceptron, x: Tensor) -> Tensor:
        up, down = (StraightThrough.apply(layer.weight, "int4", 64) for layer in (net.up, net.down))
        return function(x, up, net.up.bias, down)

    expected = trained(lambda: Trained(copy.deepcopy(net), call=call), tmp_path, max_steps=4)
    if in_place:
        net.compile(backend=backend, fullgraph=True)
    else:
        net = torch.compile(net, backend=backend, fullgraph=True)  # type: ignore[assignment]
    callback = QuantizationCallback(qat=QATConfig([WeightRule(codebook="int4", block_size=64)]))
    counters.clear()
    got = trained(lambda: Trained(net), tmp_path, callback, max_steps=4)
    assert got.losses == expected.losses
    for value, other in zip(got.net.state_dict().values(), expected.net.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert counters["stats"]["unique_graphs"] == 1
