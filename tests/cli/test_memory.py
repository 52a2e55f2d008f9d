"""Converting takes memory for one tensor, however large the file is."""

import json
import re
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from support import forked, processes
from support.sharded_models import samples, trainer_of
from support.sharded_scenarios import save_plain
from torch import nn
from torch.distributed.fsdp import fully_shard

from q8lightning import QuantizationCallback
from q8lightning.cli.main import main

MIB = 2**20
TENSORS, TENSOR = 32, 6 * MIB
ALLOWED = TENSOR + 24 * MIB
"""Beside the largest tensor: what the codecs' chunks, the pickle and Python's own memory take."""


def private() -> int:
    """Return the bytes of this process that are no pages of a file: those of the input are the system's cache."""
    status = Path("/proc/self/status").read_text()
    return sum(int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("RssAnon", "RssShmem")) * 1024  # type: ignore[index]


def peak(*arguments: object) -> int:
    """Run a command; return by how many bytes the process grew meanwhile."""
    before, stop, seen = private(), threading.Event(), [private()]

    def watch() -> None:
        while not stop.wait(0.002):
            seen.append(private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        stop.set()
        watcher.join()
    return max(seen) - before


def measure(folder: Path, preset: str) -> None:
    """Write what each command takes into a file."""
    main(["compress", str(folder / "tiny"), str(folder / "tiny_small"), "--preset", preset])  # what is imported once
    main(["decompress", str(folder / "tiny_small"), str(folder / "tiny_again")])
    large, small = folder / "large", folder / "small"
    sizes = {
        "compress": peak("compress", large, small, "--preset", preset),
        "decompress": peak("decompress", small, folder / "again"),
        "verify": peak("verify", small),
        "compare": peak("compare", large, small, "--top", "1"),
    }
    (folder / "sizes").write_text(json.dumps(sizes))


class Large(pl.LightningModule):
    """Matrices of the same size, in shards of one process."""

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            self.layers = nn.ParameterList(nn.Parameter(torch.randn(TENSOR // 256, 64)) for _ in range(20))
            fully_shard(self, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return batch.mean() + self.layers[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def save_folders(rank: int, folder: Path) -> None:
    trainer = trainer_of(folder, max_steps=1, callbacks=[QuantizationCallback()])
    trainer.fit(Large(), samples(8))
    trainer.save_checkpoint(folder / "folder")
    save_plain(trainer, folder / "plain_folder")


def measure_folders(folder: Path) -> None:
    """Write what each command takes for folders into a file."""
    torch.save({"state_dict": {"weight": torch.randn(256, 256)}}, folder / "tiny")
    main(["compress", str(folder / "tiny"), str(folder / "tiny_small")])  # what is imported once
    plain, encoded = folder / "plain_folder", folder / "folder"
    sizes = {
        "compress": peak("compress", plain, folder / "small"),
        "decompress": peak("decompress", encoded, folder / "one"),
        "decompress a plain one": peak("decompress", plain, folder / "plain_one"),
        "verify": peak("verify", encoded, plain),
        "compare": peak("compare", plain, encoded, "--top", "1"),
        "inspect": peak("inspect", encoded),
    }
    (folder / "sizes").write_text(json.dumps(sizes))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_that_of_one_tensor_of_a_folder(tmp_path: Path) -> None:
    """The plain folder is 120 MiB, its codes are 45."""
    processes.run(save_folders, 1, tmp_path)
    assert forked.run(measure_folders, tmp_path) == 0
    sizes = json.loads((tmp_path / "sizes").read_text())
    assert max(sizes.values()) < ALLOWED, {name: f"{size / MIB:.0f} MiB" for name, size in sizes.items()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_that_of_one_tensor(preset: str, tmp_path: Path) -> None:
    """The file is 144 MiB; its codes alone would take 36 to 55."""
    torch.save({"state_dict": {"weight": torch.randn(256, 256)}}, tmp_path / "tiny")
    rows = [TENSOR // 4 // 64 // (1 + index % 2) + index for index in range(TENSORS)]  # sizes that leave gaps in a heap
    state = {f"w{index}": torch.randn(count, 64) for index, count in enumerate(rows)}
    torch.save({"state_dict": state}, tmp_path / "large")
    assert forked.run(measure, tmp_path, preset) == 0
    sizes = json.loads((tmp_path / "sizes").read_text())
    assert max(sizes.values()) < ALLOWED, {name: f"{size / MIB:.0f} MiB" for name, size in sizes.items()}
