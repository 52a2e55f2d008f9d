"""How close the Triton kernels come to the memory's speed, beside other implementations, on one GPU.

    python benchmarks/kernels.py [--numel 2**28] [--blocks 64 256 2048] [--out results.md] [--only quantize]

A row's bytes count each input and output once; its floor is the time that a device-to-device copy in the same run takes
for so many bytes, and its fraction the floor over its own time. Times are medians of CUDA-event timings. Every result
of ours is compared with the reference, bit for bit, on the first 2**20 elements before it is timed; statistics within
2e-6. The other implementations are in ``contenders.py``, whole states of a model in ``grouped.py``.
"""

import argparse
import importlib
import platform
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import contenders
import torch
from contenders import Row
from torch import Tensor

from q8lightning import fake_quantize
from q8lightning.quantization import ops
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook

SAMPLE = 2**20


def median_ms(run: Callable[[], object], repeats: int = 15) -> float:
    for _ in range(3):
        run()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    torch.cuda._sleep(20_000_000)  # ten milliseconds in which the host runs ahead, so that its overhead does not count
    for start, end in events:
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


def our_rows(x: Tensor, block: int) -> Iterator[Row]:
    n, size, blocks = x.numel(), x.element_size(), x.numel() / block

    def row(kernel: str, moved: float, run: Callable[[], object]) -> Row:
        return Row(kernel, "ours", x.dtype, block, moved, run)

    for name in ("linear", "softsign", "dynamic", "normal_float4"):
        book, moved = get_codebook(name), n * (size + 1) + 4 * blocks
        sample = x[:SAMPLE]
        *parts, _ = ops.quantize(sample, name, block)
        check(f"quantize {name}", tuple(parts), reference.quantize(sample, book, block))
        check(
            f"dequantize {name}",
            ops.dequantize(*parts, name, block, x.dtype),
            reference.dequantize(*parts, book, block, x.dtype),
        )
        yield row(f"quantize {name}", moved, partial(ops.quantize, x, name, block))
        *parts, _ = ops.quantize(x, name, block)
        yield row(f"dequantize {name}", moved, partial(ops.dequantize, *parts, name, block, x.dtype))
        del parts
        values, statistics = fake_quantize(sample, name, block, return_statistics=True)
        check(f"fake-quantize {name}", (values, values), (reference.fake_quantize(sample, book, block),) * 2)
        torch.testing.assert_close(statistics, reference.measure(sample, values), rtol=2e-6, atol=0.0)
        yield row(f"fake-quantize {name}", 2 * n * size, partial(fake_quantize, x, name, block))
        measured = partial(fake_quantize, x, name, block, return_statistics=True)
        yield row(f"fake-quantize {name} + statistics", 2 * n * size, measured)
    for name, extra, title in (("residual", 1, "linear + residual"), ("affine", 0, "affine"), ("log", 0, "log")):
        moved = n * (size + 1 + extra) + {"residual": 4, "affine": 5, "log": 8}[name] * blocks
        given = x.float().square().to(x.dtype) if name == "log" else x
        sample = given[:SAMPLE]
        encode, decode = getattr(ops, f"quantize_{name}"), getattr(ops, f"dequantize_{name}")
        options = block, *{"residual": (8, 8), "log": (8,), "affine": ()}[name]
        *parts, _ = encode(sample, *options)
        check(f"quantize {title}", tuple(parts), getattr(reference, f"quantize_{name}")(sample, *options))
        check(
            f"dequantize {title}",
            decode(*parts, *options, x.dtype),
            getattr(reference, f"dequantize_{name}")(*parts, *options, x.dtype),
        )
        yield row(f"quantize {title}", moved, partial(encode, given, *options))
        *parts, _ = encode(given, *options)
        yield row(f"dequantize {title}", moved, partial(decode, *parts, *options, x.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=2**28)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 256, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose kernel contains this")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    rows: list[Row] = []
    for name in arguments.dtypes:
        x = torch.randn(arguments.numel, device="cuda").to(getattr(torch, name))
        target = torch.empty_like(x)
        bytes_per_ms = 2 * x.nbytes / median_ms(lambda target=target, x=x: target.copy_(x))
        del target
        print(f"{name}: copy {bytes_per_ms / 1e9:.3f} TB/s", flush=True)
        for block in arguments.blocks:
            for row in chain(our_rows(x, block), contenders.rows(x, block)):
                if arguments.only in row.kernel:
                    row.milliseconds, row.floor = median_ms(row.run), row.bytes / bytes_per_ms
                    rows.append(row)
                row.run = int  # lets go of the tensors
            torch.cuda.empty_cache()
    report(rows, arguments)


def report(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Print one line a kernel, implementation and dtype, with each block's fraction of the copy, time and GB/s."""
    header = ["kernel", "whose", "dtype", "bytes", "floor", *(f"block {block}" for block in arguments.blocks)]
    lines = [environment(), "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for key in dict.fromkeys((row.kernel, row.whose, row.dtype) for row in rows):
        mine = {row.block: row for row in rows if (row.kernel, row.whose, row.dtype) == key}
        first = next(iter(mine.values()))
        cells = []
        for block in arguments.blocks:
            row = mine[block]
            rate = f"{row.milliseconds:.3f} ms, {row.bytes / row.milliseconds / 1e6:.0f} GB/s"
            cells.append(f"{row.floor / row.milliseconds:.2f} ({rate})")
        floor = f"{first.bytes / 1e9:.2f} GB", f"{first.floor:.3f} ms"
        lines.append("| " + " | ".join([key[0], key[1], str(key[2])[6:], *floor, *cells]) + " |")
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


def environment() -> str:
    """Return the machine and the versions in a line."""
    modules = [f"{name} {importlib.import_module(name).__version__}" for name in ("torch", "triton")]
    return ", ".join([torch.cuda.get_device_name(), *modules, f"Python {platform.python_version()}"])


if __name__ == "__main__":
    main()
