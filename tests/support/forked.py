"""Processes that start in milliseconds: forked from a server that has imported everything and runs no threads."""

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from typing import Any

import torch

_WHOLE = (
    "q8lightning.trainer.callback",
    "q8lightning.export.quantized",
    "q8lightning.tools",
    "q8lightning.qat.masters",
)
"""Modules that import the whole package, of which ``q8lightning`` itself imports nothing before it is used."""


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.models", *_WHOLE])
    return context


def prepare() -> None:
    """Start the server, which imports everything while the caller goes on."""
    _context()
    forkserver.ensure_running()


def start(target: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """Start a process that calls ``target``, a function of a test module."""
    process = _context().Process(target=_run, args=(target, *arguments))
    process.start()
    return process


def run(target: Callable[..., object], *arguments: Any) -> int | None:
    """Do the same and wait for its end; return the exit code, negative for a signal."""
    process = start(target, *arguments)
    process.join(100)
    return process.exitcode


def event() -> Event:
    """Return an event that can be passed to a process."""
    return _context().Event()


def _run(target: Callable[..., object], *arguments: Any) -> None:
    torch.set_num_threads(1)
    target(*arguments)
