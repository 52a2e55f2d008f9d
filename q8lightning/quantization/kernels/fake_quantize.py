"""Kernels that write quantized values and no codes; one of them measures on the way."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.kernels import codec
from q8lightning.quantization.kernels.bits import as_pairs, packed, rounded, unpacked
from q8lightning.quantization.kernels.statistics import add, measure_many, nothing
from q8lightning.quantization.kernels.tiles import load_float, store, tile


@triton.jit
def fake_quantize_kernel(
    x, values, table, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    first, _, _, elements, mask, _ = tile(numel, ROWS, BLOCK)
    x_tile = load_float(x + first * BLOCK, elements, mask)
    value = codec.fake_quantize(x_tile, table, levels, SEARCH, SHIFT, BITS)
    store(values + first * BLOCK, elements, value, mask)


@triton.jit
def measured_fake_quantize_kernel(
    x, values, table, levels, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, IN_PAIRS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (TILES * ROWS * BLOCK)
    left = tl.minimum(numel - start, TILES * ROWS * BLOCK).to(tl.int32)
    fake_quantize_tiles(
        x + start, values + start, values + start, left, table, levels, partials, tl.program_id(0), tl.num_programs(0),
        ROWS, BLOCK, TILES, SEARCH, SHIFT, BITS, False, IN_PAIRS,
    )  # fmt: skip


@triton.jit
def fake_quantize_tiles(
    x, values, masters, left, table, levels, partials, column, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):  # fmt: skip
    """Fake-quantize and measure tile after tile, each loaded while the one before is worked on.

    Sums stay with their lanes until the last tile. With KEEP, ``x`` is copied to ``masters``, and ``values`` may be
    ``x`` itself. With IN_PAIRS, for an even number of bfloat16 values that are aligned to 4 bytes, two of them are
    loaded, stored and compared with zero at a time.
    """
    WIDTH: tl.constexpr = 2 if IN_PAIRS else 1
    words, kept, written, count = x, masters, values, left
    if IN_PAIRS:
        words, kept, written = as_pairs(x), as_pairs(masters), as_pairs(values)
        count = left // 2
    places = tl.arange(0, ROWS)[:, None] * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)[None, :]
    error, squares, largest, zeros, zeroed = nothing(ROWS, BLOCK, IN_PAIRS)
    TILE: tl.constexpr = ROWS * BLOCK // WIDTH
    ahead = tl.load(words + places, mask=places < count, other=0)
    for i in range(TILES):
        original, at = ahead, places + i * TILE
        following = at + TILE
        ahead = tl.load(words + following, mask=following < count, other=0)
        value = unpacked(original, IN_PAIRS)
        quantized = codec.fake_quantize(value, table, levels, SEARCH, SHIFT, BITS)
        quantized = packed(quantized) if IN_PAIRS else rounded(quantized, values)
        if KEEP:
            tl.store(kept + at, original, mask=at < count)
        tl.store(written + at, quantized, mask=at < count)
        error, squares, largest, zeros, zeroed = add(
            value, unpacked(quantized, IN_PAIRS), original, quantized, error, squares, largest, zeros, zeroed, IN_PAIRS
        )
    if KEEP:
        x = masters
    elements = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    measure_many(error, squares, largest, zeros, zeroed, x, values, elements, left, TILES, partials, column, columns)
