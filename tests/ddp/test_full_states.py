"""Whole checkpoints of strategies that spread states over processes: they pass the CheckpointIO, in the first one.

| kind | strategy |
|---|---|
| ddp | DDP |
| zero | DDP with a ZeroRedundancyOptimizer, whose state Lightning collects in the first process |
| checkpointed | DDP, a layer inside a wrapper of activation checkpointing |
| fsdp2 | ModelParallelStrategy(save_distributed_checkpoint=False) |
| fsdp | FSDPStrategy(state_dict_type="full"); not sharded, as torch 2.13 cannot collect the shards of FSDP1 on CPUs |
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from support import processes
from support.models import Autoencoder, quiet_trainer
from support.promises import assert_kept, assert_same, load, payloads_of, promised_paths
from support.steps import announced, our_threads
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from q8lightning import CheckpointPolicy, QuantizationCallback, Rule
from q8lightning.tools import decompress

SAVED_AT, LATER = 2, 20
RAW = frozenset({"table", "counts"})


DECODER = CheckpointPolicy(
    [
        Rule("state_dict.decoder.weight", "softsign"),
        Rule("optimizer_states.*.exp_avg", "softsign", parameter="decoder.weight"),
    ]
)


class Sharded(Autoencoder):
    """Sharded over the processes by FSDP2."""

    def configure_model(self) -> None:
        for part in (self.encoder, self.decoder):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class WithZero(Autoencoder):
    """Each process has the optimizer's state of some parameters."""

    def configure_optimizers(self) -> Any:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-2)


class Wrapped(Autoencoder):
    """Its parameters have longer names than in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = checkpoint_wrapper(self.decoder)  # type: ignore[assignment]


class FSDPOnCPU(FSDPStrategy):
    """What Lightning refuses on CPUs."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        options = {"device_id": torch.device("cpu"), "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, **options, **self.kwargs)


KINDS: dict[str, tuple[type[Autoencoder], Any]] = {
    "ddp": (Autoencoder, DDPStrategy),
    "zero": (WithZero, DDPStrategy),
    "checkpointed": (Wrapped, DDPStrategy),
    "fsdp2": (Sharded, partial(ModelParallelStrategy, 2, 1, save_distributed_checkpoint=False)),
    "fsdp": (
        Autoencoder,
        partial(FSDPOnCPU, state_dict_type="full", sharding_strategy="NO_SHARD", auto_wrap_policy={nn.Linear}),
    ),
}


class SaveAt(pl.Callback):
    """Saves during the fit, when training goes on at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.path)


def fit(kind: str, folder: Path, steps: int, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> list[float]:
    """Train from the same start, or from a checkpoint; return the losses."""
    make, strategy = KINDS[kind]
    torch.manual_seed(5)
    model, chosen = make(), strategy()
    assert isinstance(chosen, Strategy)
    options: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "devices": 2}
    trainer = quiet_trainer(folder, strategy=chosen, callbacks=list(callbacks), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, ckpt_path=ckpt_path)
    return model.losses


def save_plain_and_quantized(rank: int, folder: Path, kind: str) -> dict[str, Any]:
    plain = fit(kind, folder, SAVED_AT + LATER, SaveAt(folder / "plain.ckpt"))
    with announced() as steps:
        callback = QuantizationCallback(async_save=True)
        losses = fit(kind, folder, SAVED_AT + LATER, callback, SaveAt(folder / "small.ckpt"))
    fit(kind, folder, SAVED_AT, QuantizationCallback(DECODER), SaveAt(folder / "decoder.ckpt"))
    return {"plain": plain, "losses": losses, "seen": steps.seen, "threads": our_threads()}


def resume(rank: int, folder: Path, kind: str) -> dict[str, list[float]]:
    """Return the losses after each file, and after the quantized one with the callback."""
    steps = SAVED_AT + LATER
    found = {
        name: fit(kind, folder, steps, ckpt_path=folder / f"{name}.ckpt") for name in ("plain", "small", "decompressed")
    }
    return found | {"again": fit(kind, folder, steps, QuantizationCallback(), ckpt_path=folder / "small.ckpt")}


class Trained:
    """What two processes of one kind saved and returned."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.ranks = processes.run(save_plain_and_quantized, 2, folder, kind)


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    kind: str = request.param
    return Trained(kind, tmp_path_factory.mktemp(kind))


def test_all_that_the_preset_promises_is_kept_and_encoded(trained: Trained) -> None:
    before = load(trained.folder / "plain.ckpt")
    before["state_dict"].update({name: x.detach() for name, x in before["state_dict"].items()})  # FSDP marks some
    assert set(payloads_of(trained.folder / "small.ckpt")) == promised_paths(before, "resume", RAW)
    assert_kept(load(trained.folder / "small.ckpt"), before, "resume", RAW)


def test_rules_name_parameters_as_the_state_dict_does(trained: Trained) -> None:
    encoded = set(payloads_of(trained.folder / "decoder.ckpt"))
    assert encoded == {"state_dict.decoder.weight", "optimizer_states.0.state.4.exp_avg"}


def test_training_does_not_notice(trained: Trained) -> None:
    for rank in trained.ranks:
        assert rank["losses"] == rank["plain"]


def test_only_the_first_process_works(trained: Trained) -> None:
    first, second = trained.ranks
    assert ("durable", "small.ckpt") in first["seen"]
    assert second["seen"] == []
    assert second["threads"] == first["threads"] == []


def test_both_resume_from_exactly_what_was_stored_and_close_to_plain(trained: Trained) -> None:
    decompress(trained.folder / "small.ckpt", trained.folder / "decompressed.ckpt")
    for rank, losses in enumerate(processes.run(resume, 2, trained.folder, trained.kind)):
        assert losses["plain"] == trained.ranks[rank]["plain"][SAVED_AT:]
        assert losses["small"] == losses["decompressed"] == losses["again"]
        assert len(losses["small"]) == LATER
        assert losses["small"] == pytest.approx(losses["plain"], rel=1e-2)


def test_one_process_resumes_from_it(trained: Trained) -> None:
    torch.manual_seed(5)
    model = Wrapped() if trained.kind == "checkpointed" else Autoencoder()
    trainer = quiet_trainer(trained.folder, max_steps=SAVED_AT + 2, max_epochs=-1, limit_val_batches=0)
    if trained.kind == "zero":
        model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=1e-2)  # type: ignore[method-assign]
    trainer.fit(model, ckpt_path=trained.folder / "small.ckpt")
    assert trainer.global_step == SAVED_AT + 2
    fresh = Wrapped() if trained.kind == "checkpointed" else Autoencoder()
    state = load(trained.folder / "small.ckpt")["state_dict"]
    fresh.load_state_dict(state)
    assert_same(dict(fresh.state_dict()), dict(state))
