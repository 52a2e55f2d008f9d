"""Round the scales of blocks to the dtype in which a target stores them.

The nearest value is taken, as the quantizers of the targets do. To round up would keep every element within the levels,
but costs more: with bfloat16 scales and 8-bit codes, an error of weights that is 0.4 to 1.3% larger instead of 0.03 to
0.8%, and the largest element of a block may then no longer be the end of the codebook, so that encoding again moves a
quarter of the scales. The nearest value moves none, except for scales below the smallest normal number of float16
(6.1e-5), which has few bits there.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

ScaleDtype = Literal["float32", "float16", "bfloat16"]
"""The dtypes of scales, by their names."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_scale_dtype(scale_dtype: str) -> None:
    """Raise ValueError for the name of another dtype."""
    if scale_dtype not in get_args(ScaleDtype):
        raise ValueError(f"scale_dtype is one of {', '.join(get_args(ScaleDtype))}, got {scale_dtype!r}; try 'float16'")


def round_scale(scale: Tensor, scale_dtype: str, unit: float) -> Tensor:
    """Return scales that are ``unit`` times a value of the dtype; NaN and infinity stay as they are.

    What is beyond the largest value becomes that one.

    Args:
        scale: float32, of any sign.
        scale_dtype: The name of the dtype.
        unit: A power of two.
    """
    if scale_dtype == "float32":
        return scale
    dtype = _DTYPES[scale_dtype]
    most = torch.finfo(dtype).max
    nearest = (scale / unit).to(dtype).float().clamp(-most, most) * unit + 0.0  # no negative zero
    return torch.where(scale.isfinite(), nearest, scale)


def rounding_code(scale_dtype: str, unit: float) -> int:
    """Return the rounding as a number for kernels: 0 for none, -1 for bfloat16, 1 + log2(unit) for float16."""
    if scale_dtype == "float32":
        return 0
    return -1 if scale_dtype == "bfloat16" else int(unit).bit_length()
