"""The processes that save together: what one of them finds out, or fails with, all of them know."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

_TOLD, _ALONE = "q8lightning_told", "q8lightning_alone"
"""Marks of errors."""


class Outcome(NamedTuple):
    """What became of one process's part of a step: a value, or an error."""

    value: object = None
    error: BaseException | None = None


@contextmanager
def talking() -> Iterator[None]:
    """Mark what is raised in this context and by no method of :class:`Ranks`: see :func:`is_alone`."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, _TOLD, False):
            _mark(error, _ALONE)
        raise


def is_alone(error: BaseException) -> bool:
    """Whether a process left the others with an error while they talk, and they wait for it there.

    An interrupt by the user for instance, or another process that is gone. They cannot be told of it any more. If the
    process ends, they are.
    """
    return getattr(error, _ALONE, False)


class Ranks:
    """The processes of one group, for one thread: two threads must not use one group at the same time.

    Every method is called by all of them in the same order. An error of one is raised in all, so that none waits for
    another that has given up.

    Args:
        group: A group of the gloo backend with all processes in it; None for this process alone.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of_all(cls) -> "Ranks":
        """Return all processes, in a group of their own that works on host memory; to be called by all of them."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo"))

    @property
    def is_first(self) -> bool:
        """Whether this process decides what one has to decide."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> list[T]:
        """Let every process make something; return what all made, by rank.

        Raises:
            BaseException: In every process, the first one's that failed.
        """
        own = _attempt(make)
        outcomes = [own]
        if self._group is not None:
            outcomes = [Outcome()] * self.size
            with _rather(own.error):
                dist.all_gather_object(outcomes, _portable(own), group=self._group)
            outcomes[self.rank] = own
        return cast("list[T]", _values(outcomes))

    def together(self, make: Callable[[], T]) -> T:
        """Let every process make something for itself.

        Raises:
            BaseException: In every process, the first one's that failed.
        """
        own = _attempt(make)
        with _rather(own.error):
            all_made = self.smallest(own.error is None)
        if not all_made:
            self.share(lambda: _values([Outcome(error=own.error)]))  # values need not be such as can be sent
        return cast("T", _values([own])[0])

    def at_first(self, make: Callable[[], T]) -> T:
        """Let the first process make something that all get.

        Raises:
            BaseException: In every process, if it failed.
        """
        own = _attempt(make) if self.is_first else Outcome()
        if self._group is not None:
            told = [_portable(own)]
            with _rather(own.error):
                dist.broadcast_object_list(told, src=0, group=self._group)
            own = own if self.is_first else told[0]
        return cast("T", _values([own])[0])

    def decide(self, value: T, decide: Callable[[list[T]], Sequence[R]]) -> R:
        """Let the first process make one thing for each out of what each has.

        Raises:
            BaseException: In every process, if it failed.
        """
        if self._group is None:
            return decide([value])[0]
        gathered: list[T] | None = [value] * self.size if self.is_first else None
        dist.gather_object(value, gathered, dst=0, group=self._group)
        own = Outcome([]) if gathered is None else _attempt(lambda: list(decide(gathered)))
        told = None
        if self.is_first:
            one_for_all = [_portable(own)] * self.size
            told = one_for_all if own.error else [Outcome(each) for each in cast("list[R]", own.value)]
        received: list[Outcome | None] = [None]
        dist.scatter_object_list(received, told, src=0, group=self._group)
        return cast("R", _values([own if own.error else cast("Outcome", received[0])])[0])

    def smallest(self, number: int) -> int:
        """Return the smallest of the processes' numbers."""
        if self._group is None:
            return number
        numbers = torch.tensor([number], dtype=torch.int64, device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self._group)
        return int(numbers)


def _attempt(make: Callable[[], object]) -> Outcome:
    try:
        return Outcome(make())
    except BaseException as error:  # whatever it is, the others must not wait
        return Outcome(error=error)


@contextmanager
def _rather(own: BaseException | None) -> Iterator[None]:
    """Raise this process's own error in the place of one about others that are gone."""
    try:
        yield
    except Exception as error:
        if own is not None:
            raise own from error
        raise


def _mark(error: BaseException, mark: str) -> None:
    with suppress(AttributeError):  # of a class that takes none
        setattr(error, mark, True)


def _portable(outcome: Outcome) -> Outcome:
    """Return an outcome that can be sent: an error that cannot be pickled is told in words."""
    if outcome.error is None:
        return outcome
    try:
        pickle.loads(pickle.dumps(outcome.error))
    except Exception:
        return Outcome(error=RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}"))
    return outcome


def _values(outcomes: Sequence[Outcome]) -> list[object]:
    for outcome in outcomes:
        if outcome.error is not None:
            _mark(outcome.error, _TOLD)
            raise outcome.error
    return [outcome.value for outcome in outcomes]
