"""What quantization-aware training adds to a training step: a GPT in bf16-mixed, eager and compiled, on one GPU.

    python benchmarks/qat.py --sizes 162M --modes eager                     # all ways, about a minute
    python benchmarks/qat.py --sizes 162M --modes compiled --only ours torchao --records qat.jsonl
    python benchmarks/qat.py --sizes 1B --modes eager --only ours --records qat.jsonl
    python benchmarks/qat.py --render --records qat.jsonl --output qat.md   # one table of several runs

Every way quantizes the same weights, those of the linear layers in the blocks, to int4 in blocks of 64:

- ours: engaged before forward, released before the optimizer's step, as the callback does it
- ours-activations: what those layers receive as well, to 8 bits a token
- autograd: a module swap whose forward calls the same kernel through a straight-through autograd operator
- torchao and torchao-activations: its QAT for the same bits, where it is installed (`pip install torchao`)

A step is forward, backward, gradient clipping and a fused AdamW. Times are medians of CUDA-event timings of single
steps. Each way is timed against float in rounds, first one, then the other, in alternating order, so that a drift of
the clock hits both alike. Memory is the peak of a step, what is held between steps for QAT included, above that of
float. Compiling takes most of the time of the compiled mode.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from char_lm import GPT

from q8lightning import ActivationRule, QATConfig, WeightRule, fake_quantize
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer

SIZES = {
    "tiny": {"vocabulary": 128, "width": 128, "depth": 2, "heads": 2},
    "124M": {"vocabulary": 50304, "width": 768, "depth": 12, "heads": 12},
    "162M": {"vocabulary": 50304, "width": 768, "depth": 17, "heads": 12},
    "1B": {"vocabulary": 50304, "width": 2048, "depth": 18, "heads": 16},
}
WEIGHTS = WeightRule("blocks.*.weight", "int4", 64)
ACTIVATIONS = [ActivationRule(f"blocks.*.{name}") for name in ("qkv", "project", "feed_forward.0", "feed_forward.2")]

Around = tuple[Callable[[], object], Callable[[], object]]
"""What runs before forward and after backward."""


def nothing() -> None:
    pass


def use_nothing(model: nn.Module) -> Around:
    return nothing, nothing


def use_ours(model: nn.Module) -> Around:
    quantizer = FakeQuantizer(model, QATConfig([WEIGHTS]))
    return quantizer.engage, quantizer.release


def use_ours_with_activations(model: nn.Module) -> Around:
    quantizer = FakeQuantizer(model, QATConfig([WEIGHTS], activations=ACTIVATIONS))
    return quantizer.engage, quantizer.release


class StraightThroughLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, fake_quantize(self.weight, "int4", 64), self.bias)


def use_autograd(model: nn.Module) -> Around:
    for module in model.blocks.modules():
        if type(module) is nn.Linear:
            module.__class__ = StraightThroughLinear
    return nothing, nothing


def use_torchao(model: nn.Module, activations: bool = False) -> Around:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weights = IntxFakeQuantizeConfig(torch.int4, group_size=64, is_symmetric=True)
    receives = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    quantize_(model.blocks, QATConfig(activation_config=receives, weight_config=weights, step="prepare"))
    return nothing, nothing


WAYS: dict[str, Callable[[nn.Module], Around]] = {
    "ours": use_ours,
    "autograd": use_autograd,
    "torchao": use_torchao,
    "ours-activations": use_ours_with_activations,
    "torchao-activations": lambda model: use_torchao(model, activations=True),
}


class Training:
    """One model, trained in one way, a step at a time."""

    def __init__(self, size: str, way: str, compiled: bool, batch: int, context: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        model = GPT(context=context, **SIZES[size]).to(device)
        self.parameters = list(model.parameters())
        self.before, self.after = WAYS.get(way, use_nothing)(model)
        self.model = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.batch = torch.randint(SIZES[size]["vocabulary"], (batch, context + 1), device=device)

    def step(self) -> None:
        self.before()
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(self.batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), self.batch[:, 1:].flatten())
        loss.backward()
        self.after()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def milliseconds(self) -> float:
        if self.device == "cpu":
            started = time.perf_counter()
            self.step()
            return 1000 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def measure(size: str, compiled: bool, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row a way; only its model and the float one are alive at a time."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # each way is another model of the same code
    options = (compiled, arguments.batch, arguments.context, arguments.device)
    reference = Training(size, "float", *options)
    reference_peak = warm_up(reference, arguments)
    for way in arguments.only:
        try:
            training = Training(size, way, *options)
        except (ImportError, TypeError, AttributeError) as error:  # another version of torchao
            print(f"{way} is left out: {error!r}")
            continue
        peak = warm_up(training, arguments)
        float_times, times = compare(reference, training, arguments)
        quarters = statistics.quantiles(times, n=4)
        median, float_median = statistics.median(times), statistics.median(float_times)
        yield {
            "environment": environment(arguments),
            "size": size,
            "mode": "compiled" if compiled else "eager",
            "way": way,
            "ms": median,
            "spread_ms": quarters[2] - quarters[0],
            "float_ms": float_median,
            "added": median / float_median - 1,
            "memory_GB": (peak - reference_peak) / 1e9,
        }
        del training


def warm_up(training: Training, arguments: argparse.Namespace) -> float:
    """Run some steps, which compile, and return the peak memory of the next."""
    for _ in range(arguments.warm_up):
        training.step()
    return peak_of(training)


def compare(one: Training, other: Training, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Time two trainings alternately, so that both see the same clock."""
    times: tuple[list[float], list[float]] = [], []
    for index in range(arguments.rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            training = (one, other)[which]
            training.step()  # the first after the other one's is slower
            times[which].extend(training.milliseconds() for _ in range(arguments.steps))
    return times


def environment(arguments: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    return f"{device}, torch {torch.__version__}, {arguments.batch} x {arguments.context} tokens, bf16-mixed"


def peak_of(training: Training) -> float:
    """Return the peak memory of a step: what it allocates, and the quantized values, which are held between steps."""
    if training.device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.step()
    torch.cuda.synchronize()
    quantizer = getattr(training.before, "__self__", None)
    held = sum(weight.parameter.nbytes for weight in quantizer.weights) if quantizer is not None else 0
    return torch.cuda.max_memory_allocated() - before + held


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as tables in Markdown, one for each environment; the last of several equal ones counts."""
    lines = []
    for place in dict.fromkeys(row["environment"] for row in rows):
        lines += [place, "", "| size | mode | way | float, ms | step, ms | added | memory above float, GB |"]
        lines.append("|---|---|---|---|---|---|---|")
        last = {(row["size"], row["mode"], row["way"]): row for row in rows if row["environment"] == place}
        order = {name: i for i, name in enumerate([*SIZES, "eager", "compiled", *WAYS])}
        for key in sorted(last, key=lambda key: [order[part] for part in key]):
            row = last[key]
            lines.append(
                f"| {' | '.join(key)} | {row['float_ms']:.2f} | {row['ms']:.2f} ± {row['spread_ms']:.2f} |"
                f" {row['added']:+.2%} | {row['memory_GB']:+.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["124M", "162M", "1B"], choices=SIZES)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a way in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--records", type=Path, help="a file of JSON lines, which grows by a line for each way")
    parser.add_argument("--render", action="store_true", help="measure nothing, make the table of the records")
    parser.add_argument("--output", type=Path, help="where the table goes, besides the screen")
    arguments = parser.parse_args()
    if arguments.render and arguments.records is None:
        parser.error("--render makes a table of --records, which are missing")
    if importlib.util.find_spec("torchao") is None:
        arguments.only = [way for way in arguments.only if not way.startswith("torchao")]
        print("torchao is not installed: its rows are left out")
    torch.set_float32_matmul_precision("high")
    rows: list[dict[str, Any]] = []
    for size, mode in product(arguments.sizes, arguments.modes) if not arguments.render else ():
        for row in measure(size, mode == "compiled", arguments):
            print(json.dumps(row), flush=True)
            rows.append(row)
            if arguments.records is not None:
                with arguments.records.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if arguments.records is not None:
        rows = [json.loads(line) for line in arguments.records.read_text().splitlines()]
    print(table(rows))
    if arguments.output is not None:
        arguments.output.write_text(table(rows))


if __name__ == "__main__":
    main()
