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
from q8lightning.quantization.backends.kernels.tiles import load_codes, load_scale, store_codes, store_scale


@triton.jit
def encode_tile(
    values, like, codes, rest, scales, left, table, levels, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STORE: tl.constexpr, DECODE: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, REST_BITS: tl.constexpr, END: tl.constexpr, ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Encode a tile. Return its decoded values in the dtype of ``like``, and 1 if a scale is not finite, else 0."""
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, row_mask = elements < left, rows * BLOCK < left
    decoded = values
    if CODEC == "log":
        code, scale, high = log.encode(values, BITS, ROUND)
        if STORE:
            store_scale(scales, rows * 2, scale, row_mask)
            store_scale(scales, rows * 2 + 1, high, row_mask)
        if DECODE:
            decoded = rounded(log.decode(code, scale, high, BITS), like)
    elif CODEC == "residual":
        code, second, scale = residual.encode(values, BITS, REST_BITS)
        if STORE:
            store_codes(rest, second, elements, mask, row_mask, ROWS, BLOCK, REST_BITS, ALIGNED)
            store_scale(scales, rows, scale, row_mask)
        if DECODE:
            decoded = rounded(residual.decode(code, second, scale, BITS, REST_BITS), like)
    else:
        code, scale = codebook.encode(values, table, SEARCH, SHIFT, BITS, END, ROUND)
        if STORE:
            store_scale(scales, rows, scale, row_mask)
        if DECODE:
            decoded = rounded(codebook.decode(code, levels, scale, SEARCH, BITS), like)
    if STORE:
        store_codes(codes, code, elements, mask, row_mask, ROWS, BLOCK, BITS, ALIGNED)
    return decoded, tl.max((~is_finite(scale)).to(tl.int32), axis=0)


@triton.jit
def decode_tile(
    codes, rest, scales, levels, elements, mask, tile_rows, row_mask, PARTS: tl.constexpr, CODEC: tl.constexpr,
    SEARCH: tl.constexpr, BITS: tl.constexpr, REST_BITS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the decoded values of ``elements``, ``[ROWS, ROW]`` float32.

    Pointers, ``tile_rows`` and PARTS are those of ``tiles.load_codes``.
    """
    ROW: tl.constexpr = elements.shape[1]
    blocks = tile_rows // PARTS
    code = load_codes(codes, elements, mask, tile_rows, row_mask, ROW, PARTS, BITS, ALIGNED)
    if CODEC == "log":
        low, high = load_scale(scales, blocks * 2, row_mask), load_scale(scales, blocks * 2 + 1, row_mask)
        value = log.decode(code, low, high, BITS)
    elif CODEC == "residual":
        second = load_codes(rest, elements, mask, tile_rows, row_mask, ROW, PARTS, REST_BITS, ALIGNED)
        value = residual.decode(code, second, load_scale(scales, blocks, row_mask), BITS, REST_BITS)
    else:
        value = codebook.decode(code, levels, load_scale(scales, blocks, row_mask), SEARCH, BITS)
    return value
