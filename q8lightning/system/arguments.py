"""Check arguments that users write as words and mappings, and guess what was meant."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import wraps
from inspect import currentframe, signature
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that suggests the known words most like ``word``; empty if none is."""
    if not word:
        return ""
    by_lower = {each.lower(): each for each in known}
    close = [each for each in by_lower if each.startswith(word.lower())] or get_close_matches(word.lower(), by_lower, 1)
    return f"; did you mean {' or '.join(repr(by_lower[each]) for each in close[:2])}?" if close else ""


def names_arguments(kind: type[T]) -> type[T]:
    """Let a class say which of its arguments may be meant by a keyword that is none of them.

    The error is a TypeError, as Python's own. Where a mapping of arguments is read, :func:`check_keys` does the same.
    """
    init: Callable[..., None] = kind.__init__
    known = list(signature(kind).parameters)

    @wraps(init)
    def checked(self: T, *arguments: Any, **named: Any) -> None:
        for name, value in named.items():
            if name not in known:
                raise TypeError(
                    f"{kind.__name__} has no argument {name!r}, got {name}={value!r}; its arguments are"
                    f" {', '.join(known)}{did_you_mean(name, known)}"
                )
        init(self, *arguments, **named)

    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False, else raise ValueError: many words and numbers count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, got {value!r}; write {name}=True or {name}=False")
    return value


def check_integer(name: str, value: object, least: int, otherwise: str = "") -> int:
    """Return ``value`` if it is an integer of at least ``least``, else raise ValueError.

    Args:
        name: The argument.
        value: What was given.
        least: The smallest that is allowed.
        otherwise: The remedy where none follows from the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be an integer of at least {least}, got {value!r}{as_integer(value) or otherwise}"
        )
    return value


def check_pattern(name: str, value: object) -> str:
    """Return ``value`` if it is a pattern over names, else raise ValueError: an empty one matches nothing."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is a pattern over names, got {value!r}; write such as '*.weight', or '*' for all")
    if not value:
        raise ValueError(f"{name} is a pattern over names, got {value!r}, which matches nothing; write '*' for all")
    return value


def check_patterns(name: str, values: object) -> tuple[str, ...]:
    """Return a list of patterns as a tuple; raise ValueError if it is something else."""
    if isinstance(values, str):
        raise ValueError(f"{name} is a list of patterns, got {values!r}; write [{values!r}]")
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        raise ValueError(f"{name} is a list of patterns, got {values!r}; write such as ['*.embed.weight']")
    found: Sequence[object] = list(values)
    return tuple(check_pattern(f"{name}[{index}]", each) for index, each in enumerate(found))


def as_integer(value: object) -> str:
    """Return the end of an error message that writes ``value`` as an integer; empty if it is none in another form."""
    if isinstance(value, bool):
        return ""
    number: Any = value
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        number = int(value)
    try:
        if int(number) == number and not isinstance(number, int):
            return f"; write {int(number)}"
    except (TypeError, ValueError, OverflowError):
        return ""
    return "" if number is value else f"; write {number}"


def end_in_one_line(check: Callable[[T], None]) -> Callable[[T], None]:
    """Let what a check raises end a command line in the one line that says it.

    jsonargparse, which LightningCLI reads configurations with, makes objects of all types that an argument may have. If
    none can be made it reports what each said: a typo in one rule ended in a traceback and a list of 159 lines. Where
    jsonargparse itself makes the object, the program ends with the message instead, as for other wrong arguments.

    Args:
        check: The ``__post_init__`` of a dataclass, which raises ValueError.
    """

    @wraps(check)
    def checked(self: T) -> None:
        try:
            check(self)
        except ValueError as error:
            if not _is_made_by_jsonargparse():
                raise
            raise SystemExit(f"error: {error}") from error

    return checked


def _is_made_by_jsonargparse() -> bool:
    """Whether the first caller from outside of this package is jsonargparse."""
    frame = currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("q8lightning."):
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("jsonargparse.")


def check_keys(where: str, kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse keys that a dataclass has no argument for, and missing ones, with a message that says where they stand.

    Args:
        where: Where the mapping stands, for the message, such as ``rules[1]``.
        kind: The dataclass.
        given: The mapping of its arguments.

    Raises:
        ValueError: If a key is unknown or missing; it names the key.
    """
    given_fields = [each for each in fields(kind) if each.init]
    known = [each.name for each in given_fields]
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where} has the key {key!r} in {dict(given)!r}, but the arguments of {kind.__name__} are"
                f" {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    for each in given_fields:
        if each.default is MISSING and each.name not in given:
            raise ValueError(f"{where} needs the key {each.name!r}, got {dict(given)!r}; add it")
