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
LOG2_C0, LOG2_C1, LOG2_C2, LOG2_C3 = (tl.constexpr(c) for c in reference.LOG2_POLYNOMIAL)
LOG2_AT_ONE = tl.constexpr(sum(reference.LOG2_POLYNOMIAL))
EXP2_C0, EXP2_C1, EXP2_C2, EXP2_C3 = (tl.constexpr(c) for c in reference.EXP2_POLYNOMIAL)

# Bit patterns
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all but the sign
SIGN = tl.constexpr(-0x80000000)
INFINITY = tl.constexpr(0x7F800000)  # NaN above it
NAN = tl.constexpr(0x7FC00000)
ONE = tl.constexpr(0x3F800000)  # or-ed with a mantissa, it gives a float in [1, 2)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


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
    """The nearest integer, ties to even, for x of at most 2**24 in magnitude: above 2**23 float32 are integers."""
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
def nearest_code(y, thresholds, CODEBOOK: tl.constexpr, BITS: tl.constexpr):
    """How many thresholds lie below each normalised value.

    CODEBOOK names a closed form; any other codebook is searched in ``thresholds``: ``[2**BITS - 1]`` float32,
    increasing, filled up with infinity.
    """
    if CODEBOOK == "linear":
        code = round_to_code(y * 127.0, 127)
    elif CODEBOOK == "softsign":
        share = bits_of(1.0 - tl.div_rn(1.0, tl.abs(y) + 1.0)) | (bits_of(y) & SIGN)
        code = round_to_code(float_of(share) * 254.0, 127)
    else:
        code = tl.zeros(y.shape, tl.int32)
        for bit in tl.static_range(BITS):
            half = 1 << (BITS - 1 - bit)
            code += tl.where(y > tl.load(thresholds + code + (half - 1)), half, 0)
    return code


@triton.jit
def encode(x, thresholds, CODEBOOK: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr):
    """As ``reference.quantize``: codes and scale."""
    scale = block_scale(x, END)
    return nearest_code(normalise(x, scale), thresholds, CODEBOOK, BITS), scale


@triton.jit
def decode(code, levels, scale):
    """As ``reference.dequantize``; ``levels``: ``[256]`` float32, 0 for codes that the codebook lacks."""
    return tl.load(levels + code) * nan_unless_finite(scale)[:, None]


# Residual


@triton.jit
def encode_residual(x, levels):
    """As ``reference.quantize_residual``: codes, residual codes and scale; ``levels`` of the linear codebook."""
    code, scale = encode(x, levels, "linear", 8, 0)
    left = x - decode(code, levels, scale)
    residual = round_to_code(normalise(left, scale) * (RESIDUAL_DIVISOR * 127), 127)
    return code, tl.minimum(tl.maximum(residual, 1), 253), scale


@triton.jit
def decode_residual(code, residual, levels, scale):
    """As ``reference.dequantize_residual``; ``levels`` of the linear codebook."""
    return decode(code, levels, scale) + decode(residual, levels, tl.div_rn(scale, RESIDUAL_DIVISOR))


# Log


@triton.jit
def log2_correction(pattern):
    """As ``reference.log2_correction``, for any shape."""
    mantissa = float_of((pattern & (OCTAVE - 1)) | ONE)
    return mantissa * (mantissa * (mantissa * (mantissa * LOG2_C3 + LOG2_C2) + LOG2_C1) + LOG2_C0)


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
    first = low + round_to_integer(correction - LOG2_AT_ONE) - LOG_MARGIN
    return -correction, tl.div_rn(steps, tl.maximum(span, 1.0)), first - step, step


@triton.jit
def encode_log(x):
    """As ``reference.quantize_log``: codes, and the smallest positive and the largest value."""
    magnitude = tl.where(x < 0.0, NAN, bits_of(x) & MAGNITUDE)
    high = tl.max(magnitude, axis=1)
    low = tl.min(tl.where(magnitude > 0, magnitude, INFINITY), axis=1)
    wrong = high >= INFINITY
    low = tl.where(wrong, NAN, tl.where(high > 0, low, 0))
    high = tl.where(wrong, NAN, high)

    offset, codes_per_pattern, _, _ = log_grid(low, high)
    distance = (magnitude - low[:, None]).to(tl.float32) + log2_correction(magnitude)
    code = round_to_code((distance + offset[:, None]) * codes_per_pattern[:, None], 1)
    code = tl.where(wrong[:, None], 1, tl.where(magnitude > 0, code, 0))
    return code, float_of(low), float_of(high)


@triton.jit
def decode_log(code, low, high):
    """As ``reference.dequantize_log``."""
    low, high = bits_of(low), bits_of(high)
    _, _, origin, step = log_grid(low, high)
    pattern = exp2_pattern(code * step[:, None] + origin[:, None])
    pattern = tl.minimum(tl.maximum(pattern, low[:, None]), high[:, None])
    return float_of(pattern * tl.minimum(code, 1))


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
