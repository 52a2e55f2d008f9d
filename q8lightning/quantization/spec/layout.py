"""How the bytes of an encoded tensor lie, and what kernels are told of its codec."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import Codebook


class Layout(NamedTuple):
    """An encoded tensor in bytes: the scales of all blocks, then a byte of code for each element and stage.

    Attributes:
        block_size: Elements that share their scales.
        scales: How many float32 scales a block has.
        stages: How many bytes of code an element has; those of a stage lie together.
    """

    block_size: int
    scales: int = 1
    stages: int = 1

    def scale_bytes(self, numel: int) -> int:
        """Return how many bytes the scales of ``numel`` elements take."""
        return -(-numel // self.block_size) * 4 * self.scales

    def encoded_bytes(self, numel: int) -> int:
        """Return how many bytes the scales and codes of ``numel`` elements take."""
        return numel * self.stages + self.scale_bytes(numel)

    def split(self, data: Tensor, numel: int) -> tuple[Tensor, ...]:
        """Return codes, scales and the codes of later stages as views of ``data``, ``[encoded_bytes(numel)]`` uint8."""
        head, codes, *later = data.split_with_sizes([self.scale_bytes(numel), *[numel] * self.stages])
        scales = head.view(torch.float32)
        return codes, scales if self.scales == 1 else scales.view(-1, self.scales), *later

    def join(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write the parts of a flat tensor to ``out``, ``[encoded_bytes(numel)]`` uint8."""
        codes, scales, *later = parts
        torch.cat([scales.view(-1).view(torch.uint8), codes, *later], out=out)

    def take(self, parts: Sequence[Tensor], which: slice | Tensor, length: int) -> tuple[Tensor, ...]:
        """Return the parts of some stretches of a flat tensor, whole blocks each; see :func:`take_stretches`."""
        codes, scales, *later = parts
        return (
            take_stretches(codes, which, length),
            take_stretches(scales, which, length // self.block_size),
            *(take_stretches(part, which, length) for part in later),
        )


class KernelCodec(NamedTuple):
    """What the kernels for many tensors are told of a codec.

    Attributes:
        kernel: What they call its arithmetic; see ``kernels/codecs/of_tile.py``.
        layout: How the bytes lie.
        codebook: The levels, if it has any.
        end: The end of [-1, 1] that a signed scale turns the largest element of a block to; 0 for a plain absmax.
    """

    kernel: str
    layout: Layout
    codebook: Codebook | None = None
    end: int = 0


def take_stretches(x: Tensor, which: slice | Tensor, length: int) -> Tensor:
    """Return stretches of so many rows of ``x``, one after the other; by number, only whole ones.

    Args:
        x: ``[rows, ...]``.
        which: A range of stretches, or their numbers.
        length: Rows of a stretch.
    """
    if isinstance(which, slice):
        return x[which.start * length : which.stop * length]
    whole = x[: x.shape[0] // length * length]
    return whole.view(-1, length, *x.shape[1:])[which].flatten(0, 1)


MIN_BLOCK_SIZE = 32
"""Elements that share a scale at least."""


def check_block_size(block_size: int) -> int:
    """Return ``block_size`` if it is a power of two between 32 and 4096, else raise ValueError."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise ValueError(f"block_size must be an integer, got {block_size!r}; try 256")
    if not MIN_BLOCK_SIZE <= block_size <= 4096 or block_size & (block_size - 1):
        nearest = min((2**i for i in range(5, 13)), key=lambda size: abs(size - block_size))
        raise ValueError(f"block_size must be a power of two between 32 and 4096, got {block_size}; try {nearest}")
    return block_size
