"""Add up on the device what the programs of a launch have measured (``statistics.py``), tensor by tensor."""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _total(partials, columns, start, programs, item, WIDTH: tl.constexpr):
    """Add up one statistic of some programs, in float64."""
    lanes = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for at in range(0, programs, WIDTH):
        column, mask = partials + start + at + lanes, at + lanes < programs
        value = tl.load(column + item * columns, mask, 0.0).to(tl.float64)
        if item < 2:
            unit = tl.load(column + 5 * columns, mask, 0.0).to(tl.float64)
            total += value * unit * unit
        elif item == 2:
            total = _larger(total, value)
        else:
            total += value
    return _fold(total, item)


@triton.jit
def _larger(a, b):
    """Return the larger of two numbers that are not negative; NaN if one is."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _fold(values, item):
    # The patterns of floats that are not negative order as the floats do, with NaN on top.
    largest = tl.max(values.to(tl.int64, bitcast=True), axis=0).to(tl.float64, bitcast=True)
    return tl.where(item == 2, largest, tl.sum(values))


# Not specialized: a large save runs what a small one has compiled.
@triton.jit(do_not_specialize=["columns"])
def _parts_kernel(partials, columns, parts, PROGRAMS: tl.constexpr):
    item, part, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start = part * PROGRAMS
    programs = tl.minimum(columns - start, PROGRAMS)
    tl.store(parts + item * count + part, _total(partials, columns, start, programs, item, PROGRAMS))


@triton.jit(do_not_specialize=["count"])
def _total_kernel(parts, count, statistics, WIDTH: tl.constexpr):
    item, lanes = tl.program_id(0), tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for at in range(0, count, WIDTH):
        value = tl.load(parts + item * count + at + lanes, at + lanes < count, 0.0)
        total = _larger(total, value) if item == 2 else total + value
    tl.store(statistics + item, _fold(total, item))


@triton.jit(do_not_specialize=["columns"])
def _totals_kernel(partials, columns, first, used, rows, statistics, WIDTH: tl.constexpr):
    item, tensor = tl.program_id(0), tl.program_id(1)
    start, programs = tl.load(first + tensor), tl.load(used + tensor)
    row = statistics + tl.load(rows + tensor) * 5
    tl.store(row + item, _total(partials, columns, start, programs, item, WIDTH))


def empty_partials(like: Tensor, programs: int) -> Tensor:
    """``[6, programs]`` float32 on the device of ``like``: the five statistics and their unit."""
    return torch.empty(6, programs, dtype=torch.float32, device=like.device)


def sum_of_one(partials: Tensor, statistics: Tensor) -> None:
    """Add up all programs of one tensor: ``[6, programs]`` into ``[5]`` float64."""
    programs = partials.shape[1]
    parts = torch.empty(5, triton.cdiv(programs, 1024), dtype=torch.float64, device=partials.device)
    with torch.cuda.device_of(partials):
        if programs:
            _parts_kernel[(5, parts.shape[1])](partials, programs, parts, PROGRAMS=1024)
        _total_kernel[(5,)](parts, parts.shape[1], statistics, WIDTH=256)


def sum_of_each(partials: Tensor, first: Tensor, used: Tensor, rows: Tensor, statistics: Tensor) -> None:
    """Add up the programs of each tensor of a group.

    Args:
        partials: ``[6, programs]`` float32.
        first: ``[tensors]`` int64, the first program of each tensor.
        used: ``[tensors]`` int64, the number of its programs, which follow each other.
        rows: ``[tensors]`` int64, the row of each tensor in the statistics.
        statistics: ``[any, 5]`` float64, of which these rows are written.
    """
    with torch.cuda.device_of(partials):
        _totals_kernel[(5, len(first))](partials, partials.shape[1], first, used, rows, statistics, WIDTH=1024)
