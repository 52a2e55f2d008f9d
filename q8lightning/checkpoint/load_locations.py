"""Where copies in host memory load to: to where the tensors were of which they are copies."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

_TAGS: ContextVar[Mapping[int, str]] = ContextVar("tags", default=MappingProxyType({}))
"""Where tensors were whose copies on the host are being saved, by the address of the copy."""


@contextmanager
def located(tags: Mapping[int, str]) -> Iterator[None]:
    """Within this context, storages on the host are saved with another location, such as ``cuda:0``.

    Args:
        tags: The locations by the storages' addresses; added to those of contexts around this one.
    """
    token = _TAGS.set({**_TAGS.get(), **tags})
    try:
        yield
    finally:
        _TAGS.reset(token)


def _tag(storage: Any) -> str | None:
    return _TAGS.get().get(storage.data_ptr()) if storage.device.type == "cpu" else None


# Before torch's own, which begin at 10. It has no say in where a file is loaded to.
torch.serialization.register_package(7, _tag, lambda storage, location: None)
