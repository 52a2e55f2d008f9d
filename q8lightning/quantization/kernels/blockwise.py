"""The kernels, one pass over memory each, and the functions that launch them: the GPU's backend of ``ops.py``.

The launchers have the signatures and the meaning of their namesakes in ``reference.py`` and return the same bits. They
take CUDA tensors; under Triton's interpreter (``TRITON_INTERPRET=1`` set before Triton is imported) CPU tensors too.

A program handles a tile of ROWS blocks of BLOCK elements. Its offsets are 64-bit and all its loads and stores masked.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from q8lightning.quantization.codebook import BUILTIN, Codebook
from q8lightning.quantization.kernels import codec

TILE = 2048
"""Elements of a program, or one block if that is larger: a few rows even of large blocks, and 16 values a thread."""

NUM_WARPS = 4
"""With 4 warps even a tile of one block of 4096 leaves a thread 32 values, which fit its registers."""

# Kernels


@triton.jit
def _tile(numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of this program and its elements, ``[ROWS]`` and ``[ROWS, BLOCK]`` int64, each with its mask."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, rows * BLOCK < numel, elements, elements < numel


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
    x, codes, scale, thresholds, numel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODEBOOK: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, block_scale = codec.encode(_load_float(x, elements, mask), thresholds, CODEBOOK, BITS, END)
    _store(codes, elements, code, mask)
    _store(scale, rows, block_scale, row_mask)


@triton.jit
def _dequantize_kernel(codes, scale, values, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    value = codec.decode(_load_code(codes, elements, mask), levels, _load_float(scale, rows, row_mask))
    _store(values, elements, value, mask)


@triton.jit
def _fake_quantize_kernel(
    x, values, thresholds, levels, numel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODEBOOK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    _, _, elements, mask = _tile(numel, ROWS, BLOCK)
    code, scale = codec.encode(_load_float(x, elements, mask), thresholds, CODEBOOK, BITS, 0)
    _store(values, elements, codec.decode(code, levels, scale), mask)


@triton.jit
def _quantize_residual_kernel(x, codes, residual, scale, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, left, block_scale = codec.encode_residual(_load_float(x, elements, mask), levels)
    _store(codes, elements, code, mask)
    _store(residual, elements, left, mask)
    _store(scale, rows, block_scale, row_mask)


@triton.jit
def _dequantize_residual_kernel(codes, residual, scale, values, levels, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, left = _load_code(codes, elements, mask), _load_code(residual, elements, mask)
    value = codec.decode_residual(code, left, levels, _load_float(scale, rows, row_mask))
    _store(values, elements, value, mask)


@triton.jit
def _quantize_log_kernel(x, codes, bounds, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, low, high = codec.encode_log(_load_float(x, elements, mask))
    _store(codes, elements, code, mask)
    _store(bounds, rows * 2, low, row_mask)
    _store(bounds, rows * 2 + 1, high, row_mask)


@triton.jit
def _dequantize_log_kernel(codes, bounds, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    low, high = _load_float(bounds, rows * 2, row_mask), _load_float(bounds, rows * 2 + 1, row_mask)
    _store(values, elements, codec.decode_log(_load_code(codes, elements, mask), low, high), mask)


@triton.jit
def _quantize_affine_kernel(x, codes, scale, zero_point, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    code, block_scale, block_zero = codec.encode_affine(_load_float(x, elements, mask))
    _store(codes, elements, code, mask)
    _store(scale, rows, block_scale, row_mask)
    _store(zero_point, rows, block_zero, row_mask)


@triton.jit
def _dequantize_affine_kernel(codes, scale, zero_point, values, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, row_mask, elements, mask = _tile(numel, ROWS, BLOCK)
    block_zero = _load_code(zero_point, rows, row_mask)
    value = codec.decode_affine(_load_code(codes, elements, mask), _load_float(scale, rows, row_mask), block_zero)
    _store(values, elements, value, mask)


# Launchers

INTERPRETED = not isinstance(_quantize_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter instead of on a GPU."""


def _launch(kernel: Any, block_size: int, x: Tensor, *others: Tensor, **constants: int | str) -> None:
    """Run ``kernel`` on ``x, *others`` with one program for each tile of ``x``, on the device of ``x``."""
    rows = max(TILE // block_size, 1)
    tiles = triton.cdiv(x.numel(), rows * block_size)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}  # codec.py needs every operation rounded
    if tiles:
        with torch.cuda.device_of(x):
            kernel[(tiles,)](x, *others, x.numel(), ROWS=rows, BLOCK=block_size, **constants, **options)


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


class _Tables(NamedTuple):
    """A codebook as kernels need it.

    Attributes:
        search: Which search: the name of a closed form, or "thresholds".
        bits: Steps of the search in ``thresholds``.
        thresholds: ``[2**bits - 1]`` float32, filled up with infinity.
        levels: ``[256]`` float32, 0 for codes that the codebook lacks.
    """

    search: str
    bits: int
    thresholds: Tensor
    levels: Tensor


_CLOSED_FORMS = {BUILTIN[name].closed_form: name for name in ("linear", "softsign")}
"""The closed forms that ``codec.nearest_code`` knows; all others are searched in their thresholds."""


def _tables(codebook: Codebook, device: torch.device) -> _Tables:
    return _make_tables(codebook, codebook.closed_form, device)


@lru_cache(maxsize=256)
def _make_tables(codebook: Codebook, closed_form: Callable[[Tensor], Tensor] | None, device: torch.device) -> _Tables:
    # Codebooks compare equal whatever their closed form, so the cache needs it as a key of its own.
    thresholds, levels = codebook.thresholds, codebook.tensor()
    bits = thresholds.numel().bit_length()
    return _Tables(
        search=_CLOSED_FORMS.get(closed_form, "thresholds"),
        bits=bits,
        thresholds=pad(thresholds, (0, 2**bits - 1 - thresholds.numel()), value=torch.inf).to(device),
        levels=pad(levels, (0, 256 - levels.numel())).to(device),
    )


def quantize(x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8 and scale ``[ceil(numel / block_size)]`` float32."""
    flat, (search, bits, thresholds, _) = _flat(x), _tables(codebook, x.device)
    codes, scale = _new(x, *x.shape, dtype=torch.uint8), _new(x, _blocks(x, block_size))
    end = codebook.end if signed_scale else 0
    _launch(_quantize_kernel, block_size, flat, codes, scale, thresholds, CODEBOOK=search, BITS=bits, END=end)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    flat, levels = codes.reshape(-1), _tables(codebook, codes.device).levels
    values = _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    _launch(_dequantize_kernel, block_size, flat, scale.contiguous(), values, levels)
    return values.to(dtype)


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int) -> Tensor:
    """Quantized values in the shape and dtype of ``x``; codes are never written."""
    flat, (search, bits, thresholds, levels) = _flat(x), _tables(codebook, x.device)
    values = _new(x, *x.shape, dtype=flat.dtype)
    _launch(_fake_quantize_kernel, block_size, flat, values, thresholds, levels, CODEBOOK=search, BITS=bits)
    return values.to(x.dtype)


def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and residual codes ``[*x.shape]`` uint8, scale ``[ceil(numel / block_size)]`` float32."""
    flat, levels = _flat(x), _tables(BUILTIN["linear"], x.device).levels
    codes, residual = _new(x, *x.shape, dtype=torch.uint8), _new(x, *x.shape, dtype=torch.uint8)
    scale = _new(x, _blocks(x, block_size))
    _launch(_quantize_residual_kernel, block_size, flat, codes, residual, scale, levels)
    return codes, residual, scale


def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    levels = _tables(BUILTIN["linear"], codes.device).levels
    values = _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    stages = codes.reshape(-1), residual.reshape(-1)
    _launch(_dequantize_residual_kernel, block_size, *stages, scale.contiguous(), values, levels)
    return values.to(dtype)


def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8 and bounds ``[ceil(numel / block_size), 2]`` float32."""
    flat = _flat(x)
    codes, bounds = _new(x, *x.shape, dtype=torch.uint8), _new(x, _blocks(x, block_size), 2)
    _launch(_quantize_log_kernel, block_size, flat, codes, bounds)
    return codes, bounds


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    flat, values = codes.reshape(-1), _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    _launch(_dequantize_log_kernel, block_size, flat, bounds.contiguous(), values)
    return values.to(dtype)


def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[*x.shape]`` uint8, scale float32 and zero point uint8, ``[ceil(numel / block_size)]`` each."""
    flat, blocks = _flat(x), _blocks(x, block_size)
    codes, scale, zero_point = _new(x, *x.shape, dtype=torch.uint8), _new(x, blocks), _new(x, blocks, dtype=torch.uint8)
    _launch(_quantize_affine_kernel, block_size, flat, codes, scale, zero_point)
    return codes, scale, zero_point


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Values ``[*codes.shape]`` of ``dtype``."""
    flat, values = codes.reshape(-1), _new(codes, *codes.shape, dtype=_kernel_dtype(dtype))
    blocks = scale.contiguous(), zero_point.contiguous()
    _launch(_dequantize_affine_kernel, block_size, flat, *blocks, values)
    return values.to(dtype)
