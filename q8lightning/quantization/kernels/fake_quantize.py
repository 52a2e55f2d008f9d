"""Kernels that write quantized values and no codes; one of them measures on the way.

Those for groups (``grouped.py``) may quantize only some of the blocks, which a hash chooses: ``block_choice.py`` says
how, in plain torch.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.kernels import codec
from q8lightning.quantization.kernels.bits import rounded
from q8lightning.quantization.kernels.statistics import add, measure_many, nothing
from q8lightning.quantization.kernels.tiles import load_float, store, tile


@triton.jit
def fake_quantize_kernel(
    x, values, table, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    first, _, _, elements, mask, _ = tile(numel, ROWS, BLOCK)
    x_tile = load_float(x + first * BLOCK, elements, mask)
    value = codec.fake_quantize(x_tile, table, levels, SEARCH, SHIFT, LOWEST, HALF, BITS, 0)
    store(values + first * BLOCK, elements, value, mask)


@triton.jit
def measured_fake_quantize_kernel(
    x, values, table, levels, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (TILES * ROWS * BLOCK)
    left = tl.minimum(numel - start, TILES * ROWS * BLOCK).to(tl.int32)
    fake_quantize_tiles(
        x + start, values + start, left, table, levels, partials, tl.program_id(0), tl.num_programs(0), 0, 0, 0, 0,
        ROWS, BLOCK, TILES, SEARCH, SHIFT, LOWEST, HALF, BITS, 0, False,
    )  # fmt: skip


@triton.jit
def fake_quantize_tiles(
    x, values, left, table, levels, partials, column, columns, seed, limit, number, block, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr,
    HALF: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr, CHOOSE: tl.constexpr,
):  # fmt: skip
    """Fake-quantize and measure tile after tile, each loaded while the one before is worked on.

    Sums stay with their lanes until the last tile. With CHOOSE only some blocks are quantized, see :func:`is_chosen`;
    the first one here has the number ``block``.
    """
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    error, squares, largest, zeros, zeroed = nothing(ROWS, BLOCK)
    ahead = tl.load(x + elements, mask=elements < left, other=0.0)
    for i in range(TILES):
        value, at = ahead.to(tl.float32), elements + i * (ROWS * BLOCK)
        following = at + ROWS * BLOCK
        ahead = tl.load(x + following, mask=following < left, other=0.0)
        quantized = codec.fake_quantize(value, table, levels, SEARCH, SHIFT, LOWEST, HALF, BITS, END)
        if CHOOSE:
            quantized = tl.where(is_chosen(seed, limit, number, block + i * ROWS + rows)[:, None], quantized, value)
        quantized = rounded(quantized, values)
        tl.store(values + at, quantized, mask=at < left)
        error, squares, largest, zeros, zeroed = add(
            value, quantized.to(tl.float32), error, squares, largest, zeros, zeroed
        )
    measure_many(error, squares, largest, zeros, zeroed, x, values, elements, left, TILES, partials, column, columns)


@triton.jit
def is_chosen(seed, limit, number, blocks):
    """As ``block_choice.chosen_blocks``, for blocks of tensor ``number``; ``seed`` and ``limit`` are patterns of
    unsigned integers, int32."""
    key = _mix(_mix(seed.to(tl.uint32, bitcast=True)) ^ number.to(tl.uint32))
    return _mix(key ^ blocks.to(tl.uint32)) < limit.to(tl.uint32, bitcast=True)


@triton.jit
def _mix(x):
    """As ``block_choice.mix``, uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
