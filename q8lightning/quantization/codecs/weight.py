"""The codec of weights in QAT, with blocks along the flattened tensor, or row by row along an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.spec.codebook import Codebook, get_codebook
from q8lightning.quantization.spec.layout import MAX_BLOCK_SIZE, check_block_size

WHOLE_ROW = 2**62
"""A block size that no row reaches, so that a row has one scale however long it is."""


@dataclass(frozen=True)
class WeightCodec:
    """The codec of a weight. It encodes what it decoded to the same codes and scales again.

    With ``axis=None``, blocks run along the elements in the order of memory, as in checkpoints, and the last one may be
    short. With an axis, the elements that share an index of that axis (a channel) form a row, in row-major order of the
    other dimensions. Blocks run along a row and do not cross it, and its last one may be short. A block as long as a
    row gives one scale a channel.

    Args:
        codebook: The name or ``Codebook.spec`` of the codebook, which also says to what scales are rounded; an alias
            becomes the name.
        block_size: Elements that share a scale; a power of two between 32 and 4096, or a larger one with an axis, such
            as :data:`WHOLE_ROW`.
        axis: The axis of the channels, negative from the end, or None.

    Raises:
        ValueError: If the codebook or the block size is unknown, or the codebook has no negative levels or reaches
            neither -1 nor 1.
    """

    codebook: str
    block_size: int = 256
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.axis is None or not _is_longer(self.block_size):
            check_block_size(self.block_size)
        object.__setattr__(self, "codebook", self.book.spec)
        levels = self.book.levels
        if not self.book.signed:
            raise ValueError(f"a codebook for weights has negative levels, got {self.book.name}; try 'dynamic'")
        if self.book.end == 0:
            raise ValueError(
                f"a codebook for weights holds 1 or -1, got levels from {levels[0]:g} to {levels[-1]:g}; divide them by"
                " the largest magnitude"
            )

    @property
    def book(self) -> Codebook:
        """The codebook."""
        return get_codebook(self.codebook)

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return self.book.bits

    def fitted(self, shape: Sequence[int]) -> "WeightCodec":
        """Return the codec with the smallest block that does the same to a tensor of this shape.

        Raises:
            ValueError: If there is no such axis.
        """
        if self.axis is None:
            return self
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"axis {self.axis} is not one of a tensor of shape {tuple(shape)}; use axis=0 or None")
        axis = self.axis % len(shape)
        row = math.prod(shape) // max(shape[axis], 1)
        return WeightCodec(self.codebook, min(self.block_size, max(32, 1 << max(row - 1, 0).bit_length())), axis)

    def runs_along_memory(self, x: Tensor) -> bool:
        """Tell whether a dense tensor has the same blocks, in the same order, without an axis."""
        if self.axis is None:
            return True
        channels = x.movedim(self.axis, 0)
        return channels.is_contiguous() and channels[0].numel() % self.block_size == 0

    def to_rows(self, x: Tensor) -> Tensor:
        """Return the elements of a dense tensor in the order of blocks, ``[rows, row]``; one row without an axis.

        The result may share memory with ``x``.
        """
        if self.axis is None:
            return x.as_strided((1, x.numel()), (x.numel(), 1))
        channels = x.movedim(self.axis, 0)
        return channels.reshape(channels.shape[0], math.prod(channels.shape[1:]))

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`to_rows`: return a tensor of the shape of ``like``, and without an axis of its strides, too."""
        if self.axis is None:
            return rows.as_strided(like.shape, like.stride())
        return rows.reshape(like.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a dense float tensor.

        Returns:
            codes ``[rows, row]`` uint8, and scales ``[rows, blocks a row]`` float32 in the units of ``x``. A scale is
            negative if the codebook reaches only one of -1 and 1, and the block's largest element has the other sign.
        """
        rows = self.to_rows(x.detach())
        padded = pad_rows(rows, self.block_size)
        codes, scales, _ = ops.quantize(padded, self.codebook, self.block_size, self.book.one_sided)
        return codes[:, : rows.shape[1]], scales.view(rows.shape[0], -1)

    def decode(self, codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
        """Return the values of codes and scales, with the shape and dtype of ``like``."""
        padded = pad_rows(codes, self.block_size)
        values = ops.dequantize(padded, scales.reshape(-1), self.codebook, self.block_size, like.dtype)
        return self.from_rows(values[:, : codes.shape[1]], like)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return ``decode(encode(x))``: the weights that the forward pass uses."""
        return self.decode(*self.encode(x), like=x)


def _is_longer(block_size: int) -> bool:
    """Whether a block is longer than kernels take, and a power of two."""
    return block_size > MAX_BLOCK_SIZE and block_size & (block_size - 1) == 0


def pad_rows(rows: Tensor, block_size: int) -> Tensor:
    """Fill up rows ``[rows, row]`` to whole blocks with zeros, which change no scale; a single row stays as it is."""
    if rows.shape[0] == 1 or rows.shape[1] % block_size == 0:
        return rows
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % block_size))
