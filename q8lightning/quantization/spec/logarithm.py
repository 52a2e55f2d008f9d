"""The logarithm of the log codec, as integer and float32 arithmetic that every processor rounds alike.

A float32 pattern, read as an integer, is already a logarithm with straight lines between powers of two; a polynomial of
the mantissa bends them. Logarithms are counted in patterns: an octave has ``OCTAVE`` of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OCTAVE = 2**23
"""An octave in steps of float32 patterns (int32): the log codec measures logarithms of ratios in this unit."""

FINEST_LOG_STEP = OCTAVE // 64
"""The log codec never makes finer steps than this: they stay wider than the rounding of bfloat16, so that encoding what
was decoded finds the same codes in every dtype."""

LOG_MARGIN = OCTAVE // 2**11
"""How far the grid of the log codec reaches beyond the bounds: half again what both polynomials are off together."""

LOG2_POLYNOMIAL = tuple(c * OCTAVE for c in (0.43872568572886206, -0.23905802201081208, 0.08213051947237734))
"""``m (1 - m) (c0 + m (c1 + m c2))`` is ``log2(1 + m) - m`` for m in [0, 1), in patterns; a minimax fit, 1.2e-4 octaves
off at most. In this form its rounding errors stay well below one pattern, so neighbouring floats stay in order."""

EXP2_POLYNOMIAL = (0.4526153571554752, 0.4776128968344331, -0.008496220273731037, 0.07826796628382286)
"""``c0 + F (c1 + F (c2 + F c3))`` is ``2**(F - 1)`` for F in [1, 2), 1.5e-4 octaves off at most."""


def log2_correction(pattern: Tensor) -> Tensor:
    """Return what has to be added to a float's pattern to make it a logarithm, in float32 patterns.

    Args:
        pattern: int32 bit patterns of floats that are not negative.
    """
    mantissa = ((pattern & (OCTAVE - 1)) | 0x3F800000).view(torch.float32) - 1.0
    c0, c1, c2 = LOG2_POLYNOMIAL
    return mantissa * (1.0 - mantissa) * (mantissa * (mantissa * c2 + c1) + c0)


def exp2_pattern(position: Tensor) -> Tensor:
    """Return the pattern (int32) of the float whose pattern plus correction is ``position`` (int32), nearly."""
    fraction = ((position & (OCTAVE - 1)) | 0x3F800000).view(torch.float32)
    c0, c1, c2, c3 = EXP2_POLYNOMIAL
    power = fraction * (fraction * (fraction * c3 + c2) + c1) + c0
    return (position & -OCTAVE) + (power.view(torch.int32) - 0x3F800000)


class LogGrid(NamedTuple):
    """Where the codes of each block lie, ``[blocks]`` each; distances are logarithms in patterns.

    Attributes:
        offset: float32; minus the correction of the smallest value.
        codes_per_pattern: float32; the reciprocal of the distance between codes.
        origin: int32; the position of code 0, were it on the grid.
        step: int32; from code to code when decoding.
    """

    offset: Tensor
    codes_per_pattern: Tensor
    origin: Tensor
    step: Tensor


def log_grid(bounds: Tensor) -> LogGrid:
    """Lay the grid from the smallest positive to the largest value of each block (``bounds``: ``[blocks, 2]`` float32).

    When decoding, it reaches beyond both by more than the approximations can move a value, so that clamping to the
    bounds returns them exactly.
    """
    low, high = bounds.contiguous().view(torch.int32).unbind(dim=1)
    correction = log2_correction(low)
    span = (high - low).float() + (log2_correction(high) - correction)
    steps = (span * (1.0 / FINEST_LOG_STEP)).floor().clamp(1, 254)
    step = ((span + 2.0 * LOG_MARGIN) / steps).round().to(torch.int32)
    first = low + correction.round().to(torch.int32) - LOG_MARGIN
    # Neighbouring floats are at least a quarter of a pattern apart, so only a block of one value is changed here.
    return LogGrid(-correction, steps / span.clamp(min=0.25), first - step, step)
