"""Keep the tensors of a save, and copies of those that it needs after training has changed them."""

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from q8lightning.checkpoint.memory import in_memory_order
from q8lightning.checkpoint.staging.transfer import HostMemory, aligned, take

_VERSION = attrgetter("_version")


class Originals:
    """The tensors of a save, by their numbers in its outline, each as it was when the save began.

    Args:
        tensors: The checkpoint's. They are kept, because a tensor that is freed could be followed by another one at the
            same address.

    Attributes:
        tensors: The same, which training may have changed.
        values: The copies, and the tensors themselves where there is no copy.
        copied: The numbers of those that were copied.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.values = list(tensors)
        self.copied: set[int] = set()
        self._versions = _versions_of(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors have the values of the originals; False if that is not known."""
        return self._versions is not None and self._versions == _versions_of(tensors)

    def copy_to_host(self, numbers: Iterable[int], memory: HostMemory | None) -> None:
        """Copy tensors of the CPU into one stretch of memory.

        Args:
            numbers: Which tensors.
            memory: Where they go; None for new memory.
        """
        wanted = sorted(numbers)
        if not wanted:
            return
        tensors = [in_memory_order(self.tensors[i]) for i in wanted]
        sizes = [aligned(each.nbytes) for each in tensors]
        space = take(sum(sizes), memory)
        copies = [
            part[: each.nbytes].view(each.dtype) for part, each in zip(torch.split(space, sizes), tensors, strict=True)
        ]
        torch._foreach_copy_(copies, tensors)
        self._set(wanted, copies)

    def copy(self, numbers: Iterable[int]) -> None:
        """Copy tensors within their devices, those of one dtype at once."""
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in sorted(numbers):
            alike.setdefault((self.tensors[i].device, self.tensors[i].dtype), []).append(i)
        for group in alike.values():
            tensors = [in_memory_order(self.tensors[i]) for i in group]
            self._set(group, torch.split(torch.cat(tensors), [each.numel() for each in tensors]))

    def copy_late(self, numbers: Sequence[int]) -> set[int]:
        """Copy tensors after the save began; return the numbers of those that were written to in the meantime."""
        self._set(numbers, [in_memory_order(self.tensors[i]).clone() for i in numbers])
        now, before = _versions_of(self.tensors), self._versions
        return set() if now is None or before is None else {i for i in numbers if now[i] != before[i]}

    def release_copies(self) -> None:
        """Let go of the copies; none is needed any more."""
        self.values.clear()

    def _set(self, numbers: Sequence[int], copies: Sequence[Tensor]) -> None:
        for i, copy in zip(numbers, copies, strict=True):
            tensor = self.tensors[i]
            self.values[i] = copy.as_strided(tensor.shape, tensor.stride())
        self.copied.update(numbers)


def _versions_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """Return how often each tensor was written to; None if one does not count that (inference tensors)."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return None
