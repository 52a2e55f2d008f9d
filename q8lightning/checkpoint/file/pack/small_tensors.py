"""Store small tensors together.

They are what no policy quantizes: biases and norms, their moments, steps, statistics. Alone, each would add some two
hundred bytes to the file, and a tenth of a millisecond to each load, since torch's unpickler is Python. Together, those
of one dtype and location are one tensor, and the pickle has a number for each. Loaded, each has memory of its own, as
it had when it was saved.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from q8lightning.checkpoint.memory import has_memory, in_memory_order, is_dense, is_ordinary
from q8lightning.checkpoint.payload import ITEM, TENSORS, rebuild_v1

SMALL = 2**14
"""Bytes that a small tensor has at most: the largest float32 tensor that no policy quantizes."""


class SmallTensors:
    """Copies of the small host tensors of a checkpoint, stored together.

    Tensors that share memory with another one are left out, and tensors that are more than their values.

    Args:
        leaves: The leaves of the checkpoint.
        fewer_than: Leave out tensors of so many elements or more.
        location: Returns where a storage loads to.

    Attributes:
        tags: The location to which each storage of copies loads, by its address.
        originals: Addresses of what was copied. If anything else that is saved has one of them, the two would no longer
            share memory when they are loaded.
    """

    def __init__(
        self,
        leaves: Iterable[Any],
        fewer_than: float = math.inf,
        location: Callable[[UntypedStorage], str] = torch.serialization.location_tag,
    ) -> None:
        tensors = {id(x): x for x in leaves if isinstance(x, Tensor) and has_memory(x) and x.device.type == "cpu"}
        used = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
        pools: dict[tuple[torch.dtype, str], list[Tensor]] = {}
        for tensor in tensors.values():
            if _is_small(tensor) and tensor.numel() < fewer_than and used[tensor.data_ptr()] == 1:
                pools.setdefault((tensor.dtype, location(tensor.untyped_storage())), []).append(tensor)
        self.tags: dict[int, str] = {}
        self.originals: set[int] = set()
        self._places: dict[int, tuple[_Pool, int]] = {}
        for (_, tag), members in pools.items():
            pool = _Pool(members)
            self.tags[pool.data.data_ptr()] = tag
            self.originals.update(tensor.data_ptr() for tensor in members)
            self._places.update({id(tensor): (pool, number) for number, tensor in enumerate(members)})

    def reduce(self, value: Any) -> Any:
        """Return what a small tensor pickles as; for anything else ``NotImplemented``, as ``reducer_override`` does."""
        place = self._places.get(id(value))
        return NotImplemented if place is None else (rebuild_v1, (ITEM, *place))


class _Pool:
    """The tensors of one dtype and location in one, with the shape and strides of each."""

    def __init__(self, members: list[Tensor]) -> None:
        self.data = torch.cat([in_memory_order(tensor) for tensor in members])
        # One object for equal tuples, which the pickle then has once.
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._shapes = [known.setdefault(shape, shape) for shape in (tuple(each.shape) for each in members)]
        self._strides = [
            None if each.is_contiguous() else known.setdefault(stride, stride)
            for each, stride in ((each, each.stride()) for each in members)
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_v1, (TENSORS, self.data, self._shapes, self._strides)


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor is small, has a storage to itself, and is nothing but its values."""
    return (
        type(tensor) is Tensor
        and 0 < tensor.nbytes <= SMALL
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and is_ordinary(tensor)
        and is_dense(tensor)
        and not tensor.requires_grad
    )
