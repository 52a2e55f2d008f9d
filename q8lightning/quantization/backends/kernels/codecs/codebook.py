"""The codecs that are a codebook, and the conventions of all codecs in this folder.

A tile ``x`` is ``[ROWS, BLOCK]`` float32. Each row is a block; a short last block is filled up with zeros. Codes are
``[ROWS, BLOCK]`` int32, and scales ``[ROWS]`` float32.

Every operation is rounded once, so that these functions return the bits of ``reference.py``. They divide with
``tl.div_rn``, because Triton's ``/`` is approximate on a GPU. Their kernels must be launched with
``enable_fp_fusion=False``, because a fused multiply-add rounds once for two operations.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import launch
from q8lightning.quantization.backends.kernels.bits import (
    INTERPRETED,
    MAGNITUDE,
    ROUNDING,
    ROUNDING_PATTERN,
    SIGN,
    bits_of,
    float_of,
    is_finite,
    nan_unless_finite,
    round_to_code,
    rounded,
)
from q8lightning.quantization.backends.kernels.statistics import measure
from q8lightning.quantization.backends.kernels.tables import tables_of
from q8lightning.quantization.backends.kernels.tiles import load_code, load_float, store, tile
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.quantization.spec.layout import empty_codes, empty_scales

SMALLEST_NORMAL = tl.constexpr(reference.SMALLEST_NORMAL)


@triton.jit
def block_scale(x, END: tl.constexpr, ROUND: tl.constexpr = 0):
    """Return the largest magnitude of each row as ``reference.block_scale``, with a sign unless END is 0.

    It is rounded as ``scale_dtype.round_scale``, by the number ROUND of ``Codebook.rounding``.
    """
    bits = bits_of(x)
    magnitude = tl.max(bits & MAGNITUDE, axis=1)
    scale = float_of(magnitude)
    scale = tl.where(scale < SMALLEST_NORMAL, 0.0, scale)
    if ROUND != 0:
        scale = _rounded(scale, ROUND)
    if END != 0:
        holds_positive = tl.max(bits, axis=1) == magnitude  # patterns of negative numbers are negative
        scale = tl.where(holds_positive, scale * END, scale * -END) + 0.0  # no negative zero
    return scale


@triton.jit
def _rounded(scale, ROUND: tl.constexpr):
    """Round scales that are not negative; see :func:`block_scale`."""
    if ROUND < 0:
        bits = bits_of(scale)
        # Half of what is dropped, and the last bit that stays: ties go to even.
        nearest = float_of(tl.minimum((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, 0x7F7F0000))
    else:
        UNIT: tl.constexpr = 1.0 * (1 << (ROUND - 1))
        step = scale * (1.0 / UNIT)
        bits = bits_of(step)
        normal = tl.minimum(float_of((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000), 65504.0)
        # Beside 0.5, the last bit of a float32 is that of float16 below its smallest normal number.
        nearest = tl.where(step < 2.0**-14, (step + 0.5) - 0.5, normal) * UNIT
    return tl.where(is_finite(scale), nearest, scale)


@triton.jit
def normalise_rounded(x, scale):
    """Return what :func:`normalise` does, within [-1, 1]: a rounded scale may be smaller than the largest element."""
    return tl.minimum(tl.maximum(normalise(x, scale), -1.0), 1.0)


@triton.jit
def reciprocal(scale):
    """Return 1 / scale, and 0 where the scale is 0 or not finite."""
    usable = (scale != 0.0) & is_finite(scale)
    return tl.where(usable, _one_over(tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def _one_over(x):
    """Return 1 / x, correctly rounded."""
    if INTERPRETED:
        return tl.div_rn(1.0, x)
    return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def normalise(x, scale):
    """Return x times the reciprocal of its scale; 0, which every codebook holds, in blocks that are not finite."""
    return tl.where(is_finite(scale)[:, None], x, 0.0) * reciprocal(scale)[:, None]


@triton.jit
def look_up(table, index):
    """Return the patterns, int32, of ``table[index]``, for an int32 index that is not negative."""
    if INTERPRETED:
        return tl.load(table + index).to(tl.int32, bitcast=True)
    # This computes the address in one instruction; the compiler takes two.
    return tl.inline_asm_elementwise(
        "{ .reg .b64 at; mad.wide.u32 at, $1, 4, $2; ld.global.nc.b32 $0, [at]; }", "=r,r,l",
        [index, table.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def nearest_code(y, table, SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Return the number of thresholds below each normalised value, by the search that ``tables.Tables`` describes."""
    HALF: tl.constexpr = (1 << (BITS - 1)) - 1
    if SEARCH == "linear":
        code = round_to_code(y * (HALF * 1.0), HALF)
    elif SEARCH == "softsign":
        share = bits_of(1.0 - reciprocal_to_two(tl.abs(y) + 1.0)) | (bits_of(y) & SIGN)
        code = round_to_code(float_of(share) * (HALF * 2.0), HALF)
    elif SEARCH == "cells":
        word = look_up(table, (y.to(tl.uint32, bitcast=True) >> SHIFT).to(tl.int32))
        code = (word & 0xFF) + (y > float_of(word & -0x100)).to(tl.int32)
    else:
        code = tl.zeros(y.shape, tl.int32)
        for bit in tl.static_range(BITS):
            half = 1 << (BITS - 1 - bit)
            code += tl.where(y > float_of(tl.load(table + code + (half - 1))), half, 0)
    return code


@triton.jit
def encode(
    x, table, SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr, ROUND: tl.constexpr = 0
):
    """Return codes and scale as ``reference.quantize``."""
    scale = block_scale(x, END, ROUND)
    if ROUND != 0:
        y = normalise_rounded(x, scale)
    elif SEARCH == "cells":
        y = x * reciprocal(scale)[:, None]  # Cells have an entry for NaN and infinity, so those need no care.
    else:
        y = normalise(x, scale)
    return nearest_code(y, table, SEARCH, SHIFT, BITS), scale


@triton.jit
def reciprocal_to_two(a):
    """Return 1 / a, correctly rounded, for a in [1, 2]."""
    if INTERPRETED:
        return tl.div_rn(1.0, a)
    # In this range one Newton step is enough for each of the 2**23 floats, as a test shows by trying them all. It takes
    # a third of the instructions of a general division.
    estimate = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.fma(tl.fma(-a, estimate, 1.0), estimate, estimate)


@triton.jit
def linear_level(k, BITS: tl.constexpr):
    """Return k over the largest k, correctly rounded, for an integer k of the codebook as float32."""
    # One over the largest k is a sum of two parts. The first product is exact, and the sum is the rounded quotient for
    # all k, as a test shows by trying them.
    PART: tl.constexpr = 1.0 / (1 << (BITS - 1))
    HIGH: tl.constexpr = PART + PART * PART
    LOW: tl.constexpr = 1.0 / ((1 << (BITS - 1)) - 1) - HIGH
    return tl.fma(k, HIGH, k * LOW)


@triton.jit
def linear_steps(y, BITS: tl.constexpr):
    """Return the nearest integer number of steps of the linear codebook, as float32."""
    HALF: tl.constexpr = (1 << (BITS - 1)) - 1.0
    return (y * HALF + (ROUNDING + HALF)) - (ROUNDING + HALF)


@triton.jit
def as_integer(code, ZERO: tl.constexpr):
    """Return ``code - ZERO`` as float32, for codes in [0, 255]."""
    return float_of(code | ROUNDING_PATTERN) - (ROUNDING + ZERO)


@triton.jit
def level(code, levels, SEARCH: tl.constexpr, BITS: tl.constexpr):
    """Return ``levels[code]``. ``levels`` is ``[256]`` float32, 0 for codes that the codebook lacks."""
    if SEARCH == "linear":
        k = as_integer(code, (1 << (BITS - 1)) - 1)
        return tl.where(code > (1 << BITS) - 2, 0.0, linear_level(k, BITS))
    else:
        return float_of(look_up(levels, code))


@triton.jit
def decode(code, levels, scale, SEARCH: tl.constexpr, BITS: tl.constexpr):
    """Return the values as ``reference.dequantize``."""
    return level(code, levels, SEARCH, BITS) * nan_unless_finite(scale)[:, None]


@triton.jit
def fake_quantize(
    x, table, levels, SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Return the values, float32, as ``reference.dequantize`` of ``reference.quantize``."""
    scale = block_scale(x, END, ROUND)
    # NaN in a block that is not finite, whose codes do not matter.
    y = normalise_rounded(x, scale) if ROUND != 0 else x * reciprocal(scale)[:, None]
    if SEARCH == "linear":
        value = linear_level(linear_steps(y, BITS), BITS)
    else:
        value = level(nearest_code(y, table, SEARCH, SHIFT, BITS), levels, SEARCH, BITS)
    return value * nan_unless_finite(scale)[:, None]


@triton.jit
def _quantize_kernel(
    x, codes, scale, table, levels, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    END: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, block_scale = encode(values, table, SEARCH, SHIFT, BITS, END, ROUND)
    store(codes + first * BLOCK, elements, code, mask)
    store(scale + first, rows, block_scale, row_mask)
    if MEASURE:
        decoded = rounded(decode(code, levels, block_scale, SEARCH, BITS), x)
        measure(values, decoded, left, partials)


@triton.jit(do_not_specialize_on_alignment=["scale"])  # they lie anywhere in a buffer
def _dequantize_kernel(
    codes, scale, values, levels, numel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SEARCH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    block_scale = load_float(scale, (first + rows) // PARTS, row_mask)
    value = decode(load_code(codes + first * BLOCK, elements, mask), levels, block_scale, SEARCH, BITS)
    store(values + first * BLOCK, elements, value, mask)


def quantize(
    x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize``."""
    tables = tables_of(codebook, x.device)
    parts = empty_codes(x), empty_scales(x, block_size)
    launch.run_encoder(
        _quantize_kernel, "quantize" if tables.closed_form else "quantize in cells", block_size, x, parts, statistics,
        decode=lambda: dequantize(*parts, codebook, block_size, x.dtype), tables=(tables.table, tables.levels),
        **launch.search_constants(tables), END=codebook.end if signed_scale else 0,
        ROUND=codebook.rounding,
    )  # fmt: skip
    return parts


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize``."""
    tables = tables_of(codebook, codes.device)
    settings = "dequantize linear" if tables.level_search == "linear" else "dequantize"
    parts, levels = (codes, scale), (tables.levels,)
    return launch.run_decoder(
        _dequantize_kernel, settings, block_size, parts, dtype, tables=levels, SEARCH=tables.level_search,
        BITS=tables.bits,
    )  # fmt: skip
