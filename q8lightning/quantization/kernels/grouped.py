"""One launch for many tensors: encode, decode, and for QAT write the quantized values.

A work list on the device tells each program where its part of which tensor lies, as offsets from the first tensor of
the group. Its rows stand for segments of several tiles, so that it stays small enough for the caches and a program
waits for one short load before its own. A list depends on nothing but addresses and sizes and is kept for the next
call, so groups whose tensors stay where they are cost one launch each.

There is one launch for each dtype, and another for those tensors of it that are not aligned to 16 bytes, because the
compiler must know the alignment of all of them. Empty tensors are welcome.

A tensor's counterpart, its encoded form or its quantized values, lies in a buffer that all tensors of the group share.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.block_choice import limit_of
from q8lightning.quantization.codebook import BUILTIN, Codebook
from q8lightning.quantization.coding import Coding
from q8lightning.quantization.kernels import codec, log
from q8lightning.quantization.kernels.bits import is_finite, rounded
from q8lightning.quantization.kernels.fake_quantize import fake_quantize_tiles, is_chosen
from q8lightning.quantization.kernels.launch import LOG_ROW, in_pairs, search_constants
from q8lightning.quantization.kernels.statistics import (
    add,
    add_in_units,
    is_safe,
    load_again,
    nothing,
    reduce,
    unit_of_tiles,
    write_many,
)
from q8lightning.quantization.kernels.tables import tables_of
from q8lightning.quantization.kernels.tiles import load_code, load_float, store
from q8lightning.quantization.kernels.totals import empty_partials, totals
from q8lightning.quantization.kernels.work_list import SEGMENT, Launch, describe, launches

_SEGMENT = tl.constexpr(SEGMENT)

# Kernels


@triton.jit
def _own(work, COLUMNS: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's row of the work list, the elements to skip there, and how many are left."""
    program = tl.program_id(0)
    row = work + (program // _SEGMENT).to(tl.int64) * COLUMNS
    skip = (program % _SEGMENT) * TILE
    left = tl.minimum(tl.load(row) - skip, TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return row, skip, left


@triton.jit
def _start(row, COLUMN: tl.constexpr, skip, MULTIPLE: tl.constexpr):
    """Where the elements of a column of the work list begin; a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(row + COLUMN) + skip, MULTIPLE)


@triton.jit
def _encode_tile(
    values, like, codes, rest, scales, left, table, levels, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STORE: tl.constexpr, DECODE: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Encode a tile; return what it decodes to, in the dtype of ``like``, and 1 if a scale is not finite, else 0."""
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
        code, second, scale = codec.encode_residual(values)
        if STORE:
            store(rest, elements, second, mask)
            store(scales, rows, scale, row_mask)
        if DECODE:
            decoded = rounded(codec.decode_residual(code, second, scale), like)
    else:
        code, scale = codec.encode(values, table, SEARCH, SHIFT, BITS, END)
        if STORE:
            store(scales, rows, scale, row_mask)
        if DECODE:
            decoded = rounded(codec.decode(code, levels, scale, SEARCH), like)
    if STORE:
        store(codes, elements, code, mask)
    return decoded, tl.max((~is_finite(scale)).to(tl.int32), axis=0)


@triton.jit
def _encode_kernel(
    x, codes, scales, failed, work, table, levels, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    row, skip, left = _own(work, 6, ROWS * BLOCK, ALIGNED)
    if left <= 0:
        return
    elements = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = load_float(x + _start(row, 1, skip, MULTIPLE), elements, elements < left)
    rest = codes + _start(row, 4, skip, 16 if ALIGNED else 1)
    _, wrong = _encode_tile(
        values, x, codes + _start(row, 2, skip, 16 if ALIGNED else 1), rest,
        scales + tl.load(row + 3) + skip // BLOCK * (2 if CODEC == "log" else 1), left, table, levels,
        ROWS, BLOCK, True, False, CODEC, SEARCH, SHIFT, BITS, END,
    )  # fmt: skip
    if wrong != 0:
        tl.atomic_or(failed + tl.load(row + 5), 1)


@triton.jit
def _measured_encode_kernel(
    x, codes, scales, failed, work, table, levels, partials, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """A segment a program, tile after tile as in ``fake_quantize_tiles``: sums stay with their lanes."""
    TILE: tl.constexpr = ROWS * BLOCK
    segment = tl.program_id(0)
    row = work + segment.to(tl.int64) * 6
    left = tl.minimum(tl.load(row), _SEGMENT * TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    tiles = tl.cdiv(left, TILE)
    x += tl.multiple_of(tl.load(row + 1), MULTIPLE)
    rest = codes + tl.multiple_of(tl.load(row + 4), 16 if ALIGNED else 1)
    codes += tl.multiple_of(tl.load(row + 2), 16 if ALIGNED else 1)
    scales += tl.load(row + 3)

    elements = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    error, squares, largest, zeros, zeroed = nothing(ROWS, BLOCK, False)
    wrong = 0
    ahead = tl.load(x + elements, mask=elements < left, other=0.0)
    for i in range(tiles):
        values = ahead.to(tl.float32)
        following = elements + (i + 1) * TILE
        ahead = tl.load(x + following, mask=following < left, other=0.0)
        decoded, tile_wrong = _encode_tile(
            values, x, codes + i * TILE, rest + i * TILE, scales + i * (ROWS * (2 if CODEC == "log" else 1)),
            left - i * TILE, table, levels, ROWS, BLOCK, True, True, CODEC, SEARCH, SHIFT, BITS, END,
        )  # fmt: skip
        wrong |= tile_wrong
        error, squares, largest, zeros, zeroed = add(
            values, decoded.to(tl.float32), values, decoded, error, squares, largest, zeros, zeroed, False
        )
    if wrong != 0:
        tl.atomic_or(failed + tl.load(row + 5), 1)

    error, squares, largest, zeros, zeroed = reduce(error, squares, largest, zeros, zeroed)
    unit = 1.0
    if is_safe(error, squares):
        zeroed -= zeros
    else:
        unit, shrink = unit_of_tiles(x, elements, left, tiles)
        error, squares, zeroed = 0.0, 0.0, 0.0
        for i in range(tiles):
            values, _, _ = load_again(x, elements, left, i)
            decoded, _ = _encode_tile(
                values, x, codes, rest, scales, left - i * TILE, table, levels,
                ROWS, BLOCK, False, True, CODEC, SEARCH, SHIFT, BITS, END,
            )  # fmt: skip
            error, squares, zeroed = add_in_units(values, decoded.to(tl.float32), shrink, error, squares, zeroed)
        largest = tl.where(error == error, largest, error)
    write_many(
        error, squares, largest, zeros, zeroed, unit, elements, left, tiles, partials, segment, tl.num_programs(0)
    )


@triton.jit
def _decode_kernel(
    x, codes, scales, work, levels, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    row, skip, left = _own(work, 6, ROWS * BLOCK, ALIGNED)
    if left <= 0:
        return
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, row_mask = elements < left, rows * BLOCK < left
    code = load_code(codes + _start(row, 2, skip, 16 if ALIGNED else 1), elements, mask)
    blocks = (skip // BLOCK + rows) // PARTS
    if CODEC == "log":
        scale = scales + tl.load(row + 3)
        value = log.decode(code, load_float(scale, blocks * 2, row_mask), load_float(scale, blocks * 2 + 1, row_mask))
    else:
        block_scale = load_float(scales + tl.load(row + 3), blocks, row_mask)
        if CODEC == "residual":
            rest = load_code(codes + _start(row, 4, skip, 16 if ALIGNED else 1), elements, mask)
            value = codec.decode_residual(code, rest, block_scale)
        else:
            value = codec.decode(code, levels, block_scale, SEARCH)
    store(x + _start(row, 1, skip, MULTIPLE), elements, value, mask)


@triton.jit(do_not_specialize=["seed", "limit"])
def _fake_quantize_kernel(
    x, values, work, table, levels, seed, limit, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHOOSE: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    row, skip, left = _own(work, 5, ROWS * BLOCK, ALIGNED)
    if left <= 0:
        return
    rows = tl.arange(0, ROWS)
    elements = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = elements < left
    original = load_float(x + _start(row, 1, skip, MULTIPLE), elements, mask)
    quantized = codec.fake_quantize(original, table, levels, SEARCH, SHIFT, BITS, END)
    if CHOOSE:
        blocks = tl.load(row + 3) + skip // BLOCK + rows
        quantized = tl.where(is_chosen(seed, limit, tl.load(row + 4), blocks)[:, None], quantized, original)
    store(values + _start(row, 2, skip, MULTIPLE), elements, quantized, mask)


@triton.jit(do_not_specialize=["seed", "limit"])
def _measured_fake_quantize_kernel(
    x, values, work, table, levels, seed, limit, partials, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
    IN_PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHOOSE: tl.constexpr, SEARCH: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    row = work + segment.to(tl.int64) * 5
    left = tl.minimum(tl.load(row), _SEGMENT * ROWS * BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    here = x + tl.multiple_of(tl.load(row + 1), MULTIPLE)
    there = values + tl.multiple_of(tl.load(row + 2), MULTIPLE)
    fake_quantize_tiles(
        here, there, left, table, levels, partials, segment, tl.num_programs(0),
        seed, limit, tl.load(row + 4), tl.load(row + 3),
        ROWS, BLOCK, _SEGMENT, SEARCH, SHIFT, BITS, END, CHOOSE, IN_PAIRS,
    )  # fmt: skip


# Launchers


def _run(kernel: Any, launch: Launch, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    with torch.cuda.device_of(launch.work):
        kernel[(programs,)](
            *arguments, **constants, ALIGNED=launch.aligned, MULTIPLE=launch.multiple,
            num_warps=launch.warps, enable_fp_fusion=False,  # codec.py needs every operation rounded
        )  # fmt: skip


def _collect(partials: Tensor, launch: Launch, tiles: int, statistics: Tensor) -> None:
    """Add up what belongs to each member, with so many tiles a program; rows of other tensors stay as they are."""
    totals(partials, launch.first // tiles, (launch.used + tiles - 1) // tiles, launch.numbers, statistics)


def encode(
    tensors: Sequence[Tensor],
    buffer: Tensor,
    starts: tuple[int, ...],
    coding: Coding,
    failed: Tensor,
    statistics: Tensor | None = None,
) -> None:
    """Encode each tensor into its stretch of a buffer: scales, codes and, if there is one, the residual's codes.

    Args:
        tensors: ``[numel]`` float32, float16 or bfloat16 each, on one device.
        buffer: uint8, aligned to 16 bytes, on the same device.
        starts: Where in the buffer each tensor's scales begin, a multiple of 4. It is fastest if the codes behind them
            begin at a multiple of 16.
        coding: How to encode.
        failed: ``[tensors]`` int32 zeros, to be set to 1 where a block could not be encoded and has a scale that is not
            finite.
        statistics: ``[tensors, 5]`` float64 to be written, if wanted; rows of empty tensors are not.
    """
    book = coding.codebook or BUILTIN["linear"]
    tables = tables_of(book, buffer.device)
    in_cells = coding.kind == "codebook" and tables.search not in ("linear", "softsign")
    settings = "group in cells" if in_cells else f"group {coding.kind}"
    if statistics is not None:
        settings = f"measured {settings}"
    constants = {"CODEC": coding.kind, "END": book.end if coding.signed_scale else 0, **search_constants(tables)}
    for launch in launches(describe(tensors, starts), coding, coding.block_size, settings, buffer.device):
        parts = tensors[launch.members[0]], buffer, _as(buffer, torch.float32), failed, launch.work
        constants |= {"ROWS": launch.rows, "BLOCK": coding.block_size}
        if statistics is None:
            _run(_encode_kernel, launch, launch.programs, *parts, tables.table, tables.levels, **constants)
        else:
            partials = empty_partials(launch.work, len(launch.work))
            measured = *parts, tables.table, tables.levels, partials
            _run(_measured_encode_kernel, launch, len(launch.work), *measured, **constants)
            _collect(partials, launch, SEGMENT, statistics)


def decode(buffer: Tensor, starts: tuple[int, ...], values: Sequence[Tensor], coding: Coding) -> None:
    """Decode what :func:`encode` wrote into ``values``: ``[numel]`` float32, float16 or bfloat16 each."""
    tables = tables_of(coding.codebook or BUILTIN["linear"], buffer.device)
    row = min(coding.block_size, LOG_ROW) if coding.kind == "log" else coding.block_size
    settings = "group decode log" if coding.kind == "log" else "group decode"
    search = "linear" if tables.search == "linear" else "table"
    for launch in launches(describe(values, starts), coding, row, settings, buffer.device):
        _run(
            _decode_kernel, launch, launch.programs,
            values[launch.members[0]], buffer, _as(buffer, torch.float32), launch.work, tables.levels,
            ROWS=launch.rows, BLOCK=row, PARTS=coding.block_size // row, CODEC=coding.kind, SEARCH=search,
        )  # fmt: skip


def fake_quantize(
    tensors: Sequence[Tensor],
    buffer: Tensor,
    starts: tuple[int, ...],
    codebook: Codebook,
    block_size: int,
    numbers: tuple[int, ...] | None = None,
    share: float = 1.0,
    seed: int = 0,
    statistics: Tensor | None = None,
) -> None:
    """Write the quantized values of each tensor into its stretch of a buffer.

    They are those of ``reference.quantize``, with a signed scale if the codebook is one-sided, and
    ``reference.dequantize``.

    Args:
        tensors: Float32, float16 or bfloat16 each, dense in memory, on one device; read in the order of memory.
        buffer: uint8, aligned to 16 bytes, on the same device, to be written.
        starts: Where in ``buffer`` the values of each tensor go, in bytes; multiples of 16 are fastest.
        codebook: The levels.
        block_size: Elements that share a scale.
        numbers: The number of each tensor, for ``share`` and ``statistics``; without them, they count from 0.
        share: The share of the blocks that is quantized, as ``block_choice.chosen_blocks`` chooses them; the others
            are copied.
        seed: Chooses the blocks, if ``share`` is below 1.
        statistics: ``[any, 5]`` float64: the rows of the tensors' numbers are written, if wanted; not those of empty
            tensors.
    """
    tables = tables_of(codebook, buffer.device)
    settings = "group fake_quantize" if tables.search in ("linear", "softsign") else "group fake_quantize in cells"
    if statistics is not None:
        settings = f"measured {settings}"
    constants = {
        "BLOCK": block_size, "CHOOSE": share < 1.0, **search_constants(tables),
        "END": codebook.end if codebook.one_sided else 0,
    }  # fmt: skip
    numbered = describe(tensors, starts, numbers)
    for launch in launches(numbered, None, block_size, settings, buffer.device):
        x, values = tensors[launch.members[0]], _as(buffer, launch.dtype)
        parts = x, values, launch.work, tables.table, tables.levels, _int32(seed), _int32(limit_of(share))
        if statistics is None:
            _run(_fake_quantize_kernel, launch, launch.programs, *parts, ROWS=launch.rows, **constants)
        else:
            partials = empty_partials(launch.work, len(launch.work))
            pairs = launch.aligned and in_pairs(x)
            _run(
                _measured_fake_quantize_kernel, launch, len(launch.work), *parts, partials,
                ROWS=launch.rows, IN_PAIRS=pairs, **constants,
            )  # fmt: skip
            _collect(partials, launch, SEGMENT, statistics)


def _as(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _int32(pattern: int) -> int:
    """The int32 with the last 32 bits of an integer: kernels take one type whatever the number."""
    return ((pattern + 2**31) & 0xFFFFFFFF) - 2**31
