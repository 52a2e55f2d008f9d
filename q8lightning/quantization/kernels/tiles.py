"""Tiles: which elements a program handles, and how they are read and written."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def tile(numel, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's first row (int64), its rows and elements from there (int32), each with its mask, and how
    many elements there are.

    Only the start is 64-bit: 64-bit offsets and comparisons for every element would cost more than the arithmetic.
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
def store(pointer, offsets, value, mask):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)
