"""How well codes use the levels of their codebook."""

import torch
from torch import Tensor


def check_num_levels(num_levels: int) -> None:
    """Raise ValueError unless ``num_levels`` is a whole number from 2 to 256."""
    if not (isinstance(num_levels, int) and 2 <= num_levels <= 256):
        raise ValueError(f"num_levels must be a whole number from 2 to 256, got {num_levels}; an 8-bit code has 256")


def codebook_usage_update(codes: Tensor, num_levels: int) -> Tensor:
    """Return the count of each code in ``[*shape]`` uint8, ``[num_levels]`` float64. Waits for codes on a GPU."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}; pass what a codec returned as codes")
    counts = codes.reshape(-1).bincount(minlength=256)
    if num_levels < 256 and bool(counts[num_levels:].any()):
        raise ValueError(
            f"codes must be below num_levels={num_levels}, got {int(codes.max())}; pass the length of the codebook"
        )
    return counts[:num_levels].double()


def codebook_usage_compute(counts: Tensor) -> dict[str, Tensor]:
    """Return the share of levels in use and the entropy of counted codes; zeros if there are no codes."""
    total = counts.sum()
    probability = counts / torch.where(total == 0, 1.0, total)
    entropy = torch.special.entr(probability).sum() / torch.log(counts.new_tensor(2.0))
    return {"share_in_use": (counts > 0).double().mean(), "entropy_bits": entropy}


def codebook_usage(codes: Tensor, num_levels: int = 256) -> dict[str, Tensor]:
    """Return the share of a codebook's levels that occur among the codes, and the entropy of the codes.

    Args:
        codes: ``[*shape]`` uint8. The function waits for those on a GPU.
        num_levels: The number of levels of the codebook.

    Returns:
        ``share_in_use``, ``[]`` float64 from 0 to 1, and ``entropy_bits``, ``[]`` float64 in bits a code, from 0 for a
        single code to log2(num_levels) if all occur equally often. Both are 0 if there are no codes.

    Raises:
        ValueError: If the codes are not uint8 below ``num_levels``, or ``num_levels`` is not from 2 to 256.

    Example:
        >>> codebook_usage(torch.tensor([0, 0, 1, 2], dtype=torch.uint8), num_levels=4)
        {'share_in_use': tensor(0.7500, dtype=torch.float64), 'entropy_bits': tensor(1.5000, dtype=torch.float64)}
    """
    check_num_levels(num_levels)
    return codebook_usage_compute(codebook_usage_update(codes, num_levels))
