"""Several processes of one training: forked in milliseconds, joined by gloo on this machine, ended by a time limit.

Lightning finds them started: ``Trainer(devices=count, strategy="ddp")`` in each joins them. A process that hangs prints
where, is killed, and its rank is in the error.
"""

import faulthandler
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from support import forked

LIMIT = 60.0
"""Seconds after which processes count as hanging."""


@dataclass(frozen=True)
class Ended:
    """How the process of one rank ended.

    Attributes:
        value: What the function returned, of whatever can be pickled; None if it did not return.
        error: The traceback of an exception, or "".
        exitcode: 0, 1 after an exception, negative for a signal.
    """

    value: Any
    error: str
    exitcode: int | None


def run(function: Callable[..., Any], count: int, *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """Call ``function(rank, *arguments)`` in so many processes; return what each returns.

    Args:
        function: A function of a test module.
        count: How many processes.
        arguments: Of the function; they are pickled.
        limit: Seconds after which the processes are killed.

    Raises:
        AssertionError: If a process raises, is killed or hangs; it names the rank.
    """
    ended = run_to_the_end(function, count, *arguments, limit=limit)
    for rank, each in enumerate(ended):
        assert each.exitcode == 0, f"rank {rank} ended with {each.exitcode}: {each.error}"
    return [each.value for each in ended]


def run_to_the_end(function: Callable[..., Any], count: int, *arguments: Any, limit: float = LIMIT) -> list[Ended]:
    """Do the same, and return how each process ended: some are meant to fail or to be killed.

    Raises:
        AssertionError: If a process hangs; it names the rank.
    """
    port = _free_port()
    pipes = [Pipe(duplex=False) for _ in range(count)]
    processes = [
        forked.start(_begin, function, rank, count, port, sender, limit, *arguments)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + limit
    said = [_receive(receiver, deadline) for receiver, _ in pipes]
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} of {count} hang after {limit} s; their tracebacks are on stderr"
    return [Ended(*told, process.exitcode) for told, process in zip(said, processes, strict=True)]


def die() -> None:
    """Kill this process, as the system does when there is no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def _receive(receiver: Connection, deadline: float) -> tuple[Any, str]:
    try:
        if receiver.poll(max(deadline - time.monotonic(), 0)):
            told: tuple[Any, str] = receiver.recv()
            return told
    except EOFError:
        pass  # it was killed
    return None, ""


def _begin(
    function: Callable[..., Any], rank: int, count: int, port: int, sender: Connection, limit: float, *arguments: Any
) -> None:
    faulthandler.dump_traceback_later(max(limit - 2, 1))
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    try:
        value = function(rank, *arguments)
    except BaseException:
        sender.send((None, traceback.format_exc()))
        raise
    sender.send((value, ""))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
