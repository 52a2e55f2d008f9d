"""Run work in a few threads that releases Python's lock: reading, sums, and operators of torch."""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MOST = 8
"""The most threads that read and sum; so many are faster than a disk or the memory of one socket."""

MOST_THAT_COMPUTE = 16
"""The most threads that call operators; more would wait for Python's lock."""

WORTH_THREADS = 2**22
"""Bytes from which on it is worth starting threads to compute."""


def count_workers(jobs: int, cores: int | None = None) -> int:
    """Return how many threads to start for a number of jobs; ``cores=None`` counts the cores of this process."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores, jobs))


class Workers:
    """Threads that take jobs in the order of their submission, until the context is left.

    They also work while the interpreter shuts down, when the last save of a training may be written; the executors of
    ``concurrent.futures`` do not. Leaving the context drops the jobs that have not begun and waits for the others, so
    that no thread touches memory that the caller is about to free.

    Args:
        count: How many threads; each is started when there is a job for it. If the system has no thread left,
            :meth:`submit` does the work itself.
        begin: Called first in each thread.
    """

    def __init__(self, count: int, begin: Callable[[], object] = lambda: None) -> None:
        self._count = count
        self._begin = begin
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._left = False

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Call ``function(*arguments)`` in a thread; the future gets what it returns or raises."""
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
        except RuntimeError:  # the system has no more threads; fewer will do
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
        except BaseException as error:  # raised where the caller asks for the result
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
    """Call functions that compute with tensors on the CPU, several at a time, each in one thread.

    Threads that share an operation wait for each other at its end. Over thousands of operations that takes many times
    as long if other programs use the processor too. Only a job that would keep one thread busy longer than all others
    shares its operations.

    Args:
        jobs: Functions without side effects on each other.
        sizes: How many bytes each of them reads.

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
        with torch.inference_mode(inference), torch.no_grad():  # each thread has both of its own
            return job()

    left = sorted((i for i in range(count) if i not in results), key=lambda i: sizes[i], reverse=True)
    try:
        with Workers(threads, begin=lambda: torch.set_num_threads(1)) as workers:
            pending = [(i, workers.submit(run, jobs[i])) for i in left]
            results |= {i: future.result() for i, future in pending}
    finally:
        torch.set_num_threads(torch.get_num_threads())  # the workers changed what new threads begin with
    return [results[i] for i in range(count)]


def batches(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the numbers of jobs that one thread does in one go, in their order: together at most so large, or one."""
    batch, total = list[int](), 0
    for i, size in enumerate(sizes):
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += size
    if batch:
        yield batch
