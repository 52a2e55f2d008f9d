"""The kernels, one pass over memory each, and the functions that launch them: the GPU's backend of ``ops.py``.

The launchers have the signatures and the meaning of their namesakes in ``reference.py`` and return the same bits. They
take CUDA tensors; under Triton's interpreter (``TRITON_INTERPRET=1`` set before Triton is imported) CPU tensors too.

A program handles a tile of ROWS blocks of BLOCK elements. Its offsets are 64-bit and all its loads and stores masked.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.codebook import Codebook
from q8lightning.quantization.kernels import codec
from q8lightning.quantization.kernels.tables import Tables, tables_of


class Settings(NamedTuple):
    """How a kernel is launched: elements of a program, or one row if that is larger, and its warps."""

    tile: int
    warps: int


SETTINGS: dict[str, tuple[Settings, Settings]] = {
    # Each for 4-byte and for 2-byte values: the fastest over blocks of 64, 256 and 2048 that benchmarks/tune.py found
    # on an H200. Few warps with 16 to 64 values a thread keep enough loads in flight without waiting for one another.
    "quantize": (Settings(2048, 2), Settings(2048, 1)),
    "quantize in cells": (Settings(1024, 1), Settings(1024, 1)),
    "fake_quantize": (Settings(512, 1), Settings(2048, 4)),
    "fake_quantize in cells": (Settings(512, 1), Settings(512, 1)),
    "dequantize": (Settings(1024, 2), Settings(2048, 1)),
    "dequantize linear": (Settings(512, 1), Settings(1024, 1)),
    "quantize_residual": (Settings(4096, 4), Settings(2048, 1)),
    "dequantize_residual": (Settings(1024, 2), Settings(4096, 2)),
    "quantize_log": (Settings(2048, 2), Settings(2048, 2)),
    "dequantize_log": (Settings(2048, 1), Settings(2048, 1)),
    "quantize_affine": (Settings(1024, 2), Settings(1024, 1)),
    "dequantize_affine": (Settings(512, 1), Settings(2048, 4)),
}

DECODED_ROW = 256
"""Blocks longer than this are decoded in several rows: nothing there needs a whole block at once."""

# Kernels


@triton.jit
def _tile(numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's first row (int64), its rows and elements from there (int32), each with its mask.

    Only the start is 64-bit: 64-bit offsets and comparisons for every element would cost more than the arithmetic.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return first, rows, rows * BLOCK < left, elements, elements < left


@triton.jit
def _load_float(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_code(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0).to(tl.int32)


@triton.jit
def _store(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_kernel(
    x, codes, scale, table, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, LOWEST: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    values = _load_float(x + first * BLOCK, elements, mask)
    code, block_scale = codec.encode(values, table, SEARCH, SHIFT, LOWEST, HALF, BITS, END)
    _store(codes + first * BLOCK, elements, code, mask)
    _store(scale + first, rows, block_scale, row_mask)


@triton.jit
def _dequantize_kernel(
    codes, scale, values, levels, numel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    block_scale = _load_float(scale, (first + rows) // PARTS, row_mask)
    value = codec.decode(_load_code(codes + first * BLOCK, elements, mask), levels, block_scale, SEARCH)
    _store(values + first * BLOCK, elements, value, mask)


@triton.jit
def _fake_quantize_kernel(
    x, values, table, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, LOWEST: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    first, _, _, elements, mask = _tile(numel, ROWS, BLOCK)
    x_tile = _load_float(x + first * BLOCK, elements, mask)
    value = codec.fake_quantize(x_tile, table, levels, SEARCH, SHIFT, LOWEST, HALF, BITS)
    _store(values + first * BLOCK, elements, value, mask)


@triton.jit
def _quantize_residual_kernel(x, codes, residual, scale, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, left, block_scale = codec.encode_residual(_load_float(x + first * BLOCK, elements, mask))
    _store(codes + first * BLOCK, elements, code, mask)
    _store(residual + first * BLOCK, elements, left, mask)
    _store(scale + first, rows, block_scale, row_mask)


@triton.jit
def _dequantize_residual_kernel(
    codes, residual, scale, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    block_scale = _load_float(scale, (first + rows) // PARTS, row_mask)
    code = _load_code(codes + first * BLOCK, elements, mask)
    left = _load_code(residual + first * BLOCK, elements, mask)
    _store(values + first * BLOCK, elements, codec.decode_residual(code, left, block_scale), mask)


@triton.jit
def _quantize_log_kernel(x, codes, bounds, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, low, high = codec.encode_log(_load_float(x + first * BLOCK, elements, mask))
    _store(codes + first * BLOCK, elements, code, mask)
    _store(bounds + first * 2, rows * 2, low, row_mask)
    _store(bounds + first * 2, rows * 2 + 1, high, row_mask)


@triton.jit
def _dequantize_log_kernel(codes, bounds, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    blocks = (first + rows) // PARTS
    low, high = _load_float(bounds, blocks * 2, row_mask), _load_float(bounds, blocks * 2 + 1, row_mask)
    code = _load_code(codes + first * BLOCK, elements, mask)
    _store(values + first * BLOCK, elements, codec.decode_log(code, low, high), mask)


@triton.jit
def _quantize_affine_kernel(x, codes, scale, zero_point, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, block_scale, block_zero = codec.encode_affine(_load_float(x + first * BLOCK, elements, mask))
    _store(codes + first * BLOCK, elements, code, mask)
    _store(scale + first, rows, block_scale, row_mask)
    _store(zero_point + first, rows, block_zero, row_mask)


@triton.jit
def _dequantize_affine_kernel(
    codes, scale, zero_point, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    first, rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    blocks = (first + rows) // PARTS
    block_scale, block_zero = _load_float(scale, blocks, row_mask), _load_code(zero_point, blocks, row_mask)
    code = _load_code(codes + first * BLOCK, elements, mask)
    _store(values + first * BLOCK, elements, codec.decode_affine(code, block_scale, block_zero), mask)


# Launchers

INTERPRETED = not isinstance(_quantize_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter instead of on a GPU."""


def _launch(
    kernel: Any, settings: str, block_size: int, tensors: tuple[Tensor, ...], itemsize: int, **constants: int | str
) -> None:
    """Run ``kernel`` on ``tensors`` with one program for each tile of the first, on its device.

    ``itemsize`` is that of the float values, read or written, by which settings are chosen.
    """
    x = tensors[0]
    if x.numel() == 0:
        return
    tile, warps = SETTINGS[settings][itemsize < 4]
    rows = max(tile // block_size, 1)
    grid = (triton.cdiv(x.numel(), rows * block_size),)
    with torch.cuda.device_of(x):
        kernel[grid](
            *tensors, x.numel(), ROWS=rows, BLOCK=block_size, **constants,
            num_warps=warps, enable_fp_fusion=False,  # codec.py needs every operation rounded
        )  # fmt: skip


def _launch_decoder(
    kernel: Any, settings: str, block_size: int, tensors: tuple[Tensor, ...], itemsize: int, **constants: str
) -> None:
    """As :func:`_launch`, for kernels that may cut a block into rows."""
    row = min(block_size, DECODED_ROW)
    _launch(kernel, settings, row, tensors, itemsize, PARTS=block_size // row, **constants)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels read or write tensors of ``dtype``; PyTorch converts where they differ."""
    # The interpreter truncates where bfloat16 is to be rounded (seen in Triton 3.9).
    foreign = dtype == torch.float64 or (INTERPRETED and dtype == torch.bfloat16)
    return torch.float32 if foreign else dtype


def _flat(x: Tensor) -> Tensor:
    """``[numel]`` in row-major order, of the kernels' dtype."""
    return x.detach().reshape(-1).to(_kernel_dtype(x.dtype))


def _new(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _blocks(x: Tensor, block_size: int) -> int:
    return -(-x.numel() // block_size)


def _search(tables: Tables) -> dict[str, int | str]:
    """The constants that tell ``codec.nearest_code`` how to search."""
    return {
        "SEARCH": tables.search,
        "SHIFT": tables.shift,
        "LOWEST": tables.lowest,
        "HALF": tables.half,
        "BITS": tables.bits,
    }


def quantize(x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8 and scale ``[ceil(numel / block_size)]`` float32."""
    flat, tables = _flat(x), tables_of(codebook, x.device)
    codes, scale = _new(x, *x.shape, dtype=torch.uint8), _new(x, _blocks(x, block_size))
    constants = {**_search(tables), "END": codebook.end if signed_scale else 0}
    settings = "quantize" if tables.search in ("linear", "softsign") else "quantize in cells"
    parts = flat, codes, scale, tables.table
    _launch(_quantize_kernel, settings, block_size, parts, flat.element_size(), **constants)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    flat, tables = codes.reshape(-1), tables_of(codebook, codes.device)
    values = _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    linear = tables.search == "linear"
    parts = flat, scale.contiguous(), values, tables.levels
    settings, search = ("dequantize linear", "linear") if linear else ("dequantize", "table")
    _launch_decoder(_dequantize_kernel, settings, block_size, parts, values.element_size(), SEARCH=search)
    return values.to(dtype)


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int) -> Tensor:
    """Quantized values in the shape and dtype of ``x``; codes are never written."""
    flat, tables = _flat(x), tables_of(codebook, x.device)
    values = _new(x, *x.shape, dtype=flat.dtype)
    settings = "fake_quantize" if tables.search in ("linear", "softsign") else "fake_quantize in cells"
    parts = flat, values, tables.table, tables.levels
    _launch(_fake_quantize_kernel, settings, block_size, parts, flat.element_size(), **_search(tables))
    return values.to(x.dtype)


def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and residual codes ``[*x.shape]`` uint8, scale ``[ceil(numel / block_size)]`` float32."""
    flat = _flat(x)
    codes, residual = _new(x, *x.shape, dtype=torch.uint8), _new(x, *x.shape, dtype=torch.uint8)
    scale = _new(x, _blocks(x, block_size))
    parts = flat, codes, residual, scale
    _launch(_quantize_residual_kernel, "quantize_residual", block_size, parts, flat.element_size())
    return codes, residual, scale


def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    parts = codes.reshape(-1), residual.reshape(-1), scale.contiguous(), values
    size = values.element_size()
    _launch_decoder(_dequantize_residual_kernel, "dequantize_residual", block_size, parts, size)
    return values.to(dtype)


def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8 and bounds ``[ceil(numel / block_size), 2]`` float32."""
    flat = _flat(x)
    codes, bounds = _new(x, *x.shape, dtype=torch.uint8), _new(x, _blocks(x, block_size), 2)
    parts = flat, codes, bounds
    _launch(_quantize_log_kernel, "quantize_log", block_size, parts, flat.element_size())
    return codes, bounds


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    parts = codes.reshape(-1), bounds.contiguous(), values
    _launch_decoder(_dequantize_log_kernel, "dequantize_log", block_size, parts, values.element_size())
    return values.to(dtype)


def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8, scale float32 and zero point uint8, ``[ceil(numel / block_size)]`` each."""
    flat, blocks = _flat(x), _blocks(x, block_size)
    codes, scale, zero_point = _new(x, *x.shape, dtype=torch.uint8), _new(x, blocks), _new(x, blocks, dtype=torch.uint8)
    parts = flat, codes, scale, zero_point
    _launch(_quantize_affine_kernel, "quantize_affine", block_size, parts, flat.element_size())
    return codes, scale, zero_point


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    values = _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    parts = codes.reshape(-1), scale.contiguous(), zero_point.contiguous(), values
    size = values.element_size()
    _launch_decoder(_dequantize_affine_kernel, "dequantize_affine", block_size, parts, size)
    return values.to(dtype)
