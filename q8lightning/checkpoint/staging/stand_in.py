"""Freeze objects that training may change, as they would be pickled now.

A deep copy needs an object that can be copied, and its ``__deepcopy__`` may share parts. What pickle asks an object for
is exactly what ``torch.save`` would write now. Kept until the file is written, it gives the same bytes.
"""

import copyreg
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch.serialization import DEFAULT_PROTOCOL

_NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType)
"""Types of objects that pickle as their names."""


class StandIn:
    """Pickles as an object did when :func:`freeze` was called."""

    __slots__ = ("_reduced",)

    _reduced: list[Any]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pickle compares it with the class that it names
        function, arguments = self._reduced[:2]
        makes_anew = function in (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined]
        return arguments[0] if makes_anew else StandIn

    def __call__(self) -> None:
        """Do nothing; it is here because pickle calls only what is callable."""

    def take(self, parts: list[Any]) -> None:
        """Set the parts: what ``__reduce_ex__`` returned, with lists in place of iterators."""
        self._reduced = parts

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        function, arguments, state, items, pairs, *setter = self._reduced
        return (
            *(function, arguments, state),
            *(None if items is None else iter(items), None if pairs is None else iter(pairs)),
            *setter,
        )


def freeze(value: Any) -> tuple[StandIn, list[Any]] | None:
    """Return a stand-in for an object, and the parts that it takes when they are copied; None if it pickles as a name.

    Raises:
        Exception: What the object raises when it is pickled.
    """
    if isinstance(value, _NAMED):
        return None
    reduce = copyreg.dispatch_table.get(type(value))
    reduced = value.__reduce_ex__(DEFAULT_PROTOCOL) if reduce is None else reduce(value)
    if isinstance(reduced, str):
        return None
    function, arguments, state, items, pairs, *setter = (*reduced, None, None, None)[: max(5, len(reduced))]
    parts = [
        *(function, arguments, state),
        *(None if items is None else list(items), None if pairs is None else list(pairs)),
        *setter,
    ]
    return StandIn(), parts
