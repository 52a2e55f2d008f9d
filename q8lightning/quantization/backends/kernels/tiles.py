"""Find a program's tile, load it and store it."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.backends.kernels.bits import INTERPRETED


@triton.jit
def tile(numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's first row (int64), its rows and elements from there (int32) with masks, and their number.

    Only the first row is 64-bit. 64-bit offsets and comparisons of every element would cost more than the arithmetic.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(numel - first * BLOCK, ROWS * BLOCK).to(tl.int32)
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return first, rows, rows * BLOCK < left, elements, elements < left, left


@triton.jit
def load_float(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_code(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0).to(tl.int32)


@triton.jit
def load_code_for(values, pointer, start, offsets, mask):
    """Load codes from ``pointer + start`` for a kernel that arithmetic slows, not memory.

    Each thread loads just the codes of the values that it stores, which it does 16 bytes at a time. Left alone, the
    compiler loads more codes a thread and exchanges them, and unpacks them again wherever they are used.
    """
    if INTERPRETED:
        return load_code(pointer + start, offsets, mask)
    start = tl.inline_asm_elementwise(
        "mov.b64 $0, $1;", "=l,l", [start.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1
    )
    start = tl.multiple_of(start, 128 // values.dtype.element_ty.primitive_bitwidth)  # tells the compiler the alignment
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $4, 0, 0x4440; prmt.b32 $1, $4, 0, 0x4441;"
        "prmt.b32 $2, $4, 0, 0x4442; prmt.b32 $3, $4, 0, 0x4443;",
        "=r,=r,=r,=r,r", [tl.load(pointer + start + offsets, mask=mask, other=0)], dtype=tl.int32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def store(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_codes(pointer, code, elements, mask, row_mask, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Store the codes of a tile of whole blocks as ``spec/packing.py`` says."""
    if BITS == 8:
        store(pointer, elements, code, mask)
    else:
        block = pointer + tl.arange(0, ROWS)[:, None] * (BLOCK * BITS // 8)
        code = tl.where(mask, code, 0)
        if BITS & 4:
            plane = _merged(code & 15, 4)
            store(block, tl.arange(0, BLOCK // 2)[None, :], plane, row_mask[:, None])
        if BITS & 2:
            plane = _merged(_merged((code >> (BITS & 4)) & 3, 2), 4)
            store(block + BLOCK * (BITS & 4) // 8, tl.arange(0, BLOCK // 4)[None, :], plane, row_mask[:, None])
        if BITS & 1:
            plane = _merged(_merged(_merged(code >> (BITS - 1), 1), 2), 4)
            store(block + BLOCK * (BITS - 1) // 8, tl.arange(0, BLOCK // 8)[None, :], plane, row_mask[:, None])


@triton.jit
def _merged(fields, WIDTH: tl.constexpr):
    """Join each two fields of so many bits to one."""
    low, high = tl.split(tl.reshape(fields, (fields.shape[0], fields.shape[1] // 2, 2)))
    return low | (high << WIDTH)


@triton.jit
def load_codes(
    pointer, elements, mask, tile_rows, row_mask, ROW: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr
):
    """Load the codes of a tile, of which PARTS rows are a block.

    Args:
        pointer: To the code of the first of ``elements`` if codes are bytes; else to the block that ``tile_rows`` count
            from.
        elements: ``[ROWS, ROW]``.
        mask: Of elements.
        tile_rows: ``[ROWS]``, the number of each row.
        row_mask: Of rows.
        ROW: Elements of a row.
        PARTS: Rows of a block.
        BITS: Bits of a code.
    """
    if BITS == 8:
        code = load_code(pointer, elements, mask)
    else:
        BLOCK: tl.constexpr = ROW * PARTS
        block = pointer + ((tile_rows // PARTS) * (BLOCK * BITS // 8))[:, None]
        part = (tile_rows % PARTS)[:, None] * ROW
        code = tl.zeros(elements.shape, tl.int32)
        if BITS & 4:
            code |= _spread(load_code(block + part // 2, tl.arange(0, ROW // 2)[None, :], row_mask[:, None]), 4)
        if BITS & 2:
            plane = block + (BLOCK * (BITS & 4) // 8) + part // 4
            fields = _spread(load_code(plane, tl.arange(0, ROW // 4)[None, :], row_mask[:, None]), 4)
            code |= _spread(fields, 2) << (BITS & 4)
        if BITS & 1:
            plane = block + (BLOCK * (BITS - 1) // 8) + part // 8
            fields = _spread(load_code(plane, tl.arange(0, ROW // 8)[None, :], row_mask[:, None]), 4)
            code |= _spread(_spread(fields, 2), 1) << (BITS - 1)
    return code


@triton.jit
def _spread(fields, WIDTH: tl.constexpr):
    """Cut each field in two of so many bits."""
    pairs = tl.join(fields & ((1 << WIDTH) - 1), fields >> WIDTH)
    return tl.reshape(pairs, (fields.shape[0], fields.shape[1] * 2))
