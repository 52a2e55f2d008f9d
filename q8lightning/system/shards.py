"""Distributed tensors (``DTensor``), of which each process holds a part, and modules that gather them (FSDP2).

Nothing is imported for that: where the packages are not imported, there are none.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    cls = _class("torch.distributed.tensor", "DTensor")
    return cls is not None and isinstance(tensor, cls)


def local_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the memory where it lies; the tensor if it is an ordinary one."""
    if not is_distributed(tensor):
        return tensor
    distributed: Any = tensor
    with torch.no_grad():  # otherwise it would be a view that autograd knows
        return distributed.to_local()  # type: ignore[no-any-return]


def like_whole(local: Tensor, whole: Tensor) -> Tensor:
    """Return a distributed tensor that is distributed as ``whole`` is, of which this process holds ``local``."""
    distributed: Any = whole
    return type(distributed).from_local(  # type: ignore[no-any-return]
        local,
        distributed.device_mesh,
        distributed.placements,
        run_check=False,
        shape=distributed.shape,
        stride=distributed.stride(),
    )


def reads_from_the_host(tensor: Tensor) -> bool:
    """Whether a distributed tensor lies in the host's memory, and a device reads it there (CPU offload)."""
    distributed: Any = tensor
    on_host = local_of(tensor).device.type == "cpu"
    return is_distributed(tensor) and on_host and distributed.device_mesh.device_type != "cpu"


def gathering_modules(module: nn.Module) -> list[Any]:
    """Return the modules that gather their parameters for the time that they run, as ``fully_shard`` makes them."""
    cls = _class("torch.distributed.fsdp", "FSDPModule")
    return [] if cls is None else [each for each in module.modules() if isinstance(each, cls)]


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
