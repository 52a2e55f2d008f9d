"""Bound what a codec can lose, from the scales alone, since a sample may miss the worst."""

from functools import lru_cache

import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import Codebook
from q8lightning.quantization.spec.reference import residual_steps
from q8lightning.system.ambient import lasting

_BEYOND = {"float32": 0.0, "bfloat16": 2.0**-8 * 1.01, "float16": torch.inf}
"""How far the largest element of a block may lie beyond its scale, relative to it. The smallest float16 are coarse."""

_ROUNDING = 1e-6
"""More than all float32 roundings of an element add up to, relative to it or to the scale of its block."""


def of_residual(bits: int, residual_bits: int) -> tuple[float, float]:
    """Return the a and b of :func:`of_codebook` for the residual codec.

    A whole step of the residual is more than it can be off: half a step and the roundings of both stages.
    """
    return residual_steps(bits, residual_bits) ** -2, _ROUNDING**2


def relative_error_bound(values: Tensor, scales: Tensor, block_size: int, of_scale: float, of_value: float) -> float:
    """Return an upper bound of the relative error of encoded values, the root of error power over signal power.

    Args:
        values: ``[numel]`` of any float dtype.
        scales: ``[blocks]`` float32, finite.
        block_size: Elements that share a scale.
        of_scale: The a of :func:`of_codebook`.
        of_value: The b of :func:`of_codebook`.

    Returns:
        The bound. Infinity for other dtypes than float32, and if the squares leave the range of float32.
    """
    if values.dtype != torch.float32:
        return torch.inf
    squares = float(torch.dot(values, values))
    if not 1e-25 < squares < 1e35:
        return torch.inf
    scale_power = float(scales.double().square().sum()) * block_size
    return float((of_scale * scale_power / squares * (1 + 1e-3) + of_value) ** 0.5)


@lru_cache(maxsize=64)
@lasting()
def of_codebook(codebook: Codebook) -> tuple[float, float]:
    """Return a and b such that an element x of a block of scale s is off by at most the root of ``a s^2 + b x^2``.

    Many pairs fit, because levels are often far apart only where they are large. This is the pair with the smallest
    bound for a value of a quarter of the scale.
    """
    levels, thresholds = codebook.tensor("cpu").double(), codebook.thresholds.double()
    error = torch.maximum((levels[1:] - thresholds), (thresholds - levels[:-1])) + _ROUNDING
    smallest = torch.minimum(levels[1:].abs(), levels[:-1].abs())
    edges = torch.stack([(levels[0] + 1).clamp(min=0), (1 - levels[-1]).clamp(min=0)])
    edges += _BEYOND[codebook.scale_dtype] + _ROUNDING
    squared = torch.cat([error.square(), edges.square()])
    power = torch.cat([smallest.square(), levels[[0, -1]].square()])
    best = (torch.inf, torch.inf)
    for a in sorted(set(squared.tolist())):
        beyond = squared > a
        b = float(((squared - a) / power)[beyond].max()) if bool(beyond.any()) else 0.0
        if a + b / 16 < best[0] + best[1] / 16:
            best = (a, b)
    return best
