"""Write the quantized values of many weights into a buffer, with one launch where kernels fit, else with operators.

Both write the same bits. The kernels take float32, float16 and bfloat16 on a GPU, with blocks that run along memory. So
do blocks without an axis, and blocks along an axis whose rows are whole blocks and lie one after another. Kernels count
the blocks of a tensor from 0: where a share of the blocks is chosen of a part of a tensor, operators do it.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from q8lightning.quantization.backends.choose import has_kernels
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.block_choice import are_chosen, chosen_blocks
from q8lightning.quantization.spec.layout import MAX_BLOCK_SIZE
from q8lightning.quantization.spec.portion import Portion
from q8lightning.quantization.spec.reference import measure

BATCH = 2**22
"""Elements that operators quantize in one call: enough for many small tensors, few enough for small scratch."""


@dataclass(frozen=True)
class InLaunch:
    """Tensors of one dtype and codec that are quantized in one launch, or in two if only some are aligned.

    Attributes:
        indices: Their indices in the group.
        codec: Their codec.
        buffer: uint8, the memory of their slots.
        starts: Where each slot begins, in bytes.
        choosing: What does the same where a share of the blocks is chosen; empty if the launch does.
    """

    indices: tuple[int, ...]
    codec: WeightCodec
    buffer: Tensor
    starts: tuple[int, ...]
    choosing: "tuple[Batch, ...]" = ()

    def only(self, indices: Container[int]) -> "InLaunch | None":
        """Return the batch of those tensors that are among ``indices``, None if there are none."""
        kept = [(index, start) for index, start in zip(self.indices, self.starts, strict=True) if index in indices]
        if not kept:
            return None
        choosing = tuple(part for batch in self.choosing if (part := batch.only(indices)) is not None)
        numbers, starts = zip(*kept, strict=True)
        return replace(self, indices=numbers, starts=starts, choosing=choosing)

    def write(
        self, sources: Sequence[Tensor], slots: Sequence[Tensor], share: float, seed: int, statistics: Tensor | None
    ) -> None:
        """Write the quantized values of the sources into their slots, and what is lost into the rows of statistics."""
        if share < 1.0 and self.choosing:
            for batch in self.choosing:
                batch.write(sources, slots, share, seed, statistics)
            return
        from q8lightning.quantization.backends.kernels import many  # imports Triton

        own = [sources[index] for index in self.indices]
        book, size = self.codec.book, self.codec.block_size
        many.fake_quantize(own, self.buffer, self.starts, book, size, self.indices, share, seed, statistics)


@dataclass(frozen=True)
class Batch:
    """Tensors of one dtype and codec that operators quantize in one call, on any device.

    Attributes:
        indices: Their indices in the group.
        codec: Their codec.
        portions: For each tensor, which part of a whole it is; None for a whole.
    """

    indices: tuple[int, ...]
    codec: WeightCodec
    portions: tuple[Portion | None, ...]

    def only(self, indices: Container[int]) -> "Batch | None":
        """Return the batch of those tensors that are among ``indices``, None if there are none."""
        kept = [pair for pair in zip(self.indices, self.portions, strict=True) if pair[0] in indices]
        if not kept:
            return None
        numbers, portions = zip(*kept, strict=True)
        return replace(self, indices=numbers, portions=portions)

    def write(
        self, sources: Sequence[Tensor], slots: Sequence[Tensor], share: float, seed: int, statistics: Tensor | None
    ) -> None:
        """Write the quantized values of the sources into their slots, and what is lost into the rows of statistics."""
        size = self.codec.block_size
        rows = [self.codec.to_rows(sources[index]) for index in self.indices]
        padded = [pad(each, (0, -each.shape[1] % size)) if each.shape[1] % size else each for each in rows]
        together = torch.cat([each.reshape(-1) for each in padded]) if len(padded) > 1 else padded[0].reshape(-1)
        values = WeightCodec(self.codec.codebook, size, 0).fake_quantize(together.view(-1, size))
        counts = [each.numel() // size for each in padded]
        if share < 1.0:
            chosen = [
                self._chosen(index, portion, count, share, seed).to(values.device)
                for index, portion, count in zip(self.indices, self.portions, counts, strict=True)
            ]
            values = torch.where(torch.cat(chosen)[:, None], values, together.view(-1, size))
        for index, each, part in zip(self.indices, rows, torch.split(values, counts), strict=True):
            slot = slots[index]
            slot.copy_(self.codec.from_rows(part.reshape(each.shape[0], -1)[:, : each.shape[1]], slot))
            if statistics is not None:
                statistics[index] = measure(sources[index], slot)

    def _chosen(self, index: int, portion: Portion | None, count: int, share: float, seed: int) -> Tensor:
        if portion is None:
            return chosen_blocks(index, count, share, seed)
        return are_chosen(index, portion.block_numbers(self.codec.block_size, self.codec.axis), share, seed)


def batches(
    tensors: Sequence[Tensor],
    slots: Sequence[Tensor],
    codec: WeightCodec,
    portions: Sequence[Portion | None] = (),
) -> list[Batch | InLaunch]:
    """Divide tensors, without empty ones, into batches that are quantized together.

    Args:
        tensors: Dense in memory, all on one device.
        slots: A slot for each tensor, of its shape, strides and dtype. Slots of one dtype share a storage.
        codec: Their codec.
        portions: For each tensor, which part of a whole it is; None for a whole. Empty if all are wholes.

    Raises:
        ValueError: If a tensor does not have the codec's axis.
    """
    portions = portions or [None] * len(tensors)
    launched: dict[tuple[torch.dtype, WeightCodec], list[int]] = {}
    others: dict[tuple[torch.dtype, WeightCodec], list[int]] = {}
    for index, (tensor, portion) in enumerate(zip(tensors, portions, strict=True)):
        fitted = codec.fitted(tensor.shape if portion is None else portion.shape)
        if not tensor.numel():
            continue
        fits = fitted.block_size <= MAX_BLOCK_SIZE and fitted.runs_along_memory(tensor)
        run = launched if has_kernels(tensor) and fits else others
        run.setdefault((tensor.dtype, fitted), []).append(index)
    return [
        *(_in_launch(each, tensors, slots, fitted, portions) for (_, fitted), each in launched.items()),
        *(batch for (_, fitted), each in others.items() for batch in _cut(each, tensors, fitted, portions)),
    ]


def _in_launch(
    indices: list[int],
    tensors: Sequence[Tensor],
    slots: Sequence[Tensor],
    codec: WeightCodec,
    portions: Sequence[Portion | None],
) -> InLaunch:
    storage = slots[indices[0]].untyped_storage()
    buffer = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    starts = tuple(int(slots[index].storage_offset()) * slots[index].element_size() for index in indices)
    are_parts = any(portions[index] is not None for index in indices)
    choosing = tuple(_cut(indices, tensors, codec, portions)) if are_parts else ()
    return InLaunch(tuple(indices), WeightCodec(codec.codebook, codec.block_size), buffer, starts, choosing)


def _cut(
    indices: list[int], tensors: Sequence[Tensor], codec: WeightCodec, portions: Sequence[Portion | None]
) -> Iterator[Batch]:
    while indices:
        totals = accumulate(tensors[index].numel() for index in indices)
        count = max(1, sum(total <= BATCH for total in totals))
        yield Batch(tuple(indices[:count]), codec, tuple(portions[index] for index in indices[:count]))
        indices = indices[count:]
