"""List the parameters of a model by name, tied ones once, and tell which of them rules may select."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from q8lightning.qat.compiled import COMPILED

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Tied:
    """A parameter with all of its names; the first is what ``named_parameters`` calls it."""

    names: tuple[str, ...]
    parameter: nn.Parameter

    def matches(self, pattern: str) -> bool:
        """Whether one of the names matches."""
        return any(matches(name, pattern) for name in self.names)


def parameters_of(module: nn.Module) -> list[Tied]:
    """Return the parameters in the order of the model."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [Tied(tuple(each), parameter) for parameter, each in names.items()]


def is_eligible(parameter: Tensor, min_rank: int) -> bool:
    """Whether a rule may select a parameter: floats of a rank, with elements."""
    if isinstance(parameter, UninitializedParameter):
        return True  # if a rule selects it, checks.py refuses it
    return parameter.dtype in FLOATS and parameter.ndim >= min_rank and parameter.numel() > 0


def uncompiled(name: str) -> str:
    """Return the name that a parameter or module had before ``torch.compile`` took a module around it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def matches(name: str, pattern: str) -> bool:
    """Whether the name of a parameter or module matches a pattern, as it is or as before ``torch.compile``."""
    return fnmatchcase(name, pattern) or fnmatchcase(uncompiled(name), pattern)


def some(names: Iterable[str]) -> str:
    """Return the first four names for a message, ``none`` if there are none."""
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") or "none"
