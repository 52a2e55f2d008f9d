"""A few threads for work that releases Python's lock: reading, sums, and what torch computes."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST = 8
"""Threads at most: so many read and sum faster than a disk or one socket's memory delivers."""

MOST_THAT_COMPUTE = 16
"""Threads at most that call operators: more would wait for Python's lock."""

WORTH_THREADS = 2**22
"""Bytes from which on threads are started to compute with them: they take as long as starting a few."""


def count_workers(jobs: int, cores: int | None = None) -> int:
    """Return how many threads are worth starting for so many jobs on so many cores; None for those of this process."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores, jobs))


class Workers:
    """Threads that take jobs in the order in which they were submitted, from entering to leaving the context.

    The executors of ``concurrent.futures`` take no more jobs once the interpreter shuts down, which is when the pending
    save of a training that just ends is written. Leaving the context drops the jobs that nobody has begun and waits for
    the others, so that no thread touches memory that the caller is about to free.

    Args:
        count: How many threads; each is started when there is a job for it. If the system has no thread left,
            :meth:`submit` does the work itself.
        begin: What each thread does first.
    """

    def __init__(self, count: int, begin: Callable[[], object] = lambda: None) -> None:
        self._count = count
        self._begin = begin
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._left = False

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have ``function(*arguments)`` called; what it returns or raises is the future's."""
        future: Future[T] = Future()
        if len(self._threads) < self._count:
            self._start()
        self._jobs.put((future, function, arguments))
        if not self._threads:
            self._work_off()
        return future

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="q8lightning worker", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads; fewer do as well
            self._count = len(self._threads)
        else:
            self._threads.append(thread)

    def _work_off(self) -> None:
        while not self._jobs.empty():
            self._do(self._jobs.get())

    def _work(self) -> None:
        self._begin()
        while self._do(self._jobs.get()):
            pass

    def _do(self, job: tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None) -> bool:
        if job is None:
            return False
        future, function, arguments = job
        if self._left:
            future.cancel()
            return True
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # it is the caller's
            future.set_exception(error)
        return True

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


def share_out(jobs: Sequence[Callable[[], T]], sizes: Sequence[int]) -> list[T]:
    """Call functions that compute with tensors on the CPU, each in one thread, several at a time.

    Threads that share an operation wait for each other at its end, thousands of times, and where somebody else uses the
    processor, too, that takes many times as long. What would keep one thread busy alone is shared all the same.

    Args:
        jobs: Without side effects on each other.
        sizes: How many bytes each has to do with.

    Returns:
        What they return, in their order.
    """
    total, count = sum(sizes), len(jobs)
    threads = min(torch.get_num_threads(), MOST_THAT_COMPUTE, count)
    if threads <= 1 or total < WORTH_THREADS:
        return [job() for job in jobs]
    results: dict[int, T] = {i: jobs[i]() for i in range(count) if sizes[i] > total / threads}
    inference = torch.is_inference_mode_enabled()

    def run(job: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
            return job()

    left = sorted((i for i in range(count) if i not in results), key=lambda i: sizes[i], reverse=True)
    try:
        with Workers(threads, begin=lambda: torch.set_num_threads(1)) as workers:
            pending = [(i, workers.submit(run, jobs[i])) for i in left]
            results |= {i: future.result() for i, future in pending}
    finally:
        torch.set_num_threads(torch.get_num_threads())  # what new threads begin with, which those have changed
    return [results[i] for i in range(count)]
