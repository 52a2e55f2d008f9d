"""Compute the logarithm of the log codec in integer and float32 arithmetic, which every processor rounds alike.

A float32 pattern, read as an integer, is a logarithm already, with straight lines between powers of two. A polynomial
of the mantissa bends the lines. The unit of a logarithm is a step of the pattern; an octave has ``OCTAVE`` of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OCTAVE = 2**23
"""The patterns of an octave, from a power of two to the next."""

FINEST_LOG_STEP = OCTAVE // 64
"""The finest step of the log codec. It is wider than a rounding to bfloat16, so that decoded values of every dtype give
the same codes again."""

LOG_MARGIN = OCTAVE // 2**11
"""How far the grid of a block reaches beyond its bounds: 1.5 times what both polynomials can be off together."""

LOG2_POLYNOMIAL = tuple(c * OCTAVE for c in (0.43872568572886206, -0.23905802201081208, 0.08213051947237734))
"""``m (1 - m) (c0 + m (c1 + m c2))`` is ``log2(1 + m) - m`` for m in [0, 1), in patterns. It is a minimax fit, off by
1.2e-4 octaves at most. This form rounds by far less than a pattern, so neighbouring floats stay in order."""

EXP2_POLYNOMIAL = (0.4526153571554752, 0.4776128968344331, -0.008496220273731037, 0.07826796628382286)
"""``c0 + F (c1 + F (c2 + F c3))`` is ``2**(F - 1)`` for F in [1, 2), off by 1.5e-4 octaves at most."""


def log2_correction(pattern: Tensor) -> Tensor:
    """Return what makes a logarithm of a float's pattern when it is added, float32 in patterns.

    Args:
        pattern: int32 bit patterns of floats that are not negative.
    """
    mantissa = ((pattern & (OCTAVE - 1)) | 0x3F800000).view(torch.float32) - 1.0
    c0, c1, c2 = LOG2_POLYNOMIAL
    return mantissa * (1.0 - mantissa) * (mantissa * (mantissa * c2 + c1) + c0)


def exp2_pattern(position: Tensor) -> Tensor:
    """Return the pattern (int32) of the float whose logarithm is ``position`` (int32), nearly."""
    fraction = ((position & (OCTAVE - 1)) | 0x3F800000).view(torch.float32)
    c0, c1, c2, c3 = EXP2_POLYNOMIAL
    power = fraction * (fraction * (fraction * c3 + c2) + c1) + c0
    return (position & -OCTAVE) + (power.view(torch.int32) - 0x3F800000)


class LogGrid(NamedTuple):
    """The logarithms of the codes of each block, ``[blocks]`` each, in patterns.

    Attributes:
        offset: float32; minus the correction of the smallest value.
        codes_per_pattern: float32; the reciprocal of the distance between codes when encoding.
        origin: int32; where code 0 would be, if it were not zero.
        step: int32; the distance between codes when decoding.
    """

    offset: Tensor
    codes_per_pattern: Tensor
    origin: Tensor
    step: Tensor


def most_steps(bits: int) -> int:
    """Return the number of steps between the codes 1 and ``2**bits - 1``."""
    return (1 << bits) - 2


def log_grid(bounds: Tensor, bits: int) -> LogGrid:
    """Return the grid of codes of ``bits`` from the smallest positive to the largest value of each block.

    The bounds are these values, ``[blocks, 2]`` float32. When decoding, the grid reaches beyond both by more than the
    polynomials are off. So values clamped to the bounds give the bounds exactly.
    """
    low, high = bounds.contiguous().view(torch.int32).unbind(dim=1)
    correction = log2_correction(low)
    span = (high - low).float() + (log2_correction(high) - correction)
    steps = (span * (1.0 / FINEST_LOG_STEP)).floor().clamp(1, most_steps(bits))
    step = ((span + 2.0 * LOG_MARGIN) / steps).round().to(torch.int32)
    first = low + correction.round().to(torch.int32) - LOG_MARGIN
    # The logarithms of different floats are at least a quarter apart, so this changes only blocks of one value.
    return LogGrid(-correction, steps / span.clamp(min=0.25), first - step, step)
