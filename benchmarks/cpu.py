"""How fast the codecs are on CPU tensors, beside bitsandbytes' CPU kernels for its dynamic map.

    python benchmarks/cpu.py [--threads 2] [--numel 2**24] [--repeats 9] [--chunk]

    python benchmarks/cpu.py --save [--numel 131072]

Prints million values a second, medians over rounds in which every row is timed once, so that all rows see the same
machine. Every codec is compared with the reference before it is timed. ``--chunk`` compares chunk sizes instead.
``--save`` prints what a save does with tensors of this size, 10 million values together, in microseconds a tensor and
nanoseconds of a thread a value, the least of the rounds: encode, with what is lost measured in a sample, and in whole.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import EncodePlan, measure
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook

console = Console(width=100)
CUSTOM = [-1.0, -0.7, -0.11, -0.1, 0.0, 0.05, 0.3, 0.31, 0.9, 1.0]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def codecs(x: torch.Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return, for each row, a function that quantizes ``x`` and one that dequantizes what came out."""
    rows = {}
    for name in ("linear", "softsign", "dynamic", "normal_float4", "fp8_e4m3", "custom, 10 levels"):
        book = get_codebook(CUSTOM if name.startswith("custom") else name)
        codes, scale = cpu.quantize(x, book, 256)
        sample = x[:100_003]
        for ours, theirs in zip(cpu.quantize(sample, book, 256), reference.quantize(sample, book, 256), strict=True):
            assert torch.equal(ours, theirs), name
        rows[f"{name}, block 256"] = (
            lambda book=book: cpu.quantize(x, book, 256),
            lambda book=book, codes=codes, scale=scale: cpu.dequantize(codes, scale, book, 256, torch.float32),
        )
    residual = cpu.quantize_residual(x, 256, 8, 8)
    rows["linear + residual, block 256"] = (
        lambda: cpu.quantize_residual(x, 256, 8, 8),
        lambda: cpu.dequantize_residual(*residual, 256, 8, 8, torch.float32),
    )
    squares = x.square()
    log = cpu.quantize_log(squares, 128, 8)
    assert torch.equal(
        cpu.quantize_log(squares[:100_003], 128, 8)[0], reference.quantize_log(squares[:100_003], 128, 8)[0]
    )
    rows["log, block 128"] = (
        lambda: cpu.quantize_log(squares, 128, 8),
        lambda: cpu.dequantize_log(*log, 128, 8, torch.float32),
    )
    affine = cpu.quantize_affine(x, 256)
    rows["affine (zero-point), block 256"] = (
        lambda: cpu.quantize_affine(x, 256),
        lambda: cpu.dequantize_affine(*affine, 256, torch.float32),
    )
    return rows


def competitor(x: torch.Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    try:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
    except ImportError:
        console.print("bitsandbytes is not installed (pip install bitsandbytes): no comparison")
        return {}
    codes, state = quantize_blockwise(x, blocksize=256)
    return {
        "bitsandbytes dynamic, block 256": (
            lambda: quantize_blockwise(x, blocksize=256),
            lambda: dequantize_blockwise(codes, state),
        )
    }


def speeds(x: torch.Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """Return million values a second of (quantize, dequantize) for each row."""
    rows = competitor(x) | codecs(x)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
    for _ in range(repeats + 1):
        for name, functions in rows.items():
            for record, function in zip(times[name], functions, strict=True):
                record.append(seconds(function))
    millions = x.numel() / 1e6
    return {name: tuple(millions / statistics.median(r[1:]) for r in both) for name, both in times.items()}


def save(numel: int, repeats: int) -> None:
    """Print how long a thread takes to encode and measure tensors as a save does."""
    count = max(1, 10_000_000 // numel)
    x = [torch.randn(numel, generator=torch.Generator().manual_seed(i)) * 1e-3 for i in range(count)]
    second = [each.square() for each in x]
    table = Table(title=f"{count} tensors of {numel:,} float32 values, one thread, torch {torch.__version__}")
    for column in ("codec", "encode", "and measure a sample", "and measure in whole"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for codec in (
        get_codec("linear", 256),
        get_codec("softsign", 128),
        get_codec("linear", 128, residual_bits=8),
        get_codec("log", 128),
    ):
        tensors = second if codec.unsigned else x
        packing = EncodePlan(tensors, [codec] * count)
        packed = packing.encode(tensors)

        def whole(tensors: list[torch.Tensor] = tensors, packing: EncodePlan = packing, codec: Codec = codec) -> None:
            for values, data in zip(tensors, packing.encode(tensors).data, strict=True):
                measure(values, codec, data)

        ways = (partial(packing.encode, tensors), partial(packing.encode, tensors, measure=True), whole)
        least = [min(thread_seconds(way) for _ in range(repeats + 1)) for way in ways]
        table.add_row(
            f"{codec.label}, block {codec.block_size}",
            *(f"{t / count * 1e6:.0f} us, {t / count / numel * 1e9:.2f} ns" for t in least),
        )
        assert not packed.failed.any()
    console.print(table)


def thread_seconds(function: Callable[[], object]) -> float:
    """Return how long this thread computed; whoever else uses the processor counts less."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--numel", type=int, default=2**24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--chunk", action="store_true", help="compare chunk sizes")
    parser.add_argument("--save", action="store_true", help="time what a save does, in one thread")
    arguments = parser.parse_args()
    if arguments.save:
        torch.set_num_threads(1)
        save(arguments.numel, arguments.repeats)
        return
    torch.set_num_threads(arguments.threads)
    x = torch.randn(arguments.numel, generator=torch.Generator().manual_seed(0))

    results = {}
    for exponent in range(15, 21) if arguments.chunk else [None]:
        if exponent is not None:
            cpu.CHUNK = cpu.SHARED_CHUNK = 2**exponent
        results[exponent] = speeds(x, arguments.repeats)

    table = Table(
        title=f"{arguments.numel:,} float32 values, {arguments.threads} threads, torch {torch.__version__},"
        f" {platform.processor() or platform.machine()}; million values a second",
        width=100,
    )
    table.add_column("codec")
    for exponent in results:
        label = "" if exponent is None else f"2^{exponent} "
        table.add_column(f"{label}quantize", justify="right")
        table.add_column(f"{label}dequantize", justify="right")
    base = results[None].get("bitsandbytes dynamic, block 256") if None in results else None
    for name in next(iter(results.values())):
        cells = []
        for result in results.values():
            for column, speed in enumerate(result[name]):
                ratio = f"  ({speed / base[column]:.2f}x)" if base else ""
                cells.append(f"{speed:.0f}{ratio}")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
