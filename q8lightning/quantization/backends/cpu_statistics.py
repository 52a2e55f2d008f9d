"""What a codec lost of a CPU tensor, added up chunk by chunk while the chunk is still in the caches.

The numbers of :func:`reference.measure` of the tensor and its decoded form, but for the order of the float64 sums.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from q8lightning.quantization.backends.cpu_memory import Scratch
from q8lightning.quantization.spec import reference


class Totals:
    """The five numbers of ``reference.ErrorStatistics``, of the chunks so far."""

    def __init__(self) -> None:
        self._numbers = [0.0] * 5

    def add(self, original: Tensor, decoded: Tensor, scratch: Scratch) -> None:
        """Add a chunk of finite numbers.

        Args:
            original: ``[rows, width]`` float32.
            decoded: The same; 0 where the original is.
            scratch: To compute in; its first float and its doubles are overwritten.
        """
        zeros = _count_zeros(original, scratch.floats[0])
        zeroed = _count_zeros(decoded, scratch.floats[0]) - zeros
        exact, error = scratch.doubles
        exact.view(original.shape).copy_(original)
        error.view(decoded.shape).copy_(decoded)
        error.sub_(exact)
        max_error = max(float(error.amax()), -float(error.amin()))
        self.add_numbers(float(torch.dot(error, error)), float(torch.dot(exact, exact)), max_error, zeros, zeroed)

    def add_slowly(self, original: Tensor, decoded: Tensor) -> None:
        """Add a chunk of any floats, of any dtype."""
        self.add_numbers(*(float(each) for each in reference.error_statistics(original, decoded)))

    def add_numbers(self, squared_error: float, squares: float, max_error: float, zeros: float, zeroed: float) -> None:
        """Add the five numbers of something."""
        error, power, largest, *counts = self._numbers
        if max_error > largest or math.isnan(max_error):  # nothing is greater than a NaN
            largest = max_error
        self._numbers = [error + squared_error, power + squares, largest, counts[0] + zeros, counts[1] + zeroed]

    def write(self, statistics: Tensor, weight: float = 1.0) -> None:
        """Write the numbers to ``statistics``, ``[5]`` float64, sums and counts times ``weight``."""
        error, squares, largest, *counts = self._numbers
        numbers = [error * weight, squares * weight, largest, *(count * weight for count in counts)]
        statistics.copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))


def add_pieces(
    totals: Sequence[Totals], rows: Sequence[int], original: Tensor, decoded: Tensor, scratch: Scratch
) -> None:
    """Add pieces of several tensors, each of some rows, in one pass: alone, each would take a dozen short ones.

    Args:
        totals: Of the tensor that each piece is of.
        rows: How many rows each piece has.
        original: ``[rows, width]`` float32, all pieces.
        decoded: The same; 0 where the original is.
        scratch: See :meth:`Totals.add`.
    """
    spare, (exact, error) = scratch.floats[0], (each.view(original.shape) for each in scratch.doubles)
    zeros = torch.eq(original, 0.0, out=spare).sum(dim=1)
    zeroed = torch.eq(decoded, 0.0, out=spare).sum(dim=1).sub_(zeros)
    exact.copy_(original)
    largest = error.copy_(decoded).sub_(exact).abs_().amax(dim=1)
    sums = torch.stack([error.square_().sum(dim=1), exact.square_().sum(dim=1), zeros.double(), zeroed.double()], dim=1)
    of_pieces = torch.stack([each.sum(dim=0) for each in torch.split(sums, list(rows))]).tolist()
    for total, (squared_error, squares, *counts), most in zip(
        totals, of_pieces, torch.split(largest, list(rows)), strict=True
    ):
        total.add_numbers(squared_error, squares, float(most.amax()), *counts)


def _count_zeros(x: Tensor, spare: Tensor) -> float:
    # As floats: to count bools would take many times as long.
    return float(torch.eq(x, 0.0, out=spare).sum())
