"""Find what a dotted name stands for, and whether something has an attribute without making one of it."""

import importlib
from collections.abc import Iterator, Mapping
from dis import get_instructions as dis
from inspect import signature, unwrap
from types import CodeType, FunctionType
from typing import Any


def find(dotted: str) -> Any:
    """Return a module, or something in one; None if it does not exist."""
    first, *parts = dotted.split(".")
    found: Any = importlib.import_module(first)
    for part in parts:
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
            except (AttributeError, ImportError):
                return None
    return found


def has(owner: Any, name: str) -> bool:
    """Whether a module, class or function has something of a name.

    That is an attribute; of a class also one that it annotates or that its methods set, or a text in them that begins
    so; of a function one of its parameters, or such a text.
    """
    return is_declared(owner, name) or any(_sets(code, name) for code in _codes_of(owner))


def is_declared(owner: Any, name: str) -> bool:
    """Whether something has an attribute, or is a class that annotates it for its objects."""
    classes = owner.__mro__ if isinstance(owner, type) else ()
    return hasattr(owner, name) or any(name in _annotations(each) for each in classes)


def parameters_of(function: Any) -> tuple[str, ...]:
    """Return the names of what a function takes, in their order; none if it has no known signature."""
    try:
        return tuple(signature(function).parameters)
    except (TypeError, ValueError):  # no function, or one in C
        return ()


def _annotations(owner: type) -> Mapping[str, Any]:
    try:
        return owner.__annotations__
    except (AttributeError, NameError):  # of a type in C; of what Python 3.14 cannot evaluate
        return {}


def _codes_of(owner: Any) -> Iterator[CodeType]:
    """Yield the code of a function, or of the methods of a class and its base classes."""
    members = (
        (value for base in owner.__mro__ for value in vars(base).values()) if isinstance(owner, type) else (owner,)
    )
    for each in members:
        function = unwrap(getattr(each, "fget", each))
        if isinstance(function, FunctionType):
            yield function.__code__


def _sets(code: CodeType, name: str) -> bool:
    """Whether code has a parameter, sets an attribute or says a text of that name, or the functions in it do."""
    if name in code.co_varnames[: code.co_argcount]:
        return True
    if name in code.co_names and any(each.opname == "STORE_ATTR" and each.argval == name for each in dis(code)):
        return True
    texts = (each for each in code.co_consts if isinstance(each, str))
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return any(each.startswith(name) for each in texts) or any(_sets(each, name) for each in inner)
