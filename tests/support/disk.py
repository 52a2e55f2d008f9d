"""What a disk is asked for while a test runs, and what it refuses."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Notes what is flushed and renamed, in order, and refuses what a test wants it to; all else is really done.

    Renames and opened files are seen through Python's audit events. There is none for ``os.fsync``, which is wrapped.

    Attributes:
        calls: ``"flush file"`` and ``"flush folder"`` with inode and size, ``"rename"`` with both
            paths, inode and size.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._refused: dict[str, int] = {}
        self._fsync: Callable[[int], None] = os.fsync
        monkeypatch.setattr(os, "fsync", self._flush)

    def refuse(self, call: str, code: int) -> None:
        """Fail with this error from now on, at ``"flush file"``, ``"flush folder"``, ``"open folder"``, ``"rename"`` or
        ``"make file"``."""
        self._refused[call] = code

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an audit event."""
        if event == "os.rename":
            source, target = Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1]))
            self._check("rename", str(source), None, str(target))
            status = source.stat()
            self.calls.append(("rename", (source, target, status.st_ino, status.st_size)))
        elif event == "open" and not isinstance(arguments[0], int) and self._refused:
            path = os.fsdecode(arguments[0])
            if os.path.isdir(path):
                self._check("open folder", path)
            elif arguments[1] is not None and "x" in arguments[1]:
                self._check("make file", path)

    def _flush(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        call = "flush folder" if stat.S_ISDIR(status.st_mode) else "flush file"
        self._check(call)
        self.calls.append((call, (status.st_ino, status.st_size)))
        self._fsync(descriptor)

    def _check(self, call: str, *names: Any) -> None:
        if call in self._refused:
            code = self._refused[call]
            raise OSError(code, os.strerror(code), *names)
