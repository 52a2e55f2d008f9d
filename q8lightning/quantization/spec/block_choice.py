"""Choose the blocks that are quantized when only a share of them is, as in Quant-Noise (arXiv:2004.07320).

A hash chooses them, so that every device chooses the same, and a resume needs no state.
"""

import torch
from torch import Tensor


def chosen_blocks(tensor: int, blocks: int, share: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Tell which blocks of a tensor are quantized.

    Block ``b`` of tensor ``t`` is chosen if ``mix(mix(mix(seed) ^ t) ^ b) < floor(share * 2**32)``, with the 32-bit
    integer hash :func:`mix`.

    Args:
        tensor: The number of the tensor in its group.
        blocks: How many blocks it has.
        share: The share of the blocks that is chosen, 0 to 1.
        seed: Chooses the blocks.
        device: The device of the result.

    Returns:
        ``[blocks]`` bool.
    """
    return are_chosen(tensor, torch.arange(blocks, dtype=torch.int64, device=device), share, seed)


def are_chosen(tensor: int, blocks: Tensor, share: float, seed: int) -> Tensor:
    """Tell which of some blocks of a tensor are quantized, as :func:`chosen_blocks` does of all.

    Args:
        tensor: The number of the tensor.
        blocks: ``[blocks]`` int64, their numbers.
        share: The share of all blocks that is quantized.
        seed: Chooses the blocks.

    Returns:
        ``[blocks]`` bool, on their device.
    """
    one = torch.tensor(seed, dtype=torch.int64, device="cpu")
    key = mix(mix(one & 0xFFFFFFFF) ^ tensor).to(blocks.device)
    return mix(key ^ (blocks & 0xFFFFFFFF)) < limit_of(share)


def limit_of(share: float) -> int:
    """Return the number below which the hash of a chosen block is."""
    return int(share * 2**32)


def mix(x: Tensor) -> Tensor:
    """Hash integers below 2**32, int64, with Wellons' ``lowbias32``."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
