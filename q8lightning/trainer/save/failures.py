"""Raise in all processes what one of them failed with, so that none waits for one that has gone.

Files are the work of one process. What fails there would end it alone, and leave the others in the barrier that follows
every save, or in the next step. So it is kept until all processes meet: at a save, and at the end of the fit. No step
of the training costs any communication.
"""

import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy

from q8lightning.system.advice import advise
from q8lightning.trainer.lightning_api.both_packages import twin_of


class OtherRankError(RuntimeError):
    """Tells where another process of the training failed; the cause of an exception that is raised here too.

    Raised itself only in the place of an exception that cannot be pickled.
    """


class Failures:
    """What this process failed with, until all hear of it.

    Args:
        trainer: Whose processes meet.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.due = False
        """Whether a save has begun since the last meeting. It is the same in every process."""
        self._trainer = trainer
        self._kept: list[BaseException] = []
        self._raised: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept: a copy belongs to a process that has not failed."""
        return {**self.__dict__, "_kept": [], "_raised": None}

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return bool(self._kept)

    @contextmanager
    def kept(
        self, kind: type[BaseException] = Exception, unless: Callable[[BaseException], bool] | None = None
    ) -> Iterator[None]:
        """Keep what is raised in this context for the next meeting; where there is one process, let it through.

        Args:
            kind: What is kept. ``BaseException``, an interrupt by the user for instance, only where a meeting follows
                at once.
            unless: Which errors are raised at once. The others cannot be met: they wait elsewhere.
        """
        try:
            yield
        except kind as error:
            if self._trainer.world_size == 1 or (unless is not None and unless(error)):
                raise
            self._kept.append(error)

    def meet(self) -> None:
        """Raise in every process what one of them failed with; all call this at the same moment.

        Of several processes that failed, the first one's exception is raised, and of several exceptions the first.

        Raises:
            BaseException: What was kept, with its own traceback in the process that failed. In the others an equal one,
                whose cause is an :class:`OtherRankError` with that traceback.
        """
        own, self.due, self._raised = self.forget(), False, None
        try:
            told = self._exchange(own[0] if own else None)
        except Exception as error:  # a process has gone meanwhile, by an interrupt of its own for instance
            if own:
                raise own[0] from error
            raise
        if told is not None:
            self._raise(told, own)

    def meet_after(self, error: BaseException) -> None:
        """Meet the other processes, and tell them of an error that is on its way already in this one."""
        self._kept.insert(0, error)
        with suppress(BaseException):  # which this one does not replace
            self.meet()
        if self._raised is not None:
            self._raised = error

    def _exchange(self, own: BaseException | None) -> "_Told | None":
        """Return what the first process that failed tells."""
        strategy = self._trainer.strategy
        if not strategy.reduce_boolean_decision(own is not None, all=False):
            return None
        mine = None if own is None else _Told.of(own, self._trainer.global_rank)
        answers = (strategy.broadcast(mine, src=rank) for rank in range(self._trainer.world_size))
        return next(told for told in answers if told is not None)

    def meet_if_due(self) -> None:
        """Meet a last time if all know that there is reason to; otherwise raise what is kept in this process."""
        if self.due:
            self.meet()
        for error in self.forget():
            raise error

    def ends_all(self, error: BaseException) -> bool:
        """Whether ``error`` is what the last meeting raised, so that it ends every process."""
        raised, self._raised = self._raised, None
        return raised is error

    def forget(self) -> list[BaseException]:
        """Return what is kept, and keep it no more. The caller reports it."""
        own, self._kept = self._kept, []
        return own

    def _raise(self, told: "_Told", own: list[BaseException]) -> None:
        is_own = bool(own) and (told.rank == self._trainer.global_rank or told.is_like(own[0]))
        for error in own[is_own:]:  # one of them can be raised
            with suppress(Warning):  # where warnings are errors
                advise(f"rank {self._trainer.global_rank} also failed: {type(error).__name__}: {error}")
        if is_own:
            self._raised = own[0]
            raise own[0]
        self._raised = told.error()
        raise self._raised from OtherRankError(f"rank {told.rank} raised this:\n{told.traceback}")


def is_from_making(trainer: pl.Trainer, error: BaseException, door: Callable[..., object]) -> bool:
    """Whether ``trainer.save_checkpoint`` failed while it made the checkpoint, before it called ``door``."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return _code_of(type(trainer).save_checkpoint) in codes and _code_of(door) not in codes


def _code_of(function: Callable[..., object]) -> CodeType | None:
    """Return the code of a function, None for what is written otherwise."""
    return getattr(function, "__code__", None)


def saves_silently(strategy: Strategy) -> bool:
    """Whether a save of a strategy has no messages to other processes: it has the method of all strategies."""
    methods = (getattr(each, "save_checkpoint", None) for each in (Strategy, twin_of(Strategy)))
    return type(strategy).save_checkpoint in methods


@dataclass(frozen=True)
class _Told:
    """What a process tells of its failure.

    Attributes:
        rank: Whose failure.
        pickled: The exception; None if it does not survive being pickled.
        message: Its type and message.
        traceback: Where it was raised, as Python prints it.
    """

    rank: int
    pickled: bytes | None
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "_Told":
        return cls(rank, _pickled(error), _message(error), "".join(traceback.format_exception(error)))

    def is_like(self, error: BaseException) -> bool:
        """Whether an exception of this process says the same: what they did together failed in both."""
        return self.message == _message(error)

    def error(self) -> BaseException:
        """Return the exception, made anew."""
        if self.pickled is not None:
            try:
                error: BaseException = pickle.loads(self.pickled)
            except Exception:  # of a class that cannot be imported here
                pass
            else:
                return error
        return OtherRankError(f"rank {self.rank} failed: {self.message}")


def _message(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _pickled(error: BaseException) -> bytes | None:
    """Return an exception as bytes; None if it would come back as another one, or not at all."""
    try:
        pickled = pickle.dumps(error)
        again = pickle.loads(pickled)
        same = type(again) is type(error) and str(again) == str(error)
    except Exception:
        return None
    return pickled if same else None
