"""Does a run that is resumed from a quantized checkpoint go on as if nothing had happened?

    python benchmarks/resume.py --scenario small --output records.jsonl      # a CPU, minutes
    python benchmarks/resume.py --scenario gpt --device cuda:0 --seed 0 --beta2 0.95 --output records.jsonl
    python benchmarks/resume.py --scenario vit --device cuda:0 --output records.jsonl
    python benchmarks/resume.py --scenario small_vit --output records.jsonl  # a CPU; needs timm and scikit-learn
    python benchmarks/resume.py --report records.jsonl --plot docs/fidelity.png

A model is trained, and its state is kept early, in the middle and late. From each of these it goes on several times, on
the same batches: from a plain copy, and from what a file of each variant would bring back. A record says how far the
losses are from those of the plain resume: at the first batch, in the mean, and in the root mean square (RMS). The plain
resume is made again as well. On a GPU its losses differ, too, because sums are added in any order: that is the floor.

States go through the code that saves run, in memory. Each finished resume appends one line to the output, so that a run
that is stopped loses nothing, and several processes can share a file. ``resuming/variants.py`` has the variants.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from resuming.report import draw, tables
from resuming.scenarios import SCENARIOS, Settings
from resuming.training import Checkpoint, Training, copy_of
from resuming.variants import FIRST_OF_ALL, LATER, PLAIN, RESTORED_OFTEN, Stored, Variant, is_wanted, store
from torch import Tensor

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A resume from one of the checkpoints.

    Attributes:
        variant: How the state is stored.
        checkpoint: The step of the checkpoint.
        restores: How often the state is stored and restored, at equal distances; the first time before the first step.
    """

    variant: Variant
    checkpoint: int
    restores: int = 1


def jobs(settings: Settings, only: str | None, often: tuple[int, ...]) -> Iterator[Job]:
    """Yield the resumes, the most important first: all checkpoints before the next variant.

    Those that restore often go on from the middle checkpoint.
    """
    first, later, often_restored = (
        [variant for variant in group if is_wanted(variant, only)] for group in (FIRST_OF_ALL, LATER, RESTORED_OFTEN)
    )
    middle = settings.checkpoints[len(settings.checkpoints) // 2]
    yield from (Job(variant, checkpoint) for variant in first for checkpoint in settings.checkpoints)
    yield from (Job(variant, middle, restores) for restores in often for variant in often_restored)
    yield from (Job(variant, checkpoint) for variant in later for checkpoint in settings.checkpoints)


class Run:
    """One training, and the resumes from its checkpoints.

    Args:
        settings: The scenario's.
        scenario: Its name.
        seed: Of weights and batches.
        beta2: Of AdamW.

    Attributes:
        checkpoints: The states that were kept, by step.
    """

    def __init__(self, settings: Settings, scenario: str, seed: int, beta2: float) -> None:
        torch.manual_seed(seed)
        make, _ = SCENARIOS[scenario]
        self._settings = settings
        self._training = Training(make(settings, seed), settings, beta2)
        self._said = {
            "scenario": scenario,
            "seed": seed,
            "beta2": beta2,
            "parameters": self._training.parameters,
            "machine": machine(settings),
        }
        self.checkpoints: dict[int, Checkpoint] = {}
        self._plain: dict[int, Tensor] = {}

    def train(self) -> None:
        """Train, keep the checkpoints, and resume from each of them plainly."""
        done = 0
        for step in sorted(self._settings.checkpoints):
            self._training.run(done, step - done)
            self.checkpoints[step], done = copy_of(self._training.checkpoint()), step
        for step in self.checkpoints:
            self._plain[step] = self._losses(Job(PLAIN, step))

    def resume(self, job: Job) -> Record:
        """Resume, and compare the losses with those of the plain resume."""
        start = time.perf_counter()
        plain, losses = self._plain[job.checkpoint], self._losses(job)
        stored = store(self.checkpoints[job.checkpoint], job.variant)
        gap = losses - plain
        return {
            **self._said,
            "checkpoint": job.checkpoint,
            "variant": job.variant.name,
            "group": job.variant.group,
            "restores": job.restores,
            "steps": len(gap),
            **_bytes(stored, self._training.parameters),
            "guarded": stored.guarded,
            **{name: _short(stored.metrics[key]) for key, name in LOST.items() if key in stored.metrics},
            "plain_loss": _short(float(plain.mean())),
            "first_batch": _short(float(gap[0])),
            "mean": _short(float(gap.mean())),
            "rms": _short(float(gap.square().mean().sqrt())),
            "largest": _short(float(gap.abs().max())),
            "seconds": round(time.perf_counter() - start, 2),
        }

    def _losses(self, job: Job) -> Tensor:
        steps = self._settings.steps
        self._training.load(self.checkpoints[job.checkpoint])
        return self._training.run(
            job.checkpoint,
            steps,
            restore=lambda checkpoint: store(checkpoint, job.variant).load(),
            every=max(steps // job.restores, 1),
        )


LOST = {
    "weights/relative_error": "weights_error",
    "exp_avg/relative_error": "exp_avg_error",
    "exp_avg_sq/relative_error": "exp_avg_sq_error",
    "update_direction_error": "direction_error",
}
"""What a save measures, and its name in records."""


def _bytes(stored: Stored, parameters: int) -> dict[str, float]:
    return {"bytes_a_parameter": round(stored.nbytes / parameters, 4)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def machine(settings: Settings) -> str:
    """Describe the device and the versions."""
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def measure(arguments: argparse.Namespace) -> None:
    """Run a scenario and append its records."""
    settings = settings_of(arguments)
    if torch.device(settings.device).type == "cuda":
        torch.cuda.set_device(torch.device(settings.device).index or 0)
    end = time.monotonic() + arguments.time_limit
    run = Run(settings, arguments.scenario, arguments.seed, arguments.beta2)
    run.train()
    for job in jobs(settings, arguments.only, arguments.often):
        if time.monotonic() > end:
            print(f"the time limit of {arguments.time_limit:.0f} s is reached; what follows is left out")
            return
        record = run.resume(job)
        with arguments.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        times = f" x{job.restores}" if job.restores > 1 else ""
        figures = f"{record['bytes_a_parameter']:6.3f} B  first {record['first_batch']:+.1e}  RMS {record['rms']:.1e}"
        print(f"{job.checkpoint:5} {job.variant.name + times:36} {figures}  {record['seconds']:.1f} s", flush=True)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the scenario's settings with those that were given."""
    _, settings = SCENARIOS[arguments.scenario]
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--output", type=Path, default=Path("runs/resume.jsonl"), help="where records are appended")
    parser.add_argument("--only", help="variants whose name contains one of these texts, separated by commas")
    parser.add_argument("--often", type=_numbers, default=(10, 100), help="how often presets are restored in a resume")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no resume begins")
    parser.add_argument("--report", type=Path, nargs="+", help="print the tables of records instead")
    parser.add_argument("--plot", type=Path, help="with --report: also draw the frontier")
    flags = parser.add_argument_group("settings, instead of the scenario's")
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            flags.add_argument(name, action=argparse.BooleanOptionalAction)
        else:
            flags.add_argument(name, type=field.type if isinstance(field.type, type) else _numbers)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.report:
        lines = [line for path in arguments.report for line in path.read_text().splitlines()]
        records = [json.loads(line) for line in lines]
        print(tables(records))
        if arguments.plot:
            draw(records, arguments.plot)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    measure(arguments)


if __name__ == "__main__":
    main()
