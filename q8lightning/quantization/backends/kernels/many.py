"""Encode, decode or fake-quantize many tensors in one launch.

Each tensor has a counterpart, its encoded form or its quantized values, in a buffer that all share. A work list on the
device tells each program where its part of a tensor and of the counterpart begins (``work_list.py``).

There is one launch for each dtype, and another for its tensors that are not aligned to 16 bytes, because the compiler
must know the alignment. Tensors may be empty.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from q8lightning.quantization.backends.kernels.launch import bits_constants, decoded_row, in_pairs, search_constants
from q8lightning.quantization.backends.kernels.many_kernels import (
    decode_kernel,
    encode_kernel,
    fake_quantize_kernel,
    measured_encode_kernel,
    measured_fake_quantize_kernel,
)
from q8lightning.quantization.backends.kernels.sum_statistics import empty_partials, sum_of_each
from q8lightning.quantization.backends.kernels.tables import tables_of
from q8lightning.quantization.backends.kernels.update_direction import update_direction_sums as update_direction_sums
from q8lightning.quantization.backends.kernels.work_list import SEGMENT, Launch, describe, launches
from q8lightning.quantization.spec.block_choice import limit_of
from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.quantization.spec.layout import KernelCodec, Layout
from q8lightning.quantization.spec.scale_dtype import rounding_code


def _packed(layout: Layout) -> str:
    """Return the word in the names of settings for kernels that pack codes."""
    return "" if layout.is_bytes else "packed "


def _run(kernel: Any, launch: Launch, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    with torch.cuda.device_of(launch.work):  # type: ignore[no-untyped-call]
        kernel[(programs,)](
            *arguments, **constants, ALIGNED=launch.aligned, MULTIPLE=launch.multiple,
            num_warps=launch.warps, enable_fp_fusion=False,  # codecs/codebook.py says why
        )  # fmt: skip


def _collect(partials: Tensor, launch: Launch, tiles: int, statistics: Tensor) -> None:
    """Add up the partial statistics of each tensor of a launch whose programs handle so many tiles each."""
    sum_of_each(partials, launch.first // tiles, (launch.used + tiles - 1) // tiles, launch.numbers, statistics)


def encode(
    tensors: Sequence[Tensor],
    buffer: Tensor,
    starts: tuple[int, ...],
    codec: KernelCodec,
    failed: Tensor,
    statistics: Tensor | None = None,
) -> None:
    """Encode each tensor into its stretch of a buffer.

    Args:
        tensors: ``[numel]`` float32, float16 or bfloat16 each, on one device.
        buffer: uint8, aligned to 16 bytes, on the same device.
        starts: Where in the buffer the scales of each tensor begin, a multiple of the bytes of a scale. It is fastest
            if the codes behind them begin at a multiple of 16.
        codec: The codec.
        failed: ``[tensors]`` int32 zeros. Set to 1 for tensors with a block whose scale is not finite.
        statistics: ``[tensors, 5]`` float64 to be written, or None. Rows of empty tensors are not written.
    """
    tables, layout = tables_of(codec.codebook, buffer.device), codec.layout
    settings = f"many {_packed(layout)}{codec.kernel}" if tables.closed_form else "many in cells"
    if statistics is not None:
        settings = f"measured {settings}"
    constants = {
        "CODEC": codec.kernel, "SCALES": layout.scales, "END": codec.end, **search_constants(tables),
        "ROUND": rounding_code(layout.scale_name) if codec.codebook is None else codec.codebook.rounding,
        **bits_constants(layout),
    }  # fmt: skip
    for launch in launches(describe(tensors, starts), layout, layout.block_size, settings, buffer.device):
        parts = tensors[launch.members[0]], buffer, _scales_in(buffer, layout), failed, launch.work
        constants |= {"ROWS": launch.rows, "BLOCK": layout.block_size}
        if statistics is None:
            _run(encode_kernel, launch, launch.programs, *parts, tables.table, tables.levels, **constants)
        else:
            partials = empty_partials(launch.work, len(launch.work))
            measured = *parts, tables.table, tables.levels, partials
            _run(measured_encode_kernel, launch, len(launch.work), *measured, **constants)
            _collect(partials, launch, SEGMENT, statistics)


def decode(buffer: Tensor, starts: tuple[int, ...], values: Sequence[Tensor], codec: KernelCodec) -> None:
    """Decode what :func:`encode` wrote into ``values``: ``[numel]`` float32, float16 or bfloat16 each."""
    tables, block_size = tables_of(codec.codebook, buffer.device), codec.layout.block_size
    settings = f"many decode {_packed(codec.layout)}{codec.kernel}"
    row = decoded_row(settings, block_size)
    for launch in launches(describe(values, starts), codec.layout, row, settings, buffer.device):
        _run(
            decode_kernel, launch, launch.programs,
            values[launch.members[0]], buffer, _scales_in(buffer, codec.layout), launch.work, tables.levels,
            ROWS=launch.rows, BLOCK=row, PARTS=block_size // row, CODEC=codec.kernel, SEARCH=tables.level_search,
            **bits_constants(codec.layout),
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

    They are those of ``reference.quantize`` and ``reference.dequantize``, with a signed scale if the codebook is
    one-sided.

    Args:
        tensors: float32, float16 or bfloat16 each, dense in memory, on one device. Blocks run in the order of memory.
        buffer: uint8, aligned to 16 bytes, on the same device, to be written.
        starts: Where in the buffer the values of each tensor begin, in bytes. Multiples of 16 are fastest.
        codebook: The levels.
        block_size: Elements that share a scale.
        numbers: The number of each tensor, which chooses its blocks and its row of the statistics. None counts from 0.
        share: The share of the blocks that is quantized, chosen as in ``block_choice.chosen_blocks``. The others are
            copied.
        seed: Chooses the blocks, if ``share`` is below 1.
        statistics: ``[any, 5]`` float64, of which the tensors' rows are written, or None. Rows of empty tensors are not
            written.
    """
    tables = tables_of(codebook, buffer.device)
    settings = "many fake_quantize" if tables.closed_form else "many fake_quantize in cells"
    if statistics is not None:
        settings = f"measured {settings}"
    constants = {
        "BLOCK": block_size, "CHOOSE": share < 1.0, **search_constants(tables),
        "END": codebook.scale_end, "ROUND": codebook.rounding,
    }  # fmt: skip
    numbered = describe(tensors, starts, numbers)
    for launch in launches(numbered, None, block_size, settings, buffer.device):
        x, values = tensors[launch.members[0]], _as(buffer, launch.dtype)
        parts = x, values, launch.work, tables.table, tables.levels, _int32(seed), _int32(limit_of(share))
        if statistics is None:
            _run(fake_quantize_kernel, launch, launch.programs, *parts, ROWS=launch.rows, **constants)
        else:
            partials = empty_partials(launch.work, len(launch.work))
            pairs = launch.aligned and in_pairs(x)
            _run(
                measured_fake_quantize_kernel, launch, len(launch.work), *parts, partials,
                ROWS=launch.rows, IN_PAIRS=pairs, **constants,
            )  # fmt: skip
            _collect(partials, launch, SEGMENT, statistics)


def _scales_in(buffer: Tensor, layout: Layout) -> Tensor:
    """Return a buffer as scales; those of bfloat16 as int16, because the interpreter lacks bfloat16."""
    return _as(buffer, torch.int16 if layout.scale_dtype == torch.bfloat16 else layout.scale_dtype)


def _as(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _int32(pattern: int) -> int:
    """Return the int32 with the last 32 bits of an integer, so that a kernel is compiled for one type of argument."""
    return ((pattern + 2**31) & 0xFFFFFFFF) - 2**31
