"""What each codec means for a tile of blocks in registers; ``blockwise.py`` moves the tiles.

A tile ``x`` is ``[ROWS, BLOCK]`` float32, one block a row, zero where a short last block has ended. What belongs to a
block, such as its scale, is ``[ROWS]`` float32. Codes are ``[ROWS, BLOCK]`` int32.

These functions return the bits of ``reference.py``, so they round once an operation. They divide with ``tl.div_rn``,
because Triton's ``/`` is approximate on a GPU, and kernels that call them must be launched with
``enable_fp_fusion=False``, because a fused multiply-add rounds once for two operations.

Magnitudes of float32 order as their bit patterns do as int32, with NaN above infinity. Reductions of patterns therefore
propagate NaN, which reductions of floats do not.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization import reference

SMALLEST_NORMAL = tl.constexpr(reference.SMALLEST_NORMAL)
ROUNDING = tl.constexpr(reference.ROUNDING)
RESIDUAL_DIVISOR = tl.constexpr(reference.RESIDUAL_DIVISOR)
OCTAVE = tl.constexpr(reference.OCTAVE)
FINEST_LOG_STEP = tl.constexpr(float(reference.FINEST_LOG_STEP))
LOG_MARGIN = tl.constexpr(reference.LOG_MARGIN)  # an integer, exact as float32
LOG2_C0, LOG2_C1, LOG2_C2 = (tl.constexpr(c) for c in reference.LOG2_POLYNOMIAL)
EXP2_C0, EXP2_C1, EXP2_C2, EXP2_C3 = (tl.constexpr(c) for c in reference.EXP2_POLYNOMIAL)

HIGH_127TH = tl.constexpr(float(2064 * 2.0**-18))  # 1 / 127 to 12 bits
LOW_127TH = tl.constexpr(1 / 127 - 2064 * 2.0**-18)

# Bit patterns
ROUNDING_PATTERN = tl.constexpr(0x4B000000)  # of ROUNDING
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all but the sign
SIGN = tl.constexpr(-0x80000000)
INFINITY = tl.constexpr(0x7F800000)  # NaN above it
NAN = tl.constexpr(0x7FC00000)
ONE = tl.constexpr(0x3F800000)  # or-ed with a mantissa, it gives a float in [1, 2)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


INTERPRETED = tl.constexpr(not isinstance(bits_of, triton.JITFunction))  # by Triton's interpreter, not compiled


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    return (bits_of(x) & MAGNITUDE) < INFINITY


@triton.jit
def nan_unless_finite(scale):
    return tl.where(is_finite(scale), scale, float("nan"))


@triton.jit
def round_to_code(x, ZERO: tl.constexpr):
    """x + ZERO, which is a byte, rounded once to an integer: see ``reference.ROUNDING``."""
    return bits_of(x + (ROUNDING + ZERO)) & 0xFF


@triton.jit
def round_to_integer(x):
    """The nearest integer, ties to even, for x within int32; float32 above 2**23 are integers already."""
    magnitude = tl.abs(x)
    rounded = tl.where(magnitude < ROUNDING, (magnitude + ROUNDING) - ROUNDING, magnitude).to(tl.int32)
    return tl.where(x < 0.0, -rounded, rounded)


# Codebooks


@triton.jit
def block_scale(x, END: tl.constexpr):
    """As ``reference.block_scale``: the largest magnitude of each row, signed towards END unless that is 0."""
    bits = bits_of(x)
    magnitude = tl.max(bits & MAGNITUDE, axis=1)
    scale = float_of(magnitude)
    scale = tl.where(scale < SMALLEST_NORMAL, 0.0, scale)
    if END != 0:
        holds_positive = tl.max(bits, axis=1) == magnitude  # patterns of negative numbers are negative
        scale = tl.where(holds_positive, scale * END, scale * -END) + 0.0  # no negative zero
    return scale


@triton.jit
def reciprocal(scale):
    """1 / scale, and 0 where the scale is 0 or not finite."""
    usable = (scale != 0.0) & is_finite(scale)
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def normalise(x, scale):
    """x / scale by way of the reciprocal; 0, which every codebook has a code for, in blocks that are not finite."""
    return tl.where(is_finite(scale)[:, None], x, 0.0) * reciprocal(scale)[:, None]


@triton.jit
def nearest_code(y, table, SEARCH: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr, HALF: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    """How many thresholds lie below each normalised value; see ``tables.Tables`` for what tells the search."""
    if SEARCH == "linear":
        code = round_to_code(y * 127.0, 127)
    elif SEARCH == "softsign":
        share = bits_of(1.0 - reciprocal_to_two(tl.abs(y) + 1.0)) | (bits_of(y) & SIGN)
        code = round_to_code(float_of(share) * 254.0, 127)
    elif SEARCH == "cells":
        bits = bits_of(y)
        cell = tl.maximum((bits & MAGNITUDE) >> SHIFT, LOWEST) - LOWEST
        word = tl.load(table + tl.where(bits < 0, cell + HALF, cell))
        code = (word & 0xFF) + (y > float_of(word & -0x100)).to(tl.int32)
    else:
        code = tl.zeros(y.shape, tl.int32)
        for bit in tl.static_range(BITS):
            half = 1 << (BITS - 1 - bit)
            code += tl.where(y > float_of(tl.load(table + code + (half - 1))), half, 0)
    return code


@triton.jit
def encode(x, table, SEARCH: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr, HALF: tl.constexpr,
           BITS: tl.constexpr, END: tl.constexpr):  # fmt: skip
    """As ``reference.quantize``: codes and scale."""
    scale = block_scale(x, END)
    return nearest_code(normalise(x, scale), table, SEARCH, SHIFT, LOWEST, HALF, BITS), scale


@triton.jit
def reciprocal_to_two(a):
    """1 / a, correctly rounded, for a in [1, 2]."""
    if INTERPRETED:
        return tl.div_rn(1.0, a)
    # One Newton step is enough in this range, for each of its 2**23 floats (tests enumerate them), at a third of the
    # instructions of a general division.
    estimate = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.fma(tl.fma(-a, estimate, 1.0), estimate, estimate)


@triton.jit
def linear_level(k):
    """k / 127 for an integer k in [-127, 127] as float32, correctly rounded."""
    # In two parts: the first product is exact, and their sum is the correctly rounded quotient for each of these k.
    return k * HIGH_127TH + k * LOW_127TH


@triton.jit
def linear_steps(y):
    """The nearest integer number of steps of the linear codebook, as float32."""
    return (y * 127.0 + (ROUNDING + 127.0)) - (ROUNDING + 127.0)


@triton.jit
def level(code, levels, SEARCH: tl.constexpr):
    """``levels[code]``; ``levels``: ``[256]`` float32, 0 for codes that the codebook lacks."""
    if SEARCH == "linear":
        k = float_of(code | ROUNDING_PATTERN) - (ROUNDING + 127.0)
        return tl.where(code == 255, 0.0, linear_level(k))
    else:
        return tl.load(levels + code)


@triton.jit
def decode(code, levels, scale, SEARCH: tl.constexpr):
    """As ``reference.dequantize``."""
    return level(code, levels, SEARCH) * nan_unless_finite(scale)[:, None]


# Residual


@triton.jit
def fake_quantize(x, table, levels, SEARCH: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr,
                  HALF: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """As ``reference.fake_quantize``, float32."""
    scale = block_scale(x, 0)
    y = normalise(x, scale)
    if SEARCH == "linear":
        value = linear_level(linear_steps(y))
    else:
        value = level(nearest_code(y, table, SEARCH, SHIFT, LOWEST, HALF, BITS), levels, SEARCH)
    return value * nan_unless_finite(scale)[:, None]


@triton.jit
def encode_residual(x):
    """As ``reference.quantize_residual``: codes, residual codes and scale."""
    scale = block_scale(x, 0)
    per_unit = reciprocal(scale)[:, None]
    finite = is_finite(scale)
    x = tl.where(finite[:, None], x, 0.0)
    k = linear_steps(x * per_unit)
    left = x - linear_level(k) * tl.where(finite, scale, 0.0)[:, None]
    residual = round_to_code(left * per_unit * (RESIDUAL_DIVISOR * 127), 127)
    code = bits_of(k + (ROUNDING + 127.0)) & 0xFF
    return code, tl.minimum(tl.maximum(residual, 1), 253), scale


@triton.jit
def decode_residual(code, residual, scale):
    """As ``reference.dequantize_residual``."""
    return decode(code, 0, scale, "linear") + decode(residual, 0, tl.div_rn(scale, RESIDUAL_DIVISOR), "linear")


# Log


@triton.jit
def log2_correction(pattern):
    """As ``reference.log2_correction``, for any shape."""
    mantissa = float_of((pattern & (OCTAVE - 1)) | ONE) - 1.0
    return mantissa * (1.0 - mantissa) * (mantissa * (mantissa * LOG2_C2 + LOG2_C1) + LOG2_C0)


@triton.jit
def exp2_pattern(position):
    """As ``reference.exp2_pattern``: a bit pattern, int32."""
    fraction = float_of((position & (OCTAVE - 1)) | ONE)
    power = fraction * (fraction * (fraction * EXP2_C3 + EXP2_C2) + EXP2_C1) + EXP2_C0
    return (position & -OCTAVE) + (bits_of(power) - ONE)


@triton.jit
def log_grid(low, high):
    """As ``reference.log_grid``, of the bounds' patterns: offset, codes per pattern, origin and step."""
    correction = log2_correction(low)
    span = (high - low).to(tl.float32) + (log2_correction(high) - correction)
    steps = tl.minimum(tl.maximum(tl.floor(span * (1.0 / FINEST_LOG_STEP)), 1.0), 254.0)
    step = round_to_integer(tl.div_rn(span + 2.0 * LOG_MARGIN, steps))
    first = low + round_to_integer(correction) - LOG_MARGIN
    return -correction, tl.div_rn(steps, tl.maximum(span, 0.25)), first - step, step


@triton.jit
def encode_log(x):
    """As ``reference.quantize_log``: codes, and the smallest positive and the largest value."""
    pattern = bits_of(x + 0.0)  # no negative zero
    # Unsigned, a negative value's pattern lies above that of NaN, and one less than zero's above all.
    high = tl.max(pattern.to(tl.uint32, bitcast=True), axis=1)
    low = tl.min((pattern - 1).to(tl.uint32, bitcast=True), axis=1).to(tl.int32, bitcast=True) + 1
    wrong = high >= INFINITY
    low = tl.where(wrong, NAN, low)
    high = tl.where(wrong, NAN, high.to(tl.int32, bitcast=True))

    offset, codes_per_pattern, _, _ = log_grid(low, high)
    distance = (pattern - low[:, None]).to(tl.float32) + log2_correction(pattern)
    code = round_to_code((distance + offset[:, None]) * codes_per_pattern[:, None], 1)
    code = tl.where(wrong[:, None], 1, tl.where(pattern == 0, 0, code))
    return code, float_of(low), float_of(high)


@triton.jit
def decode_log(code, low, high):
    """As ``reference.dequantize_log``."""
    low, high = bits_of(low), bits_of(high)
    _, _, origin, step = log_grid(low, high)
    pattern = exp2_pattern(code * step[:, None] + origin[:, None])
    pattern = tl.minimum(tl.maximum(pattern, low[:, None]), high[:, None])
    return float_of(tl.where(code == 0, 0, pattern))


# Affine


@triton.jit
def encode_affine(x):
    """As ``reference.quantize_affine``: codes, scale and zero point (``[ROWS]`` int32)."""
    finite = tl.max(bits_of(x) & MAGNITUDE, axis=1) < INFINITY
    x = tl.where(finite[:, None], x, 0.0)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    scale = tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0)
    scale = tl.where(scale < SMALLEST_NORMAL, 0.0, scale)
    per_unit = reciprocal(scale)
    zero_point = _byte(0.5 - low * per_unit)
    code = _byte(x * per_unit[:, None] + (zero_point + 0.5)[:, None])
    return code.to(tl.int32), tl.where(finite, scale, float("nan")), zero_point.to(tl.int32)


@triton.jit
def _byte(x):
    return tl.minimum(tl.maximum(tl.floor(x), 0.0), 255.0)


@triton.jit
def decode_affine(code, scale, zero_point):
    """As ``reference.dequantize_affine``."""
    return (code - zero_point[:, None]).to(tl.float32) * nan_unless_finite(scale)[:, None]
