"""The codec ``linear`` with a residual. ``codebook.py`` says what tiles are, and how arithmetic is rounded."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import launch
from q8lightning.quantization.backends.kernels.bits import ROUNDING, bits_of, is_finite, round_to_code, rounded
from q8lightning.quantization.backends.kernels.codecs import codebook
from q8lightning.quantization.backends.kernels.statistics import measure
from q8lightning.quantization.backends.kernels.tiles import load_code, load_float, store, tile
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.layout import empty_codes, empty_scales

RESIDUAL_DIVISOR = tl.constexpr(reference.RESIDUAL_DIVISOR)


@triton.jit
def encode(x):
    """Return codes, residual codes and scale as ``reference.quantize_residual``."""
    scale = codebook.block_scale(x, 0)
    per_unit = codebook.reciprocal(scale)[:, None]
    finite = is_finite(scale)
    x = tl.where(finite[:, None], x, 0.0)
    k = codebook.linear_steps(x * per_unit)
    left = x - codebook.linear_level(k) * tl.where(finite, scale, 0.0)[:, None]
    residual = round_to_code(left * per_unit * (RESIDUAL_DIVISOR * 127), 127)
    code = bits_of(k + (ROUNDING + 127.0)) & 0xFF
    return code, tl.minimum(tl.maximum(residual, 1), 253), scale


@triton.jit
def decode(code, residual, scale):
    """Return the values as ``reference.dequantize_residual``."""
    return codebook.decode(code, 0, scale, "linear") + codebook.decode(
        residual, 0, tl.div_rn(scale, RESIDUAL_DIVISOR), "linear"
    )


@triton.jit
def _quantize_residual_kernel(
    x, codes, residual, scale, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr
):
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, rest, block_scale = encode(values)
    store(codes + first * BLOCK, elements, code, mask)
    store(residual + first * BLOCK, elements, rest, mask)
    store(scale + first, rows, block_scale, row_mask)
    if MEASURE:
        decoded = rounded(decode(code, rest, block_scale), x)
        measure(values, decoded, left, partials)


@triton.jit(do_not_specialize_on_alignment=["scale"])  # they lie anywhere in a buffer
def _dequantize_residual_kernel(
    codes, residual, scale, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    block_scale = load_float(scale, (first + rows) // PARTS, row_mask)
    code = load_code(codes + first * BLOCK, elements, mask)
    rest = load_code(residual + first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, decode(code, rest, block_scale), mask)


def quantize_residual(x: Tensor, block_size: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.quantize_residual``."""
    parts = empty_codes(x), empty_codes(x), empty_scales(x, block_size)
    launch.run_encoder(
        _quantize_residual_kernel, "quantize_residual", block_size, x, parts, statistics,
        decode=lambda: dequantize_residual(*parts, block_size, x.dtype),
    )  # fmt: skip
    return parts


def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize_residual``."""
    parts = codes, residual, scale
    return launch.run_decoder(_dequantize_residual_kernel, "dequantize_residual", block_size, parts, dtype)
