"""What a checkpoint in shards costs: how long a save holds training, when it is on the disk, and its bytes.

    python benchmarks/sharded.py                                    # 1 B parameters under FSDP2, NCCL, all GPUs here
    python benchmarks/sharded.py --ranks 2 --device cpu --size 10m  # processes on this machine's CPUs, gloo
    python benchmarks/sharded.py --only resume-async,dcp-async --saves 5
    python benchmarks/sharded.py --only lightning,resume-async --resume-on 2,1

A decoder of transformer blocks, each under ``fully_shard``, is trained by a real Trainer with ``ModelParallelStrategy``
and AdamW on random tokens. Every way to save runs in processes of its own, so that its first save is the first of a
process; ways take turns if there are several ``--rounds``.

"step" is the median of steps without a save. "holds" is what the step with a save and the save itself take more than
that, until the next step begins, on the slowest process: the median of all saves but the first, and the first. "durable
after" is the time from the call until every process has flushed its file (Lightning's and ``dcp.async_save``: until
DCP says that it is done; DCP flushes files, and no folder). "bytes" are those of the folder.

With ``--resume-on``, the last checkpoint of a way is resumed from in new processes, as many as it says. "ready after"
is the time from the Trainer's ``setup`` to its first step, in which the model is made, divided and loaded; "without" is
that of the run that saved, which loads nothing. "loss" is that of one fixed batch.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from q8lightning import QuantizationCallback

SIZES = {
    # blocks, width, heads, batch, length
    "tiny": (2, 128, 4, 2, 64),
    "10m": (6, 256, 4, 2, 64),
    "100m": (12, 768, 12, 4, 256),
    "1b": (20, 2048, 16, 4, 1024),
    "7b": (32, 4096, 32, 1, 1024),
}
VOCABULARY = 8192

WAYS = ("none", "lightning", "dcp-async", "resume", "resume-async", "compact", "compact-async")
"""``lightning`` is its own sharded save; ``dcp-async`` hands the same states to ``dcp.async_save``; the others are the
callback's presets."""


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, blocks: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Model(pl.LightningModule):
    def __init__(self, size: str) -> None:
        super().__init__()
        self.size = size

    def configure_model(self) -> None:
        blocks, width, heads, *_ = SIZES[self.size]
        self.net = Decoder(blocks, width, heads)
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        return self.loss_of(tokens)

    def loss_of(self, tokens: Tensor) -> Tensor:
        predicted = self.net(tokens[:, :-1])
        return nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.device.type == "cuda")


class Saves(pl.Callback):
    """Saves every few steps, and takes the time."""

    def __init__(self, save: Callable[[pl.Trainer, Path], Callable[[], None]] | None, folder: Path, every: int) -> None:
        self.save, self.folder, self.every = save, folder, every
        self.began = 0.0
        self.steps: list[float] = []
        self.with_save: list[float] = []
        self.durable: list[float] = []
        self.wait: Callable[[], None] | None = None
        self.called = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer)

    def _mark(self, trainer: pl.Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.began:
            saved = trainer.global_step and trainer.global_step % self.every == 0
            (self.with_save if saved and self.save else self.steps).append(now - self.began)
        if self.wait is not None:
            self.wait()  # outside of what is measured; the next save finds the disk at rest
            self.durable.append(time.perf_counter() - self.called)
            self.wait = None
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.save is not None and trainer.global_step % self.every == 0:
            self.called = time.perf_counter()
            self.wait = self.save(trainer, self.folder / f"{trainer.global_step}.ckpt")


class Looks(pl.Callback):
    """Takes the time until training begins, and the loss of a fixed batch at its begin and its end."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch
        self.began = 0.0
        self.ready = 0.0
        self.losses: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.began = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.ready = time.perf_counter() - self.began
        self._look(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(pl_module)

    def _look(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Model)
        with torch.no_grad():
            self.losses.append(float(pl_module.loss_of(self.batch.to(pl_module.device))))


def way_to_save(
    way: str, callback: QuantizationCallback | None
) -> Callable[[pl.Trainer, Path], Callable[[], None]] | None:
    """Return what saves, which returns what waits until that is durable."""
    if way == "none":
        return None
    if way == "dcp-async":
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None

        def save(trainer: pl.Trainer, path: Path) -> Callable[[], None]:
            strategy = trainer.strategy
            state = {
                "state_dict": strategy.lightning_module_state_dict(),
                "optimizer_0": strategy.optimizer_state(trainer.optimizers[0]),
            }
            future = dcp.async_save(state, checkpoint_id=path, process_group=group)
            return lambda: future.result() and None

        return save

    def save_through_trainer(trainer: pl.Trainer, path: Path) -> Callable[[], None]:
        trainer.save_checkpoint(path)
        return lambda: None if callback is None else callback.wait_until_durable()

    return save_through_trainer


def run(arguments: argparse.Namespace, way: str) -> None:
    """Train in this process, one of several, with one way to save; the first one prints what it took."""
    warnings.simplefilter("ignore")
    size = int(os.environ["WORLD_SIZE"])
    *_, batch, length = SIZES[arguments.size]
    steps = (arguments.saves + 1) * arguments.every
    tokens = torch.randint(VOCABULARY, (steps * batch, length + 1), generator=torch.Generator().manual_seed(0))
    preset = way.removesuffix("-async")
    callbacks: list[pl.Callback] = []
    callback = None
    if preset in ("resume", "compact"):
        callback = QuantizationCallback(preset, async_save=way.endswith("-async"))
        callbacks.append(callback)
    looks = Looks(tokens[:batch])
    if arguments.resume_from:
        steps += 1
    trainer = pl.Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=size,
        strategy=ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
        precision="bf16-true" if arguments.bf16 else "32-true",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    saves = Saves(None, Path(arguments.folder), arguments.every)

    class Begin(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if not arguments.resume_from:
                saves.save = way_to_save(way, callback)

    trainer.callbacks += [Begin(), saves, looks]  # type: ignore[attr-defined]
    loader = DataLoader(tokens, batch_size=batch)  # type: ignore[arg-type]
    trainer.fit(Model(arguments.size), loader, ckpt_path=arguments.resume_from, weights_only=False)
    found = [saves.steps, saves.with_save, saves.durable]
    everybody: list[Any] = [None] * size
    dist.all_gather_object(everybody, found)
    if trainer.is_global_zero:
        step = statistics.median(saves.steps[2:] or saves.steps)
        held = [max(each[1][i] for each in everybody) - step for i in range(len(saves.with_save))]
        durable = [max(each[2][i] for each in everybody) for i in range(len(saves.durable))]
        newest = max(Path(arguments.folder).glob("*.ckpt"), key=os.path.getmtime, default=None)
        row = {
            "way": way,
            "ranks": size,
            "device": arguments.device,
            "parameters": sum(each.numel() for each in trainer.lightning_module.parameters()),
            "step": step,
            "first": held[0] if held else None,
            "holds": statistics.median(held[1:]) if held[1:] else None,
            "durable": statistics.median(durable[1:]) if durable[1:] else None,
            "bytes": sum(file.stat().st_size for file in newest.iterdir()) if newest else None,
            "ready": looks.ready,
            "loss": looks.losses[0 if arguments.resume_from else -1],
        }
        print(json.dumps(row), flush=True)


def launch(arguments: argparse.Namespace, way: str, ranks: int, resume_from: Path | None = None) -> dict[str, Any]:
    """Start the processes of one way; return the row that the first one prints."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.port), "NODE_RANK": "0"}
    environment |= {"WORLD_SIZE": str(ranks)}
    if arguments.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    if resume_from is not None:
        command += ["--resume-from", str(resume_from)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = processes[0].communicate()[0]
    for process in processes:
        process.wait()
    rows = [line for line in said.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"{way} ended with {[each.returncode for each in processes]}; --verbose shows why")
    row: dict[str, Any] = json.loads(rows[-1])
    if resume_from is not None:
        row["resumes"] = True
    return row


def measure(arguments: argparse.Namespace, way: str) -> Iterator[dict[str, Any]]:
    """Yield the row of one way to save, and of resuming from what it saved last."""
    folder = Path(arguments.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield launch(arguments, way, arguments.ranks)
    newest = max(folder.glob("*.ckpt"), key=os.path.getmtime, default=None)
    if newest is not None and way != "dcp-async":  # it has no loops and callbacks, which a Trainer asks for
        for ranks in arguments.resume_on:
            yield launch(arguments, way, ranks, newest)
    shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return all that was measured as tables, the medians of the rounds."""
    lines = [
        "| way | step | the first save holds | a save holds | durable after | bytes a parameter |",
        "|---|---|---|---|---|---|",
    ]
    saved = [row for row in rows if "resumes" not in row]
    for way in dict.fromkeys(row["way"] for row in saved):
        own = [row for row in saved if row["way"] == way]
        times = [_median(own, key) for key in ("step", "first", "holds", "durable")]
        said = ["" if each is None else f"{each * 1e3:,.0f} ms" for each in times]
        nbytes = _median(own, "bytes")
        said.append("" if nbytes is None else f"{nbytes / own[0]['parameters']:.2f}")
        lines.append(f"| {way} | {' | '.join(said)} |")
    resumed = [row for row in rows if "resumes" in row]
    if resumed:
        lines += [
            "",
            "| resumes from | processes | ready after | without | loss when saved | when loaded |",
        ]
        lines += ["|---|---|---|---|---|---|"]
    for way, ranks in dict.fromkeys((row["way"], row["ranks"]) for row in resumed):
        own = [row for row in resumed if (row["way"], row["ranks"]) == (way, ranks)]
        before = [row for row in saved if row["way"] == way]
        ready, fresh = (f"{(_median(each, 'ready') or 0) * 1e3:,.0f} ms" for each in (own, before))
        losses = [f"{_median(each, 'loss'):.6f}" for each in (before, own)]
        lines.append(f"| {way} | {ranks} | {ready} | {fresh} | {' | '.join(losses)} |")
    return "\n".join(lines)


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if row[key] is not None]
    return statistics.median(found) if found else None


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--only", default=",".join(WAYS), help="comma-separated, of " + ", ".join(WAYS))
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--resume-on", type=_numbers, default=[], help="numbers of processes, such as 2,1")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 alone, as bf16-true")
    parser.add_argument("--folder", default="sharded-benchmark")
    parser.add_argument("--port", type=int, default=29531)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--resume-from", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run(arguments, arguments.way)
        return
    rows = []
    for _ in range(arguments.rounds):
        for way in arguments.only.split(","):
            for row in measure(arguments, way):
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
