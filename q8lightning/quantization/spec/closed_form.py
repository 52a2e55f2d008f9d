"""Codes computed without a table, for codebooks whose levels have a formula."""

from collections.abc import Callable

import torch
from torch import Tensor

_TO_INTEGER = 2.0**23 + 127
"""Added to a float32 in [-127.5, 127.5], it leaves the nearest integer plus 127 in the low bits of the pattern."""


def linear_code(y: Tensor) -> Tensor:
    """Return the codes (int32) of normalised values (float32), which are overwritten, in the codebook ``linear``."""
    return y.mul_(127.0).add_(_TO_INTEGER).view(torch.int32).bitwise_and_(0xFF)


def softsign_code(y: Tensor) -> Tensor:
    """As :func:`linear_code`, in the codebook ``softsign``."""
    # This inverts the levels, k = 254 l / (1 + l), and rounds: its steps are within 0.2% of a gap of the midpoints.
    # The form 1 - 1 / (1 + l) keeps the order of values through every rounding; l / (1 + l) would not.
    share = y.abs().add_(1.0).reciprocal_().neg_().add_(1.0)
    return share.copysign_(y).mul_(254.0).add_(_TO_INTEGER).view(torch.int32).bitwise_and_(0xFF)


def steps_of(closed_form: Callable[[Tensor], Tensor], levels: int) -> Tensor:
    """Return the largest float32 that a monotone closed form maps to each code or below it, found by bisection.

    Args:
        closed_form: Computes codes, as :func:`linear_code` does.
        levels: How many codes there are.

    Returns:
        ``[levels - 1]`` float32, of all codes but the last.
    """

    def floats(ordered: Tensor) -> Tensor:  # of integers that order as the floats do
        bits = torch.where(ordered < 0, -(2**31) - ordered - 1, ordered)
        return bits.int().view(torch.float32)

    def order(x: float) -> int:
        bits = int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))
        return bits if bits >= 0 else -(2**31) - bits - 1

    code = torch.arange(levels - 1, dtype=torch.int64, device="cpu")
    low, high = torch.full_like(code, order(-1.0)), torch.full_like(code, order(1.0))
    while int((high - low).max()) > 1:
        middle = (low + high) >> 1
        below = closed_form(floats(middle)).long() <= code
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return floats(low)
