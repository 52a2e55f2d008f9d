"""Measure how far stored moments turn the steps of Adam, in one launch for all parameters that are stored alike.

Work lists, alignment and launches are as in ``many.py``, but a row stands for two tensors. Of a large tensor, only an
eighth of the segments is listed (``sampling.py``). Sums are float64 and added up in a fixed order.
"""
# Triton's decorator is untyped, and so is what it decorates:
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.backends.kernels.bits import rounded
from q8lightning.quantization.backends.kernels.codecs.dispatch import decode_tile
from q8lightning.quantization.backends.kernels.launch import bits_constants
from q8lightning.quantization.backends.kernels.tables import tables_of
from q8lightning.quantization.backends.kernels.tiles import load_float
from q8lightning.quantization.backends.kernels.work_list import SEGMENT
from q8lightning.quantization.spec.layout import KernelCodec, Layout
from q8lightning.quantization.spec.sampling import STRETCH, stretches_of, weight_of
from q8lightning.system.ambient import lasting

TILE = STRETCH // SEGMENT
"""Elements of a tile, 512. Each program is one warp."""

ROW = 64
"""The longest row of a tile. With 32 rows, each lane of a warp computes the log grid of one."""

_SEGMENT = tl.constexpr(SEGMENT)


class _Place(NamedTuple):
    """The memory of one moment of all parameters, as numbers.

    Attributes:
        addresses: The address of each original.
        itemsize: Bytes of its elements.
        starts: Where its encoded form begins in the buffer, in bytes.
        layout: The layout of the encoded form; None if the moment is stored as it is.
    """

    addresses: tuple[int, ...]
    itemsize: int
    starts: tuple[int, ...]
    layout: Layout | None

    @property
    def block_size(self) -> int:
        return TILE if self.layout is None else self.layout.block_size

    def columns(self, index: int, numel: int) -> tuple[int, int, int, int]:
        """Return the offsets of the values from the first tensor, and of codes, scales and residual codes."""
        offset = (self.addresses[index] - self.addresses[0]) // self.itemsize
        if self.layout is None:
            return offset, 0, 0, 0
        stages = self.layout.code_starts(self.starts[index], numel)
        return offset, stages[0], self.starts[index] // self.layout.scale_dtype.itemsize, stages[-1]

    def advance(self, segment: int) -> tuple[int, int, int, int]:
        """Return how far these offsets move from one segment to the next."""
        if self.layout is None:
            return segment, 0, 0, 0
        first, rest = (segment // 8 * bits for bits in (self.layout.bits[0], self.layout.bits[-1]))
        return segment, first, segment // self.layout.block_size * self.layout.scales, rest

    def is_aligned(self, index: int, numel: int) -> bool:
        codes = [] if self.layout is None else self.layout.code_starts(self.starts[index], numel)
        return not any(n % 16 for n in (self.addresses[index], numel, *codes))


class _Launch(NamedTuple):
    """Parameters of one alignment.

    Attributes:
        aligned: As in ``work_list.Launch``, of both moments.
        work: ``[segments, 9]`` int64: elements left, then the four offsets of the first and of the second moment.
        first: ``[members]`` int64, the first program of each parameter.
        used: ``[members]`` int64, the number of its programs.
        members: ``[members]`` int64, its row in the sums.
        weights: ``[members]`` float64, the factor by which the sum of a sample stands for the whole.
    """

    aligned: bool
    work: Tensor
    first: Tensor
    used: Tensor
    members: Tensor
    weights: Tensor


@triton.jit
def _stored(
    values, like, buffer, floats, levels, row, COLUMN: tl.constexpr, elements, mask, tile_rows, row_mask,
    PARTS: tl.constexpr, CODEC: tl.constexpr, SEARCH: tl.constexpr, BITS: tl.constexpr, REST_BITS: tl.constexpr,
    NARROW: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return a tile as it is stored, decoded to float32."""
    MULTIPLE: tl.constexpr = 16 if ALIGNED else 1
    if CODEC == "raw":
        return values
    else:
        codes = buffer + tl.multiple_of(tl.load(row + COLUMN + 1), MULTIPLE)
        rest = buffer + tl.multiple_of(tl.load(row + COLUMN + 3), MULTIPLE)
        scales = (_as_int16(buffer) if NARROW else floats) + tl.load(row + COLUMN + 2)
        value = decode_tile(
            codes, rest, scales, levels, elements, mask, tile_rows, row_mask, PARTS, CODEC, SEARCH, BITS, REST_BITS,
            ALIGNED,
        )  # fmt: skip
        return rounded(value, like).to(tl.float32)


@triton.jit
def _as_int16(pointer):
    return pointer.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def _direction(first, second, eps):
    return tl.div_rn(first, tl.sqrt_rn(second) + eps)


@triton.jit
def _sums_kernel(
    firsts, seconds, buffer, floats, first_levels, second_levels, work, partials, eps,
    ROWS: tl.constexpr, ROW: tl.constexpr, ALIGNED: tl.constexpr,
    FIRST_MULTIPLE: tl.constexpr, FIRST_PARTS: tl.constexpr, FIRST_CODEC: tl.constexpr, FIRST_SEARCH: tl.constexpr,
    FIRST_BITS: tl.constexpr, FIRST_REST_BITS: tl.constexpr, FIRST_NARROW: tl.constexpr,
    SECOND_MULTIPLE: tl.constexpr, SECOND_PARTS: tl.constexpr, SECOND_CODEC: tl.constexpr, SECOND_SEARCH: tl.constexpr,
    SECOND_BITS: tl.constexpr, SECOND_REST_BITS: tl.constexpr, SECOND_NARROW: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = ROWS * ROW
    segment = tl.program_id(0)
    row = work + segment.to(tl.int64) * 9
    left = tl.minimum(tl.load(row), _SEGMENT * TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    firsts += tl.multiple_of(tl.load(row + 1), FIRST_MULTIPLE)
    seconds += tl.multiple_of(tl.load(row + 5), SECOND_MULTIPLE)
    rows = tl.arange(0, ROWS)
    error, squares = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for i in range(tl.cdiv(left, TILE)):
        tile_rows = i * ROWS + rows
        elements = tile_rows[:, None] * ROW + tl.arange(0, ROW)[None, :]
        mask, row_mask = elements < left, tile_rows * ROW < left
        first, second = load_float(firsts, elements, mask), load_float(seconds, elements, mask)
        direction = _direction(first, second, eps)
        stored = _direction(
            _stored(first, firsts, buffer, floats, first_levels, row, 1, elements, mask, tile_rows, row_mask,
                    FIRST_PARTS, FIRST_CODEC, FIRST_SEARCH, FIRST_BITS, FIRST_REST_BITS, FIRST_NARROW, ALIGNED),
            _stored(second, seconds, buffer, floats, second_levels, row, 5, elements, mask, tile_rows, row_mask,
                    SECOND_PARTS, SECOND_CODEC, SECOND_SEARCH, SECOND_BITS, SECOND_REST_BITS,
                    SECOND_NARROW, ALIGNED),
            eps,
        )  # fmt: skip
        off = tl.where(mask, stored - direction, 0.0).to(tl.float64)
        direction = tl.where(mask, direction, 0.0).to(tl.float64)
        error += tl.sum(tl.sum(off * off, axis=1), axis=0)
        squares += tl.sum(tl.sum(direction * direction, axis=1), axis=0)
    tl.store(partials + segment * 2, error)
    tl.store(partials + segment * 2 + 1, squares)


@triton.jit
def _totals_kernel(partials, first, used, members, weights, sums, WIDTH: tl.constexpr):
    item, member = tl.program_id(0), tl.program_id(1)
    start, count, lanes = tl.load(first + member), tl.load(used + member), tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for at in range(0, count, WIDTH):
        total += tl.load(partials + (start + at + lanes) * 2 + item, at + lanes < count, 0.0)
    tl.store(sums + tl.load(members + member) * 2 + item, tl.sum(total, axis=0) * tl.load(weights + member))


def update_direction_sums(
    tensors: tuple[Sequence[Tensor], Sequence[Tensor]],
    starts: tuple[tuple[int, ...], tuple[int, ...]],
    codecs: tuple[KernelCodec | None, KernelCodec | None],
    buffer: Tensor,
    eps: float,
    sums: Tensor,
) -> None:
    """Write the sums from which the error of each parameter's update direction is computed.

    Args:
        tensors: The first and the second moment of each parameter, ``[numel]`` float32, float16 or bfloat16, contiguous
            and on one device. All first moments share a dtype, and all second moments do.
        starts: Where in the buffer the scales of each begin, in bytes. Not read for moments without a codec.
        codecs: The codecs of the first and of the second moments; None for moments that are stored as they are.
        buffer: uint8, aligned to 16 bytes, the encoded moments.
        eps: The eps of the optimizer.
        sums: ``[parameters, 2]`` float64 to be written, as ``many/update_directions.py`` returns them.
    """
    places = tuple(
        _Place(
            tuple(x.data_ptr() for x in each), each[0].element_size(), begin, None if codec is None else codec.layout
        )
        for each, begin, codec in zip(tensors, starts, codecs, strict=True)
    )
    row = min(ROW, *(place.block_size for place in places))
    rows = TILE // row
    sums.zero_()  # for empty tensors
    floats = buffer[: buffer.numel() // 4 * 4].view(torch.float32)
    books = [tables_of(None if codec is None else codec.codebook, buffer.device) for codec in codecs]
    constants: dict[str, Any] = {"ROWS": rows, "ROW": row}
    for name, place, codec, tables in zip(("FIRST", "SECOND"), places, codecs, books, strict=True):
        constants |= {
            f"{name}_PARTS": place.block_size // row,
            f"{name}_CODEC": "raw" if codec is None else codec.kernel,
            f"{name}_SEARCH": tables.level_search,
            f"{name}_NARROW": codec is not None and codec.layout.scale_dtype != torch.float32,
        } | {f"{name}_{key}": bits for key, bits in bits_constants(place.layout or Layout(TILE)).items()}
    numels = tuple(x.numel() for x in tensors[0])
    for launch in _launches(*places, numels, buffer.device):
        members = tensors[0][0], tensors[1][0]
        partials = torch.empty(len(launch.work), 2, dtype=torch.float64, device=buffer.device)
        multiples = {
            f"{name}_MULTIPLE": 16 // x.element_size() if launch.aligned else 1
            for name, x in zip(("FIRST", "SECOND"), members, strict=True)
        }
        with torch.cuda.device_of(buffer):
            _sums_kernel[(len(launch.work),)](
                *members, buffer, floats, books[0].levels, books[1].levels, launch.work, partials, eps,
                ALIGNED=launch.aligned, **multiples, **constants, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            _totals_kernel[(2, len(launch.members))](
                partials, launch.first, launch.used, launch.members, launch.weights, sums, WIDTH=1024
            )  # fmt: skip


@lru_cache(maxsize=32)
@lasting()
def _launches(first: _Place, second: _Place, numels: tuple[int, ...], device: torch.device) -> tuple[_Launch, ...]:
    kinds: dict[bool, list[int]] = {}
    for index, numel in enumerate(numels):
        if numel:
            aligned = first.is_aligned(index, numel) and second.is_aligned(index, numel)
            # Offsets count from the first tensors, so these must be aligned, too.
            base = not (first.addresses[0] % 16 or second.addresses[0] % 16)
            kinds.setdefault(aligned and base, []).append(index)
    steps = [-STRETCH, *first.advance(STRETCH), *second.advance(STRETCH)]
    advance = torch.tensor(steps, dtype=torch.int64, device=device)
    launches = []
    for aligned, members in kinds.items():
        columns = [(numels[i], *first.columns(i, numels[i]), *second.columns(i, numels[i])) for i in members]
        taken = [_stretches(numels[i]) for i in members]
        used = torch.tensor([len(each) for each in taken], dtype=torch.int64, device="cpu")
        begins = used.cumsum(0) - used
        start = torch.tensor(columns, dtype=torch.int64, device=device)
        nth = torch.cat(taken).to(device)
        rows = torch.repeat_interleave(start, used.to(device), dim=0, output_size=len(nth))
        work = (rows + nth[:, None] * advance).contiguous()
        weights = torch.tensor([weight_of(numels[i]) for i in members], dtype=torch.float64, device=device)
        numbers = torch.tensor(members, dtype=torch.int64, device=device)
        launches.append(_Launch(aligned, work, begins.to(device), used.to(device), numbers, weights))
    return tuple(launches)


def _stretches(numel: int) -> Tensor:
    """Return the numbers of the stretches of a tensor that are measured."""
    taken = stretches_of(numel)
    return torch.arange(-(-numel // STRETCH), dtype=torch.int64, device="cpu") if taken is None else taken
