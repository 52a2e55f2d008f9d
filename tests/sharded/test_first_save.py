"""The kernels of the first save in shards are loaded beside the first batches, too."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from support import processes
from support.loaded import loaded
from support.sharded_models import ShardedModel, samples, trainer_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from q8lightning import CheckpointPolicy, QuantizationCallback
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.trainer.prepare.miniatures import ALIGNED, Form, miniatures_of
from q8lightning.trainer.save.door import door_of


class Look(pl.Callback):
    """Keeps the miniatures of a model and the shards that they stand for, with the blocks of both."""

    def __init__(self) -> None:
        self.forms: set[tuple[Form, int]] = set()
        self.shards: set[tuple[Form, int]] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        policy = CheckpointPolicy.of("resume")
        for each in miniatures_of(policy, pl_module, trainer.optimizers, torch.device("cpu")):
            assert each.weight is not None
            self.forms.add(
                (each.weight, RULE.block_size if each.shard is None else each.shard.aligned(RULE).block_size)
            )
        for parameter in pl_module.parameters():
            local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
            if parameter.numel() >= policy.min_numel and local.numel():
                form = Form(local.dtype, local.numel() % ALIGNED == 0, local.data_ptr() % ALIGNED == 0)
                self.shards.add((form, BLOCKS.get(tuple(parameter.shape[1:]), RULE.block_size)))


RULE = get_codec("linear", 128, residual_bits=3)
"""Of weights, in the preset that is looked at, in blocks for which rows of 128 have room."""

BLOCKS = {(96,): 32, (64,): 64}
"""Of shards whose rows have no room for those of the rule; rows of 67 or 72 have room for none. The parameter that is
not divided, with rows of 64, is saved as a shard of itself."""


class Uneven(ShardedModel):
    """A model with a matrix of a multiple of 16 elements, whose halves are none."""

    def __init__(self) -> None:
        super().__init__()
        self.net.more = nn.Linear(72, 66)


def choose(rank: int, folder: Path) -> tuple[set[tuple[Form, int]], set[tuple[Form, int]]]:
    look = Look()
    trainer_of(folder, max_steps=1, callbacks=[look]).fit(Uneven(), samples())
    return look.forms, look.shards


def test_miniatures_stand_for_the_shards_of_a_process(tmp_path: Path) -> None:
    for forms, shards in processes.run(choose, 2, tmp_path):
        assert forms == shards
        assert {form.is_whole for form, _ in forms} == {True, False}
        assert {block_size for _, block_size in forms} == {128, 64, 32}


class SavesWarm(pl.Callback):
    """Saves once everything is warm, and keeps which kernels that loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        door = door_of(trainer)
        assert door is not None
        if trainer.global_step == 2:
            assert door.warm_up is not None
            assert door.warm_up._thread is not None
            door.warm_up._thread.join()
            self.found = loaded()
            trainer.save_checkpoint(self.path)


def save_warm(rank: int, folder: Path) -> list[str] | None:
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    saves = SavesWarm(folder / "a.ckpt")
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    options: dict[str, Any] = {"accelerator": "gpu", "max_steps": 3}
    trainer_of(folder, strategy, callbacks=[QuantizationCallback(), saves], **options).fit(ShardedModel(), samples())
    return saves.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_save_in_shards_loads_no_kernel(tmp_path: Path) -> None:
    assert processes.run(save_warm, 1, tmp_path, limit=200) == [[]]
