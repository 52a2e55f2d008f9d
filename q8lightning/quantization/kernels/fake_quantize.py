"""Kernels that write quantized values and no codes; one of them measures on the way."""
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
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    first, _, _, elements, mask, _ = tile(numel, ROWS, BLOCK)
    x_tile = load_float(x + first * BLOCK, elements, mask)
    value = codec.fake_quantize(x_tile, table, levels, SEARCH, SHIFT, BITS)
    store(values + first * BLOCK, elements, value, mask)


@triton.jit
def measured_fake_quantize_kernel(
    x, values, table, levels, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (TILES * ROWS * BLOCK)
    left = tl.minimum(numel - start, TILES * ROWS * BLOCK).to(tl.int32)
    fake_quantize_tiles(
        x + start, values + start, values + start, left, table, levels, partials, tl.program_id(0), tl.num_programs(0),
        ROWS, BLOCK, TILES, SEARCH, SHIFT, BITS, False,
    )  # fmt: skip


@triton.jit
def fake_quantize_tiles(
    x, values, masters, left, table, levels, partials, column, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Fake-quantize and measure tile after tile, each loaded while the one before is worked on.

    Sums stay with their lanes until the last tile. With KEEP, ``x`` is copied to ``masters``, and ``values`` may be
    ``x`` itself.
    """
    elements = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    error, squares, largest, zeros, zeroed = nothing(ROWS, BLOCK)
    ahead = tl.load(x + elements, mask=elements < left, other=0.0)
    for i in range(TILES):
        original, at = ahead, elements + i * (ROWS * BLOCK)
        following = at + ROWS * BLOCK
        ahead = tl.load(x + following, mask=following < left, other=0.0)
        value = original.to(tl.float32)
        quantized = rounded(codec.fake_quantize(value, table, levels, SEARCH, SHIFT, BITS), values)
        if KEEP:
            tl.store(masters + at, original, mask=at < left)
        tl.store(values + at, quantized, mask=at < left)
        error, squares, largest, zeros, zeroed = add(
            value, quantized.to(tl.float32), error, squares, largest, zeros, zeroed
        )
    if KEEP:
        x = masters
    measure_many(error, squares, largest, zeros, zeroed, x, values, elements, left, TILES, partials, column, columns)
