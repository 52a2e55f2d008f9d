"""Lay out the codes and scales of an encoded tensor in memory."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.quantization.spec.packing import pack, packed_bytes, unpack
from q8lightning.quantization.spec.scale_dtype import narrow, widen
from q8lightning.system.arguments import as_integer


class Layout(NamedTuple):
    """The order of an encoded tensor's bytes: the scales of all blocks, then the packed codes of each stage.

    Attributes:
        block_size: Elements that share their scales.
        scales: The number of scales of a block.
        bits: The bits of a code in each stage. The codes of a stage lie together; ``packing.py`` says how.
        scale_dtype: The dtype of scales in memory, float32 or bfloat16. Everywhere else they are float32.
    """

    block_size: int
    scales: int = 1
    bits: tuple[int, ...] = (8,)
    scale_dtype: torch.dtype = torch.float32

    @property
    def scale_name(self) -> str:
        """The name of the scales' dtype."""
        return str(self.scale_dtype).removeprefix("torch.")

    @property
    def is_bytes(self) -> bool:
        """Whether all codes have 8 bits, so that they need no packing."""
        return self.bits == (8,) * len(self.bits)

    def scale_bytes(self, numel: int) -> int:
        """Return the bytes of the scales of ``numel`` elements."""
        return -(-numel // self.block_size) * self.scale_dtype.itemsize * self.scales

    def code_bytes(self, numel: int) -> list[int]:
        """Return the bytes of the codes of ``numel`` elements in each stage."""
        return [packed_bytes(numel, bits, self.block_size) for bits in self.bits]

    def code_starts(self, start: int, numel: int) -> list[int]:
        """Return where the codes of each stage begin, in bytes, for a tensor whose data begin at ``start``."""
        sizes = [self.scale_bytes(numel), *self.code_bytes(numel)]
        return [start + end for end in accumulate(sizes[:-1])]

    def encoded_bytes(self, numel: int) -> int:
        """Return the bytes of the scales and codes of ``numel`` elements."""
        return self.scale_bytes(numel) + sum(self.code_bytes(numel))

    def views(self, data: Tensor, numel: int) -> tuple[Tensor, ...]:
        """Return packed codes, scales in their dtype and the packed codes of later stages as views of ``data``.

        Args:
            data: ``[encoded_bytes(numel)]`` uint8.
            numel: Elements of the tensor.
        """
        head, codes, *later = data.split_with_sizes([self.scale_bytes(numel), *self.code_bytes(numel)])
        scales = head.view(self.scale_dtype)
        return codes, scales if self.scales == 1 else scales.view(-1, self.scales), *later

    def unpack(self, parts: Sequence[Tensor], numel: int) -> tuple[Tensor, ...]:
        """Return the parts of :meth:`views` or :meth:`take` with a byte for each code and scales in float32."""
        codes, scales, later = parts[0], widen(parts[1]), parts[2:]
        if self.is_bytes:
            return codes, scales, *later
        first, *others = (
            unpack(part, bits, self.block_size, numel) for part, bits in zip((codes, *later), self.bits, strict=True)
        )
        return first, scales, *others

    def split(self, data: Tensor, numel: int) -> tuple[Tensor, ...]:
        """Return codes, scales and the codes of later stages.

        Codes of 8 bits and scales of float32 are views of ``data``.
        """
        return self.unpack(self.views(data, numel), numel)

    def join(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write the parts of a flat tensor to ``out``, ``[encoded_bytes(numel)]`` uint8."""
        codes, scales, *later = parts
        packed = [pack(part, bits, self.block_size) for part, bits in zip((codes, *later), self.bits, strict=True)]
        stored = narrow(scales.view(-1), self.scale_dtype)
        torch.cat([stored.view(torch.uint8), *packed], out=out)

    def take(self, parts: Sequence[Tensor], which: slice | Tensor, length: int) -> tuple[Tensor, ...]:
        """Return the packed parts of stretches of a flat tensor.

        Args:
            parts: As :meth:`views` returns them.
            which: A range of stretches, or the numbers of whole ones.
            length: Elements of a stretch, a multiple of the block size.
        """
        codes, scales, *later = parts
        first, *others = (
            take_stretches(part, which, length * bits // 8)
            for part, bits in zip((codes, *later), self.bits, strict=True)
        )
        return first, take_stretches(scales, which, length // self.block_size), *others


class KernelCodec(NamedTuple):
    """A codec as the kernels for many tensors know it.

    Attributes:
        kernel: The name of its arithmetic: ``"codebook"``, ``"residual"`` or ``"log"``.
        layout: The order of the bytes.
        codebook: The levels, if it has any.
        end: The end of [-1, 1] to which a signed scale turns the largest element of a block; 0 for a plain absmax.
    """

    kernel: str
    layout: Layout
    codebook: Codebook | None = None
    end: int = 0


def empty_codes(x: Tensor) -> Tensor:
    """Return memory for the codes of ``x``, ``[*x.shape]`` uint8."""
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


def empty_scales(x: Tensor, block_size: int, *trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for a value, or ``trailing`` values, of each block of ``x``, ``[blocks, *trailing]``."""
    blocks = (x.numel() + block_size - 1) // block_size
    return torch.empty(blocks, *trailing, dtype=dtype, device=x.device)


def take_stretches(x: Tensor, which: slice | Tensor, length: int) -> Tensor:
    """Return stretches of the rows of ``x``, one after the other.

    Args:
        x: ``[rows, ...]``.
        which: A range of stretches, or the numbers of whole ones.
        length: Rows of a stretch.
    """
    if isinstance(which, slice):
        return x[which.start * length : which.stop * length]
    whole = x[: x.shape[0] // length * length]
    return whole.view(-1, length, *x.shape[1:]).index_select(0, which).flatten(0, 1)


MIN_BLOCK_SIZE = 32
"""Elements that share a scale at least."""

MAX_BLOCK_SIZE = 4096
"""Elements that share a scale at most, in checkpoints and in kernels; rows of weights may be longer."""


def check_block_size(block_size: int) -> int:
    """Return ``block_size`` if it is a power of two between 32 and 4096, else raise ValueError."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise ValueError(f"block_size must be an integer, got {block_size!r}{as_integer(block_size) or '; try 256'}")
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        nearest = min((2**i for i in range(5, 13)), key=lambda size: abs(size - block_size))
        raise ValueError(f"block_size must be a power of two between 32 and 4096, got {block_size}; try {nearest}")
    return block_size


def check_bits(name: str, bits: int, least: int = 2) -> int:
    """Return ``bits`` if it is an integer from ``least`` to 8, else raise ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= 8:
        raise ValueError(f"{name} must be an integer from 2 to 8, got {bits!r}{as_integer(bits) or '; try 6'}")
    return bits
