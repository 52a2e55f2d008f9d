"""Round the scales of blocks to the dtype in which a target or a checkpoint stores them.

The scale of a codebook becomes the nearest value, as the quantizers of the targets have it. To round up would keep
every element within the levels, but costs more: with bfloat16 scales and 8-bit codes, an error of weights that is 0.4
to 1.3% larger instead of 0.03 to 0.8%, and the largest element of a block may then no longer be the end of the
codebook, so that encoding again moves a quarter of the scales. The nearest value moves none, except for scales below
the smallest normal number of float16 (6.1e-5), which has few bits there, and with codebooks whose last levels are less
than 1/128 apart (:func:`finds_scale_again`).

The bounds of the log codec move to the inside of the block, and what lies beyond them becomes the bound. So both bounds
are values of the decoded block, which encoding again finds, and no nonzero value becomes zero or infinite. All of it is
integer arithmetic, because a processor may take the smallest floats for zero.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

ScaleDtype = Literal["float32", "float16", "bfloat16"]
"""The dtypes of scales, by their names."""

StoredScaleDtype = Literal["float32", "bfloat16"]
"""The dtypes of scales in checkpoints. The range of float16 is too small for moments."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_UPPER, _LOWER = -0x10000, 0xFFFF
"""The bits of a float32 that a bfloat16 has, and those that it lacks."""

_SMALLEST = 0x10000
"""The pattern of the smallest positive bfloat16, as float32."""

_LARGEST_IS_AT_LEAST = 257 / 258
"""The smallest quotient of a block's largest magnitude and the nearest bfloat16: slightly above 1 + 2**-8, it is
rounded up to 1 + 2**-7."""


def check_scale_dtype(scale_dtype: str) -> None:
    """Raise ValueError for the name of another dtype."""
    if scale_dtype not in get_args(ScaleDtype):
        raise ValueError(f"scale_dtype is one of {', '.join(get_args(ScaleDtype))}, got {scale_dtype!r}; try 'float16'")


def round_scale(scale: Tensor, scale_dtype: str, unit: float) -> Tensor:
    """Return scales of a dtype; NaN and infinity stay as they are.

    What is beyond the largest value becomes that one.

    Args:
        scale: float32, of any sign.
        scale_dtype: The name of the dtype.
        unit: A power of two. Scales of float16 are ``unit`` times a value of it; bfloat16 has the range of float32 and
            needs no unit.
    """
    if scale_dtype == "float32":
        return scale
    dtype, unit = _DTYPES[scale_dtype], unit if scale_dtype == "float16" else 1.0
    most = torch.finfo(dtype).max
    nearest = (scale / unit).to(dtype).float().clamp(-most, most) * unit + 0.0  # no negative zero
    return torch.where(scale.isfinite(), nearest, scale)


def rounding_code(scale_dtype: str, unit: float = 1.0) -> int:
    """Return the rounding as a number for kernels: 0 for none, -1 for bfloat16, 1 + log2(unit) for float16."""
    if scale_dtype == "float32":
        return 0
    return -1 if scale_dtype == "bfloat16" else int(unit).bit_length()


def finds_scale_again(levels: tuple[float, ...], thresholds: Tensor) -> bool:
    """Tell whether the largest element of a block, relative to the nearest bfloat16, always is the end of a codebook.

    Then decoding gives the scale itself, which encoding again finds.
    """
    least = _LARGEST_IS_AT_LEAST * (1 - 2.0**-22)  # less the roundings of the reciprocal and of the product
    upper = levels[-1] < 1 or float(thresholds[-1]) < least
    return upper and (levels[0] > -1 or float(thresholds[0]) >= -least)


def round_bounds(bounds: Tensor, scale_dtype: str) -> Tensor:
    """Return bounds of the log codec in a dtype: the nearest values inside of the block.

    Where there is no value between the bounds, both become the one below them, or the smallest number above zero.

    Args:
        bounds: ``[blocks, 2]`` float32, finite and not negative, the lower one first; 0 and 0 for no bounds.
        scale_dtype: ``"float32"`` or ``"bfloat16"``.
    """
    if scale_dtype == "float32":
        return bounds
    low, high = bounds.contiguous().view(torch.int32).unbind(dim=1)
    high = torch.where(high > 0, (high & _UPPER).clamp(min=_SMALLEST), 0)
    low = torch.minimum((low + _LOWER) & _UPPER, high)
    return torch.stack([low, high], dim=1).view(torch.float32)


def stored_dtype(scale_dtype: str) -> torch.dtype:
    """Return the dtype in which scales lie in memory. Those of float16 need their unit and stay float32."""
    return torch.bfloat16 if scale_dtype == "bfloat16" else torch.float32


def narrow(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales, float32 with values of a dtype, in that dtype, float32 or bfloat16."""
    if dtype == torch.float32:
        return scales
    return (scales.contiguous().view(torch.int32) >> 16).to(torch.int16).view(dtype)


def widen(scales: Tensor) -> Tensor:
    """Undo :func:`narrow`."""
    if scales.dtype == torch.float32:
        return scales
    return (scales.contiguous().view(torch.int16).to(torch.int32) << 16).view(torch.float32)
