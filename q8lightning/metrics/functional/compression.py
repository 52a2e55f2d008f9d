"""How many times smaller something is stored."""

import operator

import torch
from torch import Tensor


def _total_bytes(count: int | Tensor, name: str) -> int:
    if isinstance(count, Tensor) and (count.is_floating_point() or count.is_complex() or count.dtype == torch.bool):
        raise ValueError(f"{name} must count whole bytes, got {count.dtype}; pass an int or a tensor of integers")
    if isinstance(count, Tensor):
        smallest, total = (int(count.min()), int(count.sum())) if count.numel() else (0, 0)
    else:
        try:
            smallest = total = operator.index(count)
        except TypeError:
            raise ValueError(
                f"{name} must count whole bytes, got {count!r}; pass an int or a tensor of integers"
            ) from None
    if smallest < 0:
        raise ValueError(f"{name} must not be negative, got {smallest}; pass a size in bytes")
    return total


def compression_ratio_update(original_bytes: int | Tensor, stored_bytes: int | Tensor) -> Tensor:
    """Return both totals in bytes, ``[2]`` float64 on the CPU, exact up to 2**53 bytes."""
    totals = (_total_bytes(original_bytes, "original_bytes"), _total_bytes(stored_bytes, "stored_bytes"))
    return torch.tensor(totals, dtype=torch.float64, device="cpu")


def compression_ratio_compute(sums: Tensor) -> Tensor:
    """Return original over stored bytes, ``[]`` float64; 1 if both are 0, infinity if only the stored ones are."""
    original, stored = sums
    return torch.where((original == 0) & (stored == 0), 1.0, original / stored)


def compression_ratio(original_bytes: int | Tensor, stored_bytes: int | Tensor) -> Tensor:
    """Return ``original_bytes / stored_bytes``.

    Args:
        original_bytes: An int, or a tensor of integers, whose elements are added up. The function waits for a GPU's.
        stored_bytes: The same for the stored form.

    Returns:
        ``[]`` float64, a ratio; 1 if both are 0, infinity if only the stored bytes are.

    Raises:
        ValueError: If a count is negative or not whole.

    Example:
        >>> compression_ratio(4096, 1040)
        tensor(3.9385, dtype=torch.float64)
    """
    return compression_ratio_compute(compression_ratio_update(original_bytes, stored_bytes))
