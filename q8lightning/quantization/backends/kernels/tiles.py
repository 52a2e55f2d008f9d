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
