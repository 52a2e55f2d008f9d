"""What surrounds a computation and would change its bits: put aside while the package computes, and put back after.

Torch keeps these states thread by thread. The default device and the default dtype are not among them here: whatever
makes a tensor names its device and its dtype, which costs nothing and holds in every thread.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Devices whose autocast would convert what operators are given, or refuse dtypes that it does not know."""

_SMALLEST = sys.float_info.min

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def neutral() -> Iterator[None]:
    """Compute within this context, or in a function decorated with it, as IEEE arithmetic says.

    Autocast is off, and denormal numbers are numbers (``torch.set_flush_denormal`` would make them zeros). Where they
    were not, operations are not shared among threads meanwhile: each thread has that state of its own, and those that
    torch keeps for sharing cannot be asked. A graph that is being compiled is left as it is: what decides about bits is
    in operators, which it holds whole.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with ExitStack() as stack:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if _flushes_denormals():
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        yield


@contextmanager
def lasting() -> Iterator[None]:
    """As :func:`neutral`, for what is computed once and kept: training could do little with inference tensors."""
    with neutral(), torch.inference_mode(False):
        yield


def untraced(function: F) -> F:
    """Keep a function out of graphs that ``torch.compile`` makes of code around it: it is the same at every call.

    What it does between operators (to parameters, by the step) would become constants of the graph, or compile it
    anew for each step.
    """
    return cast("F", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def _flushes_denormals() -> bool:
    """Whether this thread's processor makes zeros of denormal numbers; torch has no function that tells."""
    return _SMALLEST * 0.5 == 0.0
