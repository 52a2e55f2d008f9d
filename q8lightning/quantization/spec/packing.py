"""Pack the codes of a block into as few bytes as their bits need.

A code is cut into fields of 4, 2 and 1 bits, as many as the sum needs, from its lowest bit on: 6 bits are a field of 4
and one of 2. A field's plane holds that field of all elements of the block, in the order of the elements, each byte
filled from its lowest bit on. The planes of a block lie one after the other, so that a block of ``block_size`` elements
takes ``block_size * bits / 8`` bytes. The elements that a short last block lacks have zero bits. Codes of 8 bits are
bytes already, and a short last block of them stays short.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def fields_of(bits: int) -> tuple[tuple[int, int], ...]:
    """Return the fields of a code, the width of each and how many bits of the code lie below it.

    Example:
        >>> fields_of(7)
        ((4, 0), (2, 4), (1, 6))
    """
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    return tuple((width, sum(widths[:place])) for place, width in enumerate(widths))


def packed_bytes(numel: int, bits: int, block_size: int) -> int:
    """Return the bytes of the packed codes of ``numel`` elements."""
    return numel if bits == 8 else -(-numel // block_size) * (block_size * bits // 8)


def pack(codes: Tensor, bits: int, block_size: int) -> Tensor:
    """Pack codes below ``2**bits``.

    Args:
        codes: ``[numel]`` uint8.
        bits: 1 to 8.
        block_size: Elements of a block, a multiple of 8.

    Returns:
        ``[packed_bytes(numel, bits, block_size)]`` uint8; ``codes`` themselves if they have 8 bits.

    Example:
        >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4, 32)[:3].tolist()
        [33, 3, 0]
    """
    if bits == 8:
        return codes
    blocks = pad(codes, (0, -codes.numel() % block_size)).view(-(-codes.numel() // block_size), block_size)
    planes = [_plane((blocks >> below) & (2**width - 1), width) for width, below in fields_of(bits)]
    return torch.cat(planes, dim=1).view(-1)


def unpack(packed: Tensor, bits: int, block_size: int, numel: int) -> Tensor:
    """Undo :func:`pack`: return ``[numel]`` uint8; ``packed`` itself if codes have 8 bits."""
    if bits == 8:
        return packed
    rows = packed.view(-(-numel // block_size), block_size * bits // 8)
    codes, start = torch.zeros(rows.shape[0], block_size, dtype=torch.uint8, device=packed.device), 0
    for width, below in fields_of(bits):
        plane = rows[:, start : start + block_size * width // 8]
        fields = (plane[:, :, None] >> _shifts(width, packed.device)) & (2**width - 1)
        codes |= fields.view(codes.shape) << below
        start += plane.shape[1]
    return codes.view(-1)[:numel]


def _plane(fields: Tensor, width: int) -> Tensor:
    """Return the bytes of fields, ``[blocks, block_size]`` uint8 below ``2**width``."""
    together = fields.view(fields.shape[0], fields.shape[1] * width // 8, 8 // width)
    return (together << _shifts(width, fields.device)).sum(dim=2, dtype=torch.uint8)


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)
