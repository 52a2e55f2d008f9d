"""HSDP, tensor parallelism, and checkpoints that other numbers of processes load: one launch for each number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from support import forked, processes
from support.sharded_models import (
    HybridModel,
    ShardedModel,
    TensorParallelModel,
    samples,
    trainer_of,
)
from support.sharded_scenarios import assert_same, decoded, loaded, play, results, shards_of, whole
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ByRows

from q8lightning import QuantizationCallback, QuantizedCheckpointIO
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.sharded.check import check_shards
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.checkpoint.sharded.shard_file import read_table
from q8lightning.checkpoint.sharded.write.local_shards import local_shards
from q8lightning.checkpoint.sharded.write.save import ShardedSave
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlanner, agree, state_for_dcp

RAW = ("state_dict.seen",)

LAYOUTS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "fsdp": (ShardedModel, 4, 1),
    "hsdp": (HybridModel, 4, 1),
    "tensor parallel": (TensorParallelModel, 2, 2),
    "tensor parallel alone": (TensorParallelModel, 1, 4),
}
"""Models, and how many processes cut the data and the tensors."""


def strategy(data: int, tensor: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)


def saved(folder: Path) -> Any:
    found = {}
    for name, (make, data, tensor) in LAYOUTS.items():
        torch.manual_seed(1)
        trainer = trainer_of(folder, strategy(data, tensor), max_steps=4, callbacks=[QuantizationCallback()])
        trainer.fit(make(), samples())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        found[name] = shards_of(trainer)
    return found


def crossed(folder: Path) -> Any:
    """Load each checkpoint into every layout."""
    paths = folder.parent / "saved"
    return {
        (source, target): loaded(make(), paths / f"{source}.ckpt", strategy(data, tensor))
        for source in LAYOUTS
        for target, (make, data, tensor) in LAYOUTS.items()
    }


def fewer(folder: Path) -> Any:
    paths = folder.parent / "saved"
    return {source: loaded(ShardedModel(), paths / f"{source}.ckpt") for source in LAYOUTS}


# Ten generations


TENSORS = {
    "state_dict.even": (256, 128),
    "state_dict.uneven": (67, 96),
    "state_dict.long": (8192,),
    "state_dict.kernels": (64, 4, 4, 4),
    "state_dict.narrow": (1000, 100),
    "optimizer_0.state.even.exp_avg": (256, 128),
    "optimizer_0.state.even.exp_avg_sq": (256, 128),
}


def generations(folder: Path) -> Any:
    """Save and load ten times over 2, 1 and 4 processes; return what the first process reads each time."""
    sizes = (2, 1, 4)
    groups = {size: dist.new_group(list(range(size)), backend="gloo") for size in sizes}
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in sizes}
    torch.manual_seed(3)
    tensors = {name: torch.randn(shape) for name, shape in TENSORS.items()}
    tensors["optimizer_0.state.even.exp_avg_sq"].square_()
    read = []
    for generation in range(10):
        size = sizes[generation % 3]
        if dist.get_rank() < size:
            path = folder / f"{generation}.ckpt"
            ranks = Ranks(groups[size] if size > 1 else None)
            _save(tensors, path, ranks, meshes[size])
            tensors = {name: torch.empty(shape) for name, shape in TENSORS.items()}
            load(tensors, checkpoint_id=path, planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
            read.append(tensors)
        dist.barrier()
        told = [tensors]
        dist.broadcast_object_list(told, 0)
        tensors = told[0]
    return read


def _save(tensors: dict[str, torch.Tensor], path: Path, ranks: Ranks, mesh: DeviceMesh) -> None:
    held = {name: _distributed(tensor, mesh) for name, tensor in tensors.items()}
    checkpoint = {
        "state_dict": {name.removeprefix("state_dict."): each for name, each in held.items() if "state_dict" in name},
        "optimizer_states": [
            {
                "state": {"even": {key: held[f"optimizer_0.state.even.{key}"] for key in ("exp_avg", "exp_avg_sq")}},
                "param_groups": [{"params": ["even"], "eps": 1e-8}],
            }
        ],
    }
    planner = ShardPlanner()
    plan = agree(planner, state_for_dcp(checkpoint, "state_dict"), ranks, None)
    part = local_shards(checkpoint, plan, planner, ranks.is_first)
    QuantizedCheckpointIO().save_shards(
        part.checkpoint,
        part.shards,
        path,
        ModelNames(),
        ranks,
        lambda save, memory: ShardedSave(save, plan, part.places, ranks).write(str(path), memory),
    )


def _distributed(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    parts, rank = tensor.chunk(mesh.size(), 0), mesh.get_local_rank()
    own = parts[rank].contiguous() if rank < len(parts) else tensor[:0]
    return DTensor.from_local(own, mesh, [ByRows(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def play_four(rank: int, folder: Path) -> None:
    play(rank, [saved, crossed, generations], folder)


def play_fewer(rank: int, folder: Path) -> None:
    play(rank, [fewer], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    forked.prepare()
    processes.run(play_four, 4, folder, limit=200)
    return folder


def expected(folder: Path, name: str) -> dict[str, torch.Tensor]:
    held = [each[name] for each in results(folder, "saved", 4)]
    return whole(held, lambda key, shard: decoded(key, shard, raw=RAW))


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_loads_into_every_other(source: str, target: str, folder: Path) -> None:
    found = [each[source, target] for each in results(folder, "crossed", 4)]
    assert_same(whole(found, lambda _, shard: shard.tensor), expected(folder, source))


@pytest.mark.parametrize("size", [3, 1])
def test_fewer_processes_load_it(size: int, folder: Path) -> None:
    processes.run(play_fewer, size, folder)
    found = results(folder, "fewer", size)
    for source in LAYOUTS:
        assert_same(whole([each[source] for each in found], lambda _, shard: shard.tensor), expected(folder, source))


def test_replicas_are_encoded_and_written_once(folder: Path) -> None:
    tables = [read_table(file) for file in (folder / "saved" / "hsdp.ckpt").glob("*.distcp")]
    names = [(chunk.name, chunk.offsets) for table in tables for chunk in table.chunks]
    assert len(names) == len(set(names))
    assert len(tables) == 4
    sizes = [sum(chunk.nbytes for chunk in table.chunks) for table in tables]
    # DCP gives each process as many plain bytes. A tensor that no rule names counts for four times as many as others.
    assert max(sizes) < 2 * min(sizes), sizes
    assert check_shards(folder / "saved" / "hsdp.ckpt")


def test_ten_generations_over_other_numbers_of_processes_are_the_same_to_the_bit(folder: Path) -> None:
    read = results(folder, "generations", 4)[0]
    assert len(read) == 10
    same = [name for name in TENSORS if "narrow" not in name]
    for later in read[1:]:
        for name in same:
            assert torch.equal(later[name], read[0][name]), name


def test_rows_without_room_for_blocks_lose_a_little_more(folder: Path) -> None:
    """Blocks cross rows of 100, and lie elsewhere when others share the rows: see docs/distributed.md."""
    read = results(folder, "generations", 4)[0]
    torch.manual_seed(3)
    exact = {name: torch.randn(shape) for name, shape in TENSORS.items()}["state_dict.narrow"]
    errors = [float((each["state_dict.narrow"] - exact).norm()) for each in read]
    assert errors[0] < errors[-1] < 2 * errors[0]
