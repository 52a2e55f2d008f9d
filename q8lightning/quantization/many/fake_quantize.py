"""Let many tensors show their quantized values, and then their own again, as QAT engages and releases weights.

A group has a buffer in which every tensor has a slot of its shape and strides. To engage, the quantized values are
written there, on a GPU in one launch for each dtype, and the tensors point at their slots. To release, the tensors
point at their own memory again. So the originals (the masters) are never copied, and cannot be lost. A write to an
engaged tensor changes its slot, which :meth:`FakeQuantizeGroup.lost` finds. Code that writes to a master instead calls
:meth:`FakeQuantizeGroup.wrote`, and :meth:`FakeQuantizeGroup.settle` renews the slot.

Tensors that lie in memory which others share (the weights that cuDNN's recurrent layers keep in one piece, views) stay
where they are: their values change places with those of the slot.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.many.write_quantized import Batch, InLaunch, batches
from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.system.ambient import neutral

STATISTICS = 5
"""Columns of the statistics, in the order of :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`."""

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
            of memory; see :class:`~q8lightning.quantization.codecs.weight.WeightCodec`.

    Raises:
        ValueError: If the codebook, the block size or the axis does not fit.
    """

    def __init__(self, tensors: Sequence[Tensor], codebook: Codebook, block_size: int, axis: int | None = None) -> None:
        self.tensors = tuple(tensors)
        self.engaged = False
        self.masters: list[Tensor] = []
        """The masters while the group is engaged, with the tensors' shapes and strides."""
        self.written: set[int] = set()
        """Which tensors' slots are out of date, because their masters were written to."""
        self._codec = WeightCodec(codebook.spec, block_size, axis)
        self._addresses: list[int] = []
        self._layout: list[object] = []
        self._own: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._shared: list[bool] = []
        self._marks: list[tuple[int | None, int]] = []
        self._batches: list[Batch | InLaunch] = []
        self._find()

    @neutral()
    @torch.no_grad()
    def engage(self, share: float = 1.0, seed: int = 0, measure: bool = True) -> Tensor | None:
        """Let the tensors show the quantized values of their masters.

        Args:
            share: The share of the blocks that is quantized; see
                :func:`~q8lightning.quantization.spec.block_choice.chosen_blocks`.
            seed: Chooses the blocks, if ``share`` is below 1.
            measure: Whether to compute the statistics.

        Returns:
            What each tensor lost, ``[len(tensors), 5]`` float64 on the tensors' device, in the order of
            :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`; None if not measured. The values are bit
            for bit those of ``ops.dequantize(ops.quantize(...))``, with a signed scale if the codebook is one-sided.
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
        self._settled()
        return statistics

    @torch.no_grad()
    def settle(self, share: float = 1.0, seed: int = 0) -> None:
        """Quantize the masters again that were written to.

        Args:
            share: As for the last :meth:`engage`.
            seed: As for the last :meth:`engage`.
        """
        if not self.written or not self.engaged:
            return
        if not all(self._is_in_place(index) for index in self.written):
            self.engage(share, seed, measure=False)
            return
        for batch in self._batches:
            part = batch.only(self.written)
            if part is not None:
                part.write(self._own, self._slots, share, seed, None)
        self._settled()

    def wrote(self, index: int) -> None:
        """Note that the master of a tensor was written to. A change of the tensor itself belongs to that write."""
        self.written.add(index)
        self._marks[index] = _mark(self.tensors[index])

    def lost(self) -> list[int]:
        """Return the tensors that were written to while they show quantized values. A release undoes such writes.

        A write raises the version of a tensor, or makes it point at memory with other values. If it points at the same
        values elsewhere, it was only moved. A write in place through ``Tensor.data`` does not show here.
        """
        if not self.engaged:
            return []
        shown = [
            own if shared else slot for own, slot, shared in zip(self._own, self._slots, self._shared, strict=True)
        ]
        return [
            index
            for index, (tensor, mark) in enumerate(zip(self.tensors, self._marks, strict=True))
            if _mark(tensor) != mark and (tensor.data_ptr() == mark[1] or not _same(tensor, shown[index]))
        ]

    @torch.no_grad()
    def release(self) -> None:
        """Let the tensors show their masters again, if they are engaged."""
        if not self.engaged:
            return
        self.engaged = False
        each = enumerate(zip(self.tensors, self.masters, self._slots, self._shared, strict=True))
        for index, (tensor, master, slot, shared) in each:
            if shared or (tensor.data_ptr() != slot.data_ptr() and index not in self.written):  # moved meanwhile
                tensor.data.copy_(master)
            else:
                tensor.data = master

    def _is_in_place(self, index: int) -> bool:
        """Tell whether a tensor points at its slot and its master is where it was, as it was."""
        own = self._own[index]
        places = self.tensors[index].data_ptr(), own.data_ptr()
        expected = self._slots[index].data_ptr(), self._addresses[index]
        return not self._shared[index] and places == expected and _kind(own) == self._layout[index]

    def _settled(self) -> None:
        """Mark the tensors as they are now, so that a later write shows."""
        for index in self.written:
            tensor = self.tensors[index]
            if _version(tensor) is not None:  # a graph that saved the old values must raise
                torch.autograd.graph.increment_version(tensor)
        self.written.clear()
        self._marks = [_mark(tensor) for tensor in self.tensors]

    def _exchange_shared(self) -> None:
        """Write quantized values into tensors that must stay where they are, and their masters into the slots."""
        own, slots = ([each[i] for i, shared in enumerate(self._shared) if shared] for each in (self._own, self._slots))
        before = [each.clone() for each in own]  # all of them first, since they may overlap
        torch._foreach_copy_(own, slots)
        torch._foreach_copy_(slots, before)
        for index, shared in enumerate(self._shared):
            if shared:
                self.masters[index] = self._slots[index].detach()  # a tensor of its own, whose data may be set

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
        layout = [_kind(own) for own in self._own]
        if layout != self._layout:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written to by training
                self._slots = _slots(self._own)
                self._batches = batches(self._own, self._slots, self._codec)
            self._layout = layout
        self._addresses = addresses


def _kind(tensor: Tensor) -> object:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _mark(tensor: Tensor) -> tuple[int | None, int]:
    """Return what changes when a tensor is written to: its version, and where it is."""
    address = tensor.data_ptr()  # first: who follows writes may bring the tensor up to date for that
    return _version(tensor), address


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None for a tensor of inference mode, which has no counter."""
    try:
        return tensor._version
    except RuntimeError:  # is_inference() may be False here: setting the data changes it, and adds no counter
        return None


def _same(tensor: Tensor, slot: Tensor) -> bool:
    """Tell whether a tensor holds the values of a slot, also in another dtype or on another device."""
    if tensor.shape != slot.shape:
        return False
    there = slot.to(tensor.device, tensor.dtype)
    return bool(torch.isclose(tensor.detach(), there, rtol=0.0, atol=0.0, equal_nan=True).all())


def _slots(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a slot for each tensor, in one buffer for each dtype: torch cannot save one storage under two dtypes."""
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
