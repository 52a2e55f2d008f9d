"""Fabric with FSDP2 in two processes: each writes its own shards quantized, and every way of loading takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from support import forked, processes
from torch import nn
from torch.distributed.fsdp import fully_shard

import q8lightning
from q8lightning import CorruptCheckpointError, QuantizedCheckpointIO


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    forked.prepare()


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def started(in_shards: bool = True) -> tuple[Fabric, dict[str, Any]]:
    """Return a Fabric of two processes and a state after two steps; only the first seed differs between calls."""
    strategy = ModelParallelStrategy(
        shard, data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=in_shards
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(1)
    model = fabric.setup(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), 1e-2))
    for _ in range(2):
        fabric.backward(model(torch.randn(8, 64)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return fabric, {"model": model, "optimizer": optimizer, "step": 2}


def values_of(state: dict[str, Any]) -> list[torch.Tensor]:
    weights = [each.full_tensor().detach().clone() for each in state["model"].parameters()]
    moments = [
        kept[key].full_tensor().clone()
        for kept in state["optimizer"].state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return weights + moments


def scenario(rank: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    fabric, state = started()
    before = values_of(state)
    for name, preset in (("a.ckpt", "compact"), ("b.ckpt", "precise"), ("b.ckpt", "precise")):
        q8lightning.fabric.save(fabric, folder / name, state, preset)
    fabric.save(folder / "plain.ckpt", state)
    errors = {}
    for name, load in (("a.ckpt", fabric.load), ("b.ckpt", lambda *given: q8lightning.fabric.load(fabric, *given))):
        with torch.no_grad():
            for each in state["model"].parameters():
                each.zero_()
        state["step"] = 0
        load(folder / name, state)
        assert state["step"] == 2
        pairs = zip(before, values_of(state), strict=True)
        errors[name] = max(float((one - two).norm() / one.norm()) for one, two in pairs)
    refused = ""
    try:
        q8lightning.fabric.save(fabric, folder / "c.ckpt", state, filter={"model": lambda *_: True})
    except NotImplementedError as error:
        refused = str(error)
    try:
        Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(shard), plugins=[QuantizedCheckpointIO()])
    except NotImplementedError as error:
        refused += f"; {error}"
    (shards,) = (sorted((folder / "b.ckpt").glob(f"__{rank}_*.distcp")),)
    fabric.barrier()
    if rank == 0:
        content = bytearray(shards[0].read_bytes())
        content[len(content) // 3] ^= 1
        shards[0].write_bytes(content)
    fabric.barrier()
    with pytest.raises(CorruptCheckpointError):
        q8lightning.fabric.load(fabric, folder / "b.ckpt", state)
    fabric.strategy._save_distributed_checkpoint = False
    q8lightning.fabric.save(fabric, folder / "gathered.ckpt", state, "compact")
    return {"errors": errors, "refused": refused}


def test_two_processes_save_and_load_shards(tmp_path: Path) -> None:
    results = processes.run(scenario, 2, tmp_path, limit=300)
    for result in results:
        assert 0 < result["errors"]["b.ckpt"] < 0.05 < result["errors"]["a.ckpt"] < 0.3
        assert "cannot be filtered" in result["refused"]
        assert "CheckpointIO" in result["refused"], "Fabric itself refuses the plugin, as docs/fabric.md says"

    def size(name: str) -> int:
        return sum(each.stat().st_size for each in (tmp_path / name).iterdir())

    assert size("plain.ckpt") > 2 * size("a.ckpt")
    found = q8lightning.inspect(tmp_path / "a.ckpt")
    codecs = {entry.path: entry.codec for entry in found.tensors}
    assert codecs["model.0.weight"] == "softsign/64"
    assert codecs["optimizer.state.0.weight.exp_avg_sq"].startswith("log")
    assert {"model", "optimizer", "step"} <= set(found.sections)
    kinds = q8lightning.compare(tmp_path / "plain.ckpt", tmp_path / "a.ckpt").by_kind()
    assert 0 < kinds["weights"].relative_error < 0.02
    assert 0 < kinds["update_direction"].relative_error < 0.3
    assert q8lightning.verify(tmp_path / "a.ckpt").is_whole
    assert not q8lightning.verify(tmp_path / "b.ckpt").is_whole
    q8lightning.decompress(tmp_path / "a.ckpt", tmp_path / "one.ckpt")
    one, loaded = torch.load(tmp_path / "one.ckpt", weights_only=True), q8lightning.load(tmp_path / "a.ckpt")
    assert torch.equal(one["model"]["0.weight"], loaded["model"]["0.weight"])
    assert one["step"] == loaded["step"] == 2
    gathered = torch.load(tmp_path / "gathered.ckpt", weights_only=True)
    assert q8lightning.inspect(tmp_path / "gathered.ckpt").sizes["exp_avg"].ratio > 4
    assert gathered["model"]["0.weight"].shape == (128, 64)
