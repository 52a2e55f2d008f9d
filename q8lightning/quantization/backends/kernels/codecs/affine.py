"""The affine codec, which has a zero point. ``codebook.py`` says what tiles are, and how arithmetic is rounded."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import launch
from q8lightning.quantization.backends.kernels.bits import INFINITY, MAGNITUDE, bits_of, nan_unless_finite, rounded
from q8lightning.quantization.backends.kernels.codecs import codebook
from q8lightning.quantization.backends.kernels.statistics import measure
from q8lightning.quantization.backends.kernels.tiles import load_code, load_float, store, tile
from q8lightning.quantization.spec.layout import empty_codes, empty_scales


@triton.jit
def encode(x, BITS: tl.constexpr):
    """Return codes, scale and zero point (``[ROWS]`` int32) as ``reference.quantize_affine``."""
    LAST: tl.constexpr = (1 << BITS) - 1.0
    finite = tl.max(bits_of(x) & MAGNITUDE, axis=1) < INFINITY
    x = tl.where(finite[:, None], x, 0.0)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    scale = tl.div_rn(high, LAST) - tl.div_rn(low, LAST)
    scale = tl.where(scale < codebook.SMALLEST_NORMAL, 0.0, scale)
    per_unit = codebook.reciprocal(scale)
    zero_point = _code(0.5 - low * per_unit, LAST)
    code = _code(x * per_unit[:, None] + (zero_point + 0.5)[:, None], LAST)
    return code.to(tl.int32), tl.where(finite, scale, float("nan")), zero_point.to(tl.int32)


@triton.jit
def _code(x, LAST: tl.constexpr):
    """Round down to an integer from 0 to the last code."""
    return tl.minimum(tl.maximum(tl.floor(x), 0.0), LAST)


@triton.jit
def decode(code, scale, zero_point):
    """Return the values as ``reference.dequantize_affine``."""
    return (code - zero_point[:, None]).to(tl.float32) * nan_unless_finite(scale)[:, None]


@triton.jit
def _quantize_affine_kernel(
    x, codes, scale, zero_point, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, block_scale, block_zero = encode(values, BITS)
    store(codes + first * BLOCK, elements, code, mask)
    store(scale + first, rows, block_scale, row_mask)
    store(zero_point + first, rows, block_zero, row_mask)
    if MEASURE:
        decoded = rounded(decode(code, block_scale, block_zero), x)
        measure(values, decoded, left, partials)


@triton.jit
def _dequantize_affine_kernel(
    codes, scale, zero_point, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    blocks = (first + rows) // PARTS
    block_scale, block_zero = load_float(scale, blocks, row_mask), load_code(zero_point, blocks, row_mask)
    code = load_code(codes + first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, decode(code, block_scale, block_zero), mask)


def quantize_affine(
    x: Tensor, block_size: int, bits: int = 8, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.quantize_affine``."""
    parts = empty_codes(x), empty_scales(x, block_size), empty_scales(x, block_size, dtype=torch.uint8)
    launch.run_encoder(
        _quantize_affine_kernel, "quantize_affine", block_size, x, parts, statistics,
        decode=lambda: dequantize_affine(*parts, block_size, x.dtype), BITS=bits,
    )  # fmt: skip
    return parts


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize_affine``."""
    parts = codes, scale, zero_point
    return launch.run_decoder(_dequantize_affine_kernel, "dequantize_affine", block_size, parts, dtype)
