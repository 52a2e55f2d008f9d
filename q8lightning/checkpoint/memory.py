"""Tell how a tensor lies in memory."""

import torch
from torch import Tensor, nn


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a view of one memory: no subclass, and not sparse, nested or on meta."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
    )


def is_ordinary(tensor: Tensor) -> bool:
    """Whether its memory, shape and strides are all there is to a tensor; it has no attributes either."""
    return (
        has_memory(tensor) and not (tensor.is_quantized or tensor.is_neg() or tensor.is_conj()) and not tensor.__dict__
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each element once, in any order of dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise ValueError if the elements of a tensor overlap or leave gaps in memory."""
    if not is_dense(tensor):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense in memory;"
            " encode tensor.contiguous()"
        )


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order in which they lie in memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
