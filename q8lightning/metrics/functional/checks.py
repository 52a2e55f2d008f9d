"""Check arguments of metrics by shape and dtype only, so that nothing waits for a GPU."""

import torch
from torch import Tensor


def check_floats(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are real floats of one shape."""
    names = " and ".join(tensors)
    dtypes = [tensor.dtype for tensor in tensors.values()]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"{names} must be real floats, got {', '.join(map(str, dtypes))}; convert them first")
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"{names} must have one shape, got {', '.join(map(str, shapes))}; pass an original with its own decoding"
        )


def check_sums(sums: Tensor, length: int, name: str) -> None:
    """Raise ValueError unless ``sums`` is ``[..., length]`` float64."""
    if sums.dtype != torch.float64 or sums.ndim == 0 or sums.shape[-1] != length:
        raise ValueError(
            f"{name} must be float64 of shape [..., {length}], got {sums.dtype} of shape {list(sums.shape)};"
            f" pass them as they were returned, stacked along the first dimensions"
        )
