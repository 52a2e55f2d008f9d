"""Several processes that train together over gloo on this machine, forked from a server that has imported everything.

A process takes a second to start so, and eight otherwise. One launch should serve many scenarios all the same: the
processes call a function of the test module, which writes down what it finds, and named tests assert it.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import forked


def launch(target: Callable[..., object], size: int, *arguments: Any, timeout: float = 120.0) -> list[int | None]:
    """Call ``target`` of a test module in ``size`` processes; return their exit codes, negative for signals.

    What one of them raises is printed. Those that are still there after ``timeout`` seconds are killed, and their exit
    code is that.

    Args:
        target: Gets the arguments; may call anything that is to be called in all processes of a distributed run.
        size: How many processes.
        arguments: For all of them.
        timeout: In seconds.
    """
    port = _free_port()
    processes = [forked.start(_run, target, rank, size, port, *arguments) for rank in range(size)]
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _run(target: Callable[..., object], rank: int, size: int, port: int, *arguments: Any) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "RANKS_OF_TEST": str(size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        target(*arguments)
    except BaseException:
        print(f"rank {rank} of {size}:", flush=True)
        traceback.print_exc()
        raise


def world_size() -> int:
    """Return how many processes the launch has; set again what Lightning takes away at the end of each run."""
    size = os.environ.get("RANKS_OF_TEST", "1")
    os.environ["WORLD_SIZE"] = size
    return int(size)


def marker(folder: Path, name: str) -> Path:
    """Return where a process leaves what it finds."""
    return folder / f"{name}.{os.environ['LOCAL_RANK']}.pt"
