"""Encode many tensors into one stretch of memory, on a GPU in one launch for each dtype and codec."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backend import grouped
from q8lightning.quantization.codec import Codec

_ALIGNMENT = 16
"""Bytes. Codes begin at multiples of it, because kernels write so many at once."""


class Packed(NamedTuple):
    """Tensors encoded into one buffer.

    Attributes:
        data: For each tensor ``[nbytes]`` uint8, a view of the buffer: the scales' bytes, then the codes, then the
            residual's codes if the codec has that stage.
        failed: ``[tensors]`` int32 on their device, 1 where the codec cannot hold a block of the tensor and its scales
            are not finite.
        statistics: ``[tensors, 5]`` float64 on their device if they were wanted: the fields of
            :class:`q8lightning.quantization.reference.ErrorStatistics`, in their order.
    """

    data: list[Tensor]
    failed: Tensor
    statistics: Tensor | None


def pack(tensors: Sequence[Tensor], codecs: Sequence[Codec], measure: bool = False) -> Packed:
    """Encode each tensor with its codec, as :meth:`Codec.encode` does; on a GPU without waiting for it.

    Args:
        tensors: ``[numel]`` float32, float16, bfloat16 or float64 each, contiguous, all on one device; at least one.
        codecs: One for each.
        measure: Whether to measure what is lost.
    """
    device = tensors[0].device
    sizes = tuple(
        (codec.scale_bytes(tensor.numel()), codec.encoded_bytes(tensor.numel()))
        for tensor, codec in zip(tensors, codecs, strict=True)
    )
    starts, total, gaps = _layout(sizes, device)
    buffer = torch.empty(total, dtype=torch.uint8, device=device)
    buffer.index_fill_(0, gaps, 0)  # or they would carry into the file whatever was in memory before
    data = [buffer[start : start + size] for start, (_, size) in zip(starts, sizes, strict=True)]
    failed = torch.zeros(len(tensors), dtype=torch.int32, device=device)
    statistics = torch.zeros(len(tensors), 5, dtype=torch.float64, device=device) if measure else None
    packed = Packed(data, failed, statistics)

    groups: dict[Codec, list[int]] = {}
    for index, (tensor, codec) in enumerate(zip(tensors, codecs, strict=True)):
        if tensor.is_cuda and tensor.dtype != torch.float64:
            groups.setdefault(codec, []).append(index)
        else:
            _encode(tensor, codec, packed, index)
    for codec, members in groups.items():
        _encode_group([tensors[i] for i in members], codec, buffer, tuple(starts[i] for i in members), packed, members)
    return packed


def unpack(data: Tensor, codec: Codec, numel: int) -> tuple[Tensor, ...]:
    """Return what :meth:`Codec.encode` returned for a tensor of ``numel`` elements, as views of its packed ``data``."""
    scales = data[: codec.scale_bytes(numel)].view(torch.float32)
    codes = torch.split(data[scales.nbytes :], numel)
    return codes[0], scales.view(-1, 2) if codec.coding.scales == 2 else scales, *codes[1:]


def repack(data: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``data`` of one device into a buffer of its own, so that it keeps nothing else alive.

    Args:
        data: ``[nbytes]`` uint8 each, as :class:`Packed` has it; at least one.
    """
    starts, total, gaps = _layout(tuple((0, each.nbytes) for each in data), data[0].device)
    buffer = torch.empty(total, dtype=torch.uint8, device=data[0].device)
    buffer.index_fill_(0, gaps, 0)
    copies = [buffer[start : start + each.nbytes] for start, each in zip(starts, data, strict=True)]
    torch._foreach_copy_(copies, list(data))
    return copies


def _encode(tensor: Tensor, codec: Codec, packed: Packed, index: int) -> None:
    if packed.statistics is None:
        codes, scales, *residual = codec.encode(tensor)
    else:
        (codes, scales, *residual), packed.statistics[index] = codec.encode_and_measure(tensor)
    torch.cat([scales.view(-1).view(torch.uint8), codes, *residual], out=packed.data[index])
    packed.failed[index] = ~scales.isfinite().all()


def _encode_group(
    tensors: list[Tensor], codec: Codec, buffer: Tensor, starts: tuple[int, ...], packed: Packed, members: list[int]
) -> None:
    failed = packed.failed.new_zeros(len(members))
    statistics = None if packed.statistics is None else packed.statistics.new_zeros(len(members), 5)
    grouped().encode(tensors, buffer, starts, codec.coding, failed, statistics)
    where = kept_index(tuple(members), buffer.device)
    packed.failed[where] = failed
    if packed.statistics is not None and statistics is not None:
        packed.statistics[where] = statistics


@lru_cache(maxsize=16)
def _layout(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[tuple[int, ...], int, Tensor]:
    """Return where each tensor's data begins, so that its codes are aligned, where the last ends, and the gaps' bytes.

    Args:
        sizes: For each tensor the bytes of its scales and of all its data.
        device: Where the gaps are wanted.
    """
    starts: list[int] = []
    gaps: list[int] = []
    end = 0
    for scale_bytes, size in sizes:
        start = end + -(end + scale_bytes) % _ALIGNMENT
        starts.append(start)
        gaps += range(end, start)
        end = start + size
    return tuple(starts), end, torch.tensor(gaps, dtype=torch.int64, device=device)


@lru_cache(maxsize=16)
def kept_index(members: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(members, device=device)  # kept, because to copy it there waits for the device
