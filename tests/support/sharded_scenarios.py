"""What processes that train together do in a launch, and write down for named tests.

A scenario is a function of a folder, called in all processes. What it returns is saved, by its name and the process.
"""

import logging
import math
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from support.promises import FIRST_MOMENTS, SECOND_MOMENTS, WEIGHTS, stored
from support.sharded_models import samples, trainer_of

Scenario = Callable[[Path], Any]


class Shard(NamedTuple):
    """What one process holds of a tensor.

    Attributes:
        offsets: Where in the whole tensor it begins.
        size: Of the whole tensor.
        tensor: The shard.
    """

    offsets: tuple[int, ...]
    size: tuple[int, ...]
    tensor: Tensor


def play(rank: int, scenarios: Sequence[Scenario], folder: Path) -> None:
    """Call scenarios one after the other; one that raises does not keep the others from being called."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for scenario in scenarios:
        own = folder / scenario.__name__
        own.mkdir(exist_ok=True)
        try:
            found = scenario(own)
        except BaseException as error:
            found = RuntimeError("".join(traceback.format_exception(error)))
        torch.save(found, folder / f"{scenario.__name__}.{rank}.pt")


def results(folder: Path, scenario: str, size: int) -> list[Any]:
    """Return what a scenario found, by process; fail with what it raised there."""
    found = [torch.load(folder / f"{scenario}.{rank}.pt", weights_only=False) for rank in range(size)]
    for rank, each in enumerate(found):
        assert not isinstance(each, BaseException), f"{scenario} failed in process {rank}: {each}"
    return found


def shards_of(trainer: pl.Trainer) -> dict[str, Shard]:
    """Return copies of all that this process holds of the states of model and optimizers, as DCP sees it."""
    strategy = trainer.strategy
    state = {
        "state_dict": strategy.lightning_module_state_dict(),
        **{f"optimizer_{i}": strategy.optimizer_state(each) for i, each in enumerate(trainer.optimizers)},
    }
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    found = {}
    for item in planner.create_local_plan().items:
        if item.tensor_data is not None:
            data = item.tensor_data
            tensor = planner.lookup_object(item.index).detach().clone()
            found[item.index.fqn] = Shard(tuple(data.chunk.offsets), tuple(data.size), tensor)
    return found


def loaded(model: pl.LightningModule, path: Path, strategy: Any = None, *callbacks: Any) -> dict[str, Shard]:
    """Return what this process holds after a checkpoint of four steps was resumed and no step made."""
    trainer = trainer_of(path.parent, strategy, max_steps=4, callbacks=[*callbacks])
    trainer.fit(model, samples(), ckpt_path=str(path))
    assert trainer.global_step == 4
    return shards_of(trainer)


def save_plain(trainer: pl.Trainer, path: Path) -> None:
    """Save as plain Lightning does, also where the callback is."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    type(trainer.strategy).save_checkpoint(trainer.strategy, checkpoint, path)
    trainer.strategy.barrier()


def decoded(name: str, shard: Shard, preset: str = "resume", raw: Sequence[str] = ()) -> Tensor:
    """Return what a preset promises to be left of a shard."""
    tensor, numel = shard.tensor, torch.Size(shard.size).numel()
    codec = codec_of(name, preset)
    if codec is None or numel < 4096 or not tensor.is_floating_point() or not tensor.numel() or name in raw:
        return tensor
    kind, block_size, bits = codec
    if len(shard.size) > 1:  # blocks of at least 32 cross no row, nor a part of one
        lengths = [math.prod(shape[1:]) for shape in (shard.size, tensor.shape)]
        lengths.append(shard.offsets[1] * math.prod(shard.size[2:]))
        fitting = [size for size in (32, 64, 128, 256) if size <= block_size and not any(n % size for n in lengths)]
        block_size = max(fitting, default=block_size)
    return stored(tensor, kind, block_size, bits)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare tensors by name, to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def codec_of(name: str, preset: str) -> tuple[str, int, tuple[int, ...]] | None:
    if name.startswith("state_dict."):
        return WEIGHTS[preset][:3]
    if name.endswith(".exp_avg"):
        return FIRST_MOMENTS[preset][:3]
    return SECOND_MOMENTS[preset][:3] if name.endswith(".exp_avg_sq") else None


def whole(parts: Sequence[Mapping[str, Shard]], change: Callable[[str, Shard], Tensor]) -> dict[str, Tensor]:
    """Return the tensors that shards of all processes are parts of, with what ``change`` makes of each shard."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, shard in part.items():
            if name not in found:
                found[name] = (
                    torch.full(shard.size, torch.nan, dtype=shard.tensor.dtype) if shard.size else shard.tensor
                )
            if shard.size and shard.tensor.numel():
                where = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.tensor.shape, strict=True))
                found[name][where] = change(name, shard)
    return found
