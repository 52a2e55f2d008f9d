"""Pack and unpack codes on a CPU, several codes in a word at a time, and scales of two bytes.

The results are those of ``spec/packing.py`` and ``spec/scale_dtype.py``. A word is as long as the codes that share a
byte: 16 bits for fields of 4, 32 for fields of 2, 64 for single bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from q8lightning.quantization.backends.cpu_codecs import ChunkCodec, Parts
from q8lightning.quantization.backends.cpu_memory import Scratch
from q8lightning.quantization.spec.layout import Layout
from q8lightning.quantization.spec.packing import fields_of, pack, unpack
from q8lightning.quantization.spec.scale_dtype import narrow, widen

_WORDS = {4: torch.int16, 2: torch.int32, 1: torch.int64}

_LOWEST = {4: 0x0F0F0F0F0F0F0F0F, 2: 0x0303030303030303, 1: 0x0101010101010101}
"""The lowest field of each byte of eight codes."""

_GATHER = {4: [(4, 0)], 2: [(6, 0), (12, 0)], 1: [(7, 0), (14, 0), (28, 0)]}
"""Shifts by which the fields of a word move into its lowest byte, one after the other."""

_SPREAD = {
    4: [(4, 0x0F0F0F0F0F0F0F0F)],
    2: [(12, 0x000F000F000F000F), (6, 0x0303030303030303)],
    1: [(28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101)],
}
"""Shifts by which the fields of a byte move to a byte each, and what is left of the word after each shift."""


class Packed:
    """A chunk codec whose codes are packed.

    Args:
        codec: Works with a byte for each code.
        layout: Says how many bits codes have.
    """

    def __init__(self, codec: ChunkCodec, layout: Layout) -> None:
        self._codec = codec
        self._layout = layout

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        _, scale, *_ = parts
        first, *others = scratch.codes[: len(parts) - 1]
        if not self._codec.encode(blocks, (first, scale, *others), scratch):
            return False
        for codes, packed, bits in zip((first, *others), _without_scale(parts), self._layout.bits, strict=True):
            self._pack(codes.view(-1), bits, packed, scratch.spare)
        return True

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        first, *others = scratch.codes[: len(parts) - 1]
        for codes, packed, bits in zip((first, *others), _without_scale(parts), self._layout.bits, strict=True):
            self._unpack(packed, bits, codes.view(-1), scratch.spare)
        self._codec.decode((first, parts[1], *others), out, scratch)

    def encode_slowly(self, blocks: Tensor) -> Parts:
        codes, scale, *later = self._codec.encode_slowly(blocks)
        first, *others = (
            each.view(-1) if bits == 8 else pack(each.view(-1), bits, self._layout.block_size)
            for each, bits in zip((codes, *later), self._layout.bits, strict=True)
        )
        return first, scale, *others

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        flat = [part if index == 1 else part.reshape(-1) for index, part in enumerate(parts)]
        numel = flat[1].shape[0] * width
        return self._codec.decode_slowly(self._layout.unpack(flat, numel), width, dtype)

    def _pack(self, codes: Tensor, bits: int, packed: Tensor, spare: Tensor) -> None:
        """Write packed codes; ``codes`` ``[rows * width]`` uint8, ``packed`` ``[rows, bytes]`` uint8."""
        block = self._layout.block_size
        if bits == 8:
            packed.copy_(codes.view(packed.shape))
        elif codes.numel() % block:
            packed.view(-1).copy_(pack(codes, bits, block))
        else:
            for (width, below), plane in zip(fields_of(bits), _planes(packed, bits, block), strict=True):
                _gather(codes, width, below, plane, spare)

    def _unpack(self, packed: Tensor, bits: int, codes: Tensor, spare: Tensor) -> None:
        block = self._layout.block_size
        if bits == 8:
            codes.view(packed.shape).copy_(packed)
        elif codes.numel() % block:
            codes.copy_(unpack(packed.reshape(-1), bits, block, codes.numel()))
        else:
            for (width, below), plane in zip(fields_of(bits), _planes(packed, bits, block), strict=True):
                _spread(plane, width, below, codes, spare)


class NarrowScales:
    """A chunk codec whose scales have fewer than four bytes.

    Args:
        codec: Works with scales of float32.
        dtype: The dtype of the scales.
    """

    def __init__(self, codec: ChunkCodec, dtype: torch.dtype) -> None:
        self._codec = codec
        self._dtype = dtype

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        codes, stored, *later = parts
        scale = torch.empty(stored.shape, dtype=torch.float32, device="cpu")
        if not self._codec.encode(blocks, (codes, scale, *later), scratch):
            return False
        stored.copy_(narrow(scale, self._dtype))
        return True

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        codes, scale, *later = parts
        self._codec.decode((codes, widen(scale), *later), out, scratch)

    def encode_slowly(self, blocks: Tensor) -> Parts:
        codes, scale, *later = self._codec.encode_slowly(blocks)
        return codes, narrow(scale, self._dtype), *later

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, scale, *later = parts
        return self._codec.decode_slowly((codes, widen(scale), *later), width, dtype)


def _planes(packed: Tensor, bits: int, block_size: int) -> Iterator[Tensor]:
    """Yield the plane of each field, ``[rows, block_size * width / 8]``, from the packed codes of whole blocks."""
    for width, below in fields_of(bits):  # the fields before have ``below`` bits together
        yield packed[:, block_size * below // 8 : block_size * (below + width) // 8]


def _without_scale(parts: Parts) -> Parts:
    return parts[0], *parts[2:]


def _gather(codes: Tensor, width: int, below: int, plane: Tensor, spare: Tensor) -> None:
    """Write the plane of a field of the codes of whole blocks."""
    eight = spare[: codes.numel()].view(torch.int64)
    torch.bitwise_right_shift(codes.view(torch.int64), below, out=eight).bitwise_and_(_LOWEST[width])
    moved = spare[codes.numel() : 2 * codes.numel()].view(torch.int64)
    for shift, _ in _GATHER[width]:
        eight.bitwise_or_(torch.bitwise_right_shift(eight, shift, out=moved))
    plane.copy_(eight.view(_WORDS[width]).view(plane.shape))  # words become bytes modulo 256


def _spread(plane: Tensor, width: int, below: int, codes: Tensor, spare: Tensor) -> None:
    """Write a field of the codes of whole blocks from its plane; the lowest one first, which clears the others."""
    eight = spare[: codes.numel()].view(torch.int64)
    moved = spare[codes.numel() : 2 * codes.numel()].view(torch.int64)
    eight.view(_WORDS[width]).view(plane.shape).copy_(plane)
    for shift, mask in _SPREAD[width]:
        eight.bitwise_or_(torch.bitwise_left_shift(eight, shift, out=moved)).bitwise_and_(mask)
    if below:
        codes.view(torch.int64).bitwise_or_(torch.bitwise_left_shift(eight, below, out=moved))
    else:
        codes.view(torch.int64).copy_(eight)
