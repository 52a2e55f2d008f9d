"""Save copies in host memory so that they load to the devices of the originals."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

_TAGS: ContextVar[Mapping[int, str]] = ContextVar("tags", default=MappingProxyType({}))
"""The locations of the originals, by the addresses of the copies that are being saved."""


@contextmanager
def located(tags: Mapping[int, str]) -> Iterator[None]:
    """Within this context, save storages of the host with another location, such as ``cuda:0``.

    Args:
        tags: Locations by the storages' addresses. Those of contexts around this one stay.
    """
    token = _TAGS.set({**_TAGS.get(), **tags})
    try:
        yield
    finally:
        _TAGS.reset(token)


def _tag(storage: Any) -> str | None:
    return _TAGS.get().get(storage.data_ptr()) if storage.device.type == "cpu" else None


# Torch asks it before its own functions, whose priorities begin at 10. Loading does not use it.
torch.serialization.register_package(7, _tag, lambda storage, location: None)
