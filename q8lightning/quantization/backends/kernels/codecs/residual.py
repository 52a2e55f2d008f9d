"""The codec ``linear`` with a residual. ``codebook.py`` says what tiles are, and how arithmetic is rounded."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import launch
from q8lightning.quantization.backends.kernels.bits import (
    ROUNDING,
    bits_of,
    is_finite,
    nan_unless_finite,
    round_to_code,
    rounded,
)
from q8lightning.quantization.backends.kernels.codecs import codebook
from q8lightning.quantization.backends.kernels.statistics import measure
from q8lightning.quantization.backends.kernels.tiles import load_code, load_float, store, tile
from q8lightning.quantization.spec.layout import empty_codes, empty_scales


@triton.jit
def encode(x, BITS: tl.constexpr, REST_BITS: tl.constexpr):
    """Return codes, residual codes and scale as ``reference.quantize_residual``."""
    HALF: tl.constexpr = (1 << (BITS - 1)) - 1.0
    ZERO: tl.constexpr = (1 << (REST_BITS - 1)) - 1.0
    scale = codebook.block_scale(x, 0)
    per_unit = codebook.reciprocal(scale)[:, None]
    finite = is_finite(scale)
    x = tl.where(finite[:, None], x, 0.0)
    k = codebook.linear_steps(x * per_unit, BITS)
    left = x - codebook.linear_level(k, BITS) * tl.where(finite, scale, 0.0)[:, None]
    steps = left * per_unit * (HALF * ((1 << REST_BITS) - 1))
    residual = round_to_code(tl.minimum(tl.maximum(steps, -ZERO), ZERO), ZERO)
    return bits_of(k + (ROUNDING + HALF)) & 0xFF, residual, scale


@triton.jit
def decode(code, residual, scale, BITS: tl.constexpr, REST_BITS: tl.constexpr):
    """Return the values as ``reference.dequantize_residual``."""
    STEPS: tl.constexpr = ((1 << (BITS - 1)) - 1.0) * ((1 << REST_BITS) - 1)
    # The product in float64 rounds to the quotient in float32: dividing by an odd number below 2^15 never comes near a
    # tie. It takes no branch, which a division does.
    step = (nan_unless_finite(scale).to(tl.float64) * (1.0 / STEPS)).to(tl.float32)[:, None]
    second = codebook.as_integer(residual, (1 << (REST_BITS - 1)) - 1) * step
    return codebook.decode(code, 0, scale, "linear", BITS) + second


@triton.jit
def _quantize_residual_kernel(
    x, codes, residual, scale, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr,
    BITS: tl.constexpr, REST_BITS: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, rest, block_scale = encode(values, BITS, REST_BITS)
    store(codes + first * BLOCK, elements, code, mask)
    store(residual + first * BLOCK, elements, rest, mask)
    store(scale + first, rows, block_scale, row_mask)
    if MEASURE:
        decoded = rounded(decode(code, rest, block_scale, BITS, REST_BITS), x)
        measure(values, decoded, left, partials)


@triton.jit(do_not_specialize_on_alignment=["scale"])  # they lie anywhere in a buffer
def _dequantize_residual_kernel(
    codes, residual, scale, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr, REST_BITS: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    block_scale = load_float(scale, (first + rows) // PARTS, row_mask)
    code = load_code(codes + first * BLOCK, elements, mask)
    rest = load_code(residual + first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, decode(code, rest, block_scale, BITS, REST_BITS), mask)


def quantize_residual(
    x: Tensor, block_size: int, bits: int, residual_bits: int, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.quantize_residual``."""
    parts = empty_codes(x), empty_codes(x), empty_scales(x, block_size)
    launch.run_encoder(
        _quantize_residual_kernel, "quantize_residual", block_size, x, parts, statistics,
        decode=lambda: dequantize_residual(*parts, block_size, bits, residual_bits, x.dtype),
        BITS=bits, REST_BITS=residual_bits,
    )  # fmt: skip
    return parts


def dequantize_residual(
    codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, bits: int, residual_bits: int, dtype: torch.dtype
) -> Tensor:
    """As ``reference.dequantize_residual``."""
    parts = codes, residual, scale
    return launch.run_decoder(
        _dequantize_residual_kernel, "dequantize_residual", block_size, parts, dtype, BITS=bits, REST_BITS=residual_bits
    )
