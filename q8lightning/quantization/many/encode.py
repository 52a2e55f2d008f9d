"""Encode many tensors into one stretch of memory and back, on a GPU in one launch for each dtype and codec."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.backends.choose import grouped, has_kernels
from q8lightning.quantization.backends.cpu_memory import new_tensor
from q8lightning.quantization.codec import Codec
from q8lightning.quantization.spec import error_bound
from q8lightning.quantization.spec.sampling import stretches_on_cpu
from q8lightning.system.ambient import lasting, neutral
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
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics`, in their order. Where :func:`is_sampled`,
            sums and counts are estimates, and the largest error is that of the elements that were looked at.
    """

    buffer: Tensor
    cuts: list[int]
    failed: Tensor
    statistics: Tensor | None

    @property
    def data(self) -> list[Tensor]:
        """For each tensor ``[nbytes]`` uint8, a view of the buffer: scales, codes and, if there are, residual codes."""
        return split(self.buffer, self.cuts)


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
        self.codecs = tuple(codecs)
        self._layout = _layout(sizes, tensors[0].device)
        self._alone: list[tuple[int, Codec]] = []
        groups: dict[Codec, list[int]] = {}
        for index, (tensor, codec) in enumerate(zip(tensors, codecs, strict=True)):
            if has_kernels(tensor):
                groups.setdefault(codec, []).append(index)
            else:
                self._alone.append((index, codec))
        self._groups = {codec: tuple(members) for codec, members in groups.items()}

    @property
    def starts(self) -> tuple[int, ...]:
        """Where in the buffer the data of each tensor begins, in bytes."""
        return self._layout.starts

    @neutral()
    def encode(self, tensors: Sequence[Tensor], measure: bool = False) -> Packed:
        """Encode such tensors, each as :meth:`Codec.encode` does its elements in the order of memory.

        A GPU is not waited for.

        Args:
            tensors: Of the sizes and dtypes, and on the device, that were given.
            measure: Whether to measure what is lost; on a CPU, of large tensors in an eighth (``sampling.py``).
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
            encode = _encode_on_cpu if device.type == "cpu" else _encode
            jobs.append(partial(encode, flat, codec, packed, data[index], index))
        share_out(jobs, [tensors[index].nbytes if device.type == "cpu" else 0 for index, _ in self._alone])
        return packed


def pack(tensors: Sequence[Tensor], codecs: Sequence[Codec], measure: bool = False) -> Packed:
    """Encode each tensor with its codec into one buffer; see :class:`Packing`."""
    return Packing(tensors, codecs).encode(tensors, measure)


def _allocate(layout: _Layout) -> Tensor:
    """Return a new buffer."""
    device = layout.gaps.device
    if device.type == "cpu":
        buffer = new_tensor(layout.nbytes, torch.uint8)
    else:
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    return buffer.index_fill_(0, layout.gaps, 0)  # or they would carry into the file whatever was in memory before


def split(buffer: Tensor, cuts: list[int]) -> list[Tensor]:
    """Return the stretches of data in a buffer, without the gaps."""
    return list(buffer.split_with_sizes(cuts)[1::2])  # in one call: each slice would take a microsecond


def unpack(data: Tensor, codec: Codec, numel: int) -> tuple[Tensor, ...]:
    """Return what :meth:`Codec.encode` returned for a tensor of ``numel`` elements, as views of its packed ``data``."""
    scales = data[: codec.scale_bytes(numel)].view(torch.float32)
    codes = torch.split(data[scales.nbytes :], numel)
    return codes[0], scales.view(-1, 2) if codec.coding.scales == 2 else scales, *codes[1:]


def is_sampled(values: Tensor, codec: Codec) -> bool:
    """Whether :func:`pack` measures what is lost of such a tensor in a part of it."""
    taken, _ = stretches_on_cpu(values.numel(), codec.block_size)
    return values.device.type == "cpu" and taken is not None


def measure(values: Tensor, codec: Codec, data: Tensor) -> Tensor:
    """Return what is lost of all of a CPU tensor, ``[5]`` float64.

    Args:
        values: ``[numel]``, the original.
        codec: How it is encoded.
        data: What :func:`pack` returned for it.
    """
    statistics = torch.zeros(5, dtype=torch.float64, device="cpu")
    cpu.measure_into(values, codec.coding, unpack(data, codec, values.numel()), statistics)
    return statistics


def relative_error_bound(values: Tensor, codec: Codec, data: Tensor) -> float:
    """Return what the relative error of a CPU tensor cannot exceed; infinity where that is not known."""
    if values.dtype != torch.float32:
        return torch.inf
    return error_bound.relative_error_bound(values, codec.coding, unpack(data, codec, values.numel())[1])


def repack(data: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Copy ``data`` of one device into a buffer of its own, so that it keeps nothing else alive.

    Args:
        data: ``[nbytes]`` uint8 each, as :class:`Packed` has it; at least one.

    Returns:
        The buffer and the sizes of its stretches, of gaps and data in turns.
    """
    layout = _layout(tuple((0, each.nbytes) for each in data), data[0].device)
    buffer = _allocate(layout)
    torch._foreach_copy_(split(buffer, layout.cuts), list(data))
    return buffer, layout.cuts


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
        return unpack(self.data, self.codec, self.numel)


def batches(items: Sequence[Unpacking], threads: int) -> Iterator[list[int]]:
    """Yield the indices of items that :func:`unpack_together` may decode, such that several threads have enough to do.

    Items that are large or empty, not on the CPU, or end within a block come alone.
    """
    most = min(_TOGETHER, sum(item.numel for item in items) // (4 * threads))
    open_batches: dict[tuple[Codec, torch.dtype], list[int]] = {}
    sizes: dict[tuple[Codec, torch.dtype], int] = {}
    for index, (data, codec, numel, dtype) in enumerate(items):
        if data.device.type != "cpu" or numel % codec.block_size or not 0 < numel <= most:
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
        items: One, or several whose codecs and dtypes are the same and which are whole blocks, all on the CPU.

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
    """Decode on a GPU, in one launch for each dtype and codec, as :meth:`Codec.decode` does.

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
    for there, item in zip(split(buffer, layout.cuts), items, strict=True):
        there.copy_(item.data)
    values = [torch.empty(item.numel, dtype=item.dtype, device=device) for item in items]
    groups: dict[tuple[Codec, torch.dtype], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.codec, item.dtype), []).append(index)
    for (codec, _), members in groups.items():
        grouped().decode(buffer, tuple(starts[i] for i in members), [values[i] for i in members], codec.coding)
    return values


def bytes_to_unpack(items: Sequence[Unpacking]) -> int:
    """Return how much memory of the device :func:`unpack_on` needs."""
    return _layout(_sizes(items), torch.device("cpu")).nbytes + sum(item.numel * item.dtype.itemsize for item in items)


def _sizes(items: Sequence[Unpacking]) -> tuple[tuple[int, int], ...]:
    return tuple((item.codec.scale_bytes(item.numel), item.data.nbytes) for item in items)


def _encode_on_cpu(flat: Tensor, codec: Codec, packed: Packed, data: Tensor, index: int) -> None:
    """Encode without the operator, which would take new memory and some time of its own for each small tensor."""
    statistics = None if packed.statistics is None else packed.statistics[index]
    if not cpu.encode_into(flat, codec.coding, unpack(data, codec, flat.numel()), statistics):
        packed.failed[index] = 1


def _encode(flat: Tensor, codec: Codec, packed: Packed, data: Tensor, index: int) -> None:
    if packed.statistics is None:
        codes, scales, *residual = codec.encode(flat)
    else:
        (codes, scales, *residual), packed.statistics[index] = codec.encode_and_measure(flat)
    torch.cat([scales.view(-1).view(torch.uint8), codes, *residual], out=data)
    packed.failed[index] = ~scales.isfinite().all()


def _encode_group(
    tensors: list[Tensor], codec: Codec, starts: tuple[int, ...], packed: Packed, members: tuple[int, ...]
) -> None:
    failed = packed.failed.new_zeros(len(members))
    statistics = None if packed.statistics is None else packed.statistics.new_zeros(len(members), 5)
    grouped().encode(tensors, packed.buffer, starts, codec.coding, failed, statistics)
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
