"""How far each codec moves the direction in which Adam would step, on the state of a real training run.

    make demo                                   # trains the example and writes runs/demo/plain.ckpt
    python benchmarks/fidelity.py [CHECKPOINT]

The direction is exp_avg / (sqrt(exp_avg_sq) + eps); the error is that of one moment encoded while the other is exact,
relative in the root mean square over all parameters. ``log2`` is the log codec with the true logarithm in float64 in
the place of bit pattern and polynomial, and with no finest step.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.spec.reference import to_blocks

EPSILON = 1e-8


def direction(first: Tensor, second: Tensor) -> Tensor:
    return first.double() / (second.double().sqrt() + EPSILON)


def reconstruct(codec: str, block_size: int, x: Tensor) -> Tensor:
    if codec == "log2":
        return true_log2(x, block_size)
    chosen = get_codec(codec, block_size)
    return chosen.decode(chosen.encode(x), torch.float32)


def true_log2(x: Tensor, block_size: int) -> Tensor:
    """Encode at 254 equal steps of log2 between the smallest positive and the largest value of a block, and decode."""
    blocks = to_blocks(x, block_size).double()
    positive = blocks > 0
    high = blocks.amax(dim=1, keepdim=True).clamp(min=1e-300)
    low = torch.where(positive, blocks, torch.inf).amin(dim=1, keepdim=True).clamp(max=high)
    step = ((high / low).log2() / 254).clamp(min=1e-12)
    decoded = low * torch.exp2(((blocks.clamp(min=1e-300) / low).log2() / step).round() * step)
    return torch.where(positive, decoded, 0.0).view(-1)[: x.numel()].view(x.shape)


def error(states: list[dict[str, Tensor]], change: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]) -> float:
    lost = total = 0.0
    for state in states:
        exact = direction(state["exp_avg"], state["exp_avg_sq"])
        lost += float((direction(*change(state)) - exact).square().sum())
        total += float(exact.square().sum())
    return (lost / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path("runs/demo/plain.ckpt"))
    checkpoint = torch.load(parser.parse_args().checkpoint, weights_only=True)
    states = [
        state
        for optimizer in checkpoint["optimizer_states"]
        for state in optimizer["state"].values()
        if state["exp_avg"].numel() >= 4096
    ]
    count = sum(state["exp_avg"].numel() for state in states)
    table = Table(title=f"Error of the update direction, {count:,} parameters", width=96)
    table.add_column("encoded")
    table.add_column("codec")
    sizes = (64, 128, 256, 1024)
    for size in sizes:
        table.add_column(f"block {size}", justify="right")
    for codec in ("softsign", "dynamic", "linear"):
        cells = (
            error(states, lambda s, c=codec, b=size: (reconstruct(c, b, s["exp_avg"]), s["exp_avg_sq"]))
            for size in sizes
        )
        table.add_row("exp_avg", codec, *(f"{cell:.3%}" for cell in cells), end_section=codec == "linear")
    for codec in ("log", "log2", "dynamic_unsigned", "linear"):
        cells = (
            error(states, lambda s, c=codec, b=size: (s["exp_avg"], reconstruct(c, b, s["exp_avg_sq"])))
            for size in sizes
        )
        table.add_row("exp_avg_sq", codec, *(f"{cell:.3%}" for cell in cells))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
