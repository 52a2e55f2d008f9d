"""The kernels, one pass over memory each, and the functions that launch them: the GPU's backend of ``ops.py``.

The launchers have the signatures and the meaning of their namesakes in ``reference.py`` and return the same bits;
statistics of float16, bfloat16 and float32 tensors come out of the same pass. They take CUDA tensors; under Triton's
interpreter (``TRITON_INTERPRET=1`` set before Triton is imported) CPU tensors too.

A program handles a tile of ROWS blocks of BLOCK elements. Its offsets are 64-bit and all its loads and stores masked.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels import codec, launch, log
from q8lightning.quantization.backends.kernels.bits import rounded
from q8lightning.quantization.backends.kernels.fake_quantize import fake_quantize_kernel, measured_fake_quantize_kernel
from q8lightning.quantization.backends.kernels.launch import INTERPRETED as INTERPRETED
from q8lightning.quantization.backends.kernels.launch import (
    block_count,
    empty,
    flattened,
    kernel_dtype,
    search_constants,
)
from q8lightning.quantization.backends.kernels.statistics import measure
from q8lightning.quantization.backends.kernels.tables import tables_of
from q8lightning.quantization.backends.kernels.tiles import load_code, load_code_for, load_float, store, tile
from q8lightning.quantization.backends.kernels.totals import empty_partials, total
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import Codebook

# Kernels


@triton.jit
def _quantize_kernel(
    x, codes, scale, table, levels, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr,
    SEARCH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    END: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, block_scale = codec.encode(values, table, SEARCH, SHIFT, BITS, END)
    store(codes + first * BLOCK, elements, code, mask)
    store(scale + first, rows, block_scale, row_mask)
    if MEASURE:
        decoded = rounded(codec.decode(code, levels, block_scale, SEARCH), x)
        measure(values, decoded, left, partials, tl.program_id(0), tl.num_programs(0))


@triton.jit
def _dequantize_kernel(
    codes, scale, values, levels, numel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    block_scale = load_float(scale, (first + rows) // PARTS, row_mask)
    value = codec.decode(load_code(codes + first * BLOCK, elements, mask), levels, block_scale, SEARCH)
    store(values + first * BLOCK, elements, value, mask)


@triton.jit
def _quantize_residual_kernel(
    x, codes, residual, scale, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr
):
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, rest, block_scale = codec.encode_residual(values)
    store(codes + first * BLOCK, elements, code, mask)
    store(residual + first * BLOCK, elements, rest, mask)
    store(scale + first, rows, block_scale, row_mask)
    if MEASURE:
        decoded = rounded(codec.decode_residual(code, rest, block_scale), x)
        measure(values, decoded, left, partials, tl.program_id(0), tl.num_programs(0))


@triton.jit
def _dequantize_residual_kernel(
    codes, residual, scale, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    block_scale = load_float(scale, (first + rows) // PARTS, row_mask)
    code = load_code(codes + first * BLOCK, elements, mask)
    rest = load_code(residual + first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, codec.decode_residual(code, rest, block_scale), mask)


@triton.jit
def _quantize_log_kernel(
    x, codes, bounds, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr
):
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, low, high = log.encode(values)
    store(codes + first * BLOCK, elements, code, mask)
    store(bounds + first * 2, rows * 2, low, row_mask)
    store(bounds + first * 2, rows * 2 + 1, high, row_mask)
    if MEASURE:
        decoded = rounded(log.decode(code, low, high), x)
        measure(values, decoded, left, partials, tl.program_id(0), tl.num_programs(0))


@triton.jit
def _dequantize_log_kernel(codes, bounds, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    blocks = (first + rows) // PARTS
    low, high = load_float(bounds, blocks * 2, row_mask), load_float(bounds, blocks * 2 + 1, row_mask)
    code = load_code_for(values, codes, first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, log.decode(code, low, high), mask)


@triton.jit
def _quantize_affine_kernel(
    x, codes, scale, zero_point, partials, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr
):
    first, rows, row_mask, elements, mask, left = tile(numel, ROWS, BLOCK)
    values = load_float(x + first * BLOCK, elements, mask)
    code, block_scale, block_zero = codec.encode_affine(values)
    store(codes + first * BLOCK, elements, code, mask)
    store(scale + first, rows, block_scale, row_mask)
    store(zero_point + first, rows, block_zero, row_mask)
    if MEASURE:
        decoded = rounded(codec.decode_affine(code, block_scale, block_zero), x)
        measure(values, decoded, left, partials, tl.program_id(0), tl.num_programs(0))


@triton.jit
def _dequantize_affine_kernel(
    codes, scale, zero_point, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask, _ = tile(numel, ROWS, BLOCK)
    blocks = (first + rows) // PARTS
    block_scale, block_zero = load_float(scale, blocks, row_mask), load_code(zero_point, blocks, row_mask)
    code = load_code(codes + first * BLOCK, elements, mask)
    store(values + first * BLOCK, elements, codec.decode_affine(code, block_scale, block_zero), mask)


# Launchers


def _finish(x: Tensor, statistics: Tensor | None, own: Tensor | None, decode: Callable[[], Tensor]) -> None:
    """Measure in PyTorch what a kernel could not, because it saw ``x`` in another dtype."""
    if statistics is not None and own is None:
        statistics.copy_(reference.measure(x, decode()))


def quantize(
    x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8 and scale ``[ceil(numel / block_size)]`` float32."""
    flat, tables = flattened(x), tables_of(codebook, x.device)
    codes, scale = empty(x, *x.shape, dtype=torch.uint8), empty(x, block_count(x, block_size))
    constants = {**search_constants(tables), "END": codebook.end if signed_scale else 0}
    settings = "quantize" if tables.search in ("linear", "softsign") else "quantize in cells"
    parts = flat, codes, scale, tables.table, tables.levels
    own = launch.run_encoder(_quantize_kernel, settings, block_size, parts, x, statistics, **constants)
    _finish(x, statistics, own, lambda: dequantize(codes, scale, codebook, block_size, x.dtype))
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    flat, tables = codes.reshape(-1), tables_of(codebook, codes.device)
    values = empty(codes, *codes.shape, dtype=kernel_dtype(dtype))
    linear = tables.search == "linear"
    parts = flat, scale.contiguous(), values, tables.levels
    settings, search = ("dequantize linear", "linear") if linear else ("dequantize", "table")
    launch.run_decoder(_dequantize_kernel, settings, block_size, parts, values.element_size(), SEARCH=search)
    return values.to(dtype)


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int, statistics: Tensor | None = None) -> Tensor:
    """Quantized values in the shape and dtype of ``x``; codes are never written."""
    flat, tables = flattened(x), tables_of(codebook, x.device)
    values = empty(x, *x.shape, dtype=flat.dtype)
    settings = "fake_quantize" if tables.search in ("linear", "softsign") else "fake_quantize in cells"
    constants = search_constants(tables)
    parts = flat, values, tables.table, tables.levels
    if statistics is None or flat.dtype != x.dtype:
        rows, warps = launch.rows_of(settings, block_size, flat.element_size())
        launch.run(fake_quantize_kernel, rows, warps, block_size, parts, tiles=1, **constants)
        values = values.to(x.dtype)
        _finish(x, statistics, None, lambda: values)
        return values
    settings = f"{settings} measured"
    rows, warps = launch.rows_of(settings, block_size, flat.element_size())
    tiles = launch.tiles_of(settings, rows * block_size, flat.element_size())
    partials = empty_partials(flat, triton.cdiv(flat.numel(), rows * block_size * tiles))
    constants |= {"TILES": tiles, "IN_PAIRS": launch.in_pairs(flat)}
    constants |= launch.options_of(settings, flat.element_size())
    kernel = measured_fake_quantize_kernel
    launch.run(kernel, rows, warps, block_size, (*parts, partials), tiles=tiles, **constants)
    total(partials, statistics)
    return values


def quantize_residual(x: Tensor, block_size: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and residual codes ``[*x.shape]`` uint8, scale ``[ceil(numel / block_size)]`` float32."""
    flat = flattened(x)
    codes, residual = empty(x, *x.shape, dtype=torch.uint8), empty(x, *x.shape, dtype=torch.uint8)
    scale = empty(x, block_count(x, block_size))
    parts = flat, codes, residual, scale
    own = launch.run_encoder(_quantize_residual_kernel, "quantize_residual", block_size, parts, x, statistics)
    _finish(x, statistics, own, lambda: dequantize_residual(codes, residual, scale, block_size, x.dtype))
    return codes, residual, scale


def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = empty(codes, *codes.shape, dtype=kernel_dtype(dtype))
    parts = codes.reshape(-1), residual.reshape(-1), scale.contiguous(), values
    size = values.element_size()
    launch.run_decoder(_dequantize_residual_kernel, "dequantize_residual", block_size, parts, size)
    return values.to(dtype)


def quantize_log(x: Tensor, block_size: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8 and bounds ``[ceil(numel / block_size), 2]`` float32."""
    flat = flattened(x)
    codes, bounds = empty(x, *x.shape, dtype=torch.uint8), empty(x, block_count(x, block_size), 2)
    parts = flat, codes, bounds
    own = launch.run_encoder(_quantize_log_kernel, "quantize_log", block_size, parts, x, statistics)
    _finish(x, statistics, own, lambda: dequantize_log(codes, bounds, block_size, x.dtype))
    return codes, bounds


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = empty(codes, *codes.shape, dtype=kernel_dtype(dtype))
    parts = codes.reshape(-1), bounds.contiguous(), values
    launch.run_decoder(_dequantize_log_kernel, "dequantize_log", block_size, parts, values.element_size())
    return values.to(dtype)


def quantize_affine(x: Tensor, block_size: int, statistics: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8, scale float32 and zero point uint8, ``[ceil(numel / block_size)]`` each."""
    flat, blocks = flattened(x), block_count(x, block_size)
    codes, scale = empty(x, *x.shape, dtype=torch.uint8), empty(x, blocks)
    zero_point = empty(x, blocks, dtype=torch.uint8)
    parts = flat, codes, scale, zero_point
    own = launch.run_encoder(_quantize_affine_kernel, "quantize_affine", block_size, parts, x, statistics)
    _finish(x, statistics, own, lambda: dequantize_affine(codes, scale, zero_point, block_size, x.dtype))
    return codes, scale, zero_point


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = empty(codes, *codes.shape, dtype=kernel_dtype(dtype))
    parts = codes.reshape(-1), scale.contiguous(), zero_point.contiguous(), values
    size = values.element_size()
    launch.run_decoder(_dequantize_affine_kernel, "dequantize_affine", block_size, parts, size)
    return values.to(dtype)
