"""What quantization-aware training adds to a training step: a GPT in bf16-mixed, eager and compiled, on one GPU.

    python benchmarks/qat.py [--sizes 124M 1B] [--modes eager compiled] [--out results.md]

Every way quantizes the same weights, those of the linear layers in the blocks, to int4 in blocks of 64:

- float: none
- ours: engaged before forward, released before the optimizer's step, as the callback does it
- ours, weights and activations: what those layers receive as well, to 8 bits a token
- autograd: a module swap whose forward calls the same kernel through a straight-through autograd operator
- torchao, and torchao weights and activations: its QAT for the same bits (`pip install torchao`)

A step is forward, backward, gradient clipping and a fused AdamW. Times are medians of CUDA-event timings of single
steps. Each way is timed against float in rounds, first one, then the other, in alternating order, so that a drift of
the clock hits both alike. Memory is the peak of a step, masters included, above that of float.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from char_lm import GPT

from q8lightning import ActivationRule, QATConfig, WeightRule, fake_quantize
from q8lightning.qat.fake_quantizer import FakeQuantizer

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
    "float": use_nothing,
    "ours": use_ours,
    "autograd": use_autograd,
    "torchao": use_torchao,
    "ours, weights and activations": use_ours_with_activations,
    "torchao, weights and activations": lambda model: use_torchao(model, activations=True),
}


class Training:
    """One model, trained in one way, a step at a time."""

    def __init__(self, size: str, way: str, compiled: bool, batch: int, context: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        model = GPT(context=context, **SIZES[size]).to(device)
        self.parameters = list(model.parameters())
        self.before, self.after = WAYS[way](model)
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


def measure(size: str, compiled: bool, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a way; only its model and the float one are alive at a time."""
    rows = []
    for way in arguments.ways:
        try:
            torch._dynamo.reset()
            row = compare(size, way, compiled, arguments)
        except ImportError as error:
            print(f"{way}: left out, {error}")
            continue
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def compare(size: str, way: str, compiled: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one way and float alternately, so that both see the same clock."""
    names = ["float", way] if way != "float" else ["float"]
    options = (compiled, arguments.batch, arguments.context, arguments.device)
    trainings, peaks = {}, {}
    for name in names:
        trainings[name] = Training(size, name, *options)
        for _ in range(arguments.warm_up):
            trainings[name].step()
        peaks[name] = peak_of(trainings[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(arguments.rounds):
        for name in names if index % 2 else reversed(names):
            times[name] += [trainings[name].milliseconds() for _ in range(arguments.steps)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    quarters = statistics.quantiles(times[way], n=4)
    return {
        "size": size,
        "mode": "compiled" if compiled else "eager",
        "way": way,
        "ms": medians[way],
        "spread_ms": quarters[2] - quarters[0],
        "float_ms": medians["float"],
        "added": medians[way] / medians["float"] - 1,
        "memory_GB": (peaks[way] - peaks["float"]) / 1e9,
    }


def peak_of(training: Training) -> float:
    """Return the peak memory of a step: what it allocates, and the masters, which are held between steps."""
    if training.device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.step()
    torch.cuda.synchronize()
    quantizer = getattr(training.before, "__self__", None)
    masters = sum(weight.parameter.nbytes for weight in quantizer.weights) if quantizer is not None else 0
    return torch.cuda.max_memory_allocated() - before + masters


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
    lines = [
        f"{device}, torch {torch.__version__}, {arguments.batch} x {arguments.context} tokens, bf16-mixed",
        "",
        "| size | mode | way | step, ms | added to float | memory above float, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['size']} | {row['mode']} | {row['way']} | {row['ms']:.2f} ± {row['spread_ms']:.2f} |"
            f" {row['added']:+.1%} | {row['memory_GB']:+.2f} |"
        )
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["124M", "1B"], choices=SIZES)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="steps of a way in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows = []
    for size in arguments.sizes:
        for mode in arguments.modes:
            rows += measure(size, mode == "compiled", arguments)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    report(rows, arguments)


if __name__ == "__main__":
    main()
