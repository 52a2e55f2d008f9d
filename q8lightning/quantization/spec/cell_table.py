"""A lookup table that nearly finishes the search for a code in one step."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CellTable:
    """The lowest code of each cell. A cell is the set of floats that share their leading bits.

    Attributes:
        shift: How many trailing bits of the float32 pattern a cell leaves open.
        first: ``[2 ** (32 - shift)]`` int32: the lowest code that a float of the cell can have.
        rounds: Steps of a binary search that remain from there; 1 if no cell holds more than one threshold.
    """

    shift: int
    first: Tensor
    rounds: int

    @staticmethod
    def of(thresholds: Tensor) -> "CellTable":
        """Make the table of 6 mantissa bits, or of 7 if that saves a step, as it does for ``dynamic_unsigned``."""
        six, seven = (CellTable._with_mantissa_bits(thresholds, bits) for bits in (6, 7))
        return seven if seven.rounds < six.rounds else six

    @staticmethod
    def _with_mantissa_bits(thresholds: Tensor, bits: int) -> "CellTable":
        shift = 23 - bits
        cell = torch.arange(2 ** (32 - shift), dtype=torch.int64, device="cpu") << shift
        ends = torch.stack([cell, cell | (2**shift - 1)])
        ends = (ends - 2**32 * (ends >= 2**31).long()).int().view(torch.float32)  # as signed 32-bit patterns
        ends = torch.where(ends.isnan(), ends.new_tensor(torch.inf).copysign(ends), ends)  # NaN has no code
        low, high = ends.min(dim=0).values, ends.max(dim=0).values
        first = torch.searchsorted(thresholds, low, out_int32=True)
        last = torch.searchsorted(thresholds, high, out_int32=True)
        return CellTable(shift, first, max(1, int((last - first).max()).bit_length()))
