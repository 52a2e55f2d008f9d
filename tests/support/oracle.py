"""The codecs once more, in float64 NumPy and by brute force, so that the package is not its own judge.

Imports neither torch nor q8lightning; arguments may be anything with ``double()`` (a tensor) or ``__array__``. Nothing
is rounded to float32 on the way: tests derive how far float32 arithmetic may stray, and say so where they compare.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_NORMAL = 2.0**-126
LOG_STEPS_PER_OCTAVE = 64
SMALLEST_BFLOAT16, LARGEST_BFLOAT16 = 2.0**-133, (2 - 2.0**-7) * 2.0**127


def float64(x: Any) -> Array:
    """Return ``x`` as a float64 array; exact for every dtype that the package takes."""
    return np.asarray(x.double() if hasattr(x, "double") else x, dtype=np.float64)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays agree in shape and in every bit, the signs of zeros too; all NaNs count as one."""
    a, b = float64(a), float64(b)
    same = (a == b) & (np.signbit(a) == np.signbit(b)) | np.isnan(a) & np.isnan(b) if a.shape == b.shape else False
    return bool(np.all(same))


def blocks_of(x: Any, block_size: int) -> list[Array]:
    """Cut the flattened ``x`` into blocks; the last one may be short."""
    flat = float64(x).reshape(-1)
    return [flat[start : start + block_size] for start in range(0, flat.size, block_size)]


def spread(per_block: Any, block_size: int, like: Any) -> Array:
    """Repeat one value a block for every element, in the shape of ``like``."""
    shape = np.shape(like)
    return np.repeat(float64(per_block), block_size)[: int(np.prod(shape))].reshape(shape)


def to_bfloat16(x: Any, rounding: Any = np.rint) -> Array:
    """Return the nearest finite bfloat16, in a tie that with an even mantissa; ``np.floor`` or ``np.ceil`` of it."""
    _, exponent = np.frexp(float64(x))
    ulp = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    return float64(np.clip(rounding(float64(x) / ulp) * ulp, -LARGEST_BFLOAT16, LARGEST_BFLOAT16))


def bounds_inside(low: Any, high: Any) -> tuple[Array, Array]:
    """Return bounds of the log codec as bfloat16 between them, or twice the same where there is none."""
    high = np.where(float64(high) > 0, np.maximum(to_bfloat16(high, np.floor), SMALLEST_BFLOAT16), 0.0)
    return np.minimum(to_bfloat16(low, np.ceil), high), high


def block_scale(x: Any, block_size: int, end: int = 0, narrow: bool = False) -> Array:
    """Return each block's largest magnitude; with ``end``, signed so that the largest element over it is ``end``.

    It is rounded to bfloat16 if it is ``narrow``.
    """

    def scale(block: Array) -> float:
        largest = np.abs(block).max()
        if largest < SMALLEST_NORMAL:
            return 0.0
        sign = 1.0 if end == 0 else end if block.max() == largest else -end
        return float(sign * largest)

    scales = np.array([scale(block) for block in blocks_of(x, block_size)])
    return to_bfloat16(scales) if narrow else scales


def normalise(x: Any, scale: Any, block_size: int) -> Array:
    """Return each element over the scale of its block, 0 where that is 0."""
    divisor = spread(scale, block_size, x)
    return np.divide(float64(x), divisor, out=np.zeros_like(divisor), where=divisor != 0)


def nearest(y: Array, levels: Any) -> NDArray[np.int64]:
    """Return the index of the nearest level for every element of ``y``; the lower one in a tie."""
    levels = float64(levels)
    rows = [np.abs(part[:, None] - levels).argmin(axis=1) for part in np.array_split(y.reshape(-1), y.size // 4096 + 1)]
    return np.concatenate(rows).reshape(y.shape)


def undecided(y: Array, levels: Any, gap_fraction: float, noise: float = 2.0**-22) -> NDArray[np.bool_]:
    """Where ``y`` lies so close to a midpoint that thresholds off by ``gap_fraction`` of a gap may decide otherwise.

    ``noise`` is what float32 arithmetic does to ``y``, |y| <= 1: the rounding of the reciprocal and of the product.
    """
    levels = float64(levels)
    midpoints, gaps = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    at = np.clip(np.searchsorted(levels, y, side="right") - 1, 0, gaps.size - 1)
    return np.abs(y - midpoints[at]) <= gap_fraction * gaps[at] + noise


def quantize(
    x: Any, levels: Any, block_size: int, end: int = 0, narrow: bool = False
) -> tuple[NDArray[np.int64], Array]:
    """Encode each element as the nearest level times the scale of its block."""
    scale = block_scale(x, block_size, end, narrow)
    return nearest(normalise(x, scale, block_size), levels), scale


def dequantize(codes: Any, scale: Any, levels: Any, block_size: int) -> Array:
    """Return the level of each code times the scale of its block; exact, as both have 24 bits."""
    return float64(levels)[float64(codes).astype(np.int64)] * spread(scale, block_size, codes)


def residual_steps(bits: int, residual_bits: int) -> int:
    """Return in how many steps the second stage divides a scale: each step of the first in an odd number."""
    return (2 ** (bits - 1) - 1) * (2**residual_bits - 1)


def quantize_residual(left: Any, scale: Any, block_size: int, bits: int, residual_bits: int) -> NDArray[np.int64]:
    """Encode what the first stage left in equal steps."""
    steps = normalise(left, scale, block_size) * residual_steps(bits, residual_bits)
    most = 2 ** (residual_bits - 1) - 1
    return np.clip(np.ceil(steps - 0.5), -most, most).astype(np.int64) + most  # the lower code in a tie


class Log(NamedTuple):
    """Codes (0 for zero), bounds ``[blocks, 2]``, and the distance between codes in octaves, one a block."""

    codes: NDArray[np.int64]
    bounds: Array
    step: Array


def quantize_log(x: Any, block_size: int, bits: int, narrow: bool = False) -> Log:
    """Encode values that are not negative at equal steps of the true logarithm between each block's bounds.

    Values beyond bounds that are ``narrow``, bfloat16, count as the bound.
    """
    codes, bounds, step = [], [], []
    for block in blocks_of(x, block_size):
        positive = block[block > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (0.0, 0.0)
        if narrow:
            low, high = bounds_inside(low, high)
            block = np.where(block > 0, np.clip(block, low, high), 0.0)
        octaves = np.log2(high) - np.log2(low) if positive.size else 0.0
        steps = np.clip(np.floor(octaves * LOG_STEPS_PER_OCTAVE), 1, 2**bits - 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            position = (np.log2(block) - np.log2(low)) * steps / (octaves or 1.0)
        codes.append(np.where(block > 0, 1 + np.round(np.where(block > 0, position, 0.0)), 0))
        bounds.append((low, high))
        step.append(octaves / steps)
    return Log(np.concatenate(codes).astype(np.int64).reshape(np.shape(x)), np.array(bounds), np.array(step))


def dequantize_log(log: Log, block_size: int) -> Array:
    """Return the values of :func:`quantize_log`."""
    low = spread(log.bounds[:, 0], block_size, log.codes)
    return np.where(log.codes > 0, low * np.exp2((log.codes - 1) * spread(log.step, block_size, log.codes)), 0.0)


def quantize_affine(x: Any, block_size: int, bits: int = 8) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """Encode with ``2**bits`` equal steps between the smallest and the largest value of each block and zero."""
    low = np.array([min(block.min(), 0.0) for block in blocks_of(x, block_size)])
    high = np.array([max(block.max(), 0.0) for block in blocks_of(x, block_size)])
    last = 2**bits - 1
    scale = (high - low) / last
    zero_point = np.floor(0.5 - np.divide(low, scale, out=np.zeros_like(low), where=scale != 0))
    code = np.floor(normalise(x, scale, block_size) + spread(zero_point, block_size, x) + 0.5)
    return np.clip(code, 0, last).astype(np.int64), scale, zero_point.astype(np.int64)


def dequantize_affine(codes: Any, scale: Any, zero_point: Any, block_size: int) -> Array:
    """Return ``(code - zero_point) * scale``."""
    return (float64(codes) - spread(zero_point, block_size, codes)) * spread(scale, block_size, codes)


def error_statistics(x: Any, reconstruction: Any) -> tuple[float, float, float, int, int]:
    """Return the sums of squared errors and of squares, the largest error, and how many are zero and became zero."""
    x, decoded = float64(x), float64(reconstruction)
    error = np.abs(decoded - x)
    return (
        float(np.sum(error**2)),
        float(np.sum(x**2)),
        float(error.max(initial=0.0)),
        int(np.sum(x == 0)),
        int(np.sum((x != 0) & (decoded == 0))),
    )
