"""Keep the shadows of tensors, and know which memory is tainted by quantized values."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.qat.writes.operators import mapped, storage_of
from q8lightning.qat.writes.storage_owners import StorageOwners


@dataclass(frozen=True)
class _Shadow:
    """The value that a tensor would have if weights held their masters.

    Attributes:
        of: The tensor.
        value: Its value computed from masters.
        weight: The identity of the weight that the tensor is a view of; None if it is a view of none.
    """

    of: weakref.ref[Any]
    value: Tensor
    weight: int | None


class Shadows:
    """The shadows of the tensors of a run, each as long as its tensor lives.

    Args:
        quantizer: Has the weights. The shadow of an engaged weight is its master.
        owners: Knows what memory belongs to weights.
    """

    def __init__(self, quantizer: FakeQuantizer, owners: StorageOwners) -> None:
        self._quantizer = quantizer
        self._owners = owners
        self._shadows: dict[int, _Shadow] = {}
        self.tainted: dict[int, weakref.ref[Any]] = {}
        """Storages, by address, with values that were computed from quantized values and have no shadow."""

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return the shadow of a tensor, None if it has none."""
        place = self._quantizer.places.get(id(tensor))
        if place is not None:
            group, index = place
            return group.masters[index] if group.engaged else None
        shadow = self._shadows.get(id(tensor))
        return shadow.value if shadow is not None and shadow.of() is tensor else None

    def weight(self, tensor: Tensor) -> int | None:
        """Return the identity of the weight that a tensor is or is a view of, None if there is none."""
        if id(tensor) in self._quantizer.places:
            return id(tensor)
        shadow = self._shadows.get(id(tensor))
        if shadow is None or shadow.of() is not tensor or shadow.weight not in self._quantizer.places:
            return None
        return shadow.weight

    def swap(self, arguments: Any) -> Any:
        """Return arguments in which tensors are replaced by their shadows, where they have one."""
        return mapped(arguments, lambda each: each if (shadow := self.value(each)) is None else shadow)

    def pair(self, result: Any, shadow: Any, tensors: list[Tensor]) -> None:
        """Make one result the shadow of another.

        Args:
            result: What an operator returned: a tensor, or a list or tuple of tensors.
            shadow: What it returned for the shadows of its arguments.
            tensors: The tensors among its arguments.
        """
        if isinstance(result, Tensor) and isinstance(shadow, Tensor):
            if self.value(result) is None and not any(result is each for each in tensors):
                shares = {self.weight(each) for each in tensors if storage_of(each) == storage_of(result)} - {None}
                if len(shares) > 1:
                    self.taint([result])
                    return
                weight = next(iter(shares), None)
                reference = _reference(result, self._shadows, id(result))
                self._shadows[id(result)] = _Shadow(reference, shadow, weight)
                if weight is None:
                    self.taint([result])  # other tensors over this memory have no shadow
        elif isinstance(result, list | tuple) and isinstance(shadow, list | tuple):
            for one, other in zip(result, shadow, strict=False):
                self.pair(one, other, tensors)

    def taint(self, tensors: Iterable[Tensor]) -> None:
        """Note that the memory of tensors holds values that were computed from quantized values."""
        for tensor in tensors:
            if storage_of(tensor) and not self._owners.shown_in([tensor]):
                storage = tensor.untyped_storage()
                self.tainted[storage.data_ptr()] = _reference(storage, self.tainted, storage.data_ptr())

    def is_tainted(self, tensor: Tensor) -> bool:
        """Tell whether a tensor may hold values that were computed from quantized values, and has no shadow."""
        if not self.tainted or self.value(tensor) is not None:
            return False
        return storage_of(tensor) in self.tainted


def _reference(value: Any, among: dict[int, Any], key: int) -> weakref.ref[Any]:
    """Return a weak reference that removes ``among[key]`` when its object goes."""
    return weakref.ref(value, lambda _: among.pop(key, None))
