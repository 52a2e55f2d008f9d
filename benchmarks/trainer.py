"""What a user feels: how much longer a training step of a real Trainer takes when a checkpoint is saved in it.

    python benchmarks/trainer.py                                  # GPT-2 medium (355 M parameters) on a GPU
    python benchmarks/trainer.py --model 1b --only none,lightning-async,resume-async,compact-async
    python benchmarks/trainer.py --model tiny --device cpu --every 10
    python benchmarks/trainer.py --table trainer.jsonl            # the table of all that was measured

A Trainer trains transformers' GPT-2 with random weights on Python's own documentation, with AdamW, a CSVLogger and one
ModelCheckpoint that saves every 20 steps and keeps the newest file; on a GPU in bf16-mixed. Every way to save runs in a
process of its own, so that the first save is the first of a process. A CUDA event is recorded where each batch starts,
so a step takes what the stream that trains takes for it, with whatever it waits for; on the CPU it is the clock's time.

"step" is the median of the steps in which nothing is saved and that follow no save closely. "a save" is what a step
with a save takes more than that: the median and the worst of all but the first one. With QAT the steps are those after
the first 100, in which every write to a weight is followed; only the first save is one of these. "the 5 steps after" is
what those take more, together. "complete after" is the time from the end of the training step until the file is
written, by us also flushed to the disk, which nobody else does. "memory" is what the process takes more than the one
that saves nothing.
"""

import argparse
import json
import os
import platform
import pydoc_data.topics
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader

from q8lightning import CheckpointPolicy, QuantizationCallback
from q8lightning.checkpoint.policy import PRESETS

SIZES = {
    # layers, width, heads, batch, length
    "tiny": (2, 128, 4, 2, 64),
    "10m": (6, 256, 4, 2, 64),
    "medium": (24, 1024, 16, 8, 1024),
    "1b": (20, 2048, 16, 4, 1024),
}
AFTER = 5
"""Steps after a save that are looked at by themselves."""

IGNORED = 8
"""Steps at the beginning in which kernels are chosen and memory is made ready."""

FOLLOWED = 100
"""Steps at the beginning in which QAT follows every write to a weight."""


@dataclass(frozen=True)
class Way:
    """A way to save.

    Attributes:
        label: As the table names it.
        callbacks: What the Trainer gets.
        plugins: What the Trainer gets.
        saves: Whether anything is saved.
        ignored: Steps at the beginning that are not like all later ones.
    """

    label: str
    callbacks: Callable[[], list[pl.Callback]] = list
    plugins: Callable[[], list[Any]] = list
    saves: bool = True
    ignored: int = IGNORED


class Stamped(TorchCheckpointIO):
    """Lightning's CheckpointIO, noting when a file is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        COMPLETE.append((str(path), time.perf_counter()))


class DistributedCheckpointIO(Stamped):
    """``torch.distributed.checkpoint.async_save``; a save waits for the one before it."""

    def __init__(self) -> None:
        self._pending: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.teardown()
        self._pending = dcp.async_save(checkpoint, checkpoint_id=path)
        self._pending.add_done_callback(lambda _: COMPLETE.append((str(path), time.perf_counter())))

    def remove_checkpoint(self, path: Any) -> None:
        self.teardown()
        shutil.rmtree(path)

    def teardown(self) -> None:
        if self._pending is not None:
            self._pending.result()


COMPLETE: list[tuple[str, float]] = []
"""Files in the order in which they became complete, with the time."""


def ours(checkpoint: str | CheckpointPolicy | None, **options: Any) -> Callable[[], list[pl.Callback]]:
    return lambda: [QuantizationCallback(checkpoint, **options)]


def guarded() -> list[pl.Callback]:
    """A limit so tight that the guard gives every tensor of weights a residual stage."""
    rules = PRESETS["compact"].rules
    return [QuantizationCallback(CheckpointPolicy(rules, min_sqnr_db=50.0), async_save=True)]


INT4 = {"weights": [{"codebook": "int4", "block_size": 64}]}
WAYS: dict[str, Way] = {
    "none": Way("nothing is saved", saves=False),
    "lightning": Way("Lightning", plugins=lambda: [Stamped()]),
    "lightning-async": Way("Lightning, AsyncCheckpointIO", plugins=lambda: [AsyncCheckpointIO(Stamped())]),
    "dcp-async": Way("torch.distributed.checkpoint.async_save", plugins=lambda: [DistributedCheckpointIO()]),
    "resume": Way("`resume`", ours("resume")),
    "compact": Way("`compact`", ours("compact")),
    "resume-async": Way("`resume`, in the background", ours("resume", async_save=True)),
    "compact-async": Way("`compact`, in the background", ours("compact", async_save=True)),
    "compact-async-log-none": Way("the same, `log=None`", ours("compact", async_save=True, log=None)),
    "compact-async-guarded": Way("the same, every weight guarded", guarded),
    "none-qat": Way("nothing is saved, QAT with int4", ours(None, qat=INT4), saves=False, ignored=FOLLOWED),
    "compact-async-qat": Way(
        "`compact`, in the background, QAT", ours("compact", async_save=True, qat=INT4), ignored=FOLLOWED
    ),
}


class Text(torch.utils.data.Dataset[Tensor]):
    """Python's documentation, byte for byte."""

    def __init__(self, length: int, count: int) -> None:
        text = "\n".join(pydoc_data.topics.topics.values()).encode()
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._length, self._count = length, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        start = (index * 7919 * self._length) % (len(self._bytes) - self._length)
        return self._bytes[start : start + self._length]


class Model(pl.LightningModule):
    """GPT-2 as transformers builds it, without dropout."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        self.gpt = GPT2LMHeadModel(config)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.gpt(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(pl.Callback):
    """Notes when each batch starts on the stream that trains, and when each training step returns."""

    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.ends: dict[int, float] = {}
        """Host time at the end of each training step, before anything is saved, by the count of steps."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if pl_module.device.type == "cuda":
            self.starts.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)))
        else:
            self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.ends[trainer.global_step] = time.perf_counter()

    def seconds(self) -> list[float]:
        """Return what each step took until the next one began; one fewer than there were steps."""
        if not torch.cuda.is_available() or isinstance(self.starts[0], float):
            return [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.starts, self.starts[1:], strict=False)]


@dataclass
class Result:
    """What one way costs; seconds and bytes, None where nothing is saved."""

    way: str
    model: str
    machine: str
    parameters: int
    every: int
    step: float
    saves: list[float] | None
    """What each step with a save takes more, the first one first."""
    after: float | None
    complete: float | None
    size: int | None
    device_memory: int | None
    host_memory: int


def measure(name: str, arguments: argparse.Namespace) -> Result:
    """Train with one way to save, in this process."""
    way = WAYS[name]
    layers, width, heads, batch, length = SIZES[arguments.model]
    steps = arguments.every * (arguments.saves + 1) + (way.ignored if way.ignored > IGNORED else 0)
    model, clock = Model(layers, width, heads, length), Clock()
    folder = arguments.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    if way.label.startswith(("`", "the same")):
        sys.addaudithook(_note_durable)
    saving = [ModelCheckpoint(folder, every_n_train_steps=arguments.every, save_top_k=1)] if way.saves else []
    trainer = pl.Trainer(
        accelerator=arguments.device,
        devices=1,
        precision="bf16-mixed" if arguments.device == "cuda" else "32-true",
        max_steps=steps,
        callbacks=[clock, *way.callbacks(), *saving],
        plugins=way.plugins(),
        logger=CSVLogger(folder / "log", flush_logs_every_n_steps=1000),
        log_every_n_steps=10,
        enable_checkpointing=way.saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    data = DataLoader(Text(length, batch * steps), batch_size=batch)
    trainer.fit(model, data)
    took = clock.seconds()
    starts = {str(path): when for path, when in _saved(clock, arguments.every)}
    saved = [i for i in range(len(took)) if way.saves and (i + 1) % arguments.every == 0]
    near = {i + k for i in saved for k in range(AFTER + 1)}
    saved = [i for i in saved if i >= way.ignored or i == saved[0]]
    step = statistics.median(each for i, each in enumerate(took) if i >= way.ignored and i not in near)
    after = [sum(took[i + 1 : i + 1 + AFTER]) - AFTER * step for i in saved[1:] if i + AFTER < len(took)]
    waits = list(_completion(starts))
    files = [each for each in folder.iterdir() if each.name != "log"] if way.saves else []
    size = _size(files[-1]) if files else None
    result = Result(
        way=name,
        model=arguments.model,
        machine=_machine(arguments.device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        every=arguments.every,
        step=step,
        saves=[took[i] - step for i in saved] if way.saves else None,
        after=statistics.median(after) if after else None,
        complete=statistics.median(waits[1:] or waits) if waits else None,
        size=size,
        device_memory=torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
        host_memory=_host_peak(),
    )
    shutil.rmtree(folder)
    return result


def _note_durable(event: str, details: tuple[Any, ...]) -> None:
    if event == "q8lightning.save" and details[0] == "durable":
        COMPLETE.append((str(details[1]), time.perf_counter()))


def _saved(clock: Clock, every: int) -> Iterator[tuple[str, float]]:
    """Yield the step in the name of each file, and when its training step ended."""
    for step, when in clock.ends.items():
        if step % every == 0:
            yield f"step={step}.ckpt", when


def _completion(starts: dict[str, float]) -> Iterator[float]:
    for path, when in COMPLETE:
        for name, start in starts.items():
            if path.endswith(name):
                yield when - start


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _host_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _machine(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}"


def show(results: list[Result]) -> None:
    """Print a table in Markdown."""
    first = results[0]
    print(
        f"{first.model}: {first.parameters:,} parameters, {first.machine}, a save every {first.every} steps,"
        f" {len(next(each.saves for each in results if each.saves))} saves\n"
    )
    headings = "saving with", "step", "a save: median (worst)", "the first save", "the 5 steps after"
    headings += "complete after", "file", "GPU memory", "host memory"
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    bases = {each.way: each for each in results}
    for each in results:
        base = bases.get("none-qat" if each.way.endswith("qat") else "none")

        def more(value: int | None, of: int | None) -> str:
            return "" if value is None or of is None else f"{(value - of) / 1e9:+.2f} GB"

        cells = [WAYS[each.way].label, f"{each.step * 1e3:.1f} ms"]
        if each.saves is None:
            cells += [""] * 7
        else:
            later = each.saves[1:] or each.saves
            cells += [
                f"{statistics.median(later) * 1e3:+,.1f} ms ({max(later) * 1e3:+,.1f})",
                f"{each.saves[0] * 1e3:+,.0f} ms",
                "" if each.after is None else f"{each.after * 1e3:+,.1f} ms",
                "" if each.complete is None else f"{each.complete:.2f} s",
                "" if each.size is None else f"{each.size / 1e6:,.0f} MB",
                more(each.device_memory, base and base.device_memory),
                more(each.host_memory, base and base.host_memory),
            ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medium", choices=SIZES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--every", type=int, default=20, help="steps between saves")
    parser.add_argument("--saves", type=int, default=5, help="how many, the first one included")
    parser.add_argument("--only", default=",".join(WAYS), help="ways to save, with commas: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/trainer"), help="where files go, and are removed")
    parser.add_argument("--output", type=Path, help="append results to this file")
    parser.add_argument("--table", type=Path, help="print the table of such a file and end")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.table:
        show([Result(**json.loads(line)) for line in arguments.table.read_text().splitlines()])
        return
    if arguments.run:
        print(json.dumps(asdict(measure(arguments.run, arguments))))
        return
    if arguments.every < 2 * AFTER:
        parser.error(f"--every is at least {2 * AFTER}, so that steps without a save are left to compare with")
    names = arguments.only.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"no such way: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    results = []
    for name in names:
        command = [sys.executable, __file__, "--run", name, "--model", arguments.model, "--device", arguments.device]
        command += ["--every", str(arguments.every), "--saves", str(arguments.saves)]
        command += ["--folder", str(arguments.folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        line = done.stdout.splitlines()[-1]
        results.append(Result(**json.loads(line)))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\n")
    show(results)


if __name__ == "__main__":
    main()
