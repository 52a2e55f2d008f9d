"""Every optimizer resumes from a quantized checkpoint: what is encoded of its state, what not, and what that costs."""

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.models import WIDTH, batches, quiet_trainer
from support.optimizers import OPTIMIZERS
from support.promises import WEIGHTS, load, payloads_of, promised, same_bits, stored, tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from q8lightning import QuantizationCallback

BEFORE, AFTER = 8, 8
"""Steps before the save, two epochs, and after it."""

FIRST, SECOND, SAME, RAW = "softsign", "log", "as weights", "as it is"

ADAM = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
STATES: dict[str, dict[str, str]] = {
    "Adam": ADAM,
    "AdamW": ADAM,
    "AdamW, amsgrad": ADAM | {"max_exp_avg_sq": SECOND},
    "NAdam": ADAM,
    "RAdam": ADAM,
    "Adamax": {"exp_avg": FIRST, "exp_inf": SECOND},
    "Adafactor": {"variance": SECOND},
    "RMSprop": {"square_avg": SECOND},
    "RMSprop, momentum": {"square_avg": SECOND, "momentum_buffer": FIRST},
    "RMSprop, centered": {"square_avg": RAW, "grad_avg": RAW, "momentum_buffer": FIRST},
    "Adagrad": {"sum": SECOND},
    "Adadelta": {"square_avg": SECOND, "acc_delta": SECOND},
    "Rprop": {"prev": RAW, "step_size": RAW},
    "SGD": {},
    "SGD, momentum": {"momentum_buffer": FIRST},
    "ASGD": {"ax": SAME},
    "LBFGS": {"d": RAW, "prev_flat_grad": RAW, "old_dirs": RAW, "old_stps": RAW},
    "SparseAdam": ADAM,
    "Lion": {"exp_avg": FIRST},
    "SOAP-like": ADAM | {"GG": RAW, "Q": RAW},
    "schedule-free AdamW": {"z": SAME, "exp_avg_sq": SECOND},
    "Muon": {"momentum_buffer": FIRST},
}
"""The floating states of each optimizer that have at least 4,096 elements, and how the presets store each."""


class Net(pl.LightningModule):
    """An autoencoder of a matrix and of a vector that is used as one, with 4,096 elements or more each.

    Muon takes matrices only, and SparseAdam the sparse gradients of an embedding. ``losses`` has all losses, ``seen``
    the batches, which are not those that an uninterrupted training sees: Lightning begins an epoch anew.
    """

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer, self.losses, self.seen = optimizer, list[float](), list[Tensor]()
        generator = torch.Generator().manual_seed(1)
        wide = WIDTH + 16
        self.register_buffer("target", torch.randn(128, WIDTH, generator=generator), persistent=False)
        if optimizer == "SparseAdam":
            self.embedding = nn.Embedding(128, WIDTH, sparse=True)
            return
        self.encoder = nn.Parameter(torch.randn(wide, WIDTH, generator=generator) / 10)
        shape = (WIDTH, wide) if optimizer == "Muon" else (WIDTH * wide,)
        self.decoder = nn.Parameter(torch.randn(shape, generator=generator) / 10)

    def loss(self, batch: Tensor) -> Tensor:
        if self.optimizer == "SparseAdam":
            rows = (batch[:, :8].abs() * 100).long() % 128
            return (self.embedding(rows) - self.target[rows]).square().mean()
        return (F.linear(F.linear(batch, self.encoder).tanh(), self.decoder.view(WIDTH, -1)) - batch).square().mean()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        if not any(batch is each for each in self.seen[-1:]):  # LBFGS evaluates a batch several times
            self.seen.append(batch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())

    def train_dataloader(self) -> DataLoader[Tensor]:
        return batches()


def fit(folder: Path, net: Net, steps: int, preset: str, resume: Path | None = None) -> pl.Trainer:
    options = {"max_steps": steps, "limit_val_batches": 0, "callbacks": [QuantizationCallback(preset)]}
    trainer = quiet_trainer(folder, **options)
    trainer.fit(net, ckpt_path=resume)
    return trainer


State = dict[str, Any]
"""What a checkpoint has of a training: ``state_dict`` and ``optimizer_states``."""


def by_hand(name: str, state: State, data: list[Tensor]) -> list[float]:
    """Go on from a state with these batches and without a Trainer; return the losses."""
    net = Net(name)
    net.load_state_dict(state["state_dict"])
    optimizer = net.configure_optimizers()
    optimizer.load_state_dict(copy.deepcopy(state["optimizer_states"][0]))  # it keeps the tensors that it is given
    losses: list[float] = []
    for each in data:

        def closure(batch: Tensor = each) -> Tensor:
            optimizer.zero_grad()
            loss = net.loss(batch)
            losses.append(loss.item())
            loss.backward()
            return loss

        optimizer.step(closure)
    return losses


def rms(one: list[float], two: list[float]) -> float:
    assert len(one) == len(two)
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) / len(one))


def with_random_signs(before: State, after: State, seed: int) -> State:
    """Return ``before`` with what saving lost of each value, added or subtracted at random."""
    generator = torch.Generator().manual_seed(seed)
    lost = {path: tensor for path, tensor in tensors(after) if tensor.is_floating_point()}

    def changed(value: Any, path: tuple[Any, ...] = ()) -> Any:
        if isinstance(value, dict):
            return {key: changed(each, (*path, key)) for key, each in value.items()}
        if isinstance(value, list):
            return [changed(each, (*path, i)) for i, each in enumerate(value)]
        if path not in lost or same_bits(value, lost[path]):
            return value
        signs = torch.randint(2, value.shape, generator=generator) * 2 - 1
        turned = value + signs * (lost[path] - value)
        if bool((value >= 0).all()):  # below zero there is no second moment
            turned = torch.where(turned < 0, lost[path], turned)
        return turned

    result: State = changed(before)
    return result


def large_states(state: State) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    for path, tensor in tensors({"optimizer_states": state["optimizer_states"]}):
        if tensor.is_floating_point() and tensor.numel() >= 4096:
            yield path, tensor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_resumes_from_what_the_table_says(name: str, preset: str, tmp_path: Path) -> None:
    file, net = tmp_path / "a.ckpt", Net(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, net, BEFORE, preset)
        trainer.save_checkpoint(file)
    messages = [str(each.message) for each in caught if "stored" in str(each.message) or "lost" in str(each.message)]
    optimizer = trainer.optimizers[0]
    before: State = copy.deepcopy({"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]})
    after, payloads = load(file), payloads_of(file)

    # What was encoded, and what came back.
    assert {path[4] for path, _ in large_states(before)} == STATES[name].keys()
    for path, tensor in large_states(before):
        dotted, how = ".".join(map(str, path)), STATES[name][path[4]]
        loaded: Any = after
        for key in path:
            loaded = loaded[key]
        assert (dotted in payloads) == (how != RAW), dotted
        if how == RAW:
            assert same_bits(loaded, tensor), dotted
        elif how == SAME:
            assert same_bits(loaded, stored(tensor, *WEIGHTS[preset][:3])), dotted
        else:
            assert payloads[dotted].codec.name == how
            assert same_bits(loaded, promised(path, tensor, preset)), dotted
    large = {path for path, _ in large_states(before)}
    for path, tensor in tensors({"optimizer_states": before["optimizer_states"]}):
        if path not in large:  # such as step
            loaded = after
            for key in path:
                loaded = loaded[key]
            assert same_bits(loaded, tensor), path
    assert after["optimizer_states"][0]["param_groups"] == before["optimizer_states"][0]["param_groups"]
    assert ["centered=True" in text for text in messages] == [True] * (name == "RMSprop, centered")

    # How training goes on.
    resumed = Net(name)
    fit(tmp_path, resumed, BEFORE + AFTER, preset, file)
    assert len(resumed.seen) == AFTER
    assert resumed.losses == by_hand(name, after, resumed.seen), "the loop by hand is the Trainer's"
    plain = by_hand(name, before, resumed.seen)
    gap = rms(resumed.losses, plain)
    # Errors of the same size and of random signs are what a codec without a bias costs. The gap is one more draw from
    # that distribution, so three times the largest of five leaves it a chance of one in thousands to fail.
    spread = [rms(by_hand(name, with_random_signs(before, after, seed), resumed.seen), plain) for seed in range(5)]
    assert gap <= 3 * max(spread)
    assert gap < 0.01 * plain[0]
