"""Compute with the bit patterns of floats.

As int32, the patterns of float32 magnitudes order as the magnitudes do, with NaN above infinity. A maximum of patterns
therefore propagates NaN, which a maximum of floats does not.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.spec import reference

ROUNDING = tl.constexpr(reference.ROUNDING)

ROUNDING_PATTERN = tl.constexpr(0x4B000000)  # the pattern of ROUNDING
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits but the sign
SIGN = tl.constexpr(-0x80000000)
INFINITY = tl.constexpr(0x7F800000)  # magnitudes above it are NaN
NAN = tl.constexpr(0x7FC00000)
MANTISSA = tl.constexpr(0x007FFFFF)
ONE = tl.constexpr(0x3F800000)  # or-ed with a mantissa, it is the pattern of a float in [1, 2)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


INTERPRETED = tl.constexpr(not isinstance(bits_of, triton.JITFunction))  # True in Triton's interpreter


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, like):
    """Return ``x``, float32, in the dtype of the values at the pointer ``like``."""
    if like.dtype.element_ty == tl.bfloat16 and not INTERPRETED:
        # This rounds two values in an instruction. The compiler does so only if the result is just stored.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(like.dtype.element_ty)


@triton.jit
def as_pairs(pointer):
    """Return a pointer to bfloat16 as a pointer to int32, words of two bfloat16."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def pair_of(words):
    """Return the two bfloat16 of each word, as float32."""
    return float_of(words << 16), float_of(words & -0x10000)


@triton.jit
def unpacked(words, IN_PAIRS: tl.constexpr):
    """Return a tile as float32, from words of two bfloat16 or from values."""
    if IN_PAIRS:
        first, second = pair_of(words)
        return tl.reshape(tl.join(first, second), (words.shape[0], words.shape[1] * 2))
    else:
        return words.to(tl.float32)


@triton.jit
def packed(x):
    """Return a tile of float32 as words of two bfloat16."""
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
    """Return the float in [1, 2) with the mantissa of a pattern."""
    if INTERPRETED:
        return float_of((bits & MANTISSA) | ONE)
    # This is one instruction; the compiler takes two, each with a constant.
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x7FFFFF, $2, 0xEA;", "=f,r,r", [bits, ONE], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def round_to_code(x, ZERO: tl.constexpr):
    """Return x + ZERO, in [0, 255], rounded once to an integer; ``reference.ROUNDING`` says how."""
    return bits_of(x + (ROUNDING + ZERO)) & 0xFF


@triton.jit
def round_to_integer(x):
    """Return the nearest integer, ties to even, for x in the range of int32; float32 above 2**23 are integers."""
    magnitude = tl.abs(x)
    rounded = tl.where(magnitude < ROUNDING, (magnitude + ROUNDING) - ROUNDING, magnitude).to(tl.int32)
    return tl.where(x < 0.0, -rounded, rounded)
