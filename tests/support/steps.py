"""What saves announce, step by step, in this process; tests watch it, hold it up or make it fail."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.audit import listening


class Steps:
    """The steps of saves as they are announced; a test can delay them, hold them up or make them fail.

    Attributes:
        seen: Step and name of the file, in order.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self._delays: dict[str, float] = {}
        self._gates: dict[str, threading.Event] = {}
        self._failures: dict[tuple[str, str], BaseException] = {}

    def hold(self, step: str) -> threading.Event:
        """Hold up whoever gets to this step; setting what is returned lets them go on."""
        return self._gates.setdefault(step, threading.Event())

    def delay(self, step: str, seconds: float) -> None:
        """Let whoever gets to this step wait for so long."""
        self._delays[step] = seconds

    def fail(self, step: str, name: str, error: BaseException) -> None:
        """Raise ``error`` when the file gets to this step."""
        self._failures[step, name] = error

    def release(self) -> None:
        """Let everybody go on."""
        for gate in self._gates.values():
            gate.set()

    def __call__(self, step: str, path: str) -> None:
        name = Path(path).name
        self.seen.append((step, name))
        time.sleep(self._delays.get(step, 0))
        if step in self._gates:
            assert self._gates[step].wait(20), f"nobody let {name} go on from {step}"
        if (step, name) in self._failures:
            raise self._failures[step, name]


@contextmanager
def announced() -> Iterator[Steps]:
    """Hear the steps within this context."""
    steps = Steps()

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "q8lightning.save":
            steps(*arguments)

    with listening(hear):
        try:
            yield steps
        finally:
            steps.release()


def step_of(path: Path) -> int:
    """Return the training step in the name of a file such as ``step=3.ckpt``."""
    return int(path.stem.removeprefix("step="))


def our_threads() -> list[str]:
    """Return the names of the threads of ours that run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("q8lightning")]
