"""Many tensors that are quantized in place together, and come back bit for bit: what QAT engages and releases.

This is the generic implementation, for tensors on any device. While a group is engaged, its tensors hold quantized
values and the originals (the masters) lie in one buffer per dtype, which is made once.
"""

from collections.abc import Iterator, Sequence

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
        tensors: Float tensors of any sizes and dtypes, dense in memory, all on one device. They are looked up again at
            every call, so they may be given other memory in between.
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
        self._codecs = [codec.fitted(tensor.shape) for tensor in self.tensors]
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to by training
            self._slots = list(self._allocate())

    @property
    def masters(self) -> list[Tensor]:
        """The masters while the group is engaged: views of the buffer, with the tensors' shapes and strides."""
        return [self.master(index) for index in range(len(self.tensors))]

    def master(self, index: int) -> Tensor:
        """Return the master of one tensor; see :attr:`masters`."""
        tensor = self.tensors[index]
        return self._slots[index].as_strided(tensor.shape, tensor.stride())

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
        masters = self.masters
        if not self.engaged:
            torch._foreach_copy_(masters, live)
        self.engaged = True
        for batch in self._batches():
            self._quantize(batch, masters, live, share, seed)
        statistics = torch.zeros(len(live), STATISTICS, dtype=torch.float64, device=live[0].device if live else None)
        if measure:
            for row, master, tensor in zip(statistics, masters, live, strict=True):
                row.copy_(torch.stack(error_statistics(master, tensor)))
        return statistics

    @torch.no_grad()
    def release(self) -> None:
        """Put the masters back, bit for bit; nothing happens if they are there."""
        if self.engaged:
            torch._foreach_copy_([tensor.data for tensor in self.tensors], self.masters)
        self.engaged = False

    def _allocate(self) -> Iterator[Tensor]:
        """Yield for each tensor its ``[numel]`` stretch of the buffer of its dtype, from the start of a block on."""
        offsets, used = [], dict.fromkeys((tensor.dtype for tensor in self.tensors), 0)
        for tensor, codec in zip(self.tensors, self._codecs, strict=True):
            offsets.append(used[tensor.dtype])
            used[tensor.dtype] += -(-tensor.numel() // codec.block_size) * codec.block_size
        device = self.tensors[0].device if self.tensors else None
        buffers = {dtype: torch.zeros(numel, dtype=dtype, device=device) for dtype, numel in used.items()}
        for tensor, offset in zip(self.tensors, offsets, strict=True):
            yield buffers[tensor.dtype][offset : offset + tensor.numel()]

    def _batches(self) -> Iterator[list[int]]:
        """Yield the indices of tensors that are quantized together: of one dtype and block size, in order."""
        batch: list[int] = []
        numel = 0
        for index, (tensor, codec) in enumerate(zip(self.tensors, self._codecs, strict=True)):
            same = batch and (tensor.dtype, codec) == (self.tensors[batch[0]].dtype, self._codecs[batch[0]])
            if batch and (not same or numel + tensor.numel() > BATCH):
                yield batch
                batch, numel = [], 0
            if tensor.numel():
                batch.append(index)
                numel += tensor.numel()
        if batch:
            yield batch

    def _quantize(self, batch: list[int], masters: list[Tensor], live: list[Tensor], share: float, seed: int) -> None:
        """Write the quantized values of the masters of one batch into the live tensors."""
        codec = self._codecs[batch[0]]
        rows = [codec.to_rows(masters[index]) for index in batch]
        blocks = [torch.nn.functional.pad(row, (0, -row.shape[1] % codec.block_size)) for row in rows]
        together = torch.cat([block.reshape(-1) for block in blocks])
        flat = WeightCodec(codec.codebook, codec.block_size)
        values = flat.fake_quantize(together)
        if share < 1.0:
            chosen = torch.cat(
                [
                    chosen_blocks(index, block.numel() // codec.block_size, share, seed, together.device)
                    for index, block in zip(batch, blocks, strict=True)
                ]
            )
            by_block = (-1, codec.block_size)
            values = torch.where(chosen[:, None], values.view(by_block), together.view(by_block))
        parts = torch.split(values.view(-1), [block.numel() for block in blocks])
        for index, row, block, part in zip(batch, rows, blocks, parts, strict=True):
            quantized = part.view(block.shape)[:, : row.shape[1]].contiguous()
            live[index].copy_(codec.from_rows(quantized, live[index]))


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
