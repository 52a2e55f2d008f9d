"""Many tensors that are quantized in place together, and come back bit for bit: what QAT engages and releases.

This is the generic implementation, for tensors on any device. While a group is engaged, its tensors hold quantized
values and the originals (the masters) lie in one buffer per dtype, which is made once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from q8lightning.quantization.codebook import Codebook
from q8lightning.quantization.reference import error_statistics
from q8lightning.quantization.weight_codec import WeightCodec

STATISTICS = 5
"""Columns of the statistics, in the order of :class:`~q8lightning.quantization.reference.ErrorStatistics`."""

BATCH = 2**22
"""Elements that are quantized in one call: many small tensors together, while scratch stays small."""


class FakeQuantizeGroup:
    """Tensors that share a codec and a device.

    Values change through ``Tensor.data``, so that autograd's version counters do not move: what a forward pass saved
    for backward stays valid when the masters go back and the same values return.

    Args:
        tensors: Float tensors of any sizes and dtypes, dense in memory, all on one device. Their memory is looked
            up again at every call, so they may be given another in between.
        codebook: The levels.
        block_size: Elements that share a scale; a power of two between 32 and 4096.
        axis: The axis of the channels, whose rows no block crosses, or None for blocks along the elements in the order
            of memory; see :class:`~q8lightning.quantization.weight_codec.WeightCodec`.

    Raises:
        ValueError: If the codebook, the block size or the axis does not fit.
    """

    def __init__(self, tensors: Sequence[Tensor], codebook: Codebook, block_size: int, axis: int | None = None) -> None:
        self.tensors = tuple(tensors)
        self.engaged = False
        codec = WeightCodec(codebook.spec, block_size, axis)
        codecs = [codec.fitted(tensor.shape) for tensor in self.tensors]
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to by training
            self._batches = list(_batches(self.tensors, codecs))
        self.masters = [torch.empty_like(tensor.data) if not tensor.numel() else tensor for tensor in self.tensors]
        """The masters while the group is engaged: views of the buffer, with the tensors' shapes and strides."""
        for batch in self._batches:
            for index, master in zip(batch.indices, batch.masters, strict=True):
                self.masters[index] = master

    @torch.no_grad()
    def engage(self, share: float = 1.0, seed: int = 0, measure: bool = True) -> Tensor:
        """Keep the masters aside, unless they are already, and write their quantized values into the tensors.

        Args:
            share: The share of the blocks that is quantized; see :func:`chosen_blocks`.
            seed: Chooses the blocks, if ``share`` is below 1.
            measure: Whether to compute the statistics.

        Returns:
            ``[len(tensors), 5]`` float64 on the tensors' device: what each tensor lost, in the order of
            :class:`~q8lightning.quantization.reference.ErrorStatistics`; zeros if not measured. The values are those
            of ``ops.dequantize(ops.quantize(...))``, bit for bit, with a signed scale for a one-sided codebook.
        """
        live = [tensor.data for tensor in self.tensors]
        if not self.engaged and live:
            torch._foreach_copy_(self.masters, live)
        self.engaged = True
        for batch in self._batches:
            torch._foreach_copy_([live[index] for index in batch.indices], batch.quantized(share, seed))
        statistics = torch.zeros(len(live), STATISTICS, dtype=torch.float64, device=live[0].device if live else None)
        if measure:
            for row, master, tensor in zip(statistics, self.masters, live, strict=True):
                row.copy_(torch.stack(error_statistics(master, tensor)))
        return statistics

    @torch.no_grad()
    def release(self) -> None:
        """Put the masters back, bit for bit; nothing happens if they are there."""
        if self.engaged and self.tensors:
            torch._foreach_copy_([tensor.data for tensor in self.tensors], self.masters)
        self.engaged = False


@dataclass(frozen=True)
class _Batch:
    """Tensors of one dtype and codec that are quantized in one call.

    Attributes:
        indices: Where they are in the group.
        codec: How they are quantized.
        buffer: ``[numel]`` their stretch of the buffer; each tensor starts a block, what is left of it is zero.
        masters: Views of it, one a tensor.
    """

    indices: list[int]
    codec: WeightCodec
    buffer: Tensor
    masters: list[Tensor]

    def quantized(self, share: float, seed: int) -> list[Tensor]:
        """Return the quantized values of the masters, one tensor each."""
        size = self.codec.block_size
        rows = [self.codec.to_rows(master) for master in self.masters]
        blocks = [-(-each.shape[1] // size) for each in rows]
        together = self.buffer
        if self.codec.axis is not None:
            padded = [torch.nn.functional.pad(each, (0, -each.shape[1] % size)) for each in rows]
            together = torch.cat([each.reshape(-1) for each in padded])
        values = WeightCodec(self.codec.codebook, size).fake_quantize(together).view(-1, size)
        if share < 1.0:
            counts = [each.shape[0] * count for each, count in zip(rows, blocks, strict=True)]
            chosen = [
                chosen_blocks(index, count, share, seed, values.device)
                for index, count in zip(self.indices, counts, strict=True)
            ]
            values = torch.where(torch.cat(chosen)[:, None], values, together.view(-1, size))
        results, first = [], 0
        for master, each, count in zip(self.masters, rows, blocks, strict=True):
            part = values[first : first + each.shape[0] * count].view(each.shape[0], -1)[:, : each.shape[1]]
            results.append(self.codec.from_rows(part, master))
            first += each.shape[0] * count
        return results


def _batches(tensors: Sequence[Tensor], codecs: Sequence[WeightCodec]) -> Iterator[_Batch]:
    """Lay one buffer for each dtype and yield the batches, each a stretch of one."""
    kinds: dict[tuple[torch.dtype, WeightCodec], list[int]] = {}
    for index, (tensor, codec) in enumerate(zip(tensors, codecs, strict=True)):
        if tensor.numel():
            kinds.setdefault((tensor.dtype, codec), []).append(index)
    lengths = [-(-tensor.numel() // c.block_size) * c.block_size for tensor, c in zip(tensors, codecs, strict=True)]
    buffers = {
        dtype: torch.zeros(sum(lengths[i] for i in range(len(tensors)) if tensors[i].dtype == dtype), dtype=dtype,
                           device=tensors[0].device)
        for dtype, _ in kinds
    }  # fmt: skip
    used = dict.fromkeys(buffers, 0)
    for (dtype, codec), indices in kinds.items():
        while indices:
            count = max(1, sum(total <= BATCH for total in accumulate(lengths[index] for index in indices)))
            batch, indices = indices[:count], indices[count:]
            start, masters = used[dtype], []
            for index in batch:
                slot = buffers[dtype][used[dtype] :]
                masters.append(slot.as_strided(tensors[index].shape, tensors[index].stride()))
                used[dtype] += lengths[index]
            yield _Batch(batch, codec, buffers[dtype][start : used[dtype]], masters)


def chosen_blocks(tensor: int, blocks: int, share: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Tell which blocks of a tensor are quantized when only a share of them is, as in Quant-Noise (arXiv:2004.07320).

    Block ``b`` of tensor ``t`` of a group is chosen if ``mix(mix(mix(seed) ^ t) ^ b) < floor(share * 2**32)``, with
    the 32-bit integer hash :func:`mix`: the same on every device, and nothing to remember for a resume.

    Returns:
        ``[blocks]`` bool.
    """
    one = torch.tensor(seed, dtype=torch.int64)
    key = mix(mix(one & 0xFFFFFFFF) ^ tensor).to(device)
    return mix(key ^ (torch.arange(blocks, dtype=torch.int64, device=device) & 0xFFFFFFFF)) < int(share * 2**32)


def mix(x: Tensor) -> Tensor:
    """Hash integers below 2**32 to integers below 2**32, int64: Wellons' ``lowbias32``."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
