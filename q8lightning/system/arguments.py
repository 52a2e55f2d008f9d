"""Check arguments that users write as words and mappings, and guess what was meant."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that suggests the known words most like ``word``; empty if none is."""
    if not word:
        return ""
    by_lower = {each.lower(): each for each in known}
    close = [each for each in by_lower if each.startswith(word.lower())] or get_close_matches(word.lower(), by_lower, 1)
    return f"; did you mean {' or '.join(repr(by_lower[each]) for each in close[:2])}?" if close else ""


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
