"""The codecs of ``reference.py`` for CPU tensors, in cache-sized chunks: the same results, many times faster.

Each function has the signature and the meaning of its namesake in the reference. Chunks hold whole blocks, so a chunk
with a block that is not finite is simply handed to the reference. Passes write into a scratch that is allocated once a
call: fresh memory for every intermediate would cost more than the arithmetic.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast

import torch
from torch import Tensor

from q8lightning.quantization.spec import logarithm, reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

CHUNK = 2**20
"""Elements per chunk: four megabytes of float32, so that the passes over a chunk stay in the caches
(``benchmarks/cpu.py --chunk`` compares sizes)."""

HUGE = 2**23
"""Bytes from which on memory is asked for in huge pages; less is often in memory that was freed before."""


def _chunks(numel: int, block_size: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield the elements, the blocks and the block width of each chunk; a short last block comes alone."""
    whole = numel - numel % block_size
    step = max(CHUNK // block_size, 1) * block_size
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield slice(start, stop), slice(start // block_size, stop // block_size), block_size
    if whole < numel:
        yield slice(whole, numel), slice(whole // block_size, whole // block_size + 1), numel - whole


def _scratch(numel: int, rows: int) -> Tensor:
    return _empty(rows * min(numel, CHUNK), torch.float32).view(rows, -1)


def _empty(numel: int, dtype: torch.dtype) -> Tensor:
    """Return a new tensor, in huge pages if it is large: to touch 4 KiB at a time would take longer than to decode."""
    values = torch.empty(numel, dtype=dtype, device="cpu")
    _advise(values.data_ptr(), values.nbytes)
    return values


def use_huge_pages(memory: memoryview) -> None:
    """Ask for huge pages for memory that nobody has written to yet; no more than a hint."""
    _advise(ctypes.addressof(ctypes.c_byte.from_buffer(memory)), memory.nbytes)


def _advise(address: int, nbytes: int) -> None:
    madvise = _madvise()
    if madvise is not None and nbytes >= HUGE:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, length, mmap.MADV_HUGEPAGE)  # a hint: what it returns makes no difference


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise, None where there are no huge pages to ask for."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int]", madvise)


def _blocks(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def _scale(blocks: Tensor, end: int, spare: Tensor) -> Tensor:
    """As ``reference.block_scale``, with the magnitudes in ``spare``."""
    absmax = torch.abs(blocks, out=spare).amax(dim=1)
    scale = absmax.masked_fill_(absmax < reference.SMALLEST_NORMAL, 0.0)
    return torch.where(blocks.amax(dim=1) == scale, end * scale, -end * scale).add_(0.0) if end else scale


def _search(y: Tensor, codebook: Codebook) -> Tensor:
    """Return the number of thresholds below each element of ``y``, int32; overwrites ``y``."""
    if codebook.closed_form is not None:
        return codebook.closed_form(y)
    cells, flat = codebook.cells, y.view(-1)
    code = cells.first.index_select(0, (flat.view(torch.int32) >> cells.shift).bitwise_and_(cells.first.numel() - 1))
    thresholds = torch.cat([codebook.thresholds, codebook.thresholds.new_full((2**cells.rounds,), torch.inf)])
    for step in (2**i for i in reversed(range(cells.rounds))):
        code.add_(flat > thresholds[step - 1 :].index_select(0, code), alpha=step)
    return code.view(y.shape)


def _integers(x: Tensor, zero: int) -> Tensor:
    """As ``reference.round_to_code``, int32; overwrites ``x``."""
    return x.add_(reference.ROUNDING + zero).view(torch.int32).bitwise_and_(0xFF)


def quantize(x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    flat = x.detach().reshape(-1)
    codes = _empty(flat.numel(), torch.uint8)
    scale = torch.empty(_blocks(flat.numel(), block_size), dtype=torch.float32, device="cpu")
    scratch = _scratch(flat.numel(), 1)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        blocks = flat[elements].view(-1, width).float()
        spare = scratch[0, : blocks.numel()].view(-1, width)
        scale[rows] = part = _scale(blocks, codebook.end if signed_scale else 0, spare)
        if not bool(part.isfinite().all()):
            codes[elements] = reference.quantize(blocks, codebook, width, signed_scale)[0].view(-1)
            continue
        y = torch.mul(blocks, reference.reciprocal(part)[:, None], out=spare)
        codes[elements] = _search(y, codebook).view(-1)
    return codes.view(x.shape), scale


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    flat, levels = codes.reshape(-1), _Levels(codebook)
    values = _empty(flat.numel(), dtype)
    scratch = _scratch(flat.numel(), 2)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        if not bool(scale[rows].isfinite().all()):
            values[elements] = reference.dequantize(flat[elements], scale[rows], codebook, width, dtype)
            continue
        spare, part = scratch[:, : flat[elements].numel()]
        if dtype == torch.float32:
            part = values[elements]
        levels.look_up(flat[elements], spare, out=part)
        part.view(-1, width).mul_(scale[rows, None])
        if dtype != torch.float32:
            values[elements] = part
    return values.view(codes.shape)


class _Levels:
    """The levels of a codebook by code: computed where they are quotients of integers, else looked up."""

    def __init__(self, codebook: Codebook) -> None:
        self.name = codebook.name if codebook.spec in ("linear", "softsign") else None
        # Codes that the codebook lacks decode to 0, as in the reference.
        self.table = torch.nn.functional.pad(codebook.tensor(), (0, 256 - len(codebook.levels)))
        self._integers = torch.empty(2, 0, dtype=torch.uint8, device="cpu")

    def look_up(self, codes: Tensor, spare: Tensor, out: Tensor) -> None:
        """Write the level of each of ``codes`` (flat, uint8) into ``out`` (float32); ``spare`` is like ``out``."""
        if self.name is None or bool(codes.max() == 255):
            torch.index_select(self.table, 0, spare.view(torch.int32).copy_(codes), out=out)
            return
        if self._integers.shape[1] < codes.numel():
            self._integers = torch.empty(2, codes.numel(), dtype=torch.uint8, device="cpu")
        # Bytes as long as possible: a pass over them takes a quarter of the time.
        numerator, denominator = self._integers[:, : codes.numel()]
        out.copy_(torch.sub(codes, 127, out=numerator).view(torch.int8))
        if self.name == "linear":
            out.div_(127.0)
        else:
            torch.abs(numerator.view(torch.int8), out=denominator.view(torch.int8))
            denominator.neg_().sub_(2)  # 254 - x, modulo 256
            out.div_(spare.copy_(denominator))


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int) -> Tensor:
    return dequantize(*quantize(x, codebook, block_size), codebook, block_size, x.dtype)


def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    flat, linear = x.detach().reshape(-1), BUILTIN["linear"]
    codes, residual = (_empty(flat.numel(), torch.uint8) for _ in range(2))
    scale = torch.empty(_blocks(flat.numel(), block_size), dtype=torch.float32, device="cpu")
    levels, scratch = _Levels(linear), _scratch(flat.numel(), 2)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        blocks = flat[elements].view(-1, width).float()
        spare, left = scratch[:, : blocks.numel()].view(2, -1, width)
        scale[rows] = part = _scale(blocks, 0, spare)
        if not bool(part.isfinite().all()):
            first, second, _ = reference.quantize_residual(blocks, width)
            codes[elements], residual[elements] = first.view(-1), second.view(-1)
            continue
        per_unit = reference.reciprocal(part)[:, None]
        codes[elements] = _search(torch.mul(blocks, per_unit, out=spare), linear).view(-1)
        levels.look_up(codes[elements], spare.view(-1), out=left.view(-1))
        left.mul_(part[:, None])
        torch.sub(blocks, left, out=left).mul_(per_unit).mul_(reference.RESIDUAL_DIVISOR * 127)
        residual[elements] = _integers(left, zero=127).clamp_(1, 253).view(-1)
    return codes.view(x.shape), residual.view(x.shape), scale


def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    flat, flat_residual, levels = codes.reshape(-1), residual.reshape(-1), _Levels(BUILTIN["linear"])
    values = _empty(flat.numel(), dtype)
    scratch = _scratch(flat.numel(), 3)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        first, second, part = flat[elements], flat_residual[elements], scale[rows]
        if not bool(part.isfinite().all()):
            values[elements] = reference.dequantize_residual(first, second, part, width, dtype)
            continue
        spare, one, two = scratch[:, : first.numel()]
        for stage, stage_scale, decoded in (
            (first, part, one),
            (second, reference.divide(part, reference.RESIDUAL_DIVISOR), two),
        ):
            levels.look_up(stage, spare, out=decoded)
            decoded.view(-1, width).mul_(stage_scale[:, None])
        if dtype == torch.float32:
            torch.add(one, two, out=values[elements])
        else:
            values[elements] = one.add_(two)
    return values.view(codes.shape)


def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = x.detach().reshape(-1)
    codes = _empty(flat.numel(), torch.uint8)
    bounds = torch.empty(_blocks(flat.numel(), block_size), 2, dtype=torch.float32, device="cpu")
    scratch = _scratch(flat.numel(), 3)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        blocks = flat[elements].view(-1, width).float()
        log, spare, other = scratch[:, : blocks.numel()].view(3, -1, width)
        low, high = blocks.amin(dim=1), blocks.amax(dim=1) + 0.0  # no negative zero
        if not bool(((low >= 0) & high.isfinite()).all()):  # a NaN is not >= 0
            part, bounds[rows] = reference.quantize_log(blocks, width)
            codes[elements] = part.view(-1)
            continue
        has_zeros = not bool((low > 0).all())
        if has_zeros:
            low = spare.copy_(blocks).masked_fill_(blocks <= 0, torch.inf).amin(dim=1)
            low.masked_fill_(low.isinf(), 0.0)
        bounds[rows] = torch.stack([low, high], dim=1)
        grid = logarithm.log_grid(bounds[rows])
        pattern, integer = blocks.view(torch.int32), spare.view(torch.int32)
        torch.bitwise_and(pattern, logarithm.OCTAVE - 1, out=integer).bitwise_or_(0x3F800000)
        mantissa = spare.sub_(1.0)
        _polynomial(mantissa, *logarithm.LOG2_POLYNOMIAL, out=log)
        log.mul_(torch.sub(1.0, mantissa, out=other).mul_(mantissa))
        log.add_(spare.copy_(torch.sub(pattern, bounds[rows].view(torch.int32)[:, :1], out=integer)))
        log.add_(grid.offset[:, None]).mul_(grid.codes_per_pattern[:, None])
        code = _integers(log, zero=1)
        if has_zeros:
            code.mul_(integer.copy_(torch.sign(blocks, out=spare)))
        codes[elements] = code.view(-1)
    return codes.view(x.shape), bounds


def _polynomial(x: Tensor, constant: float, *coefficients: float, out: Tensor) -> None:
    """Write ``constant + x (c1 + x (c2 + ...))`` into ``out``, one rounding an operation."""
    *rest, last = coefficients
    torch.mul(x, last, out=out)
    for coefficient in reversed(rest):
        out.add_(coefficient).mul_(x)
    out.add_(constant)


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    flat = codes.reshape(-1)
    values = _empty(flat.numel(), dtype)
    grid = logarithm.log_grid(bounds)
    low, high = bounds.contiguous().view(torch.int32).unbind(dim=1)
    scratch = _scratch(flat.numel(), 2 if dtype == torch.float32 else 3)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        code = flat[elements].view(-1, width)
        has_zeros = bool(code.amin() == 0)
        one, two = scratch[:2, : code.numel()].view(2, -1, width)
        part = values[elements] if dtype == torch.float32 else scratch[2, : code.numel()]
        decoded = part.view(torch.int32).view(-1, width)
        # In place wherever it can be: to write to other memory takes longer.
        position, fraction = one.view(torch.int32), two.view(torch.int32)
        fraction.copy_(code).mul_(grid.step[rows, None]).add_(grid.origin[rows, None])
        position.copy_(fraction)
        fraction.bitwise_and_(logarithm.OCTAVE - 1).bitwise_or_(0x3F800000)
        # The octave of the position, with the power's mantissa in the place of the fraction's.
        octave = position.sub_(fraction)
        _polynomial(two, *logarithm.EXP2_POLYNOMIAL, out=part.view(-1, width))
        decoded.add_(octave)
        torch.maximum(decoded, low[rows, None], out=decoded)
        torch.minimum(decoded, high[rows, None], out=decoded)
        if has_zeros:
            decoded.mul_(position.copy_(code.clamp(max=1)))  # a comparison would take eight times as long
        if dtype != torch.float32:
            values[elements] = part
    return values.view(codes.shape)


def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.detach().reshape(-1)
    codes = _empty(flat.numel(), torch.uint8)
    scale = torch.empty(_blocks(flat.numel(), block_size), dtype=torch.float32, device="cpu")
    zero_point = torch.empty(scale.numel(), dtype=torch.uint8, device="cpu")
    for elements, rows, width in _chunks(flat.numel(), block_size):
        part, scale[rows], zero_point[rows] = reference.quantize_affine(flat[elements].view(-1, width), width)
        codes[elements] = part.view(-1)
    return codes.view(x.shape), scale, zero_point


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    flat = codes.reshape(-1)
    values = _empty(flat.numel(), dtype)
    for elements, rows, width in _chunks(flat.numel(), block_size):
        values[elements] = reference.dequantize_affine(flat[elements], scale[rows], zero_point[rows], width, dtype)
    return values.view(codes.shape)
