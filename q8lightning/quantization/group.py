"""Many tensors that show quantized values together, and then their own again: what QAT engages and releases.

A group lays a buffer, once, in which every tensor has a slot of its shape and strides. To engage is to write the
quantized values there, on a GPU in one launch for each dtype, and to let the tensors point at their slots; to release
is to let them point at their own memory again. Nothing is copied back, and nothing that happens in between can lose the
originals (the masters), because nobody writes to them.

Tensors that lie in memory which others share (the weights that cuDNN's recurrent layers keep in one piece, views) stay
where they are: their values change places with those of the slot.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from q8lightning.ambient import neutral
from q8lightning.quantization.codebook import Codebook
from q8lightning.quantization.group_batches import Batch, InLaunch, batches
from q8lightning.quantization.weight_codec import WeightCodec

STATISTICS = 5
"""Columns of the statistics, in the order of :class:`~q8lightning.quantization.reference.ErrorStatistics`."""

ALIGNMENT = 512
"""Bytes. Slots begin at multiples of it, as the memory that PyTorch hands out: libraries choose their kernels by it."""


class FakeQuantizeGroup:
    """Tensors that share a codec and a device.

    Values change through ``Tensor.data``, so that autograd's version counters do not move: what a forward pass saved
    for backward stays valid when the masters go back and the same values return. Everything runs on the current stream
    of the tensors' device, and the host waits for nothing.

    Args:
        tensors: Float tensors of any sizes and dtypes, dense in memory, all on one device. Where they are is looked up
            at every call, so they may be moved in between; if their shapes, strides, dtypes or device change, a new
            buffer is laid.
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
        self.masters: list[Tensor] = []
        """The masters while the group is engaged, with the tensors' shapes and strides."""
        self._codec = WeightCodec(codebook.spec, block_size, axis)
        self._addresses: list[int] = []
        self._layout: list[object] = []
        self._own: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._shared: list[bool] = []
        self._batches: list[Batch | InLaunch] = []
        self._find()

    @neutral()
    @torch.no_grad()
    def engage(self, share: float = 1.0, seed: int = 0, measure: bool = True) -> Tensor | None:
        """Let the tensors show the quantized values of their masters.

        Args:
            share: The share of the blocks that is quantized; see
                :func:`~q8lightning.quantization.block_choice.chosen_blocks`.
            seed: Chooses the blocks, if ``share`` is below 1.
            measure: Whether to compute the statistics.

        Returns:
            ``[len(tensors), 5]`` float64 on the tensors' device: what each tensor lost, in the order of
            :class:`~q8lightning.quantization.reference.ErrorStatistics`; None if not measured. The values are those
            of ``ops.dequantize(ops.quantize(...))``, bit for bit, with a signed scale for a one-sided codebook.
        """
        self.release()
        self._find()
        statistics = None
        if measure:
            device = self._own[0].device if self._own else torch.device("cpu")
            statistics = torch.zeros(len(self._own), STATISTICS, dtype=torch.float64, device=device)
        for batch in self._batches:
            batch.write(self._own, self._slots, share, seed, statistics)
        self.masters = list(self._own)
        if any(self._shared):
            self._exchange_shared()
        for tensor, slot, shared in zip(self.tensors, self._slots, self._shared, strict=True):
            if not shared:
                tensor.data = slot
        self.engaged = True
        return statistics

    @torch.no_grad()
    def release(self) -> None:
        """Let the tensors show their masters again; nothing happens if they do."""
        if not self.engaged:
            return
        self.engaged = False
        for tensor, master, slot, shared in zip(self.tensors, self.masters, self._slots, self._shared, strict=True):
            if shared or tensor.data_ptr() != slot.data_ptr():  # or it was moved meanwhile
                tensor.data.copy_(master)
            else:
                tensor.data = master

    def _exchange_shared(self) -> None:
        """Write the quantized values over those that must stay where they are; their slots keep the masters."""
        own, slots = ([each[i] for i, shared in enumerate(self._shared) if shared] for each in (self._own, self._slots))
        before = [each.clone() for each in own]  # all before the first is written to: they may overlap
        torch._foreach_copy_(own, slots)
        torch._foreach_copy_(slots, before)
        for index, shared in enumerate(self._shared):
            if shared:
                self.masters[index] = self._slots[index]

    def _find(self) -> None:
        """Look up where the tensors are; lay the buffer if they are not what they were."""
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        if addresses == self._addresses:
            return  # and what lay there is still alive, because it is held here
        self._own = [tensor.data for tensor in self.tensors]
        storages = [own.untyped_storage() for own in self._own]
        users = Counter(storage.data_ptr() for storage in storages)
        self._shared = [
            storage.nbytes() > own.nbytes or users[storage.data_ptr()] > 1
            for own, storage in zip(self._own, storages, strict=True)
        ]
        layout: list[object] = [(own.dtype, own.device, own.shape, own.stride()) for own in self._own]
        if layout != self._layout:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written to by training
                self._slots = _slots(self._own)
                self._batches = batches(self._own, self._slots, self._codec)
            self._layout = layout
        self._addresses = addresses


def _slots(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a slot for each tensor, in one buffer for each dtype: nobody can save views of two dtypes at once."""
    starts: list[int] = []
    ends: dict[torch.dtype, int] = {}
    for tensor in tensors:
        starts.append(ends.get(tensor.dtype, 0))
        ends[tensor.dtype] = starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT // tensor.element_size()
    buffers = {dtype: torch.empty(end, dtype=dtype, device=tensors[0].device) for dtype, end in ends.items()}
    return [
        buffers[tensor.dtype].as_strided(tensor.shape, tensor.stride(), start)
        for tensor, start in zip(tensors, starts, strict=True)
    ]
