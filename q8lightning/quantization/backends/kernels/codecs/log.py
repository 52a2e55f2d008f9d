"""The log codec. ``codebook.py`` says what tiles are, and how arithmetic is rounded."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import launch
from q8lightning.quantization.backends.kernels.bits import (
    INFINITY,
    INTERPRETED,
    NAN,
    ROUNDING,
    bits_of,
    float_of,
    one_and_mantissa,
    round_to_integer,
    rounded,
)
from q8lightning.quantization.backends.kernels.statistics import measure
from q8lightning.quantization.backends.kernels.tiles import load_code_for, load_float, store, tile
from q8lightning.quantization.spec import logarithm
from q8lightning.quantization.spec.layout import empty_codes, empty_scales
from q8lightning.quantization.spec.scale_dtype import rounding_code

FINEST_LOG_STEP = tl.constexpr(float(logarithm.FINEST_LOG_STEP))
LOG_MARGIN = tl.constexpr(logarithm.LOG_MARGIN)  # an integer, exact as float32
LOG2_C0, LOG2_C1, LOG2_C2 = (tl.constexpr(c) for c in logarithm.LOG2_POLYNOMIAL)
EXP2_C0, EXP2_C1, EXP2_C2, EXP2_C3 = (tl.constexpr(c) for c in logarithm.EXP2_POLYNOMIAL)


@triton.jit
def log2_correction(pattern):
    """Return the correction as ``logarithm.log2_correction``, of patterns of any shape."""
    mantissa = one_and_mantissa(pattern) - 1.0
    return mantissa * (1.0 - mantissa) * (mantissa * (mantissa * LOG2_C2 + LOG2_C1) + LOG2_C0)


@triton.jit
def exp2_pattern(position):
    """Return the pattern (int32) as ``logarithm.exp2_pattern``."""
    fraction = one_and_mantissa(position)
    power = fraction * (fraction * (fraction * EXP2_C3 + EXP2_C2) + EXP2_C1) + EXP2_C0
    return position - bits_of(fraction) + bits_of(power)


@triton.jit
def quotient(a, b):
    """Return a / b, correctly rounded if both lie in [0.25, 2**31].

    These are the steps of a division without its branches for very large and very small numbers. The branches cost
    registers and keep the compiler from mixing instructions: with them a decoder has 0.8 of its speed.
    """
    if INTERPRETED:
        return tl.div_rn(a, b)
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1)
    y = tl.fma(tl.fma(-b, y, 1.0), y, y)
    q = a * y
    q = tl.fma(tl.fma(-b, q, a), y, q)
    return tl.fma(tl.fma(-b, q, a), y, q)


@triton.jit
def log_grid(low, high, BITS: tl.constexpr):
    """Return offset, codes per pattern, origin and step as ``logarithm.log_grid``, of the patterns of the bounds."""
    correction = log2_correction(low)
    span = (high - low).to(tl.float32) + (log2_correction(high) - correction)
    steps = tl.minimum(tl.maximum(tl.floor(span * (1.0 / FINEST_LOG_STEP)), 1.0), (1 << BITS) - 2.0)
    step = round_to_integer(quotient(span + 2.0 * LOG_MARGIN, steps))
    first = low + round_to_integer(correction) - LOG_MARGIN
    return -correction, quotient(steps, tl.maximum(span, 0.25)), first - step, step


@triton.jit
def once(x):
    """Return ``x``, int32, computed by one lane for each row instead of by every lane that needs it."""
    if INTERPRETED:
        return x
    # The compiler repeats cheap arithmetic in each lane to save an exchange, unless an operation is not pure.
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def inward(low, high):
    """Return the patterns of bounds, int32, rounded as ``scale_dtype.round_bounds``."""
    high = tl.where(high > 0, tl.maximum(high & -0x10000, 0x10000), 0)
    return tl.minimum((low + 0xFFFF) & -0x10000, high), high


@triton.jit
def encode(x, BITS: tl.constexpr, ROUND: tl.constexpr = 0):
    """Return codes, and the smallest positive and the largest value, as ``reference.quantize_log``.

    ROUND is not 0 if bounds are rounded to bfloat16.
    """
    pattern = bits_of(x + 0.0)  # no negative zero
    # As unsigned integers, the patterns of negative values lie above that of NaN, and that of zero minus 1 above all.
    high = tl.max(pattern.to(tl.uint32, bitcast=True), axis=1)
    low = tl.min((pattern - 1).to(tl.uint32, bitcast=True), axis=1).to(tl.int32, bitcast=True) + 1
    wrong = high >= INFINITY
    low = tl.where(wrong, NAN, low)
    high = tl.where(wrong, NAN, high.to(tl.int32, bitcast=True))
    within = pattern
    if ROUND != 0:
        low, high = inward(low, high)
        within = tl.minimum(tl.maximum(pattern, low[:, None]), high[:, None])

    offset, codes_per_pattern, _, _ = log_grid(low, high, BITS)
    # What is wrong is decided once for a block, not for each value: all codes of a wrong block become 1.
    codes_per_pattern = tl.where(wrong, 0.0, codes_per_pattern)
    zero = tl.where(wrong, -1, 0)  # no pattern is -1
    distance = (within - low[:, None]).to(tl.float32) + log2_correction(within)
    code = bits_of((distance + offset[:, None]) * codes_per_pattern[:, None] + (ROUNDING + 1.0))
    code = tl.where(pattern == zero[:, None], 0, code) & ((1 << BITS) - 1)
    return code, float_of(low), float_of(high)


@triton.jit
def decode(code, low, high, BITS: tl.constexpr):
    """Return the values as ``reference.dequantize_log``."""
    low, high = bits_of(low), bits_of(high)
    _, _, origin, step = log_grid(low, high, BITS)
    origin, step = once(origin), once(step)
    pattern = exp2_pattern(code * step[:, None] + origin[:, None])
    pattern = tl.minimum(tl.maximum(pattern, low[:, None]), high[:, None])
    return float_of(tl.where(code == 0, 0, pattern))


@triton.jit
def _quantize_log_kernel(
    x, codes, bounds, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr,
    BITS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, low, high = encode(values, BITS, ROUND)
    store(codes + first * BLOCK, elements, code, mask)
    store(bounds + first * 2, rows * 2, low, row_mask)
    store(bounds + first * 2, rows * 2 + 1, high, row_mask)
    if MEASURE:
        decoded = rounded(decode(code, low, high, BITS), x)
        measure(values, decoded, left, partials)


@triton.jit(do_not_specialize_on_alignment=["bounds"])  # they lie anywhere in a buffer
def _dequantize_log_kernel(
    codes, bounds, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr
):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    blocks = (first + rows) // PARTS
    low, high = load_float(bounds, blocks * 2, row_mask), load_float(bounds, blocks * 2 + 1, row_mask)
    code = load_code_for(values, codes, first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, decode(code, low, high, BITS), mask)


def quantize_log(
    x: Tensor, block_size: int, bits: int, scale_dtype: str = "float32", statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize_log``."""
    parts = empty_codes(x), empty_scales(x, block_size, 2)
    launch.run_encoder(
        _quantize_log_kernel, "quantize_log", block_size, x, parts, statistics,
        decode=lambda: dequantize_log(*parts, block_size, bits, x.dtype), BITS=bits, ROUND=rounding_code(scale_dtype),
    )  # fmt: skip
    return parts


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize_log``."""
    return launch.run_decoder(_dequantize_log_kernel, "dequantize_log", block_size, (codes, bounds), dtype, BITS=bits)
