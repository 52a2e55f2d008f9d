"""Find a program's tile, load it and store it."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from q8lightning.quantization.backends.kernels.bits import INTERPRETED, bits_of, float_of


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
def load_scale(pointer, offsets, mask):
    """Load scales, float32; those of bfloat16 from int16, the upper half of their pattern."""
    if pointer.dtype.element_ty == tl.int16:
        scale = float_of(load_code(pointer, offsets, mask) << 16)
    else:
        scale = load_float(pointer, offsets, mask)
    return scale


@triton.jit
def store_scale(pointer, offsets, scale, mask):
    """Store scales as :func:`load_scale` reads them."""
    if pointer.dtype.element_ty == tl.int16:
        scale = bits_of(scale) >> 16
    store(pointer, offsets, scale, mask)


@triton.jit
def store_codes(
    pointer, code, elements, mask, row_mask, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the codes of a tile of whole blocks as ``spec/packing.py`` says; ALIGNED if the first may be a word."""
    if BITS == 8:
        store(pointer, elements, code, mask)
    else:
        _lay_out_as_bytes(pointer + elements, code)
        # Four codes are a word of a thread. Planes are computed from words.
        code = tl.reshape(tl.where(mask, code, 0), (ROWS, BLOCK // 4, 4))
        word = tl.sum(code << (tl.arange(0, 4) * 8)[None, None, :], axis=2)
        place, mask = tl.arange(0, BLOCK // 4)[None, :], row_mask[:, None]
        offsets = tl.arange(0, ROWS)[:, None] * (BLOCK * BITS // 8)
        block = _in_words(pointer, 4) + offsets
        if BITS & 4:
            pairs = word & 0x0F0F0F0F
            pairs |= pairs >> 4
            if ALIGNED:
                plane = _as_words(_in_words(pointer, 8) + offsets) + place
                _store(plane, (pairs & 0xFF) | ((pairs >> 8) & 0xFF00), mask, tl.uint16)
            else:
                _store(block + place * 2, pairs & 0xFF, mask, tl.uint8)
                _store(block + place * 2 + 1, pairs >> 16, mask, tl.uint8)
        if BITS & 2:
            four = (word >> (BITS & 4)) & 0x03030303
            four |= four >> 6
            four |= four >> 12
            _store(block + BLOCK * (BITS & 4) // 8 + place, four & 0xFF, mask, tl.uint8)
        if BITS & 1:
            four = (word >> (BITS - 1)) & 0x01010101
            four |= four >> 7
            four |= four >> 14
            low, high = tl.split(tl.reshape(four & 15, (ROWS, BLOCK // 8, 2)))
            plane = _in_words(pointer, 2) + offsets + BLOCK * (BITS - 1) // 8
            _store(plane + tl.arange(0, BLOCK // 8)[None, :], low | (high << 4), mask, tl.uint8)


@triton.jit
def load_codes(
    pointer, elements, mask, tile_rows, row_mask, ROW: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
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
        ALIGNED: Whether the codes begin at a word.
    """
    if BITS == 8:
        code = load_code(pointer, elements, mask)
    else:
        BLOCK: tl.constexpr = ROW * PARTS
        block = _in_words(pointer, 1) + ((tile_rows // PARTS) * (BLOCK * BITS // 8))[:, None]
        part = (tile_rows % PARTS)[:, None] * ROW
        place, rows = tl.arange(0, ROW // 4)[None, :], row_mask[:, None]
        word = tl.zeros((elements.shape[0], ROW // 4), tl.int32)
        if BITS & 4:
            plane = block + part // 2
            if ALIGNED:
                pairs = tl.load(_as_words(plane) + place, mask=rows, other=0).to(tl.int32)
                pairs = (pairs | (pairs << 8)) & 0x00FF00FF
            else:
                pairs = load_code(plane, place * 2, rows) | (load_code(plane, place * 2 + 1, rows) << 16)
            word |= (pairs | (pairs << 4)) & 0x0F0F0F0F
        if BITS & 2:
            four = load_code(block + (BLOCK * (BITS & 4) // 8) + part // 4, place, rows)
            four = (four | (four << 12)) & 0x000F000F
            word |= ((four | (four << 6)) & 0x03030303) << (BITS & 4)
        if BITS & 1:
            # Two lanes load the same byte. The hint has lanes load along rows, as they do for the other planes. Loads
            # stay single bytes, since the pointer is not aligned to more.
            half = tl.max_contiguous(place // 2, (1, ROW // 4))
            eight = load_code(block + (BLOCK * (BITS - 1) // 8) + part // 8, half, rows)
            four = (eight >> ((place % 2) * 4)) & 15
            four = (four | (four << 14)) & 0x00030003
            word |= ((four | (four << 7)) & 0x01010101) << (BITS - 1)
        code = (word[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 0xFF
        code = tl.reshape(code, (elements.shape[0], ROW))
    return code


@triton.jit
def _in_words(pointer, BYTES: tl.constexpr):
    """Return a pointer that the compiler takes as aligned to so many bytes only.

    Each thread then moves the packed codes of the values that it has. Left alone, the compiler moves 16 bytes at once
    and exchanges codes between threads, which takes longer.
    """
    if INTERPRETED:
        return pointer
    zero = tl.inline_asm_elementwise("mov.b64 $0, 0;", "=l", [], dtype=tl.int64, is_pure=True, pack=1)
    return pointer + tl.multiple_of(zero, BYTES)


@triton.jit
def _lay_out_as_bytes(pointers, code):
    """Have each thread hold 16 values in a row, as it does for codes that are bytes.

    The compiler does so for a store of bytes; this one stores nothing. With the four in a row of a thread that only
    loads float32, more threads share a block, and each of them computes what the block needs.
    """
    if not INTERPRETED:
        nothing = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        tl.store(pointers, code.to(tl.uint8), mask=nothing != 0)


@triton.jit
def _as_words(pointers):
    """Return pointers to bytes as pointers to uint16."""
    return pointers.to(tl.pointer_type(tl.uint16), bitcast=True)


@triton.jit
def _store(pointers, value, mask, DTYPE: tl.constexpr):
    tl.store(pointers, value.to(DTYPE), mask=mask)
