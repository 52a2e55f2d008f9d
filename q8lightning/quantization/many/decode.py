"""Decode many tensors: small ones together on a CPU, any in one launch on a GPU."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.buffer import allocate, lay_out, split
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import share_out

_TOGETHER = 2**19
"""The most elements that are decoded together on a CPU. Threads that call operators on far fewer wait for Python's lock
more than they compute. With more, scratch would be new memory each time."""


class EncodedItem(NamedTuple):
    """An encoded tensor, to be decoded by :func:`decode_on` or :func:`decode_together`.

    Attributes:
        data: ``[nbytes]`` uint8, on any device, as ``EncodedBuffer.data`` has it.
        codec: Its codec.
        numel: Its number of elements.
        dtype: The dtype of the values: float32, float16, bfloat16 or, on a CPU only, float64.
    """

    data: Tensor
    codec: Codec
    numel: int
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Its parts, as :meth:`Codec.encode` returned them."""
        return self.codec.split(self.data, self.numel)


def batches(items: Sequence[EncodedItem], threads: int) -> Iterator[list[int]]:
    """Yield the indices of items for :func:`decode_together`, in batches that occupy so many threads.

    An item is a batch of its own if it is large, empty or not on the CPU, or if its codec cannot decode it joined.
    """
    most = min(_TOGETHER, sum(item.numel for item in items) // (4 * threads))
    open_batches: dict[tuple[Codec, torch.dtype], list[int]] = {}
    sizes: dict[tuple[Codec, torch.dtype], int] = {}
    for index, (data, codec, numel, dtype) in enumerate(items):
        if data.device.type != "cpu" or not codec.decodes_joined(numel) or not 0 < numel <= most:
            yield [index]
            continue
        key = codec, dtype
        size = sizes.get(key, 0) + numel
        if size > most:
            yield open_batches.pop(key)
            size = numel
        open_batches.setdefault(key, []).append(index)
        sizes[key] = size
    yield from open_batches.values()


@neutral()
def decode_together(items: Sequence[EncodedItem]) -> list[Tensor]:
    """Decode one item, or join several and decode them in one call.

    Args:
        items: A batch of :func:`batches`.

    Returns:
        ``[numel]`` values for each item, in memory of its own, on the item's device.
    """
    codec, dtype = items[0].codec, items[0].dtype
    if items[0].data.device.type != "cpu" or codec.kernel is None or not cpu.knows(codec.kernel):
        values = codec.decode(_joined([item.parts for item in items]), dtype)
    else:  # unpacks codes chunk by chunk
        values = torch.empty(sum(item.numel for item in items), dtype=dtype, device="cpu")
        cpu.decode_into(codec.kernel, _joined([codec.layout.views(item.data, item.numel) for item in items]), values)
    if len(items) == 1:
        return [values]
    return [each.clone() for each in torch.split(values, [item.numel for item in items])]


@neutral()
def decode_alone(item: EncodedItem) -> Tensor:
    """Decode one item, a large one on a CPU by stretches, each in one thread.

    So several processes on a machine, which read their shards at the same time, do not wait for each other's threads.

    Returns:
        ``[numel]`` values, on the item's device.
    """
    kernel, numel = item.codec.kernel, item.numel
    if item.data.device.type != "cpu" or kernel is None or not cpu.knows(kernel):
        return item.codec.decode(item.parts, item.dtype)
    values = torch.empty(numel, dtype=item.dtype, device="cpu")
    parts = kernel.layout.views(item.data, numel)
    block_size = kernel.layout.block_size
    blocks = max(-(-numel // (block_size * torch.get_num_threads())), _TOGETHER // block_size, 1)
    length = blocks * block_size
    jobs = [
        partial(cpu.decode_into, kernel, kernel.layout.take(parts, slice(i, i + 1), length), stretch)
        for i, stretch in enumerate(torch.split(values, length))
    ]
    share_out(jobs, [length * item.dtype.itemsize] * len(jobs))
    return values


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))


def decode_on(device: torch.device, items: Sequence[EncodedItem]) -> list[Tensor]:
    """Decode on a GPU, in one launch for each dtype and codec that kernels know.

    Args:
        device: A GPU.
        items: At least one item.

    Returns:
        ``[numel]`` values for each item, on the device.

    Raises:
        torch.OutOfMemoryError: If the device has less memory left than :func:`bytes_to_decode_on`.
    """
    layout = lay_out(_sizes(items), device)
    starts, buffer = layout.starts, allocate(layout)
    data = split(buffer, layout.cuts)
    for there, item in zip(data, items, strict=True):
        there.copy_(item.data)
    values = [torch.empty(item.numel, dtype=item.dtype, device=device) for item in items]
    groups: dict[tuple[Codec, torch.dtype], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.codec, item.dtype), []).append(index)
    for (codec, dtype), members in groups.items():
        if codec.kernel is not None:
            from q8lightning.quantization.backends.kernels import many  # imports Triton

            many.decode(buffer, tuple(starts[i] for i in members), [values[i] for i in members], codec.kernel)
            continue
        for i in members:
            values[i] = codec.decode(codec.split(data[i], items[i].numel), dtype)
    return values


def bytes_to_decode_on(items: Sequence[EncodedItem]) -> int:
    """Return the bytes that :func:`decode_on` needs on the device."""
    return lay_out(_sizes(items), torch.device("cpu")).nbytes + sum(item.numel * item.dtype.itemsize for item in items)


def _sizes(items: Sequence[EncodedItem]) -> tuple[tuple[int, int], ...]:
    return tuple((item.codec.scale_bytes(item.numel), item.data.nbytes) for item in items)
