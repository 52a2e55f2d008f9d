"""Measure what a reconstruction lost while its tile is in registers: ``reference.error_statistics`` in two steps.

Each program writes partial results, float32, to its column of ``partials``: the statistics in the order of
``reference.ErrorStatistics``, and the unit in whose square the first two are counted. Then ``sum_statistics.py`` adds
up the programs of a tensor in float64, in their order. Nothing is atomic, so a second run gives the same bits.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.backends.kernels.bits import INTERPRETED, MAGNITUDE, bits_of, float_of, pair_of

SAFE_FROM, SAFE_TO = tl.constexpr(2.0**-90), tl.constexpr(2.0**100)
"""If a sum of squares lies between these, float32 had the range for it and for the sum of squared errors."""


@triton.jit
def measure(x, decoded, left, partials):
    """Write the partial statistics of this program's tile to its column of ``partials``.

    ``decoded`` has the dtype of the tensor. ``x`` is float32; ``left`` of its elements belong to the tensor, and zeros
    fill it up.
    """
    decoded = decoded.to(tl.float32)
    error, squares, largest, zeros, zeroed = nothing(x.shape[0], x.shape[1], False)
    error, squares, largest, zeros, zeroed = add(x, decoded, x, decoded, error, squares, largest, zeros, zeroed, False)
    error, squares, largest, zeros, zeroed = reduce(error, squares, largest, zeros, zeroed)
    unit = 1.0
    if is_safe(error, squares):
        zeroed -= zeros  # every zero decodes to zero
    else:
        unit, shrink = _unit(_largest_pattern(x))
        error, squares, zeroed = _sums_in_units(x, decoded, shrink)
        # A maximum ignores NaN, a sum does not.
        largest = tl.where(error == error, largest, error)
    filling = x.shape[0] * x.shape[1] - left
    column, columns = tl.program_id(0), tl.num_programs(0)
    _write(error, squares, largest, zeros - filling, zeroed, unit, partials, column, columns)


@triton.jit
def measure_many(
    error, squares, largest, zeros, zeroed, original, decoded, elements, left, tiles, partials, column, columns
):
    """Write the statistics of ``tiles`` tiles that :func:`add` has added up.

    If their squares have left the range of float32, the tiles are read again. ``original`` and ``decoded`` are pointers
    to ``left`` elements, and ``elements`` the offsets of the first tile.
    """
    error, squares, largest, zeros, zeroed = reduce(error, squares, largest, zeros, zeroed)
    unit = 1.0
    if is_safe(error, squares):
        zeroed -= zeros
    else:
        tl.debug_barrier()  # other threads may have written what this one reads
        unit, shrink = unit_of_tiles(original, elements, left, tiles)
        error, squares, zeroed = 0.0, 0.0, 0.0
        for i in range(tiles):
            x, at, mask = load_again(original, elements, left, i)
            y = tl.load(decoded + at, mask=mask, other=0.0).to(tl.float32)
            error, squares, zeroed = add_in_units(x, y, shrink, error, squares, zeroed)
        largest = tl.where(error == error, largest, error)
    write_many(error, squares, largest, zeros, zeroed, unit, elements, left, tiles, partials, column, columns)


@triton.jit
def is_safe(error, squares):
    """Tell whether sums in units of 1 are right."""
    return (squares > SAFE_FROM) & (squares < SAFE_TO) & (error == error)


@triton.jit
def load_again(original, elements, left, i):
    """Return the i-th tile, float32, its offsets and their mask."""
    at = elements + i * (elements.shape[0] * elements.shape[1])
    mask = at < left
    return tl.load(original + at, mask=mask, other=0.0).to(tl.float32), at, mask


@triton.jit
def unit_of_tiles(original, elements, left, tiles):
    """Return a unit for the squares of all tiles, and one over it."""
    pattern = 0
    for i in range(tiles):
        x, _, _ = load_again(original, elements, left, i)
        pattern = tl.maximum(pattern, _largest_pattern(x))
    return _unit(pattern)


@triton.jit
def add_in_units(x, decoded, shrink, error, squares, zeroed):
    """Add the sums of a tile in squared units."""
    tile_error, tile_squares, tile_zeroed = _sums_in_units(x, decoded, shrink)
    return error + tile_error, squares + tile_squares, zeroed + tile_zeroed


@triton.jit
def write_many(error, squares, largest, zeros, zeroed, unit, elements, left, tiles, partials, column, columns):
    """Write the statistics of ``tiles`` tiles, in which all but ``left`` elements are filling."""
    filling = tiles * (elements.shape[0] * elements.shape[1]) - left
    _write(error, squares, largest, zeros - filling, zeroed, unit, partials, column, columns)


@triton.jit
def _write(error, squares, largest, zeros, zeroed, unit, partials, column, columns):
    to = partials + column
    tl.store(to, error)
    tl.store(to + columns, squares)
    tl.store(to + 2 * columns, largest)
    tl.store(to + 3 * columns, zeros)
    tl.store(to + 4 * columns, zeroed)
    tl.store(to + 5 * columns, unit)


@triton.jit
def nothing(ROWS: tl.constexpr, BLOCK: tl.constexpr, IN_PAIRS: tl.constexpr):
    """Return zeros for squared error, squares, largest error, zeros and decoded zeros of each four elements of a tile.

    With IN_PAIRS, for bfloat16 tensors only, they stand for each eight elements, and zeros are counted two in a word.
    """
    WIDTH: tl.constexpr = 8 if IN_PAIRS else 4  # as many as a thread loads at a time
    zero = tl.zeros((ROWS, BLOCK // WIDTH), tl.float32)
    none = tl.zeros((ROWS, BLOCK // WIDTH), tl.int32) if IN_PAIRS else zero
    return zero, zero, zero, none, none


@triton.jit
def add(x, decoded, x_words, decoded_words, error, squares, largest, zeros, zeroed, IN_PAIRS: tl.constexpr):
    """Add a tile to the statistics. Operations may be fused, since no code depends on how this is rounded.

    ``x`` and ``decoded`` are float32, ``decoded`` rounded to the tensor's dtype. With IN_PAIRS, ``x_words`` and
    ``decoded_words`` hold two bfloat16 each.
    """
    if IN_PAIRS:
        xa, xb = _halves(x)
        da, db = _halves(decoded)
        error, squares, largest = _add_quarters(xa, da, error, squares, largest)
        error, squares, largest = _add_quarters(xb, db, error, squares, largest)
        zeros, zeroed = _add_zeros(zeros, x_words), _add_zeros(zeroed, decoded_words)
    else:
        error, squares, largest = _add_quarters(x, decoded, error, squares, largest)
        zeros += _zeros_by_four(x)
        zeroed += _zeros_by_four(decoded)
    return error, squares, largest, zeros, zeroed


@triton.jit
def _add_quarters(x, decoded, error, squares, largest):
    xa, xb, xc, xd = _quarters(x)
    da, db, dc, dd = _quarters(decoded)
    ea, eb, ec, ed = da - xa, db - xb, dc - xc, dd - xd
    error = tl.fma(ea, ea, tl.fma(eb, eb, tl.fma(ec, ec, tl.fma(ed, ed, error))))
    squares = tl.fma(xa, xa, tl.fma(xb, xb, tl.fma(xc, xc, tl.fma(xd, xd, squares))))
    largest = tl.maximum(tl.maximum(largest, tl.abs(ea)), tl.maximum(tl.abs(eb), tl.maximum(tl.abs(ec), tl.abs(ed))))
    return error, squares, largest


@triton.jit
def _zeros_by_four(x):
    a, b, c, d = _quarters(x)
    return (is_zero(a) + is_zero(b)) + (is_zero(c) + is_zero(d))


@triton.jit
def _add_zeros(count, words):
    """Add 1 to a count where a bfloat16 is zero. Words hold two bfloat16, or two counts, exact up to 256."""
    a, b, c, d = _quarters(words)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 zero, a, b; mov.b32 zero, 0;"
        " set.eq.bf16x2.bf16x2 a, $2, zero; set.eq.bf16x2.bf16x2 b, $3, zero; add.rn.bf16x2 a, a, b;"
        " set.eq.bf16x2.bf16x2 b, $4, zero; add.rn.bf16x2 a, a, b;"
        " set.eq.bf16x2.bf16x2 b, $5, zero; add.rn.bf16x2 a, a, b; add.rn.bf16x2 $0, $1, a; }",
        "=r,r,r,r,r,r", [count, a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def reduce(error, squares, largest, zeros, zeroed):
    """Add up what :func:`add` has added for each four elements, in one exchange between lanes."""
    if zeros.dtype == tl.int32:
        zeros, zeroed = _both(zeros), _both(zeroed)
    return tl.reduce((_flat(error), _flat(squares), _flat(largest), _flat(zeros), _flat(zeroed)), 0, _combine)


@triton.jit
def _largest_pattern(x):
    return tl.max(tl.max(bits_of(x) & MAGNITUDE, axis=1), axis=0)


@triton.jit
def _unit(pattern):
    """Return a power of two close to the number with a pattern, and one over it."""
    exponent = tl.minimum(tl.maximum(pattern >> 23, 1), 253)
    return float_of(exponent << 23), float_of((254 - exponent) << 23)


@triton.jit
def _sums_in_units(x, decoded, shrink):
    """Return squared error and squares of a tile in squared units, and how many nonzero elements became zero.

    This serves tiles whose squares leave the range of float32, and tiles with a block that is not finite, in which zero
    does not decode to zero.
    """
    error, scaled = (decoded - x) * shrink, x * shrink
    zeroed = tl.where(x == 0.0, 0.0, is_zero(decoded))
    return tl.sum(_flat(error * error)), tl.sum(_flat(scaled * scaled)), tl.sum(_flat(zeroed))


@triton.jit
def is_zero(x):
    """Return 1.0 where ``x``, float32, is zero, else 0.0."""
    if INTERPRETED:
        return (x == 0.0).to(tl.float32)
    return tl.inline_asm_elementwise(
        "set.eq.f32.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _both(words):
    """Return the sum of both counts of a word, float32."""
    first, second = pair_of(words)
    return first + second


@triton.jit
def _halves(x):
    """Return the first four and the last four of each eight elements."""
    return tl.split(
        tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 2, 4)), (0, 1, 3, 2)).reshape(
            x.shape[0], x.shape[1] // 2, 2
        )
    )


@triton.jit
def _quarters(x):
    one, two = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    a, b = tl.split(one)
    c, d = tl.split(two)
    return a, b, c, d


@triton.jit
def _flat(x):
    return tl.reshape(x, (x.shape[0] * x.shape[1],), can_reorder=False)


@triton.jit
def _combine(error_a, squares_a, largest_a, zeros_a, zeroed_a, error_b, squares_b, largest_b, zeros_b, zeroed_b):
    return (
        error_a + error_b,
        squares_a + squares_b,
        tl.maximum(largest_a, largest_b),
        zeros_a + zeros_b,
        zeroed_a + zeroed_b,
    )
