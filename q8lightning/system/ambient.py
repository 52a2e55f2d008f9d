"""Compute the same bits under autocast and any handling of denormal numbers.

Torch keeps these states thread by thread. The default device and the default dtype are not handled here, because all
code of this package names the device and the dtype of the tensors that it makes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Devices whose autocast converts what operators are given, or refuses dtypes that it does not know."""

_SMALLEST = sys.float_info.min

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def neutral() -> Iterator[None]:
    """Compute by IEEE arithmetic within this context, or in a function decorated with it.

    Autocast is off, and denormal numbers are kept (``torch.set_flush_denormal`` makes them zeros). If they were not
    kept, operations use one thread meanwhile, because torch's own threads have this state too and cannot be reached. A
    graph that is being compiled is left as it is: the operators in it, which stay whole, decide about the bits.
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
    """As :func:`neutral`, for tensors that are kept; none of them is an inference tensor, which training cannot use."""
    with neutral(), torch.inference_mode(False):
        yield


def untraced(function: F) -> F:
    """Keep a function out of graphs that ``torch.compile`` makes of the code around it.

    What it does between operators depends on the step. In a graph that would become constants, or compile the graph
    anew for each step.
    """
    return cast("F", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def _flushes_denormals() -> bool:
    """Whether this thread's processor turns denormal numbers into zeros; torch has no function to ask."""
    return _SMALLEST * 0.5 == 0.0
