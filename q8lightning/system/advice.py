"""Warn without an exception, even where warnings are errors."""

import logging
import warnings

_log = logging.getLogger(__name__)


def advise(message: str, stacklevel: int = 1) -> None:
    """Warn; where warnings are errors, log instead.

    Args:
        message: What happened, to what, and what to do.
        stacklevel: Whose line the warning shows, as for ``warnings.warn``; 1 is the caller's.
    """
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except Warning:
        _log.warning(message)
