"""Tell a Trainer's callbacks which checkpoints are durable."""

from collections import deque
from typing import Any

import lightning.pytorch as pl

from q8lightning.system.advice import advise

HOOK = "on_checkpoint_durable"


class DurableFiles:
    """Checkpoints that became durable, until the callbacks of a Trainer are told.

    Args:
        trainer: The Trainer that has the callbacks.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._paths: deque[str] = deque()
        self._is_telling = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the checkpoints: a copy has saved nothing."""
        return {**self.__dict__, "_paths": deque(), "_is_telling": False}

    def add(self, path: str) -> None:
        """Add a checkpoint, from any thread."""
        self._paths.append(path)

    def tell(self) -> None:
        """Call ``on_checkpoint_durable(path)`` of every callback that has it, for each file that became durable since.

        All are called, also after one of them has raised.

        Raises:
            Exception: The first one of a callback. After an exception in the Trainer, which it must not hide, each is a
                warning instead.
        """
        if self._is_telling:
            return  # a hook has saved or waited: its caller goes on telling, so that all hear of files in order
        failure: Exception | None = None
        interrupted = self._trainer.interrupted
        self._is_telling = True
        try:
            while self._paths:
                path = self._paths.popleft()
                for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
                    try:
                        getattr(callback, HOOK, _ignore)(path)
                    except Exception as error:
                        failure = failure or error
                        if interrupted:
                            _warn(callback, path, error)
        finally:
            self._is_telling = False
        if failure is not None and not interrupted:
            raise failure


def _ignore(path: str) -> None:
    pass


def _warn(callback: pl.Callback, path: str, error: Exception) -> None:
    advise(
        f"{type(callback).__name__}.{HOOK}({path!r}) raised {type(error).__name__}: {error}. The checkpoint is there;"
        " do by hand what the callback was to do with it"
    )
