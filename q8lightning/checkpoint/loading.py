"""Decide what loading a checkpoint returns: decoded tensors, or payloads that stay encoded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_ENCODED: ContextVar[list[Any] | None] = ContextVar("encoded", default=None)
_WATCHER: ContextVar["Callable[[Tensor, Tensor], None] | None"] = ContextVar("watcher", default=None)


@contextmanager
def keep_encoded() -> Iterator[None]:
    """Within this context, loading a checkpoint returns :class:`QuantizedTensor` objects instead of decoded tensors.

    ``torch.save`` can save them again, and they take no more room than before.

    Example:
        >>> with keep_encoded():  # doctest: +SKIP
        ...     checkpoint = torch.load("last.ckpt", weights_only=True)
        >>> checkpoint["state_dict"]["head.weight"].decode()  # doctest: +SKIP
    """
    with collect_encoded():
        yield


@contextmanager
def collect_encoded() -> Iterator[list[Any]]:
    """Keep payloads encoded as :func:`keep_encoded` does; give the list that each loaded payload is added to."""
    encoded: list[Any] = []
    token = _ENCODED.set(encoded)
    try:
        yield encoded
    finally:
        _ENCODED.reset(token)


def kept_encoded() -> list[Any] | None:
    """Return the list for payloads that stay encoded; None where they are decoded at once."""
    return _ENCODED.get()


def stays_encoded() -> bool:
    """Whether payloads that are loaded now stay encoded."""
    return _ENCODED.get() is not None


@contextmanager
def watch_apart(watch: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Within this context, call ``watch(part, tensor)`` for each tensor that was stored together with others.

    ``part`` is its stretch of the stored memory, ``tensor`` the copy that loading returns.
    """
    token = _WATCHER.set(watch)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def watcher() -> Callable[[Tensor, Tensor], None] | None:
    """Return what :func:`watch_apart` was given; None outside of it."""
    return _WATCHER.get()
