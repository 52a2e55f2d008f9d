"""Would codes of second moments gain by their near separability over rows and columns of a matrix?

    python benchmarks/separable.py                                  # a CPU, some minutes
    python benchmarks/separable.py --beta2 0.95 --late 400 --width 256 --depth 2 --models GPT

A small GPT and a model of convolutions are trained. Their second moments, early and late, are coded in several ways
(``separating/codecs.py`` has them). For each, a table says

- the error of Adam's update direction, ``exp_avg / (sqrt(exp_avg_sq) + eps)``, for codes of 3 to 6 bits: the root mean
  square over all elements of a kind of tensor, relative to that of the direction;
- the bytes a value with codes of 5 bits, bounds of blocks and profiles in 16 bits each;
- the bits a value that it needs less than blocks do with codes of 5 bits, at the same error;
- the same if a rank holds half of the rows, and codes them alone;
- how many values move when what was decoded is coded again, and once more nine times.

A value that is not zero must not become zero, and an idempotent codec must not move anything: the script fails
otherwise.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from separating.codecs import CODECS, Codec, from_logarithms, logarithms
from separating.states import MODELS, SETTINGS, State, trained

EPSILON = 1e-8
BITS = (3, 4, 5, 6)
COMPARED = 5
GENERATIONS = 10
ALL_BITS = 24
"""Of a parameter under the preset ``resume``, with the bits of its weight and of both moments."""


class Measured:
    """What a codec does to some states, with codes of some bits.

    Attributes:
        error: Of the direction, relative.
        size: Bits a value, with bounds and profiles.
    """

    def __init__(self, states: Sequence[State], codec: Codec, bits: int, block_size: int) -> None:
        lost = total = 0.0
        scale_bits = 0
        for state in states:
            coded = codec.code(logarithms(state.second), bits, block_size)
            decoded = from_logarithms(coded.logs)
            if not torch.equal(decoded == 0, state.second == 0):
                raise SystemExit(f"{codec.name} makes zero of a value that is not zero, or the other way round")
            exact = state.first.double() / (state.second.double().sqrt() + EPSILON)
            lost += float((state.first.double() / (decoded.double().sqrt() + EPSILON) - exact).square().sum())
            total += float(exact.square().sum())
            scale_bits += coded.scale_bits
        self.error = (lost / total) ** 0.5
        self.size = bits + scale_bits / sum(state.second.numel() for state in states)


def saved(curve: Sequence[Measured], reference: Measured) -> float:
    """Return how many bits a value fewer than the reference takes, with the same error, a codec needs.

    Its error is a straight line of logarithms between its bits, and beyond them.
    """
    errors = [math.log2(each.error / reference.error) for each in curve]
    after = next((index for index, error in enumerate(errors) if error <= 0), len(errors) - 1) or 1
    share = errors[after - 1] / (errors[after - 1] - errors[after])
    return reference.size - (curve[after - 1].size + share * (curve[after].size - curve[after - 1].size))


def moved(states: Sequence[State], codec: Codec, block_size: int) -> tuple[float, float]:
    """Return the share of values that a second generation changes, and that ten change."""
    changed = [0, 0]
    for state in states:
        first = now = _again(state.second, codec, block_size)
        for generation in range(1, GENERATIONS):
            now = _again(now, codec, block_size)
            if generation == 1:
                changed[0] += int((now != first).sum())
        changed[1] += int((now != first).sum())
    if codec.idempotent and any(changed):
        raise SystemExit(f"{codec.name} is not idempotent")
    values = sum(state.second.numel() for state in states)
    return changed[0] / values, changed[1] / values


def _again(second: torch.Tensor, codec: Codec, block_size: int) -> torch.Tensor:
    return from_logarithms(codec.code(logarithms(second), COMPARED, block_size).logs)


def halves(states: Sequence[State]) -> list[State]:
    """Return the states as two ranks hold them, each half of the rows."""
    return [
        State(state.kind, first.contiguous(), second.contiguous())
        for state in states
        for first, second in zip(state.first.chunk(2), state.second.chunk(2), strict=True)
    ]


def table(states: Sequence[State], block_size: int) -> tuple[str, dict[str, float]]:
    """Return the table of a kind of tensors, and the bits that each codec saves."""
    columns = [*(f"{bits} bits" for bits in BITS), f"bytes a value, {COMPARED} bits", "bits saved", "in halves"]
    lines = [["codec", *columns, "second generation", "tenth"], ["---"] * (len(columns) + 3)]
    gains = {}
    references = [Measured(each, CODECS[0], COMPARED, block_size) for each in (states, halves(states))]
    for codec in CODECS:
        curve, of_halves = (
            [Measured(each, codec, bits, block_size) for bits in BITS] for each in (states, halves(states))
        )
        gains[codec.name] = saved(curve, references[0])
        cells = [f"{each.error:.2%}" for each in curve]
        cells += [f"{curve[BITS.index(COMPARED)].size / 8:.3f}", f"{gains[codec.name]:+.2f}"]
        cells += [f"{saved(of_halves, references[1]):+.2f}"]
        cells += [f"{share:.1%}" if share else "0" for share in moved(states, codec, block_size)]
        lines.append([codec.name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines), gains


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--early", type=int, default=100, help="steps before the early state")
    parser.add_argument("--late", type=int, default=800, help="steps before the late state")
    parser.add_argument("--width", type=int, default=SETTINGS.width)
    parser.add_argument("--depth", type=int, default=SETTINGS.depth)
    parser.add_argument("--block-size", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    size = {"width": arguments.width, "depth": arguments.depth, "checkpoints": (arguments.early, arguments.late)}
    summary: list[tuple[str, str, float]] = []
    for model in arguments.models:
        for step, states in trained(model, replace(SETTINGS, **size), arguments.beta2):
            for kind in sorted({state.kind for state in states}):
                some = [state for state in states if state.kind == kind]
                values = sum(state.second.numel() for state in some)
                text, gains = table(some, arguments.block_size)
                print(f"### {model}, {kind}, after {step} steps, beta2 {arguments.beta2}: {values:,} values\n")
                print(f"{text}\n", flush=True)
                idempotent = {codec.name: gains[codec.name] for codec in CODECS if codec.idempotent}
                best = max(idempotent, key=lambda name: idempotent[name])
                summary.append((f"{model}, {kind}, {step}", best, idempotent[best]))
    print("### The best idempotent codec\n")
    print("| tensors | codec | bits saved, of 24 a parameter | share |\n| --- | --- | --- | --- |")
    for tensors, name, gain in summary:
        print(f"| {tensors} | {name} | {gain:.2f} | {gain / ALL_BITS:.1%} |")


if __name__ == "__main__":
    main()
