"""Check arguments that users write as words and mappings, and guess what was meant."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import wraps
from inspect import currentframe
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that suggests the known words most like ``word``; empty if none is."""
    if not word:
        return ""
    by_lower = {each.lower(): each for each in known}
    close = [each for each in by_lower if each.startswith(word.lower())] or get_close_matches(word.lower(), by_lower, 1)
    return f"; did you mean {' or '.join(repr(by_lower[each]) for each in close[:2])}?" if close else ""


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
    known = [each.name for each in fields(kind)]
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where} has the key {key!r} in {dict(given)!r}, but the arguments of {kind.__name__} are"
                f" {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    for each in fields(kind):
        if each.default is MISSING and each.name not in given:
            raise ValueError(f"{where} needs the key {each.name!r}, got {dict(given)!r}; add it")
