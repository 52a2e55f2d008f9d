"""Tell whose memory a tensor lies in: a master's, a quantized weight's, or another parameter's."""

from collections.abc import Iterable

from torch import Tensor, nn

from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.qat.writes.operators import storage_of


class StorageOwners:
    """The storages of a model's parameters, looked up again whenever one may have got another.

    Args:
        quantizer: Has the model.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self.moved = True
        """Whether a master may have got another storage."""
        self._quantizer = quantizer
        self._generation = -1
        self._masters: dict[int, list[int]] = {}
        self._shown: dict[int, list[tuple[int, int, int]]] = {}
        self._others: set[int] = set()

    def masters_in(self, tensors: Iterable[Tensor]) -> list[int]:
        """Return the weights whose masters share memory with tensors that are not weights themselves."""
        self._look_up()
        others = (each for each in tensors if id(each) not in self._quantizer.places)
        return [weight for each in others for weight in self._masters.get(storage_of(each), ())]

    def shown_in(self, tensors: Iterable[Tensor]) -> list[int]:
        """Return the weights whose quantized values share memory with tensors."""
        if self._generation != self._quantizer.generation:
            self._look_up()
        return [
            weight
            for each in tensors
            for weight, begin, end in self._shown.get(storage_of(each), ())
            if begin <= each.data_ptr() < end
        ]

    def is_other_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter that is not quantized, or lies in its memory."""
        self._look_up()
        return isinstance(tensor, nn.Parameter) or storage_of(tensor) in self._others

    def _look_up(self) -> None:
        """Look up all storages, unless nothing can have changed."""
        quantizer = self._quantizer
        if self._generation == quantizer.generation and not self.moved:
            return
        self._generation, self.moved = quantizer.generation, False
        self._masters, self._shown = {}, {}
        for weight, (group, index) in quantizer.places.items():
            if group.engaged:
                shown = group.tensors[index]
                where = weight, shown.data_ptr(), shown.data_ptr() + shown.nbytes
                self._masters.setdefault(storage_of(group.masters[index]), []).append(weight)
                self._shown.setdefault(storage_of(shown), []).append(where)
        others = (each for each in quantizer.module.parameters() if id(each) not in quantizer.places)
        self._others = {storage_of(each) for each in others} - {*self._masters, *self._shown, 0}
