"""Floats as bit patterns, for tiles in registers.

Magnitudes of float32 order as their bit patterns do as int32, with NaN above infinity. Reductions of patterns therefore
propagate NaN, which reductions of floats do not.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.spec import reference

ROUNDING = tl.constexpr(reference.ROUNDING)

ROUNDING_PATTERN = tl.constexpr(0x4B000000)  # of ROUNDING
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all but the sign
SIGN = tl.constexpr(-0x80000000)
INFINITY = tl.constexpr(0x7F800000)  # NaN above it
NAN = tl.constexpr(0x7FC00000)
MANTISSA = tl.constexpr(0x007FFFFF)
ONE = tl.constexpr(0x3F800000)  # or-ed with a mantissa, it gives a float in [1, 2)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


INTERPRETED = tl.constexpr(not isinstance(bits_of, triton.JITFunction))  # by Triton's interpreter, not compiled


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, like):
    """``x``, float32, in the dtype that the pointer ``like`` points to."""
    if like.dtype.element_ty == tl.bfloat16 and not INTERPRETED:
        # Two at a time. The compiler does so by itself only if nobody reads the result but a store.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(like.dtype.element_ty)


@triton.jit
def as_pairs(pointer):
    """The pointer as one to int32: two bfloat16 a word."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def pair_of(words):
    """The two bfloat16 of each word, as float32."""
    return float_of(words << 16), float_of(words & -0x10000)


@triton.jit
def unpacked(words, IN_PAIRS: tl.constexpr):
    """A tile as float32, of words with two bfloat16 each or of values."""
    if IN_PAIRS:
        first, second = pair_of(words)
        return tl.reshape(tl.join(first, second), (words.shape[0], words.shape[1] * 2))
    else:
        return words.to(tl.float32)


@triton.jit
def packed(x):
    """A tile, float32, as words with two bfloat16 each."""
    first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def is_finite(x):
    return (bits_of(x) & MAGNITUDE) < INFINITY


@triton.jit
def nan_unless_finite(scale):
    return tl.where(is_finite(scale), scale, float("nan"))


@triton.jit
def one_and_mantissa(bits):
    """The float in [1, 2) with the mantissa of a pattern."""
    if INTERPRETED:
        return float_of((bits & MANTISSA) | ONE)
    # The compiler would take two instructions, each with a constant in it.
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x7FFFFF, $2, 0xEA;", "=f,r,r", [bits, ONE], dtype=tl.float32, is_pure=True, pack=1
    )


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
