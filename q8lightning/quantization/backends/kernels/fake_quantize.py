"""Write the quantized values of a tensor, without codes, and measure what is lost.

Kernels for many tensors (``many.py``) share the tiles here. They may quantize a share of the blocks only, which a hash
chooses as ``block_choice.py`` says in plain torch.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import launch
from q8lightning.quantization.backends.kernels.bits import as_pairs, packed, rounded, unpacked
from q8lightning.quantization.backends.kernels.codecs import codebook
from q8lightning.quantization.backends.kernels.statistics import add, measure_many, nothing
from q8lightning.quantization.backends.kernels.sum_statistics import empty_partials, sum_of_one
from q8lightning.quantization.backends.kernels.tables import tables_of
from q8lightning.quantization.backends.kernels.tiles import load_float, store, tile
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import Codebook


@triton.jit
def fake_quantize_kernel(
    x, values, table, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    first, _, _, elements, mask, _ = tile(numel, ROWS, BLOCK)
    x_tile = load_float(x + first * BLOCK, elements, mask)
    value = codebook.fake_quantize(x_tile, table, levels, SEARCH, SHIFT, BITS, 0, ROUND)
    store(values + first * BLOCK, elements, value, mask)


@triton.jit
def measured_fake_quantize_kernel(
    x, values, table, levels, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, IN_PAIRS: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (TILES * ROWS * BLOCK)
    left = tl.minimum(numel - start, TILES * ROWS * BLOCK).to(tl.int32)
    fake_quantize_tiles(
        x + start, values + start, left, table, levels, partials, tl.program_id(0), tl.num_programs(0), 0, 0, 0, 0,
        ROWS, BLOCK, TILES, SEARCH, SHIFT, BITS, 0, ROUND, False, IN_PAIRS,
    )  # fmt: skip


@triton.jit
def fake_quantize_tiles(
    x, values, left, table, levels, partials, column, columns, seed, limit, number, block, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    END: tl.constexpr, ROUND: tl.constexpr, CHOOSE: tl.constexpr, IN_PAIRS: tl.constexpr,
):  # fmt: skip
    """Fake-quantize and measure tile after tile, and load each while the one before is computed.

    Lanes keep their sums until the last tile. With CHOOSE, only blocks that :func:`is_chosen` are quantized; the first
    one here has the number ``block``. With IN_PAIRS, two bfloat16 are loaded, stored and compared with zero at a time;
    their number must be even, and they must be aligned to 4 bytes.
    """
    WIDTH: tl.constexpr = 2 if IN_PAIRS else 1
    words, written, count = x, values, left
    if IN_PAIRS:
        words, written = as_pairs(x), as_pairs(values)
        count = left // 2
    rows = tl.arange(0, ROWS)
    places = rows[:, None] * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)[None, :]
    error, squares, largest, zeros, zeroed = nothing(ROWS, BLOCK, IN_PAIRS)
    TILE: tl.constexpr = ROWS * BLOCK // WIDTH
    ahead = tl.load(words + places, mask=places < count, other=0)
    for i in range(TILES):
        original, at = ahead, places + i * TILE
        following = at + TILE
        ahead = tl.load(words + following, mask=following < count, other=0)
        value = unpacked(original, IN_PAIRS)
        quantized = codebook.fake_quantize(value, table, levels, SEARCH, SHIFT, BITS, END, ROUND)
        if CHOOSE:
            quantized = tl.where(is_chosen(seed, limit, number, block + i * ROWS + rows)[:, None], quantized, value)
        quantized = packed(quantized) if IN_PAIRS else rounded(quantized, values)
        tl.store(written + at, quantized, mask=at < count)
        error, squares, largest, zeros, zeroed = add(
            value, unpacked(quantized, IN_PAIRS), original, quantized, error, squares, largest, zeros, zeroed, IN_PAIRS
        )
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    measure_many(error, squares, largest, zeros, zeroed, x, values, elements, left, TILES, partials, column, columns)


@triton.jit
def is_chosen(seed, limit, number, blocks):
    """Choose blocks of tensor ``number`` as ``block_choice.chosen_blocks``.

    ``seed`` and ``limit`` are unsigned integers, given as int32 with the same bits.
    """
    key = _mix(_mix(seed.to(tl.uint32, bitcast=True)) ^ number.to(tl.uint32))
    return _mix(key ^ blocks.to(tl.uint32)) < limit.to(tl.uint32, bitcast=True)


@triton.jit
def _mix(x):
    """Hash uint32 as ``block_choice.mix``."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int, statistics: Tensor | None = None) -> Tensor:
    """As ``reference.fake_quantize``."""
    flat, tables = launch.flattened(x), tables_of(codebook, x.device)
    values = torch.empty(x.shape, dtype=flat.dtype, device=x.device)
    settings = "fake_quantize" if tables.closed_form else "fake_quantize in cells"
    constants = {**launch.search_constants(tables), "ROUND": codebook.rounding}
    parts = flat, values, tables.table, tables.levels
    if statistics is None or flat.dtype != x.dtype:
        rows, warps = launch.rows_of(settings, block_size, flat.element_size())
        launch.run(fake_quantize_kernel, rows, warps, block_size, parts, tiles=1, **constants)
        values = values.to(x.dtype)
        if statistics is not None:  # the kernel does not see the dtype of ``x``
            statistics.copy_(reference.measure(x, values))
        return values
    settings = f"{settings} measured"
    rows, warps = launch.rows_of(settings, block_size, flat.element_size())
    tiles = launch.tiles_of(settings, rows * block_size, flat.element_size())
    partials = empty_partials(flat, triton.cdiv(flat.numel(), rows * block_size * tiles))
    constants |= {"TILES": tiles, "IN_PAIRS": launch.in_pairs(flat)}
    constants |= launch.options_of(settings, flat.element_size())
    kernel = measured_fake_quantize_kernel
    launch.run(kernel, rows, warps, block_size, (*parts, partials), tiles=tiles, **constants)
    sum_of_one(partials, statistics)
    return values
