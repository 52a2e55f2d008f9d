"""Encode several tensors at once into one memory."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from q8lightning.checkpoint.memory import check_dense, in_memory_order
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import encode_many


class Encoding(NamedTuple):
    """Payloads, and what was measured of them on their device; reading that waits for the device.

    Attributes:
        payloads: One for each tensor.
        failed: ``[tensors]`` int32, 1 where the codec cannot hold the tensor (NaN, infinity; a negative value under
            ``log``). Such a payload decodes to values that are not finite.
        statistics: ``[tensors, 5]`` float64, what each tensor lost; None if that was not measured. See
            :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`.
    """

    payloads: list[QuantizedTensor]
    failed: Tensor
    statistics: Tensor | None


def encode_tensors(items: Sequence[tuple[Tensor, Codec, str]], measure: bool = False) -> Encoding:
    """Encode dense float tensors of one device; the tensors stay as they are.

    Args:
        items: Tensors, each with its codec and its path; at least one.
        measure: Whether to measure what is lost.

    Raises:
        ValueError: If the elements of a tensor overlap or leave gaps in memory.
    """
    for tensor, _, name in items:
        check_dense(tensor, name)
    packed = encode_many([in_memory_order(tensor) for tensor, _, _ in items], [codec for _, codec, _ in items], measure)
    payloads = [
        QuantizedTensor(codec, data, tuple(tensor.shape), tensor.stride(), tensor.dtype, name)
        for (tensor, codec, name), data in zip(items, packed.data, strict=True)
    ]
    return Encoding(payloads, packed.failed, packed.statistics)
