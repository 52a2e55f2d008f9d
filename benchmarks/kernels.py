"""How close the Triton kernels come to the memory's speed, beside other implementations, on one GPU.

    python benchmarks/kernels.py [--numel 2**28] [--out results.md] [--only quantize]

A row's bytes count each input and output once; its fraction is of a device-to-device copy's bytes per second in the
same run. Times are medians of CUDA-event timings. Every result of ours is compared with the reference, bit for bit, on
the first 2**20 elements before it is timed.
"""

import argparse
import importlib
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from q8lightning.quantization import ops, reference
from q8lightning.quantization.codebook import get_codebook

SAMPLE = 2**20


@dataclass
class Row:
    """One measured function: what it is, whose, on what, and how many bytes it must move."""

    kernel: str
    whose: str
    dtype: torch.dtype
    block: int
    bytes: float
    run: Callable[[], object]
    milliseconds: float = 0.0


def median_ms(run: Callable[[], object], repeats: int = 25) -> float:
    for _ in range(3):
        run()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:  # no synchronization in between: the host runs ahead and its overhead does not count
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def check(name: str, ours: object, theirs: object) -> None:
    ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
    for one, two in zip(ours, theirs, strict=True):
        if not torch.equal(one, two):
            raise AssertionError(f"{name} differs from the reference in {int((one != two).sum())} elements")


def our_rows(x: Tensor, block: int) -> list[Row]:
    n, size, blocks = x.numel(), x.element_size(), x.numel() / block
    sample = x[:SAMPLE]
    rows = []

    def add(kernel: str, moved: float, run: Callable[[Tensor], object], expected: Callable[[Tensor], object]) -> None:
        check(f"{kernel}, {x.dtype}, block {block}", run(sample), expected(sample))
        rows.append(Row(kernel, "ours", x.dtype, block, moved, lambda: run(x)))

    for name in ("linear", "softsign", "dynamic", "normal_float4"):
        book = get_codebook(name)
        add(
            f"quantize {name}",
            n * (size + 1) + 4 * blocks,
            lambda t, name=name: ops.quantize(t, name, block),
            lambda t, book=book: reference.quantize(t, book, block),
        )
        codes, scale = ops.quantize(x, name, block)
        run = lambda c, s, name=name: ops.dequantize(c, s, name, block, x.dtype)  # noqa: E731
        check(
            f"dequantize {name}",
            run(codes[:SAMPLE], scale[: SAMPLE // block]),
            reference.dequantize(codes[:SAMPLE], scale[: SAMPLE // block], book, block, x.dtype),
        )
        moved = n * (size + 1) + 4 * blocks
        both = lambda run=run, codes=codes, scale=scale: run(codes, scale)  # noqa: E731
        rows.append(Row(f"dequantize {name}", "ours", x.dtype, block, moved, both))
        if name in ("linear", "dynamic"):
            add(
                f"fake-quantize {name}",
                2 * n * size,
                lambda t, name=name: ops.fake_quantize(t, name, block),
                lambda t, book=book: reference.fake_quantize(t, book, block),
            )
    add(
        "quantize linear + residual",
        n * (size + 2) + 4 * blocks,
        lambda t: ops.quantize_residual(t, block),
        lambda t: reference.quantize_residual(t, block),
    )
    residual = ops.quantize_residual(x, block)
    rows.append(
        Row(
            "dequantize linear + residual",
            "ours",
            x.dtype,
            block,
            n * (size + 2) + 4 * blocks,
            lambda: ops.dequantize_residual(*residual, block, x.dtype),
        )
    )
    squares = x.float().square().to(x.dtype)
    sample = squares[:SAMPLE]
    check("quantize log", ops.quantize_log(sample, block), reference.quantize_log(sample, block))
    moved = n * (size + 1) + 8 * blocks
    rows.append(Row("quantize log", "ours", x.dtype, block, moved, lambda: ops.quantize_log(squares, block)))
    log = ops.quantize_log(squares, block)
    run_log = lambda: ops.dequantize_log(*log, block, x.dtype)  # noqa: E731
    rows.append(Row("dequantize log", "ours", x.dtype, block, moved, run_log))
    add(
        "quantize affine",
        n * (size + 1) + 5 * blocks,
        lambda t: ops.quantize_affine(t, block),
        lambda t: reference.quantize_affine(t, block),
    )
    affine = ops.quantize_affine(x, block)
    moved = n * (size + 1) + 5 * blocks
    run_affine = lambda: ops.dequantize_affine(*affine, block, x.dtype)  # noqa: E731
    rows.append(Row("dequantize affine", "ours", x.dtype, block, moved, run_affine))
    return rows


def compiled_rows(x: Tensor, block: int) -> list[Row]:
    """``torch.compile`` of the plain expression for the linear codec."""
    n, size, blocks = x.numel(), x.element_size(), x.numel() / block

    @torch.compile
    def quantize(t: Tensor) -> tuple[Tensor, Tensor]:
        rows = t.view(-1, block).float()
        scale = rows.abs().amax(dim=1)
        return ((rows / scale[:, None]) * 127).round().to(torch.int8), scale

    @torch.compile
    def fake_quantize(t: Tensor) -> Tensor:
        rows = t.view(-1, block).float()
        scale = rows.abs().amax(dim=1, keepdim=True)
        return (((rows / scale) * 127).round() * (scale / 127)).to(t.dtype).view(-1)

    return [
        Row("quantize linear", "torch.compile", x.dtype, block, n * (size + 1) + 4 * blocks, lambda: quantize(x)),
        Row("fake-quantize linear", "torch.compile", x.dtype, block, 2 * n * size, lambda: fake_quantize(x)),
    ]


def bitsandbytes_rows(x: Tensor, block: int) -> list[Row]:
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        return []
    n, size, blocks = x.numel(), x.element_size(), x.numel() / block
    codes, state = functional.quantize_blockwise(x, blocksize=block)
    moved = n * (size + 1) + 4 * blocks
    return [
        Row(
            "quantize dynamic",
            "bitsandbytes",
            x.dtype,
            block,
            moved,
            lambda: functional.quantize_blockwise(x, blocksize=block),
        ),
        Row(
            "dequantize dynamic",
            "bitsandbytes",
            x.dtype,
            block,
            moved,
            lambda: functional.dequantize_blockwise(codes, state),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=2**28)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 256, 2048])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose kernel contains this")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(arguments.numel, device="cuda").to(dtype)
        target = torch.empty_like(x)
        copy_ms = median_ms(lambda target=target, x=x: target.copy_(x))
        bandwidth = 2 * x.nbytes / copy_ms
        lines.append({"kernel": "copy", "whose": "torch", "dtype": str(dtype), "ms": copy_ms, "fraction": 1.0})
        for block in arguments.blocks:
            for make in (our_rows, compiled_rows, bitsandbytes_rows):
                for row in make(x, block):
                    if arguments.only in row.kernel:
                        row.milliseconds = median_ms(row.run)
                        fraction = row.bytes / row.milliseconds / bandwidth
                        lines.append(
                            {
                                "kernel": row.kernel,
                                "whose": row.whose,
                                "dtype": str(dtype).removeprefix("torch."),
                                "block": block,
                                "ms": row.milliseconds,
                                "GB/s": row.bytes / row.milliseconds / 1e6,
                                "fraction": fraction,
                            }
                        )
                torch.cuda.empty_cache()
        print(f"{dtype}: copy {bandwidth / 1e9:.3f} TB/s", flush=True)
    report(lines, arguments)


def report(lines: list[dict], arguments: argparse.Namespace) -> None:
    """Print one row a kernel, implementation and dtype, with the fraction of the copy at each block size."""
    device = torch.cuda.get_device_name()
    triton = importlib.import_module("triton").__version__
    title = f"{device}, torch {torch.__version__}, triton {triton}, Python {platform.python_version()}"
    header = ["kernel", "whose", "dtype", *(f"block {block}" for block in arguments.blocks)]
    table = [title, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    keys = dict.fromkeys((line["kernel"], line["whose"], line["dtype"]) for line in lines if "block" in line)
    for kernel, whose, dtype in keys:
        cells = []
        for block in arguments.blocks:
            match = [
                line
                for line in lines
                if (line["kernel"], line["whose"], line["dtype"], line.get("block")) == (kernel, whose, dtype, block)
            ]
            cells.append(f"{match[0]['fraction']:.2f} ({match[0]['ms']:.3f} ms)" if match else "")
        table.append("| " + " | ".join([kernel, whose, dtype, *cells]) + " |")
    print("\n".join(table))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(table) + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
