"""Remember which tensors have shadows, and whose memory has something of quantized values in it."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from q8lightning.qat.fake_quantizer import FakeQuantizer
from q8lightning.qat.writes.operators import mapped, storage_of
from q8lightning.qat.writes.storage_owners import StorageOwners


@dataclass(frozen=True)
class _Shadow:
    """The value that a tensor would have if weights held their masters.

    Attributes:
        of: The tensor.
        value: What it would be.
        weight: The identity of the weight whose memory the tensor looks at; None for a tensor of its own.
    """

    of: weakref.ref[Any]
    value: Tensor
    weight: int | None


class Shadows:
    """The shadows of the tensors of a run, for as long as these live.

    Args:
        quantizer: Whose weights; the shadow of an engaged one is its master.
        owners: Whose memory tensors look at.
    """

    def __init__(self, quantizer: FakeQuantizer, owners: StorageOwners) -> None:
        self._quantizer = quantizer
        self._owners = owners
        self._shadows: dict[int, _Shadow] = {}
        self.spoiled: dict[int, weakref.ref[Any]] = {}
        """Storages, by address, in which there is something of quantized values that has no shadow."""

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return the shadow of a tensor, which of a weight is its master; None if it has none."""
        place = self._quantizer.places.get(id(tensor))
        if place is not None:
            group, index = place
            return group.masters[index] if group.engaged else None
        shadow = self._shadows.get(id(tensor))
        return shadow.value if shadow is not None and shadow.of() is tensor else None

    def weight(self, tensor: Tensor) -> int | None:
        """Return the weight that a tensor is, or whose memory it looks at."""
        if id(tensor) in self._quantizer.places:
            return id(tensor)
        shadow = self._shadows.get(id(tensor))
        if shadow is None or shadow.of() is not tensor or shadow.weight not in self._quantizer.places:
            return None
        return shadow.weight

    def swap(self, arguments: Any) -> Any:
        """Return arguments with shadows for the tensors that have one."""
        return mapped(arguments, lambda each: each if (shadow := self.value(each)) is None else shadow)

    def pair(self, result: Any, shadow: Any, tensors: list[Tensor]) -> None:
        """Remember what was computed with shadows as the shadow of what was computed without.

        Args:
            result: A tensor, or a list or tuple of some.
            shadow: The same of shadows.
            tensors: What both were computed from.
        """
        if isinstance(result, Tensor) and isinstance(shadow, Tensor):
            if self.value(result) is None and not any(result is each for each in tensors):
                shares = {self.weight(each) for each in tensors if storage_of(each) == storage_of(result)} - {None}
                if len(shares) > 1:
                    self.spoil([result])
                    return
                weight = next(iter(shares), None)
                reference = _reference(result, self._shadows, id(result))
                self._shadows[id(result)] = _Shadow(reference, shadow, weight)
                if weight is None:
                    self.spoil([result])  # those that share its memory without being known
        elif isinstance(result, list | tuple) and isinstance(shadow, list | tuple):
            for one, other in zip(result, shadow, strict=False):
                self.pair(one, other, tensors)

    def spoil(self, tensors: Iterable[Tensor]) -> None:
        """Remember that there is something in a tensor's memory that came from quantized values."""
        for tensor in tensors:
            if storage_of(tensor) and not self._owners.shown_in([tensor]):
                storage = tensor.untyped_storage()
                self.spoiled[storage.data_ptr()] = _reference(storage, self.spoiled, storage.data_ptr())

    def is_spoiled(self, tensor: Tensor) -> bool:
        """Tell whether a tensor without a shadow may hold something of quantized values."""
        if not self.spoiled or self.value(tensor) is not None:
            return False
        return storage_of(tensor) in self.spoiled


def _reference(value: Any, among: dict[int, Any], key: int) -> weakref.ref[Any]:
    """Return a reference that takes the entry away when its object goes."""
    return weakref.ref(value, lambda _: among.pop(key, None))
