"""Encode and decode a tile with any codec: the one place where kernels for many tensors tell codecs apart.

``CODEC`` is the ``kernel`` of a :class:`~q8lightning.quantization.spec.layout.KernelCodec`. It is a constant of the
kernel, so that the compiled code holds the arithmetic of one codec only.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.backends.kernels.bits import is_finite, rounded
from q8lightning.quantization.backends.kernels.codecs import codebook, log, residual
from q8lightning.quantization.backends.kernels.tiles import load_code, load_float, store


@triton.jit
def encode_tile(
    values, like, codes, rest, scales, left, table, levels, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STORE: tl.constexpr, DECODE: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Encode a tile. Return its decoded values in the dtype of ``like``, and 1 if a scale is not finite, else 0."""
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, row_mask = elements < left, rows * BLOCK < left
    decoded = values
    if CODEC == "log":
        code, scale, high = log.encode(values)
        if STORE:
            store(scales, rows * 2, scale, row_mask)
            store(scales, rows * 2 + 1, high, row_mask)
        if DECODE:
            decoded = rounded(log.decode(code, scale, high), like)
    elif CODEC == "residual":
        code, second, scale = residual.encode(values)
        if STORE:
            store(rest, elements, second, mask)
            store(scales, rows, scale, row_mask)
        if DECODE:
            decoded = rounded(residual.decode(code, second, scale), like)
    else:
        code, scale = codebook.encode(values, table, SEARCH, SHIFT, BITS, END)
        if STORE:
            store(scales, rows, scale, row_mask)
        if DECODE:
            decoded = rounded(codebook.decode(code, levels, scale, SEARCH), like)
    if STORE:
        store(codes, elements, code, mask)
    return decoded, tl.max((~is_finite(scale)).to(tl.int32), axis=0)


@triton.jit
def decode_tile(
    codes, rest, scales, levels, elements, mask, blocks, row_mask, CODEC: tl.constexpr, SEARCH: tl.constexpr
):
    """Return the decoded values of ``elements``, ``[ROWS, ROW]`` float32; ``blocks`` holds the block of each row."""
    code = load_code(codes, elements, mask)
    if CODEC == "log":
        low, high = load_float(scales, blocks * 2, row_mask), load_float(scales, blocks * 2 + 1, row_mask)
        value = log.decode(code, low, high)
    elif CODEC == "residual":
        second = load_code(rest, elements, mask)
        value = residual.decode(code, second, load_float(scales, blocks, row_mask))
    else:
        value = codebook.decode(code, levels, load_float(scales, blocks, row_mask), SEARCH)
    return value
