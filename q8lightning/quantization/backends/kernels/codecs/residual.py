"""The codec ``linear`` with a residual: ``codebook.py`` tells tiles and the rules of arithmetic."""
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

RESIDUAL_DIVISOR = tl.constexpr(reference.RESIDUAL_DIVISOR)


@triton.jit
def encode(x):
    """As ``reference.quantize_residual``: codes, residual codes and scale."""
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
    """As ``reference.dequantize_residual``."""
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
        measure(values, decoded, left, partials, tl.program_id(0), tl.num_programs(0))


@triton.jit
def _dequantize_residual_kernel(
    codes, residual, scale, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    block_scale = load_float(scale, (first + rows) // PARTS, row_mask)
    code = load_code(codes + first * BLOCK, elements, mask)
    rest = load_code(residual + first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, decode(code, rest, block_scale), mask)


def quantize_residual(x: Tensor, block_size: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and residual codes ``[*x.shape]`` uint8, scale ``[ceil(numel / block_size)]`` float32."""
    flat = launch.flattened(x)
    codes, residual = launch.empty(x, *x.shape, dtype=torch.uint8), launch.empty(x, *x.shape, dtype=torch.uint8)
    scale = launch.empty(x, launch.block_count(x, block_size))
    parts = flat, codes, residual, scale
    own = launch.run_encoder(_quantize_residual_kernel, "quantize_residual", block_size, parts, x, statistics)
    launch.finish(x, statistics, own, lambda: dequantize_residual(codes, residual, scale, block_size, x.dtype))
    return codes, residual, scale


def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = launch.empty(codes, *codes.shape, dtype=launch.kernel_dtype(dtype))
    parts = codes.reshape(-1), residual.reshape(-1), scale.contiguous(), values
    size = values.element_size()
    launch.run_decoder(_dequantize_residual_kernel, "dequantize_residual", block_size, parts, size)
    return values.to(dtype)
