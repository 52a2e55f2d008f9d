"""Small tensors, stored together: by itself each would take the file some two hundred bytes beside its own.

They are what no policy quantizes: biases and norms, their moments, steps, statistics. In the file those of one dtype
and location are one tensor, and the pickle has little more than a number for each; by itself each would take torch's
unpickler, which is Python, a tenth of a millisecond. Loaded, each has memory of its own, as it had when it was saved.
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
"""Bytes, at most: a float32 tensor that is too small to be quantized."""


class SmallTensors:
    """Copies of the small tensors on the host in the containers of a checkpoint.

    Not of those that share memory with another one in the containers, nor of those that are more than their values.

    Args:
        leaves: What the containers hold; of it, the tensors.
        fewer_than: Leave out tensors of so many elements or more.
        location: Where a storage loads to.

    Attributes:
        tags: Where each storage of copies is to load to, by its address.
        originals: The addresses of what was copied. Whatever else is saved must have none of them: it would not share
            the memory any more when it is loaded.
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
        """Return what a small tensor pickles as; what a pickler's ``reducer_override`` wants for anything else."""
        place = self._places.get(id(value))
        return NotImplemented if place is None else (rebuild_v1, (ITEM, *place))


class _Pool:
    """Tensors of one dtype and location in one, and what :func:`rebuild_v1` needs to know of each."""

    def __init__(self, members: list[Tensor]) -> None:
        self.data = torch.cat([in_memory_order(tensor) for tensor in members])
        # One object for equal tuples: the pickle then has the number of the first.
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
