"""Encode many tensors into one buffer, on a GPU in one launch for each dtype and codec."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.backends.choose import has_kernels
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.buffer import allocate, clear_gaps, kept_index, lay_out, split
from q8lightning.quantization.spec.sampling import stretches_on_cpu
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import batches, share_out

_TOGETHER = 2**20
"""Elements up to which tensors are encoded by one thread, one after the other, and measured in one go."""


class EncodedBuffer(NamedTuple):
    """Tensors encoded into one buffer.

    Attributes:
        buffer: uint8, all data.
        cuts: The sizes of its stretches in bytes, as in :class:`~q8lightning.quantization.many.buffer.BufferLayout`.
        failed: ``[tensors]`` int32 on the device, 1 for a tensor with a block whose scales are not finite.
        statistics: ``[tensors, 5]`` float64 on the device, the fields of
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics` in their order; None if not measured. For
            tensors of which :func:`is_sampled`, sums and counts are estimates, and the largest error is the sample's.
    """

    buffer: Tensor
    cuts: list[int]
    failed: Tensor
    statistics: Tensor | None

    @property
    def data(self) -> list[Tensor]:
        """The data of each tensor, ``[nbytes]`` uint8, as views of the buffer. :meth:`Codec.split` takes it apart."""
        return split(self.buffer, self.cuts)


class EncodePlan:
    """A plan of how tensors of certain sizes, dtypes and codecs are encoded into one buffer.

    Args:
        tensors: float32, float16, bfloat16 or float64 each, dense in memory, all on one device; at least one. The plan
            does not keep them.
        codecs: The codec of each.
    """

    def __init__(self, tensors: Sequence[Tensor], codecs: Sequence[Codec]) -> None:
        sizes = tuple(
            (codec.scale_bytes(tensor.numel()), codec.encoded_bytes(tensor.numel()))
            for tensor, codec in zip(tensors, codecs, strict=True)
        )
        self.codecs = tuple(codecs)
        self._layout = lay_out(sizes, tensors[0].device)
        self._alone: list[tuple[int, Codec]] = []
        self._on_cpu: dict[tuple[Codec, torch.dtype], list[int]] = {}
        groups: dict[Codec, list[int]] = {}
        for index, (tensor, codec) in enumerate(zip(tensors, codecs, strict=True)):
            if has_kernels(tensor) and codec.kernel is not None:
                groups.setdefault(codec, []).append(index)
            elif tensor.device.type == "cpu" and cpu.knows(codec.kernel):
                self._on_cpu.setdefault((codec, tensor.dtype), []).append(index)
            else:
                self._alone.append((index, codec))
        self._groups = {codec: tuple(members) for codec, members in groups.items()}

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the data of each tensor begins in the buffer, in bytes."""
        return self._layout.starts

    @neutral()
    def encode(self, tensors: Sequence[Tensor], measure: bool = False) -> EncodedBuffer:
        """Encode tensors, their elements in the order of memory. On a GPU this returns at once.

        Args:
            tensors: Tensors of the plan's sizes and dtypes, on its device.
            measure: Whether to measure what is lost. A CPU measures an eighth of a large tensor (``sampling.py``).
        """
        count, device = len(tensors), tensors[0].device
        failed = torch.zeros(count, dtype=torch.int32, device=device)
        statistics = torch.zeros(count, 5, dtype=torch.float64, device=device) if measure else None
        encoded = EncodedBuffer(allocate(self._layout), self._layout.cuts, failed, statistics)
        for codec, members in self._groups.items():
            starts = tuple(self.starts[i] for i in members)
            _encode_in_launches([tensors[i] for i in members], codec, starts, encoded, members)
        data = encoded.data if self._alone or self._on_cpu else []
        flat = {i: tensors[i].detach().as_strided((tensors[i].numel(),), (1,)) for i, _ in self._alone}
        share_out(
            [partial(_encode, flat[i], codec, encoded, data[i], i) for i, codec in self._alone],
            [each.nbytes if device.type == "cpu" else 0 for each in flat.values()],
        )
        jobs, sizes = [], []
        for codec, batch in self._batches(tensors):
            flat = {i: tensors[i].detach().as_strided((tensors[i].numel(),), (1,)) for i in batch}
            jobs.append(partial(_encode_on_cpu, flat, codec, encoded, data))
            sizes.append(sum(each.nbytes for each in flat.values()))
        share_out(jobs, sizes)
        clear_gaps(encoded.buffer, self._layout)
        return encoded

    def _batches(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Codec, list[int]]]:
        """Yield what one thread of a CPU encodes and measures at a time, such that several have enough to do."""
        total = sum(tensors[i].numel() for members in self._on_cpu.values() for i in members)
        most = min(_TOGETHER, total // (4 * torch.get_num_threads()))
        for (codec, _), members in self._on_cpu.items():
            for batch in batches([tensors[i].numel() for i in members], most):
                yield codec, [members[place] for place in batch]


def encode_many(tensors: Sequence[Tensor], codecs: Sequence[Codec], measure: bool = False) -> EncodedBuffer:
    """Encode each tensor with its codec into one buffer; see :class:`EncodePlan`."""
    return EncodePlan(tensors, codecs).encode(tensors, measure)


def is_sampled(values: Tensor, codec: Codec) -> bool:
    """Tell whether a CPU measures what is lost of a tensor in a sample only."""
    taken, _ = stretches_on_cpu(values.numel(), codec.block_size)
    return values.device.type == "cpu" and cpu.knows(codec.kernel) and taken is not None


def measure(values: Tensor, codec: Codec, data: Tensor) -> Tensor:
    """Measure what is lost in all of a CPU tensor of which :func:`is_sampled`; return ``[5]`` float64.

    Args:
        values: ``[numel]``, the original.
        codec: Its codec.
        data: Its data, as :attr:`EncodedBuffer.data` has it.
    """
    statistics = torch.zeros(5, dtype=torch.float64, device="cpu")
    assert codec.kernel is not None
    cpu.measure_into(values, codec.kernel, codec.layout.views(data, values.numel()), statistics)
    return statistics


def _encode_on_cpu(flat: dict[int, Tensor], codec: Codec, encoded: EncodedBuffer, data: Sequence[Tensor]) -> None:
    """Encode without the operator, which would take new memory and some time of its own for each small tensor."""
    assert codec.kernel is not None
    parts = {i: codec.layout.views(data[i], x.numel()) for i, x in flat.items()}
    statistics, held = encoded.statistics, list[int]()
    for i, x in flat.items():
        if cpu.encode_into(x, codec.kernel, parts[i]):
            held.append(i)
            continue
        encoded.failed[i] = 1
        if statistics is not None:
            cpu.measure_into(x, codec.kernel, parts[i], statistics[i])
    if statistics is not None:
        tensors, lost = [flat[i] for i in held], [statistics[i] for i in held]
        cpu.measure_together(tensors, codec.kernel, [parts[i] for i in held], lost)


def _encode(flat: Tensor, codec: Codec, encoded: EncodedBuffer, data: Tensor, index: int) -> None:
    if encoded.statistics is None:
        parts = codec.encode(flat)
    else:
        parts, encoded.statistics[index] = codec.encode_and_measure(flat)
    codec.join(parts, out=data)
    encoded.failed[index] = codec.failed(parts)


def _encode_in_launches(
    tensors: list[Tensor], codec: Codec, starts: tuple[int, ...], encoded: EncodedBuffer, members: tuple[int, ...]
) -> None:
    from q8lightning.quantization.backends.kernels import many  # imports Triton

    failed = encoded.failed.new_zeros(len(members))
    statistics = None if encoded.statistics is None else encoded.statistics.new_zeros(len(members), 5)
    assert codec.kernel is not None
    many.encode(tensors, encoded.buffer, starts, codec.kernel, failed, statistics)
    where = kept_index(members, encoded.buffer.device)
    encoded.failed[where] = failed
    if encoded.statistics is not None and statistics is not None:
        encoded.statistics[where] = statistics
