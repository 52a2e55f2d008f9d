"""The demo: train a small language model, save one state plain and with each preset, resume from each, and compare.

    python examples/train_char_lm.py                             # tables
    python examples/train_char_lm.py --picture docs/demo.png     # and the picture of the README

What a user adds to a training script is the import and the callback in ``train``; the rest of this file looks at the
files that come out.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from char_lm import CharLM, PythonDocs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.progress import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from q8lightning import QuantizationCallback, QuantizedCheckpointIO, QuantizedTensor, keep_encoded
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.quantization.spec.reference import ErrorStatistics, error_statistics

KINDS = ("weights", "exp_avg", "exp_avg_sq")
console = Console(width=100)


class Losses(pl.Callback):
    """Keeps the loss of every training step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


class Bar(ProgressBar):
    """Counts the steps of this fit. Lightning's bars count the batches of an epoch, also those before a resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = trainer.global_step
        figures = TextColumn("step"), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}")
        self.bar = Progress(BarColumn(), *figures, console=console)
        self.task = self.bar.add_task("", total=trainer.max_steps - self.first, loss="")
        self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = f"loss {float(outputs['loss']):.3f}"
        self.bar.update(self.task, completed=trainer.global_step - self.first, loss=loss)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.bar.stop()


def trainer(steps: int, folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, Bar()] if options.get("enable_progress_bar", True) else list(callbacks),
        default_root_dir=folder,
        logger=False,
        accelerator="auto",
        devices=1,
        enable_model_summary=False,
        **options,
    )


def train(data: PythonDocs, steps: int, folder: Path) -> pl.Trainer:
    """Train with the callback; every checkpoint of this run is quantized."""
    pl.seed_everything(1)
    checkpoints = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=max(steps // 3, 1), save_top_k=-1)
    run = trainer(steps, folder, checkpoints, QuantizationCallback())
    run.fit(CharLM(decay_steps=2 * steps), data)
    return run


def save_each_way(run: pl.Trainer, folder: Path) -> dict[str, Path]:
    """Save the state that ``run`` ended with: as Lightning does, and with each preset."""
    plain = run.strategy.checkpoint_io.base
    ways = {"plain": plain} | {name: QuantizedCheckpointIO(plain, name) for name in PRESETS}
    paths = {}
    for name, checkpoint_io in ways.items():
        run.strategy.checkpoint_io = checkpoint_io
        paths[name] = folder / f"{name}.ckpt"
        run.save_checkpoint(paths[name])
    return dict(sorted(paths.items(), key=lambda item: -item[1].stat().st_size))


def resume(data: PythonDocs, path: Path, steps: int, folder: Path) -> list[float]:
    """Go on from a checkpoint for ``steps`` steps and return their losses."""
    pl.seed_everything(2)
    losses = Losses()
    start = torch.load(path, weights_only=True)["global_step"]
    run = trainer(start + steps, folder, losses, enable_checkpointing=False)
    run.fit(CharLM(decay_steps=2 * start), data, ckpt_path=path)
    return losses.values


def validate(data: PythonDocs, path: Path, folder: Path) -> float:
    """Return the validation loss of the model that ``load_from_checkpoint`` gives."""
    model = CharLM.load_from_checkpoint(path, map_location="cpu")
    run = trainer(1, folder, enable_progress_bar=False, enable_checkpointing=False)
    return run.validate(model, data, verbose=False)[0]["val_loss"]


def tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield kind, name and value of the weights and of the optimizer's moments."""
    for name, value in checkpoint["state_dict"].items():
        yield "weights", name, value
    for index, state in checkpoint["optimizer_states"][0]["state"].items():
        for kind in KINDS[1:]:
            yield kind, str(index), state[kind]


def sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each kind of tensor in a file, tied ones counted once, and of the whole file."""
    with keep_encoded():
        checkpoint = torch.load(path, weights_only=True)
    result: dict[str, int] = defaultdict(int)
    seen = set()
    for kind, _, value in tensors(checkpoint):
        identity = id(value) if isinstance(value, QuantizedTensor) else value.data_ptr()
        result[kind] += 0 if identity in seen else value.nbytes
        seen.add(identity)
    result["whole file"] = path.stat().st_size
    result["everything else"] = result["whole file"] - sum(result[kind] for kind in KINDS)
    return result


def errors(path: Path, plain: Path) -> dict[str, tuple[float, float]]:
    """Return the relative error and the SQNR (dB) of each kind of tensor, and of the update direction they imply."""
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, plain))
    statistics: dict[str, list[ErrorStatistics]] = defaultdict(list)
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    for (kind, _, decoded), (_, _, original) in pairs:
        statistics[kind].append(error_statistics(original, decoded))
    states = zip(*(checkpoint["optimizer_states"][0]["state"].values() for checkpoint in (ours, theirs)), strict=True)
    for decoded, original in states:
        statistics["update direction"].append(error_statistics(direction(original), direction(decoded)))
    result = {}
    for kind, parts in statistics.items():
        share = sum(part.squared_error for part in parts) / sum(part.squares for part in parts)
        result[kind] = (float(share.sqrt()), float(-10 * share.log10()))
    return result


def direction(state: dict[str, Tensor]) -> Tensor:
    """Return where Adam would step: exp_avg / (sqrt(exp_avg_sq) + eps)."""
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)


def gaps(losses: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Return how far the losses after a resume are from those after a resume from the plain file: RMS and largest."""
    result = {}
    for name, values in losses.items():
        gap = torch.tensor(values, dtype=torch.float64) - torch.tensor(losses["plain"], dtype=torch.float64)
        result[name] = float(gap.square().mean().sqrt()), float(gap.abs().max())
    return result


def report(
    paths: dict[str, Path],
    size: dict[str, dict[str, int]],
    losses: dict[str, list[float]],
    validation: dict[str, float],
) -> None:
    plain = paths["plain"]
    parameters = size["plain"]["weights"] // 4
    table = Table(
        title=f"\nOne state of {parameters:,} parameters, AdamW, saved plain and with each preset (bytes)", width=100
    )
    table.add_column("")
    for name in paths:
        table.add_column(name if name == "plain" else f'"{name}"', justify="right")
    for kind in (*KINDS, "everything else", "whole file"):
        cells = [f"{size['plain'][kind]:,}"]
        for name in list(paths)[1:]:
            ratio = size["plain"][kind] / size[name][kind]
            cells.append(f"{size[name][kind]:,}  ({ratio:.2f}x)")
        table.add_row(kind, *cells, style="bold" if kind == "whole file" else None, end_section=kind == KINDS[-1])
    table.add_row("bytes a parameter", *(f"{size[name]['whole file'] / parameters:.2f}" for name in paths))
    console.print(table)

    table = Table(title="\nWhat the encoding lost (relative error, SQNR)", width=100)
    table.add_column("")
    for name in list(paths)[1:]:
        table.add_column(f'"{name}"', justify="right")
    lost = {name: errors(path, plain) for name, path in paths.items() if name != "plain"}
    for kind in (*KINDS, "update direction"):
        table.add_row(kind, *(f"{lost[name][kind][0]:.2e}  {lost[name][kind][1]:5.1f} dB" for name in lost))
    console.print(table)

    table = Table(title=f"\nResumed for {len(losses['plain'])} steps on the same batches", width=100)
    for heading in ("resumed from", "last loss", "gap to plain, RMS", "gap, largest", "load_from_checkpoint: val_loss"):
        table.add_column(heading, justify="left" if heading == "resumed from" else "right")
    for name, (rms, largest) in gaps(losses).items():
        table.add_row(name, f"{losses[name][-1]:.5f}", f"{rms:.1e}", f"{largest:.1e}", f"{validation[name]:.5f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450, help="training steps before the state is saved")
    parser.add_argument("--resume-steps", type=int, default=100, help="steps after each resume")
    parser.add_argument("--batch-size", type=int, default=24, help="windows of text in a batch")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where checkpoints go")
    parser.add_argument("--picture", type=Path, help="also draw the tables to this file")
    arguments = parser.parse_args()

    started = time.monotonic()
    console.rule("train with the callback")
    data = PythonDocs(batch_size=arguments.batch_size)
    run = train(data, arguments.steps, arguments.folder)
    paths = save_each_way(run, arguments.folder)
    losses, validation = {}, {}
    for name, path in paths.items():
        console.rule(f"resume from {path}")
        losses[name] = resume(data, path, arguments.resume_steps, arguments.folder)
        validation[name] = validate(data, path, arguments.folder)
    size = {name: sizes(path) for name, path in paths.items()}
    report(paths, size, losses, validation)
    if arguments.picture is not None:
        from demo_picture import draw  # it needs matplotlib, an extra

        draw(arguments.picture, size, losses, {name: rms for name, (rms, _) in gaps(losses).items()})
    console.print(f"\nCheckpoints are in {arguments.folder}. Took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
