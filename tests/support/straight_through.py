"""The straight-through estimator of autograd, and models that train with it or with the callback.

Nothing here asks the package which weights are quantized or how: that is written down once more.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN
from support.models import OPTIMIZERS, batches, quiet_trainer


def quantized(x: Tensor, codebook: str = "linear", block_size: int = 256) -> Tensor:
    """Return a contiguous tensor as the reference quantizes it."""
    book = BUILTIN[codebook]
    parts = reference.quantize(x.detach(), book, block_size, signed_scale=book.one_sided)
    return reference.dequantize(*parts, book, block_size, x.dtype)


class StraightThrough(torch.autograd.Function):
    """Quantized forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: str, block_size: int) -> Tensor:
        return quantized(x, codebook, block_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


Call = Callable[..., Any]


def as_it_is(net: nn.Module, *inputs: Any) -> Any:
    return net(*inputs)


def straight_through(codebook: str = "linear", block_size: int = 256) -> Call:
    """Return what calls a module with every weight of rank 2 or more replaced by its quantized value."""

    def call(net: nn.Module, *inputs: Any) -> Any:
        weights = {
            name: StraightThrough.apply(parameter, codebook, block_size)
            for name, parameter in net.named_parameters()  # tied names follow the first
            if parameter.ndim >= 2
        }
        return functional_call(net, weights, inputs)

    return call


class Trained(pl.LightningModule):
    """Trains ``net`` to return zeros; ``call`` says how it is called."""

    def __init__(self, net: nn.Module, batch: Tensor | None = None, call: Call = as_it_is, optimizer: str = "adamw"):
        super().__init__()
        self.net = net
        self.call = call
        self.optimizer = optimizer
        self.batch = batch
        self.losses: list[float] = []
        self.evaluated: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        inputs = batch if self.batch is None else self.batch
        if inputs.is_floating_point():
            inputs = inputs.to(next(self.net.parameters()).dtype)
        output = self.call(self.net, inputs)
        return (output[0] if isinstance(output, tuple) else output).float().square().mean()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.evaluated.append(self.loss(batch).item())

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.net.parameters())

    def train_dataloader(self) -> Any:
        return batches(8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trained(
    make: Callable[[], Trained], folder: Path, *callbacks: pl.Callback, seed: int = 1, **options: Any
) -> Trained:
    """Seed, make a model and train it; the options are the Trainer's."""
    torch.manual_seed(seed)
    model = make()
    quiet_trainer(folder, callbacks=list(callbacks), **options).fit(model)
    return model


def assert_trained_alike(got: Trained, expected: Trained) -> None:
    """Compare losses and weights, bit for bit."""
    assert got.losses == expected.losses
    assert got.evaluated == expected.evaluated
    state, other = got.net.state_dict(), expected.net.state_dict()
    assert list(state) == list(other)
    for name, value in other.items():
        assert torch.equal(state[name], value), name


class Adversaries(Trained):
    """Two networks under manual optimization, as in a GAN: AdamW for one, SGD for the other, in one training step."""

    def __init__(self, call: Call = as_it_is) -> None:
        super().__init__(nn.ModuleDict({"g": nn.Linear(64, 64), "d": nn.Linear(64, 64)}), call=call)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        g, d = self.optimizers()  # type: ignore[misc]
        fake = self.call(self.net["g"], batch)
        loss = self.call(self.net["d"], fake).square().mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()
        self.losses.append(loss.item())
        fake = self.call(self.net["g"], batch).detach()  # with what the step above left
        loss = (self.call(self.net["d"], batch) - self.call(self.net["d"], fake) - 1).square().mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS["adamw"](self.net["g"].parameters()), OPTIMIZERS["sgd"](self.net["d"].parameters())
