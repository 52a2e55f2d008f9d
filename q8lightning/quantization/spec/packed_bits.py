"""Pack codes of fewer than eight bits without gaps, and unpack them."""

import torch
from torch import Tensor

CHUNK = 2**20
"""Codes that are packed at a time, since their bits take eight times their memory."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return codes below ``2**bits`` as one stream of bits. Codes and bytes are read from their lowest bit on.

    Args:
        codes: uint8, of any shape.
        bits: 1 to 8.

    Returns:
        ``[ceil(numel * bits / 8)]`` uint8.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    parts = [_as_bytes(_bits_of(part, bits)) for part in flat.split(CHUNK)]  # type: ignore[no-untyped-call]
    return torch.cat(parts)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Undo :func:`pack_bits`: return ``[numel]`` uint8."""
    if bits == 8:
        return packed[:numel].clone()
    whole = packed.split(CHUNK // 8 * bits)  # type: ignore[no-untyped-call]
    codes = [_bits_of(part, 8)[: part.numel() * 8 // bits * bits].view(-1, bits) for part in whole]
    return torch.cat([_weighted(part) for part in codes] or [packed])[:numel]


def _bits_of(x: Tensor, bits: int) -> Tensor:
    return ((x[:, None] >> torch.arange(bits, dtype=torch.uint8, device=x.device)) & 1).reshape(-1)


def _as_bytes(stream: Tensor) -> Tensor:
    return _weighted(torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8))


def _weighted(rows: Tensor) -> Tensor:
    """Return the number whose bits each row holds, ``[rows]`` uint8."""
    return (rows << torch.arange(rows.shape[1], dtype=torch.uint8, device=rows.device)).sum(dim=1, dtype=torch.uint8)
