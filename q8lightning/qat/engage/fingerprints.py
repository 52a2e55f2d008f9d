"""Sums over the bits of engaged weights, to find writes that torch does not count."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that are as wide as floats of so many bytes."""


class Fingerprints:
    """The sums of engaged weights, to compare them when the weights are released.

    Args:
        places: The group of each weight and its index there, by the identity of the weight.
    """

    def __init__(self, places: Mapping[int, tuple[FakeQuantizeGroup, int]]) -> None:
        self.compare_all = False
        """Whether all weights are compared; otherwise only those whose memory was handed out."""
        self._places = places
        self._sums: dict[int, Tensor] = {}

    def __contains__(self, weight: object) -> bool:
        return weight in self._sums

    def record(self, weights: Iterable[int]) -> None:
        """Compute the sums of weights, given by their identity, and keep them."""
        for weight in weights:
            self._sums[weight] = self._sum(weight)

    def changed(self) -> list[int]:
        """Return the weights whose sum has changed.

        A weight whose master was written to is left out: its quantized values are out of date.
        """
        compared = [weight for weight in self._sums if not self._is_written(weight)]
        return [weight for weight in compared if bool(self._sums[weight] != self._sum(weight))]

    def clear(self) -> None:
        """Forget all sums."""
        self._sums = {}

    def _is_written(self, weight: int) -> bool:
        group, index = self._places[weight]
        return index in group.written

    def _sum(self, weight: int) -> Tensor:
        group, index = self._places[weight]
        tensor = group.shown(index)
        return tensor.view(INTEGERS[tensor.element_size()]).sum()
