"""Sums over the bits of weights, which tell whether somebody wrote to their memory behind torch's back."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprints:
    """What engaged weights looked like when they were last written.

    Args:
        places: The group of each weight and its index there, by the identity of the weight.
    """

    def __init__(self, places: Mapping[int, tuple[FakeQuantizeGroup, int]]) -> None:
        self.of_all = False
        """Whether all weights are compared when they are released, or only those that somebody asks for."""
        self._places = places
        self._taken: dict[int, Tensor] = {}

    def __contains__(self, weight: object) -> bool:
        return weight in self._taken

    def take(self, weights: Iterable[int]) -> None:
        """Take down what weights look like now."""
        for weight in weights:
            self._taken[weight] = self._sum(weight)

    def altered(self) -> list[int]:
        """Return the weights that look different now, aside from those whose masters were written to."""
        known = [weight for weight in self._taken if not self._is_written(weight)]
        return [weight for weight in known if bool(self._taken[weight] != self._sum(weight))]

    def forget(self) -> None:
        """Forget everything that was taken down."""
        self._taken = {}

    def _is_written(self, weight: int) -> bool:
        group, index = self._places[weight]
        return index in group.written

    def _sum(self, weight: int) -> Tensor:
        group, index = self._places[weight]
        tensor = group.tensors[index].detach()
        return tensor.view(INTEGERS[tensor.element_size()]).sum()
