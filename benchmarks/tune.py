"""Find the launch settings of the kernels: the table ``SETTINGS`` of ``quantization/backends/kernels/launch.py``.

    python benchmarks/tune.py [--only fake] [--dtypes bfloat16] [--numel 134217728]

For each kernel and size of value, every tile and number of warps (of tiles and of registers, where that matters) is
timed at blocks of 64, 256 and 2048, and the one whose slowest fraction of the best is highest is printed. The winners
are written into the table by hand.
"""

import argparse
from collections.abc import Callable

import torch
from kernels import median_ms
from torch import Tensor

from q8lightning.quantization.backends.kernels import blockwise, launch, many, work_list
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.spec.codebook import BUILTIN

BLOCKS = (64, 256, 2048)
CHOICES = [
    launch.Settings(*choice)
    for choice in (
        (256, 1),
        (512, 1),
        (1024, 1),
        (1024, 2),
        (2048, 1),
        (2048, 2),
        (2048, 4),
        (4096, 2),
        (4096, 4),
        (4096, 8),
        (8192, 8),
    )
]
# Kernels that work through several tiles, with as many as they have in short blocks and in long ones.
LOOPED = [
    launch.Settings(tile, warps, tiles, fewest=fewest)
    for tile, warps in ((256, 1), (512, 1), (1024, 2), (2048, 4))
    for tiles in (4, 6, 8, 12, 16)
    for fewest in (1, tiles)
]
# For kernels with many values a thread: fewer registers, more programs on a processor.
SQUEEZED = [launch.Settings(tile, warps, registers=96) for tile, warps in ((1024, 1), (2048, 1), (2048, 2), (4096, 2))]


def choices_for(name: str) -> list[launch.Settings]:
    if "measured" in name and "many" not in name:
        return LOOPED
    return CHOICES + SQUEEZED if name == "dequantize_log" else CHOICES


def runs(name: str, x: Tensor, block: int) -> Callable[[], object]:
    """Return a call that launches the kernel of these settings."""
    dtype = x.dtype
    book = BUILTIN["dynamic" if "cells" in name else "softsign"]
    squares = x.float().square().to(dtype)
    bits = {"residual": (8, 8), "log": (8,)}.get(name.rpartition("_")[2], ())
    if name.startswith("quantize_"):
        return lambda: getattr(blockwise, name)(squares, block, *bits)
    if name.startswith("dequantize_"):
        parts = getattr(blockwise, name.removeprefix("de"))(squares, block, *bits)
        return lambda: getattr(blockwise, name)(*parts, block, *bits, dtype)
    if name.startswith("dequantize"):
        book = BUILTIN["linear" if name.endswith("linear") else "dynamic"]
        codes, scale = blockwise.quantize(x, book, block)
        return lambda: blockwise.dequantize(codes, scale, book, block, dtype)
    if "many" in name:
        return many_run(name, x, block)
    if name.startswith("fake"):
        book = BUILTIN["dynamic" if "cells" in name else "linear"]
        lost = torch.empty(5, dtype=torch.float64, device=x.device) if name.endswith("measured") else None
        return lambda: blockwise.fake_quantize(x, book, block, lost)
    return lambda: blockwise.quantize(x, book, block)


def many_run(name: str, x: Tensor, block: int) -> Callable[[], object]:
    """Likewise for the kernels of many tensors: here eight of them."""
    tensors, count = list(x.view(8, -1)), 8
    if "fake_quantize" in name:
        book = BUILTIN["dynamic" if "cells" in name else "linear"]
        values = torch.empty(x.nbytes, dtype=torch.uint8, device=x.device)
        starts = tuple(range(0, x.nbytes, x.nbytes // count))
        lost = torch.empty(count, 5, dtype=torch.float64, device=x.device) if "measured" in name else None
        return lambda: many.fake_quantize(tensors, values, starts, book, block, statistics=lost)
    packed_bits = "packed" in name
    codec = get_codec("softsign", block, 6 if packed_bits else 8)
    if name.endswith("residual"):
        codec = get_codec("linear", block, residual_bits=4 if packed_bits else 8)
    if "cells" in name:
        codec = get_codec("dynamic", block)
    if "log" in name:
        codec = get_codec("log", block, 5 if packed_bits else 8)
        tensors = list(x.float().square().to(x.dtype).view(8, -1))
    packed = encode_many(tensors, [codec] * count)
    buffer = packed.data[0].new_empty(0).set_(packed.data[0].untyped_storage())
    starts = tuple(data.storage_offset() for data in packed.data)
    if "decode" in name:
        return lambda: many.decode(buffer, starts, tensors, codec.kernel)
    lost = torch.empty(count, 5, dtype=torch.float64, device=x.device) if "measured" in name else None
    return lambda: many.encode(tensors, buffer, starts, codec.kernel, packed.failed, lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="kernels whose name contains one of these")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--numel", type=int, default=2**27)
    parser.add_argument("--blocks", type=int, nargs="*", default=BLOCKS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name, settings in list(launch.SETTINGS.items()):
        if not any(part in name for part in arguments.only):
            continue
        for index, dtype in enumerate((torch.float32, torch.bfloat16)):
            if str(dtype)[6:] not in arguments.dtypes:
                continue
            x = torch.randn(arguments.numel, device="cuda").to(dtype)
            times: dict[launch.Settings, list[float]] = {}
            for each in choices_for(name):
                choice = each._replace(row=settings[index].row)  # rows are as the kernel wants them
                chosen = list(settings)
                chosen[index] = choice
                launch.SETTINGS[name] = (chosen[0], chosen[1])
                work_list.launches.cache_clear()  # they depend on the settings
                times[choice] = [median_ms(runs(name, x, block), 9) for block in arguments.blocks]
            launch.SETTINGS[name] = settings
            best = [min(column) for column in zip(*times.values(), strict=True)]
            worst = {c: min(b / t for b, t in zip(best, row, strict=True)) for c, row in times.items()}
            ranked = sorted(worst, key=lambda choice: -worst[choice])[:4]
            now = settings[index]
            print(
                f"{name:24} {str(dtype)[6:]:9} " + "  ".join(f"{tuple(c)}: {worst[c]:.3f}" for c in ranked),
                f"  now {tuple(now)}: {worst.get(now, 0):.3f}; best ms {[round(b, 3) for b in best]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
