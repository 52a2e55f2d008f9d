"""Find the launch settings of the kernels: the table ``SETTINGS`` of ``quantization/kernels/blockwise.py``.

    python benchmarks/tune.py [--only fake] [--numel 2**27]

For each kernel and size of value, every tile and number of warps is timed at blocks of 64, 256 and 2048, and the one
whose slowest fraction of the best is highest is printed. The winners are written into the table by hand.
"""

import argparse
from collections.abc import Callable

import torch
from kernels import median_ms
from torch import Tensor

from q8lightning.quantization.codebook import BUILTIN
from q8lightning.quantization.kernels import blockwise

BLOCKS = (64, 256, 2048)
CHOICES = [(512, 1), (1024, 1), (1024, 2), (2048, 1), (2048, 2), (2048, 4), (4096, 2), (4096, 4), (4096, 8), (8192, 8)]


def runs(name: str, x: Tensor, block: int) -> Callable[[], object]:
    """Return a call that launches the kernel of these settings."""
    dtype = x.dtype
    book = BUILTIN["dynamic" if "cells" in name else "softsign"]
    squares = x.float().square().to(dtype)
    if name.startswith("quantize_"):
        return lambda: getattr(blockwise, name)(squares, block)
    if name.startswith("dequantize_"):
        parts = getattr(blockwise, name.removeprefix("de"))(squares, block)
        return lambda: getattr(blockwise, name)(*parts, block, dtype)
    if name.startswith("dequantize"):
        book = BUILTIN["linear" if name.endswith("linear") else "dynamic"]
        codes, scale = blockwise.quantize(x, book, block)
        return lambda: blockwise.dequantize(codes, scale, book, block, dtype)
    if name.startswith("fake"):
        book = BUILTIN["dynamic" if "cells" in name else "linear"]
        return lambda: blockwise.fake_quantize(x, book, block)
    return lambda: blockwise.quantize(x, book, block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="kernels whose name contains one of these")
    parser.add_argument("--numel", type=int, default=2**27)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name, settings in list(blockwise.SETTINGS.items()):
        if not any(part in name for part in arguments.only):
            continue
        for index, dtype in enumerate((torch.float32, torch.bfloat16)):
            x = torch.randn(arguments.numel, device="cuda").to(dtype)
            times: dict[tuple[int, int], list[float]] = {}
            for choice in CHOICES:
                chosen = list(settings)
                chosen[index] = blockwise.Settings(*choice)
                blockwise.SETTINGS[name] = (chosen[0], chosen[1])
                times[choice] = [median_ms(runs(name, x, block), 9) for block in BLOCKS]
            blockwise.SETTINGS[name] = settings
            best = [min(column) for column in zip(*times.values(), strict=True)]
            worst = {c: min(b / t for b, t in zip(best, row, strict=True)) for c, row in times.items()}
            ranked = sorted(worst, key=lambda choice: -worst[choice])[:4]
            now = tuple(settings[index])
            print(
                f"{name:24} {str(dtype)[6:]:9} " + "  ".join(f"{c}: {worst[c]:.3f}" for c in ranked),
                f"  now {now}: {worst.get(now, 0):.3f}; best ms {[round(b, 3) for b in best]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
