"""Codes of fewer than 8 bits take as many bits, in the order that docs/format.md describes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from q8lightning.quantization.backends.cpu_codecs import Parts
from q8lightning.quantization.backends.cpu_memory import Scratch, scratch
from q8lightning.quantization.backends.cpu_packing import Packed
from q8lightning.quantization.spec.layout import Layout
from q8lightning.quantization.spec.packing import fields_of, pack, packed_bytes, unpack

every_number_of_bits = pytest.mark.parametrize("bits", range(1, 9))


def codes_of(bits: int, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    return torch.randint(0, 2**bits, (numel,), generator=generator, dtype=torch.uint8)


def packed_by_hand(codes: Tensor, bits: int, block_size: int) -> bytes:
    """Pack bit by bit: the planes of a block one after the other, each byte filled from its lowest bit on."""
    result = b""
    for start in range(0, len(codes), block_size):
        block = codes[start : start + block_size].tolist()
        block += [0] * (block_size - len(block))
        below = 0
        for width in (4, 2, 1):
            if bits & width:
                stream = [(code >> (below + bit)) & 1 for code in block for bit in range(width)]
                result += np.packbits(stream, bitorder="little").tobytes()
                below += width
    return result


@every_number_of_bits
def test_packed_codes_are_those_packed_bit_by_bit(bits: int) -> None:
    for block_size, numel in ((32, 100), (32, 64), (64, 1), (128, 1000)):
        codes = codes_of(bits, numel)
        packed = pack(codes, bits, block_size)
        assert packed.numel() == packed_bytes(numel, bits, block_size)
        assert bytes(packed.tolist()) == (
            packed_by_hand(codes, bits, block_size) if bits < 8 else bytes(codes.tolist())
        )
        assert torch.equal(unpack(packed, bits, block_size, numel), codes)
    assert pack(torch.empty(0, dtype=torch.uint8), bits, 32).numel() == 0
    assert unpack(torch.empty(0, dtype=torch.uint8), bits, 32, 0).numel() == 0


def test_the_fields_of_a_code_are_all_of_it() -> None:
    for bits in range(1, 9):
        widths, below = zip(*fields_of(bits), strict=True)
        assert sum(widths) == bits
        assert list(below) == [sum(widths[:place]) for place in range(len(widths))]


class Given:
    """A chunk codec that encodes to given codes, and decodes to the codes themselves."""

    def __init__(self, codes: list[Tensor]) -> None:
        self._codes = codes

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        first, _, *later = parts
        for part, codes in zip((first, *later), self._codes, strict=True):
            part.view(-1).copy_(codes)
        return True

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        first, _, *later = parts
        out.copy_(first.view(out.shape))
        for part in later:
            out.mul_(1000.0).add_(part.view(out.shape))


@every_number_of_bits
@pytest.mark.parametrize("other", [None, 3, 8])
def test_a_cpu_packs_chunks_alike(bits: int, other: int | None) -> None:
    """Whole blocks by words, and a short one."""
    layout = Layout(64, bits=(bits,) if other is None else (bits, other))
    for rows, width in ((1, 64), (7, 64), (1, 40)):
        codes = [codes_of(each, rows * width) for each in layout.bits]
        scale = torch.ones(rows)
        data = torch.full((layout.encoded_bytes(rows * width),), 77, dtype=torch.uint8)
        first, _, *later = layout.views(data, rows * width)
        parts = first.view(rows, -1), scale, *(each.view(rows, -1) for each in later)
        packed = Packed(Given(codes), layout)  # type: ignore[arg-type]
        assert packed.encode(torch.empty(rows, width), parts, scratch(rows, width))
        for part, each, number in zip((parts[0], *parts[2:]), codes, layout.bits, strict=True):
            assert torch.equal(part.reshape(-1), pack(each, number, 64))
        out = torch.empty(rows, width)
        packed.decode(parts, out, scratch(rows, width))
        expected = codes[0].float() if other is None else codes[0].float() * 1000 + codes[1].float()
        assert torch.equal(out.view(-1), expected)
