"""Launch kernels for one tensor, with the settings that were measured for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from q8lightning.quantization.backends.kernels import bits
from q8lightning.quantization.backends.kernels.sum_statistics import empty_partials, sum_of_one
from q8lightning.quantization.backends.kernels.tables import Tables
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.layout import Layout


class Settings(NamedTuple):
    """The settings of a kernel.

    Attributes:
        tile: Elements of a tile. A longer row is a tile of its own.
        warps: Warps of a program.
        tiles: Tiles of a program that measures one tensor, fewer if rows are longer. It loads a tile while it computes
            with the one before, and exchanges sums between lanes once, at the end.
        registers: The most registers of a thread; 0 leaves it to the compiler. Fewer registers let more programs share
            a processor.
        fewest: The smallest number of tiles, however long the rows are.
        row: The longest row in which a kernel decodes. A longer block is cut, since decoding needs no whole block.
    """

    tile: int
    warps: int
    tiles: int = 1
    registers: int = 0
    fewest: int = 1
    row: int = 4096


SETTINGS: dict[str, tuple[Settings, Settings]] = {
    # Each for 4-byte and for 2-byte values: the winners of benchmarks/tune.py on an H200, over blocks of 64, 256 and
    # 2048. An earlier winner stays if it is within 1% of a new one. Few warps with 16 to 64 values a thread keep enough
    # loads in flight without waiting for one another. Kernels that measure also hold sums, and do better with 8 to 16.
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
    # With 32 rows a tile, each lane of a warp computes the grid of one.
    "dequantize_log": (Settings(2048, 1, row=64), Settings(2048, 1, row=64, registers=96)),
    "quantize_affine": (Settings(1024, 2), Settings(1024, 1)),
    "dequantize_affine": (Settings(512, 1, row=256), Settings(2048, 4, row=256)),
    "many codebook": (Settings(1024, 1), Settings(1024, 1)),
    "many in cells": (Settings(1024, 1), Settings(1024, 1)),
    "many residual": (Settings(1024, 2), Settings(1024, 1)),
    "many log": (Settings(2048, 1), Settings(2048, 1)),
    "many packed codebook": (Settings(1024, 1), Settings(1024, 1)),
    "many packed residual": (Settings(1024, 1), Settings(1024, 1)),
    "many packed log": (Settings(2048, 1), Settings(2048, 1)),
    "many decode packed codebook": (Settings(1024, 2), Settings(4096, 2)),
    "many decode packed residual": (Settings(1024, 1), Settings(4096, 2)),
    "many decode packed log": (Settings(1024, 1, row=32), Settings(1024, 1, row=32)),
    "many decode codebook": (Settings(1024, 2), Settings(4096, 2)),
    "many decode residual": (Settings(1024, 2), Settings(4096, 2)),
    "many decode log": (Settings(2048, 1, row=64), Settings(2048, 1, row=64)),
    "many fake_quantize": (Settings(512, 1), Settings(2048, 2)),
    "many fake_quantize in cells": (Settings(1024, 2), Settings(1024, 2)),
    "measured many fake_quantize": (Settings(512, 1), Settings(512, 1)),
    "measured many fake_quantize in cells": (Settings(512, 1), Settings(1024, 2)),
    "measured many packed codebook": (Settings(512, 1), Settings(512, 1)),
    "measured many packed residual": (Settings(512, 1), Settings(512, 1)),
    "measured many packed log": (Settings(512, 1), Settings(512, 1)),
    "measured many codebook": (Settings(512, 1), Settings(512, 1)),
    "measured many in cells": (Settings(256, 1), Settings(512, 1)),
    "measured many residual": (Settings(1024, 1), Settings(512, 1)),
    "measured many log": (Settings(512, 1), Settings(512, 1)),
}

VALUES_OF_A_WARP = 2048
"""The most values of a warp, 64 for each thread."""

INTERPRETED = bool(bits.INTERPRETED)
"""Whether the kernels run in Triton's interpreter instead of on a GPU."""


def rows_of(settings: str, row: int, itemsize: int) -> tuple[int, int]:
    """Return the rows of a tile and the warps of a program, for float values of ``itemsize`` bytes."""
    tile, warps, *_ = SETTINGS[settings][itemsize < 4]
    rows = max(tile // row, 1)
    # A longer row gets more warps, because registers are limited. Sums take up some of them.
    a_warp = tile // warps if "measured" in settings else VALUES_OF_A_WARP
    return rows, min(max(rows * row // a_warp, warps), 8)


def decoded_row(settings: str, block_size: int) -> int:
    """Return the elements of a row when blocks are decoded."""
    return min(block_size, SETTINGS[settings][0].row)


def tiles_of(settings: str, elements: int, itemsize: int) -> int:
    """Return the tiles of a program that measures one tensor, for tiles of so many elements."""
    chosen = SETTINGS[settings][itemsize < 4]
    return max(chosen.tile * chosen.tiles // elements, chosen.fewest)


def options_of(settings: str, itemsize: int) -> dict[str, int]:
    """Return the compiler's options in the settings."""
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
    """Run ``kernel`` on ``tensors``, with a program for every ``tiles`` tiles of the first one, on its device."""
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
    x: Tensor,
    parts: tuple[Tensor, ...],
    statistics: Tensor | None,
    decode: Callable[[], Tensor],
    tables: tuple[Tensor, ...] = (),
    **constants: Any,
) -> None:
    """Encode a tensor, and measure what is lost if that is wanted.

    Args:
        kernel: Takes ``x``, the parts, the tables and partial statistics.
        settings: Its name in ``SETTINGS``.
        block_size: Elements of a block.
        x: The tensor.
        parts: Its codes and scales, to be written.
        statistics: ``[5]`` float64 to be written, or None.
        decode: Decodes the parts. It is called if the kernel cannot measure, because it reads ``x`` in another dtype.
        tables: Tensors of the codebook.
        constants: Constants of the kernel.
    """
    flat = flattened(x)
    measured_by_kernel = statistics is not None and flat.dtype == x.dtype
    rows, warps = rows_of(settings, block_size, flat.element_size())
    programs = triton.cdiv(flat.numel(), rows * block_size) if measured_by_kernel else 0
    partials = empty_partials(flat, programs)
    tensors = (flat, *parts, *tables, partials)
    run(kernel, rows, warps, block_size, tensors, MEASURE=measured_by_kernel, **constants)
    if statistics is not None and measured_by_kernel:
        sum_of_one(partials, statistics)
    elif statistics is not None:
        statistics.copy_(reference.measure(x, decode()))


def run_decoder(
    kernel: Any,
    settings: str,
    block_size: int,
    parts: tuple[Tensor, ...],
    dtype: torch.dtype,
    tables: tuple[Tensor, ...] = (),
    **constants: Any,
) -> Tensor:
    """Decode a tensor.

    Args:
        kernel: Takes the parts, the values and the tables. It may cut a block into several rows.
        settings: Its name in ``SETTINGS``.
        block_size: Elements of a block.
        parts: The codes ``[*shape]``, then whatever else was encoded.
        dtype: The dtype of the values.
        tables: Tensors of the codebook.
        constants: Constants of the kernel.

    Returns:
        The values, ``[*shape]`` of ``dtype``.
    """
    values = torch.empty(parts[0].shape, dtype=kernel_dtype(dtype), device=parts[0].device)
    row = decoded_row(settings, block_size)
    rows, warps = rows_of(settings, row, values.element_size())
    constants |= options_of(settings, values.element_size())
    tensors = (*(part.contiguous() for part in parts), values, *tables)
    run(kernel, rows, warps, row, tensors, PARTS=block_size // row, **constants)
    return values.to(dtype)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels read or write tensors of ``dtype``. PyTorch converts if it is another."""
    # The interpreter truncates to bfloat16 instead of rounding (seen in Triton 3.9).
    foreign = dtype == torch.float64 or (INTERPRETED and dtype == torch.bfloat16)
    return torch.float32 if foreign else dtype


def flattened(x: Tensor) -> Tensor:
    """Return the elements in row-major order, ``[numel]`` of the kernels' dtype."""
    return x.detach().reshape(-1).to(kernel_dtype(x.dtype))


def in_pairs(x: Tensor) -> bool:
    """Whether kernels can take ``x`` as words of two bfloat16 each; the device must compare such words with zero."""
    if INTERPRETED or x.dtype != torch.bfloat16 or x.numel() % 2 or x.data_ptr() % 4:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def search_constants(tables: Tables) -> dict[str, int | str]:
    """Return the constants with which ``codecs/codebook.py`` searches for a code."""
    return {"SEARCH": tables.search, "SHIFT": tables.shift, "BITS": tables.bits}


def bits_constants(layout: Layout) -> dict[str, int]:
    """Return the constants with which kernels pack codes; the codes of a second stage have 0 bits if there is none."""
    first, *rest = layout.bits
    return {"BITS": first, "REST_BITS": sum(rest)}
