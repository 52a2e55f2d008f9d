"""How long a save holds training up, slows it down and takes until it is durable, beside what Lightning and torch have.

    python benchmarks/save.py                                       # 1.007 B parameters on a GPU
    python benchmarks/save.py --device cpu --parameters 10e6
    python benchmarks/save.py --only plain,resume-async --repeats 3 --output save.jsonl
    python benchmarks/save.py --table save.jsonl                    # the table of all that was measured

20 transformer blocks with AdamW in float32: 240 parameters, 720 large tensors. Each round trains 20 steps, saves, and
trains 20 more while what saves in the background is watched. "stall" is the time of the call, with the stream that
trains synchronized before and after; "next 20 steps" what they took longer than those before; "durable" the time until
the file is written and flushed to the disk, by us or by the IO; "load" is from the page cache and, after it was
dropped, from the disk, into memory that the process has used before; "resume" is what a Trainer does in a process that
has just begun: load from the page cache, then into model and optimizer, which are on the device. Medians of the rounds
after the first, in which kernels are compiled and memory is made ready: its stall stands behind the others'. One file
is on the disk at a time.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import q8lightning

console = Console(width=130)
BLOCKS, STEPS = 20, 20
LOADS = ("load", "resume", "disk")


class Block(nn.Module):
    """A transformer block: 12 tensors, ``12 width^2 + 13 width`` parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.before_feed_forward = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.project(attended)
        return x + self.narrow(F.gelu(self.widen(self.before_feed_forward(x))))


class Training:
    """A model, its optimizer, a step, and the checkpoint that a Trainer would save of them."""

    def __init__(self, device: torch.device, parameters: float) -> None:
        self.device = device
        width = max(8, round((parameters / 12 / BLOCKS) ** 0.5 / 8) * 8)
        torch.manual_seed(0)
        with device:
            self.model = nn.Sequential(*(Block(width, heads=8) for _ in range(BLOCKS)))
            self.batch = torch.randn(*((4, 256) if device.type == "cuda" else (2, 16)), width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def steps(self, count: int = STEPS) -> float:
        """Train; return the seconds it took."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(self.batch).square().mean().backward()
            self.optimizer.step()
        self.synchronize()
        return time.perf_counter() - start

    def resume(self, load: Callable[[Path], Any], path: Path) -> float:
        """Load a checkpoint into model and optimizer as a Trainer does; return the seconds it took."""
        with torch.no_grad():
            self.model(self.batch)  # makes the device ready
        self.synchronize()
        start = time.perf_counter()
        checkpoint = load(path)
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for what trains, not for copies in the background on streams of their own."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def checkpoint(self) -> dict[str, Any]:
        return {
            "epoch": 1,
            "global_step": 1000,
            "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        }


@dataclass(frozen=True)
class Contender:
    """One way to save.

    Attributes:
        wait: Returns when what was saved is written; None if it is when ``save`` returns.
        end: Gives memory back that was kept from save to save.
        load: None where it is not measured.
    """

    save: Callable[[dict[str, Any], Path], object]
    wait: Callable[[], object] | None
    end: Callable[[], object]
    load: Callable[[Path], Any] | None
    load_for: Callable[[torch.device], object] | None = None
    """Tells the IO where a training that resumes has its optimizer, as the callback does."""


def of_lightning(asynchronous: bool) -> Contender:
    io = AsyncCheckpointIO(TorchCheckpointIO()) if asynchronous else TorchCheckpointIO()
    # What it writes in the background is the same file, which need not be loaded twice.
    return Contender(
        io.save_checkpoint,
        io.teardown if asynchronous else None,
        io.teardown,
        None if asynchronous else io.load_checkpoint,
    )


def of_ours(checkpoint: str, async_save: bool = False) -> Contender:
    io = q8lightning.QuantizedCheckpointIO(checkpoint=checkpoint, async_save=async_save)

    def load_for(device: torch.device) -> None:
        io.optimizer_device = device

    wait = io.wait_until_durable if async_save else None
    return Contender(io.save_checkpoint, wait, io.teardown, io.load_checkpoint, load_for)


def of_dcp() -> Contender:
    pending: list[Any] = []

    def save(checkpoint: dict[str, Any], path: Path) -> None:
        pending.append(dcp.async_save(checkpoint, checkpoint_id=path))

    return Contender(save, lambda: pending.pop().result(), lambda: None, None)


CONTENDERS: dict[str, tuple[str, Callable[[], Contender]]] = {
    "plain": ("Lightning", lambda: of_lightning(asynchronous=False)),
    "lightning-async": ("Lightning, AsyncCheckpointIO", lambda: of_lightning(asynchronous=True)),
    "dcp-async": ("torch.distributed.checkpoint.async_save", of_dcp),
    "resume": ("ours, resume", lambda: of_ours(checkpoint="resume")),
    "compact": ("ours, compact", lambda: of_ours(checkpoint="compact")),
    "resume-async": ("ours, resume, async", lambda: of_ours(checkpoint="resume", async_save=True)),
    "compact-async": ("ours, compact, async", lambda: of_ours(checkpoint="compact", async_save=True)),
}


@dataclass
class Result:
    """Medians over rounds, in seconds and bytes."""

    contender: str
    machine: str
    parameters: int
    rounds: int
    stall: float
    first_stall: float
    steps_before: float
    next_steps: float
    durable: float
    size: int
    load: float | None
    load_from_disk: float | None
    device_memory: int | None
    host_memory: int
    resume: float | None = None


def measure(name: str, training: Training, folder: Path, rounds: int, loads: Collection[str]) -> Result:
    contender = CONTENDERS[name][1]()
    path = folder / f"{name}.ckpt"
    columns: dict[str, list[float]] = {key: [] for key in ("stall", "before", "next", "durable", *LOADS)}
    device_memory = 0
    _release_host_memory()
    rss = _host_memory("VmRSS")
    _reset_host_peak()
    for counts in [False] + [True] * rounds:
        if counts:
            _remove(path)
            columns["before"].append(training.steps())
        checkpoint = training.checkpoint()
        training.synchronize()
        if training.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        start = time.perf_counter()
        contender.save(checkpoint, path)
        training.synchronize()
        columns["stall"].append(time.perf_counter() - start)
        if training.device.type == "cuda":
            device_memory = max(device_memory, torch.cuda.max_memory_allocated() - allocated)
        del checkpoint
        watcher = threading.Thread(target=_watch, args=(contender, path, start, columns["durable"]))
        watcher.start()
        if contender.wait is None:
            watcher.join()
        if counts:
            columns["next"].append(training.steps())
        watcher.join()
        gc.collect()
    size, host_memory = _size(path), max(0, _host_memory("VmHWM") - rss)
    contender.end()
    if contender.load is not None:
        for _ in range(rounds):
            load(contender, training, path, loads, columns)
    _remove(path)
    medians = {key: statistics.median(values[-rounds:]) if values else None for key, values in columns.items()}
    return Result(
        contender=name,
        machine=_machine(training.device),
        parameters=training.parameters,
        rounds=rounds,
        stall=medians["stall"],
        first_stall=columns["stall"][0],
        steps_before=medians["before"],
        next_steps=medians["next"],
        durable=medians["durable"],
        size=size,
        load=medians["load"],
        load_from_disk=medians["disk"],
        device_memory=device_memory if training.device.type == "cuda" else None,
        host_memory=host_memory,
        resume=medians["resume"],
    )


def load(
    contender: Contender, training: Training, path: Path, loads: Collection[str], columns: dict[str, list[float]]
) -> None:
    """Load a file in the ways that are wanted; it is in the page cache, and at the end it is not."""
    assert contender.load is not None
    if "load" in loads:
        columns["load"].append(_seconds(contender.load, path))
    if "resume" in loads:
        columns["resume"].append(_resume_elsewhere(path, training))
    if "disk" in loads:
        _drop_from_memory(path)
        columns["disk"].append(_seconds(contender.load, path))


def _resume_elsewhere(path: Path, training: Training) -> float:
    """Resume in a process of its own, as a training that starts again does; return the seconds of loading."""
    arguments = {
        "--device": training.device,
        "--parameters": training.parameters,
        "--threads": torch.get_num_threads(),
        "--resume": path,
    }
    command = [sys.executable, __file__, *(str(part) for pair in arguments.items() for part in pair)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resume(path: Path, training: Training) -> float:
    """Resume from a file that is named after the contender that wrote it; return the seconds of loading."""
    contender = CONTENDERS[path.stem][1]()
    assert contender.load is not None
    if contender.load_for is not None:
        contender.load_for(training.device)
    return training.resume(contender.load, path)


def _watch(contender: Contender, path: Path, start: float, durable: list[float]) -> None:
    """Note when a checkpoint is on the disk, while training goes on."""
    if contender.wait is not None:
        contender.wait()
    _flush(path)
    durable.append(time.perf_counter() - start)


def _flush(path: Path) -> None:
    for each in [path, *(path.rglob("*") if path.is_dir() else ()), path.parent]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _seconds(function: Callable[[Path], object], path: Path) -> float:
    start = time.perf_counter()
    function(path)
    return time.perf_counter() - start


def _drop_from_memory(path: Path) -> None:
    """Drop a file from the page cache, as after a restart; it has been flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _host_memory(key: str) -> int:
    """Return the resident memory of this process, or its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _release_host_memory() -> None:
    """Give back what contenders before have freed, so that the next one is seen to take it."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._host_emptyCache()  # private: pinned memory
    ctypes.CDLL(None).malloc_trim(0)


def _reset_host_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}"


def show(results: list[Result]) -> None:
    """Print a table in Markdown; ratios are to Lightning's own save where it was measured on the same machine."""
    first = results[0]
    console.print(
        f"{first.parameters:,} parameters, {first.machine}, medians of {first.rounds} rounds", highlight=False
    )
    plain = next((each for each in results if each.contender == "plain"), None)
    table = Table(box=None, pad_edge=False)
    for heading in (
        "saving with",
        "stall",
        "next 20 steps",
        "durable after",
        "file",
        "load",
        "resume",
        "GPU memory",
        "host memory",
    ):
        table.add_column(heading, justify="left" if heading == "saving with" else "right")
    rows = [[column.header for column in table.columns]]
    for each in results:

        def ratio(value: float, base: float | None) -> str:
            return "" if base is None or each is plain else f" ({base / value:.1f}x)"  # noqa: B023

        slower = each.next_steps - each.steps_before
        rows.append(
            [
                CONTENDERS[each.contender][0],
                f"{each.stall * 1e3:,.1f} ms"
                + ratio(each.stall, plain and plain.stall)
                + ("" if each is plain else f"; first {each.first_stall * 1e3:,.0f} ms"),
                f"{slower * 1e3:+,.0f} ms ({slower / each.steps_before:+.0%})",
                f"{each.durable:.2f} s" + ratio(each.durable, plain and plain.durable),
                f"{each.size / 1e6:,.1f} MB" + ratio(each.size, plain and plain.size),
                "" if each.load is None else f"{each.load:.2f} s, {each.load_from_disk or math.nan:.2f} s from disk",
                "" if each.resume is None else f"{each.resume:.2f} s" + ratio(each.resume, plain and plain.resume),
                "" if each.device_memory is None else f"{each.device_memory / each.parameters:.2f} B/param",
                f"{each.host_memory / each.parameters:.2f} B/param",
            ]
        )
    print("| " + " | ".join(map(str, rows[0])) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parameters", type=float, default=1.007e9)
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count; one more comes first")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names, with commas: %(default)s")
    parser.add_argument("--loads", default=",".join(LOADS), help="how to load, with commas: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--folder", type=Path, default=Path("runs/save"), help="where checkpoints go, and are removed")
    parser.add_argument("--output", type=Path, help="append results to this file")
    parser.add_argument("--resume", type=Path, help="print how long resuming from this file takes and end")
    parser.add_argument("--table", type=Path, help="print the table of such a file and end")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.table:
        show([Result(**json.loads(line)) for line in arguments.table.read_text().splitlines()])
        return
    if unknown := set(arguments.only.split(",")) - set(CONTENDERS):
        parser.error(f"no such contender: {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    training = Training(torch.device(arguments.device), arguments.parameters)
    if arguments.resume:
        print(resume(arguments.resume, training))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    training.steps()
    results = []
    for name in arguments.only.split(","):
        results.append(measure(name, training, arguments.folder, arguments.repeats, arguments.loads.split(",")))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(asdict(results[-1])) + "\n")
        console.print(f"{name}: stall {results[-1].stall:.4f} s, durable {results[-1].durable:.2f} s", highlight=False)
    show(results)


if __name__ == "__main__":
    main()
