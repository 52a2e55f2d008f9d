"""Check the tensors that users give to the public functions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensor(x: Any, name: str) -> None:
    """Raise ValueError if ``x`` is no tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got the layout {x.layout}; convert it with to_dense()")


def check_float(x: Tensor, name: str) -> None:
    """Raise ValueError if ``x`` is no tensor of a dtype that can be encoded."""
    check_tensor(x, name)
    check_float_dtype(x.dtype, name)


def check_float_dtype(dtype: Any, name: str) -> None:
    """Raise ValueError if ``dtype`` is none that can be encoded."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the dtype of {name} is a torch.dtype, got {dtype!r}; pass such as torch.float32")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype}; convert it first")


def check_codes(codes: Tensor, encoder: str) -> None:
    """Raise ValueError if ``codes`` are not what ``encoder``, a public function, returns."""
    check_tensor(codes, "codes")
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}; pass what {encoder} returned")


def check_buffer(buffer: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError if ``buffer`` is no tensor of this shape and dtype on this device."""
    check_tensor(buffer, name)
    if tuple(buffer.shape) != tuple(shape) or buffer.dtype != dtype or buffer.device != device:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on {device},"
            f" got {buffer.dtype} of shape {list(buffer.shape)} on {buffer.device}; pass such a tensor, or leave it out"
        )


def result_dtype(dtype: torch.dtype | None, out: Tensor | None, function: str) -> torch.dtype:
    """Return the dtype of the values that ``function`` decodes, of ``out`` if no other is given.

    Raises:
        ValueError: If neither is given, or values cannot have that dtype.
    """
    if out is not None:
        check_tensor(out, "out")
        dtype = out.dtype if dtype is None else dtype
    if dtype is None:
        raise ValueError(f"{function} needs a dtype or an out tensor, got neither; pass dtype=torch.float32")
    check_float_dtype(dtype, "the result")
    return dtype
