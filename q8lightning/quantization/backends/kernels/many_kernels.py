"""The kernels that ``many.py`` launches. Each program handles a part of one of many tensors."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.backends.kernels.codecs import codebook
from q8lightning.quantization.backends.kernels.codecs.dispatch import decode_tile, encode_tile
from q8lightning.quantization.backends.kernels.fake_quantize import fake_quantize_tiles, is_chosen
from q8lightning.quantization.backends.kernels.statistics import (
    add,
    add_in_units,
    is_safe,
    load_again,
    nothing,
    reduce,
    unit_of_tiles,
    write_many,
)
from q8lightning.quantization.backends.kernels.tiles import load_float, store
from q8lightning.quantization.backends.kernels.work_list import SEGMENT

_SEGMENT = tl.constexpr(SEGMENT)


@triton.jit
def _own(work, COLUMNS: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return this program's row of the work list, the elements of it to skip, and the elements left."""
    program = tl.program_id(0)
    row = work + (program // _SEGMENT).to(tl.int64) * COLUMNS
    skip = (program % _SEGMENT) * TILE
    left = tl.minimum(tl.load(row) - skip, TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return row, skip, left


@triton.jit
def _start(row, COLUMN: tl.constexpr, skip, MULTIPLE: tl.constexpr):
    """Return where a column of the work list says that this program's elements begin, a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(row + COLUMN) + skip, MULTIPLE)


@triton.jit
def encode_kernel(
    x, codes, scales, failed, work, table, levels, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, SCALES: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, REST_BITS: tl.constexpr, END: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row, skip, left = _own(work, 6, ROWS * BLOCK, ALIGNED)
    if left <= 0:
        return
    elements = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = load_float(x + _start(row, 1, skip, MULTIPLE), elements, elements < left)
    # A tile has at least 256 elements, so that its codes begin at a multiple of 16 bytes whatever bits they have.
    rest = codes + _start(row, 4, skip // 8 * REST_BITS, 16 if ALIGNED else 1)
    _, wrong = encode_tile(
        values, x, codes + _start(row, 2, skip // 8 * BITS, 16 if ALIGNED else 1), rest,
        scales + tl.load(row + 3) + skip // BLOCK * SCALES, left, table, levels,
        ROWS, BLOCK, True, False, CODEC, SEARCH, SHIFT, BITS, REST_BITS, END, ROUND, ALIGNED,
    )  # fmt: skip
    if wrong != 0:
        tl.atomic_or(failed + tl.load(row + 5), 1)


@triton.jit
def measured_encode_kernel(
    x, codes, scales, failed, work, table, levels, partials, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, SCALES: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, REST_BITS: tl.constexpr, END: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Encode and measure a segment, tile after tile as in ``fake_quantize_tiles``; lanes keep their sums."""
    TILE: tl.constexpr = ROWS * BLOCK
    segment = tl.program_id(0)
    row = work + segment.to(tl.int64) * 6
    left = tl.minimum(tl.load(row), _SEGMENT * TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    tiles = tl.cdiv(left, TILE)
    x += tl.multiple_of(tl.load(row + 1), MULTIPLE)
    rest = codes + tl.multiple_of(tl.load(row + 4), 16 if ALIGNED else 1)
    codes += tl.multiple_of(tl.load(row + 2), 16 if ALIGNED else 1)
    scales += tl.load(row + 3)

    elements = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    error, squares, largest, zeros, zeroed = nothing(ROWS, BLOCK, False)
    wrong = 0
    ahead = tl.load(x + elements, mask=elements < left, other=0.0)
    for i in range(tiles):
        values = ahead.to(tl.float32)
        following = elements + (i + 1) * TILE
        ahead = tl.load(x + following, mask=following < left, other=0.0)
        decoded, tile_wrong = encode_tile(
            values, x, codes + i * (TILE * BITS // 8), rest + i * (TILE * REST_BITS // 8),
            scales + i * (ROWS * SCALES), left - i * TILE, table, levels,
            ROWS, BLOCK, True, True, CODEC, SEARCH, SHIFT, BITS, REST_BITS, END, ROUND, ALIGNED,
        )  # fmt: skip
        wrong |= tile_wrong
        error, squares, largest, zeros, zeroed = add(
            values, decoded.to(tl.float32), values, decoded, error, squares, largest, zeros, zeroed, False
        )
    if wrong != 0:
        tl.atomic_or(failed + tl.load(row + 5), 1)

    error, squares, largest, zeros, zeroed = reduce(error, squares, largest, zeros, zeroed)
    unit = 1.0
    if is_safe(error, squares):
        zeroed -= zeros
    else:
        unit, shrink = unit_of_tiles(x, elements, left, tiles)
        error, squares, zeroed = 0.0, 0.0, 0.0
        for i in range(tiles):
            values, _, _ = load_again(x, elements, left, i)
            decoded, _ = encode_tile(
                values, x, codes, rest, scales, left - i * TILE, table, levels,
                ROWS, BLOCK, False, True, CODEC, SEARCH, SHIFT, BITS, REST_BITS, END, ROUND, ALIGNED,
            )  # fmt: skip
            error, squares, zeroed = add_in_units(values, decoded.to(tl.float32), shrink, error, squares, zeroed)
        largest = tl.where(error == error, largest, error)
    write_many(
        error, squares, largest, zeros, zeroed, unit, elements, left, tiles, partials, segment, tl.num_programs(0)
    )


@triton.jit
def decode_kernel(
    x, codes, scales, work, levels, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr,
    BITS: tl.constexpr, REST_BITS: tl.constexpr,
):  # fmt: skip
    row, skip, left = _own(work, 6, ROWS * BLOCK, ALIGNED)
    if left <= 0:
        return
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, row_mask = elements < left, rows * BLOCK < left
    MOST: tl.constexpr = 16 if ALIGNED else 1
    value = decode_tile(
        codes + _start(row, 2, skip if BITS == 8 else 0, MOST),
        codes + _start(row, 4, skip if REST_BITS == 8 else 0, MOST),
        scales + tl.load(row + 3), levels, elements, mask, skip // BLOCK + rows, row_mask, PARTS,
        CODEC, SEARCH, BITS, REST_BITS, ALIGNED,
    )  # fmt: skip
    store(x + _start(row, 1, skip, MULTIPLE), elements, value, mask)


@triton.jit(do_not_specialize=["seed", "limit"])
def fake_quantize_kernel(
    x, values, work, table, levels, seed, limit, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHOOSE: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row, skip, left = _own(work, 5, ROWS * BLOCK, ALIGNED)
    if left <= 0:
        return
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = elements < left
    original = load_float(x + _start(row, 1, skip, MULTIPLE), elements, mask)
    quantized = codebook.fake_quantize(original, table, levels, SEARCH, SHIFT, BITS, END, ROUND)
    if CHOOSE:
        blocks = tl.load(row + 3) + skip // BLOCK + rows
        quantized = tl.where(is_chosen(seed, limit, tl.load(row + 4), blocks)[:, None], quantized, original)
    store(values + _start(row, 2, skip, MULTIPLE), elements, quantized, mask)


@triton.jit(do_not_specialize=["seed", "limit"])
def measured_fake_quantize_kernel(
    x, values, work, table, levels, seed, limit, partials, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    IN_PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHOOSE: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    row = work + segment.to(tl.int64) * 5
    left = tl.minimum(tl.load(row), _SEGMENT * ROWS * BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    here = x + tl.multiple_of(tl.load(row + 1), MULTIPLE)
    there = values + tl.multiple_of(tl.load(row + 2), MULTIPLE)
    fake_quantize_tiles(
        here, there, left, table, levels, partials, segment, tl.num_programs(0),
        seed, limit, tl.load(row + 4), tl.load(row + 3),
        ROWS, BLOCK, _SEGMENT, SEARCH, SHIFT, BITS, END, ROUND, CHOOSE, IN_PAIRS,
    )  # fmt: skip
