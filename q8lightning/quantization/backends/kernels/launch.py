"""How kernels are launched: their settings, and the dtypes they read and write."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from q8lightning.quantization.backends.kernels import bits
from q8lightning.quantization.backends.kernels.sum_statistics import empty_partials, sum_of_one
from q8lightning.quantization.backends.kernels.tables import Tables
from q8lightning.quantization.spec import reference


class Settings(NamedTuple):
    """How a kernel is launched.

    Attributes:
        tile: Elements of a tile, or one row if that is larger.
        warps: Warps of a program.
        tiles: Tiles of a program whose kernel loads one while it works on the one before, fewer where rows are longer:
            it is not idle while it waits, and sums are exchanged between lanes only at the end. For groups, their
            segments decide.
        fewest: Tiles of a program however long the rows are.
        row: Longer blocks are decoded in rows of so many elements: nothing there needs a whole block at once.
        registers: The most that a thread may have; 0 for as many as the compiler likes. Fewer let more programs share
            a processor.
    """

    tile: int
    warps: int
    tiles: int = 1
    registers: int = 0
    fewest: int = 1
    row: int = 4096


SETTINGS: dict[str, tuple[Settings, Settings]] = {
    # Each for 4-byte and for 2-byte values: the winners of benchmarks/tune.py on an H200, over blocks of 64, 256 and
    # 2048 (an earlier one stays where it is within 1% of the winner). Few warps with 16 to 64 values a thread keep
    # enough loads in flight without waiting for one another; kernels that measure hold sums as well and do better with
    # 8 to 16.
    "quantize": (Settings(2048, 2), Settings(2048, 1)),
    "quantize in cells": (Settings(1024, 1), Settings(1024, 1)),
    "fake_quantize": (Settings(512, 1), Settings(2048, 4)),
    "fake_quantize measured": (Settings(1024, 2, 4), Settings(1024, 2, 6, fewest=6)),
    "fake_quantize in cells measured": (Settings(512, 1, 6), Settings(1024, 2, 16)),
    "fake_quantize in cells": (Settings(512, 1), Settings(1024, 2)),
    "dequantize": (Settings(512, 1, row=256), Settings(1024, 2, row=256)),
    "dequantize linear": (Settings(512, 1, row=256), Settings(2048, 4, row=256)),
    "quantize_residual": (Settings(4096, 4), Settings(2048, 1)),
    "dequantize_residual": (Settings(1024, 2, row=256), Settings(2048, 2, row=256)),
    "quantize_log": (Settings(1024, 1), Settings(1024, 1)),
    # With 32 rows a tile, each lane of a warp lays out the grid of one.
    "dequantize_log": (Settings(2048, 1, row=64), Settings(2048, 1, row=64, registers=96)),
    "quantize_affine": (Settings(1024, 2), Settings(1024, 1)),
    "dequantize_affine": (Settings(512, 1, row=256), Settings(2048, 4, row=256)),
    "many codebook": (Settings(1024, 1), Settings(1024, 1)),
    "many in cells": (Settings(1024, 1), Settings(1024, 1)),
    "many residual": (Settings(1024, 2), Settings(1024, 1)),
    "many log": (Settings(2048, 1), Settings(2048, 1)),
    "many decode codebook": (Settings(1024, 2), Settings(4096, 2)),
    "many decode residual": (Settings(1024, 2), Settings(4096, 2)),
    "many decode log": (Settings(2048, 1, row=64), Settings(2048, 1, row=64)),
    "many fake_quantize": (Settings(512, 1), Settings(2048, 2)),
    "many fake_quantize in cells": (Settings(1024, 2), Settings(1024, 2)),
    "measured many fake_quantize": (Settings(512, 1), Settings(512, 1)),
    "measured many fake_quantize in cells": (Settings(512, 1), Settings(1024, 2)),
    "measured many codebook": (Settings(512, 1), Settings(512, 1)),
    "measured many in cells": (Settings(256, 1), Settings(512, 1)),
    "measured many residual": (Settings(1024, 1), Settings(512, 1)),
    "measured many log": (Settings(512, 1), Settings(512, 1)),
}

VALUES_OF_A_WARP = 2048
"""At most: 64 a thread."""

INTERPRETED = bool(bits.INTERPRETED)
"""Whether the kernels run in Triton's interpreter instead of on a GPU."""


def rows_of(settings: str, row: int, itemsize: int) -> tuple[int, int]:
    """Return how many rows of a tile a program handles and its warps, for float values of ``itemsize`` bytes."""
    tile, warps, *_ = SETTINGS[settings][itemsize < 4]
    rows = max(tile // row, 1)
    # Longer rows get more warps, not more registers than there are; sums take up some too.
    a_warp = tile // warps if "measured" in settings else VALUES_OF_A_WARP
    return rows, min(max(rows * row // a_warp, warps), 8)


def decoded_row(settings: str, block_size: int) -> int:
    """Return how many elements of a block are a row when it is decoded."""
    return min(block_size, SETTINGS[settings][0].row)


def tiles_of(settings: str, elements: int, itemsize: int) -> int:
    """Return how many tiles of so many elements a program handles."""
    chosen = SETTINGS[settings][itemsize < 4]
    return max(chosen.tile * chosen.tiles // elements, chosen.fewest)


def options_of(settings: str, itemsize: int) -> dict[str, int]:
    """Return the options of the compiler that the settings ask for."""
    registers = SETTINGS[settings][itemsize < 4].registers
    return {"maxnreg": registers} if registers and not INTERPRETED else {}


def run(
    kernel: Any,
    rows: int,
    warps: int,
    block_size: int,
    tensors: tuple[Tensor, ...],
    *,
    tiles: int = 1,
    **constants: Any,
) -> None:
    """Run ``kernel`` on ``tensors`` with one program for so many tiles of the first, on its device."""
    x = tensors[0]
    if x.numel() == 0:
        return
    grid = (triton.cdiv(x.numel(), rows * block_size * tiles),)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[grid](
            *tensors, x.numel(), ROWS=rows, BLOCK=block_size, **constants,
            num_warps=warps, enable_fp_fusion=False,  # codecs/codebook.py says why
        )  # fmt: skip


def run_encoder(
    kernel: Any,
    settings: str,
    block_size: int,
    tensors: tuple[Tensor, ...],
    x: Tensor,
    statistics: Tensor | None,
    **constants: Any,
) -> Tensor | None:
    """As :func:`run`, for kernels that can measure on the way.

    Args:
        tensors: What the kernel takes; the first is ``x``, flat and in the kernels' dtype.
        x: The tensor to encode, as it came in.
        statistics: ``[5]`` float64 to be written, or None.

    Returns:
        ``statistics`` if they were wanted and the kernel saw ``x`` in its own dtype, else None.
    """
    flat = tensors[0]
    own = statistics if flat.dtype == x.dtype else None
    rows, warps = rows_of(settings, block_size, flat.element_size())
    programs = triton.cdiv(flat.numel(), rows * block_size) if own is not None else 0
    partials = empty_partials(flat, programs)
    run(kernel, rows, warps, block_size, (*tensors, partials), MEASURE=own is not None, **constants)
    if own is not None:
        sum_of_one(partials, own)
    return own


def finish(x: Tensor, statistics: Tensor | None, own: Tensor | None, decode: Callable[[], Tensor]) -> None:
    """Measure in PyTorch what a kernel could not, because it saw ``x`` in another dtype."""
    if statistics is not None and own is None:
        statistics.copy_(reference.measure(x, decode()))


def run_decoder(
    kernel: Any, settings: str, block_size: int, tensors: tuple[Tensor, ...], itemsize: int, **constants: Any
) -> None:
    """As :func:`run`, for kernels that may cut a block into rows; ``itemsize`` is that of the decoded values."""
    row = decoded_row(settings, block_size)
    rows, warps = rows_of(settings, row, itemsize)
    constants |= options_of(settings, itemsize)
    run(kernel, rows, warps, row, tensors, PARTS=block_size // row, **constants)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels read or write tensors of ``dtype``; PyTorch converts where they differ."""
    # The interpreter truncates where bfloat16 is to be rounded (seen in Triton 3.9).
    foreign = dtype == torch.float64 or (INTERPRETED and dtype == torch.bfloat16)
    return torch.float32 if foreign else dtype


def flattened(x: Tensor) -> Tensor:
    """``[numel]`` in row-major order, of the kernels' dtype."""
    return x.detach().reshape(-1).to(kernel_dtype(x.dtype))


def empty(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def block_count(x: Tensor, block_size: int) -> int:
    return -(-x.numel() // block_size)


def in_pairs(x: Tensor) -> bool:
    """Whether ``x`` can be worked on as words with two bfloat16 each, which its device can compare with zero."""
    if INTERPRETED or x.dtype != torch.bfloat16 or x.numel() % 2 or x.data_ptr() % 4:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def search_constants(tables: Tables) -> dict[str, int | str]:
    """The constants that tell ``codec.nearest_code`` how to search."""
    return {
        "SEARCH": tables.search,
        "SHIFT": tables.shift,
        "BITS": tables.bits,
    }
