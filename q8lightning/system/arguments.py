"""Arguments that users write as words and mappings: what is wrong with them, and what was meant."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that asks for the known words most like ``word``; nothing if none is."""
    if not word:
        return ""
    by_lower = {each.lower(): each for each in known}
    close = [each for each in by_lower if each.startswith(word.lower())] or get_close_matches(word.lower(), by_lower, 1)
    return f"; did you mean {' or '.join(repr(by_lower[each]) for each in close[:2])}?" if close else ""


def check_keys(where: str, kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse keys that a dataclass has no argument for, and missing ones, before Python does without saying where.

    Args:
        where: Whose keys they are, for the message, such as ``rules[1]``.
        kind: The dataclass.
        given: The mapping of its arguments.

    Raises:
        ValueError: Naming the key.
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
