"""Put something in the place of a method of one object, without following the object's copies."""

from collections.abc import Callable
from typing import Any


class StandIn:
    """Stands in for a method of one object. It is copied and pickled as the method alone.

    Args:
        method: The method.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.method,)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method
