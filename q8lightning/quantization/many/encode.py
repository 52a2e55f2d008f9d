"""Encode many tensors into one stretch of memory and back, on a GPU in one launch for each dtype and codec."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends.choose import grouped, has_kernels
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.system.ambient import lasting
from q8lightning.system.workers import share_out

_ALIGNMENT = 16
"""Bytes. Codes begin at multiples of it, because kernels write so many at once."""

_TOGETHER = 2**19
"""Elements up to which tensors are decoded in one go on the CPU. Threads that call operators on many fewer wait for
Python's lock more than they compute; the scratch of more would be in new memory each time."""


class Packed(NamedTuple):
    """Tensors encoded into one buffer.

    Attributes:
        buffer: uint8.
        cuts: The sizes of its stretches in bytes, of gaps and data in turns.
        failed: ``[tensors]`` int32 on their device, 1 where the codec cannot hold a block of the tensor and its scales
            are not finite.
        statistics: ``[tensors, 5]`` float64 on their device if they were wanted: the fields of
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics`, in their order.
    """

    buffer: Tensor
    cuts: list[int]
    failed: Tensor
    statistics: Tensor | None

    @property
    def data(self) -> list[Tensor]:
        """For each tensor ``[nbytes]`` uint8, a view of the buffer: what :meth:`Codec.split` takes apart."""
        return _data(self.buffer, self.cuts)


class _Layout(NamedTuple):
    """Where the data of several tensors lies in one buffer.

    Attributes:
        starts: Where that of each begins, in bytes.
        nbytes: Where the last ends.
        gaps: int64 on the device: the bytes between them.
        cuts: The sizes of all gaps and data, in turns.
    """

    starts: tuple[int, ...]
    nbytes: int
    gaps: Tensor
    cuts: list[int]


class Packing:
    """How tensors of certain sizes, dtypes and codecs are encoded into one buffer, found out once.

    Args:
        tensors: Of float32, float16, bfloat16 or float64 each, dense in memory, all on one device; at least one. They
            are not kept.
        codecs: One for each.
    """

    def __init__(self, tensors: Sequence[Tensor], codecs: Sequence[Codec]) -> None:
        sizes = tuple(
            (codec.scale_bytes(tensor.numel()), codec.encoded_bytes(tensor.numel()))
            for tensor, codec in zip(tensors, codecs, strict=True)
        )
        self._layout = _layout(sizes, tensors[0].device)
        self._alone: list[tuple[int, Codec]] = []
        groups: dict[Codec, list[int]] = {}
        for index, (tensor, codec) in enumerate(zip(tensors, codecs, strict=True)):
            if has_kernels(tensor) and codec.kernel is not None:
                groups.setdefault(codec, []).append(index)
            else:
                self._alone.append((index, codec))
        self._groups = {codec: tuple(members) for codec, members in groups.items()}

    @property
    def starts(self) -> tuple[int, ...]:
        """Where in the buffer the data of each tensor begins, in bytes."""
        return self._layout.starts

    def encode(self, tensors: Sequence[Tensor], measure: bool = False) -> Packed:
        """Encode such tensors, each as :meth:`Codec.encode` does its elements in the order of memory.

        A GPU is not waited for.

        Args:
            tensors: Of the sizes and dtypes, and on the device, that were given.
            measure: Whether to measure what is lost.
        """
        count, device = len(tensors), tensors[0].device
        failed = torch.zeros(count, dtype=torch.int32, device=device)
        statistics = torch.zeros(count, 5, dtype=torch.float64, device=device) if measure else None
        packed = Packed(_allocate(self._layout), self._layout.cuts, failed, statistics)
        for codec, members in self._groups.items():
            starts = tuple(self.starts[i] for i in members)
            _encode_group([tensors[i] for i in members], codec, starts, packed, members)
        data = packed.data if self._alone else []
        jobs = []
        for index, codec in self._alone:
            flat = tensors[index].detach().as_strided((tensors[index].numel(),), (1,))
            jobs.append(partial(_encode, flat, codec, packed, data[index], index))
        share_out(jobs, [tensors[index].nbytes if device.type == "cpu" else 0 for index, _ in self._alone])
        return packed


def pack(tensors: Sequence[Tensor], codecs: Sequence[Codec], measure: bool = False) -> Packed:
    """Encode each tensor with its codec into one buffer; see :class:`Packing`."""
    return Packing(tensors, codecs).encode(tensors, measure)


def _allocate(layout: _Layout) -> Tensor:
    """Return a new buffer."""
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=layout.gaps.device)
    return buffer.index_fill_(0, layout.gaps, 0)  # or they would carry into the file whatever was in memory before


def _data(buffer: Tensor, cuts: list[int]) -> list[Tensor]:
    """Return the stretches of data."""
    return list(buffer.split_with_sizes(cuts)[1::2])  # in one call: each slice would take a microsecond


def repack(data: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``data`` of one device into a buffer of its own, so that it keeps nothing else alive.

    Args:
        data: ``[nbytes]`` uint8 each, as :class:`Packed` has it; at least one.
    """
    layout = _layout(tuple((0, each.nbytes) for each in data), data[0].device)
    copies = _data(_allocate(layout), layout.cuts)
    torch._foreach_copy_(copies, list(data))
    return copies


class Unpacking(NamedTuple):
    """What :func:`unpack_on` and :func:`unpack_together` decode.

    Attributes:
        data: ``[nbytes]`` uint8, on any device, as :class:`Packed` has it.
        codec: What it was encoded with.
        numel: How many elements it has.
        dtype: What to decode it to: float32, float16, bfloat16 or, not on a GPU, float64.
    """

    data: Tensor
    codec: Codec
    numel: int
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What :meth:`Codec.encode` returned."""
        return self.codec.split(self.data, self.numel)


def batches(items: Sequence[Unpacking], threads: int) -> Iterator[list[int]]:
    """Yield the indices of items that :func:`unpack_together` may decode, such that several threads have enough to do.

    Items that are large or empty, not on the CPU, or whose codec decodes them only alone come alone.
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


def unpack_together(items: Sequence[Unpacking]) -> list[Tensor]:
    """Decode as :meth:`Codec.decode` does, on the CPU many small tensors in one go.

    Args:
        items: One, or several with the same codec and dtype that may be decoded joined, all on the CPU.

    Returns:
        ``[numel]`` values for each item, in memory of its own, where the item is.
    """
    codec, dtype = items[0].codec, items[0].dtype
    if len(items) == 1:
        return [codec.decode(items[0].parts, dtype)]
    parts = tuple(torch.cat(part) for part in zip(*(item.parts for item in items), strict=True))
    values = codec.decode(parts, dtype)
    return [each.clone() for each in torch.split(values, [item.numel for item in items])]


def unpack_on(device: torch.device, items: Sequence[Unpacking]) -> list[Tensor]:
    """Decode on a GPU as :meth:`Codec.decode` does, in one launch for each dtype and codec that kernels know.

    Args:
        device: A GPU.
        items: What to decode, at least one.

    Returns:
        ``[numel]`` values for each item, on the device.

    Raises:
        torch.OutOfMemoryError: If they do not fit there; see :func:`bytes_to_unpack`.
    """
    layout = _layout(_sizes(items), device)
    starts, buffer = layout.starts, _allocate(layout)
    data = _data(buffer, layout.cuts)
    for there, item in zip(data, items, strict=True):
        there.copy_(item.data)
    values = [torch.empty(item.numel, dtype=item.dtype, device=device) for item in items]
    groups: dict[tuple[Codec, torch.dtype], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.codec, item.dtype), []).append(index)
    for (codec, dtype), members in groups.items():
        if codec.kernel is not None:
            grouped().decode(buffer, tuple(starts[i] for i in members), [values[i] for i in members], codec.kernel)
            continue
        for i in members:
            values[i] = codec.decode(codec.split(data[i], items[i].numel), dtype)
    return values


def bytes_to_unpack(items: Sequence[Unpacking]) -> int:
    """Return how much memory of the device :func:`unpack_on` needs."""
    return _layout(_sizes(items), torch.device("cpu")).nbytes + sum(item.numel * item.dtype.itemsize for item in items)


def _sizes(items: Sequence[Unpacking]) -> tuple[tuple[int, int], ...]:
    return tuple((item.codec.scale_bytes(item.numel), item.data.nbytes) for item in items)


def _encode(flat: Tensor, codec: Codec, packed: Packed, data: Tensor, index: int) -> None:
    if packed.statistics is None:
        parts = codec.encode(flat)
    else:
        parts, packed.statistics[index] = codec.encode_and_measure(flat)
    codec.join(parts, out=data)
    packed.failed[index] = codec.failed(parts)


def _encode_group(
    tensors: list[Tensor], codec: Codec, starts: tuple[int, ...], packed: Packed, members: tuple[int, ...]
) -> None:
    failed = packed.failed.new_zeros(len(members))
    statistics = None if packed.statistics is None else packed.statistics.new_zeros(len(members), 5)
    assert codec.kernel is not None
    grouped().encode(tensors, packed.buffer, starts, codec.kernel, failed, statistics)
    where = kept_index(members, packed.buffer.device)
    packed.failed[where] = failed
    if packed.statistics is not None and statistics is not None:
        packed.statistics[where] = statistics


@lru_cache(maxsize=16)
@lasting()
def _layout(sizes: tuple[tuple[int, int], ...], device: torch.device) -> _Layout:
    """Lay out the data of tensors so that their codes are aligned.

    Args:
        sizes: For each tensor the bytes of its scales and of all its data.
        device: Where the gaps are wanted.
    """
    starts: list[int] = []
    gaps: list[int] = []
    cuts: list[int] = []
    end = 0
    for scale_bytes, size in sizes:
        start = end + -(end + scale_bytes) % _ALIGNMENT
        starts.append(start)
        gaps += range(end, start)
        cuts += (start - end, size)
        end = start + size
    return _Layout(tuple(starts), end, torch.tensor(gaps, dtype=torch.int64, device=device), cuts)


@lru_cache(maxsize=16)
@lasting()
def kept_index(members: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because to copy it there waits for the device.
    return torch.tensor(members, dtype=torch.int64, device=device)
