"""Refuse tensors that a codec cannot hold: values not finite, values without a code, or too coarse a dtype."""

import torch
from torch import Tensor

from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.spec.reference import SMALLEST_NORMAL


def is_held_if_finite(dtype: torch.dtype, codec: Codec) -> bool:
    """Whether finite scales show that the codec holds a tensor of this dtype, without a look at its values."""
    misread = codec.unsigned and not codec.marks_negative
    return not misread and dtype != torch.float64 and codec.is_stable_in(dtype)


def reason_to_refuse(tensor: Tensor, payload: QuantizedTensor, is_finite: bool) -> str | None:
    """Return why the payload must not replace the tensor, None if it may; waits for the device.

    Args:
        tensor: The original.
        payload: What it was encoded to.
        is_finite: Whether the payload's scales are finite.
    """
    codec = payload.codec
    if not is_finite:
        if not bool(tensor.isfinite().all()):
            return "it holds NaN or infinity"
        negative = codec.marks_negative and bool((tensor < 0).any())
        return "it holds a negative value" if negative else "its values exceed the range of float32"
    if codec.unsigned and not codec.marks_negative and bool((tensor < 0).any()):
        return f"it holds a negative value, which {codec.label} has no code for"
    if tensor.dtype == torch.float64 and bool(_vanished(tensor, payload).any()):
        return "it holds nonzero values that are zero in float32"
    if not codec.is_stable_in(tensor.dtype):  # a 16-bit float can be too coarse for the finest levels
        again = QuantizedTensor.encode(payload.decode(), codec, payload.name)
        if not torch.equal(payload.data, again.data):
            return f"{tensor.dtype} is too coarse for {codec.label} at its magnitude"
    return None


def _vanished(tensor: Tensor, payload: QuantizedTensor) -> Tensor:
    """Tell which nonzero elements became zero because of their magnitude, not because zero is the nearest level."""
    gone = (payload.decode() == 0) & (tensor != 0)
    return gone if payload.codec.keeps_nonzero else gone & (tensor.abs() < SMALLEST_NORMAL)
