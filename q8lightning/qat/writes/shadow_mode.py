"""Let writes to quantized weights reach the masters, with the values that they would have without QAT.

While weights are engaged, everybody sees their quantized values, but what the user writes belongs to the masters. So
what is computed from weights is computed twice: as the user sees it, and from the masters. The second value is kept as
the shadow of the first. A write to a weight happens to its master, with shadows for its inputs; the weight is quantized
again when somebody reads it. What a layer returns (a linear map, a convolution, an embedding, attention) has no shadow,
because layers compute with quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from q8lightning.qat.fake_quantizer import FakeQuantizer
from q8lightning.qat.lost_write import BESIDE_COMPILED, LostWriteError
from q8lightning.qat.writes.operators import (
    ACCESSORS,
    ALIASES,
    LAYERS,
    LAZY,
    NUMBERS,
    PLAIN,
    RESHAPING,
    mapped,
    name_of,
    random_states,
    same_numbers,
    set_random_states,
    targets_of,
    tensors_in,
    version_of,
)
from q8lightning.qat.writes.shadows import Shadows
from q8lightning.qat.writes.storage_owners import StorageOwners
from q8lightning.system.private_names import resolve


class ShadowMode(TorchFunctionMode):
    """While it is active, every write to an engaged weight reaches its master, or raises.

    Args:
        quantizer: Whose weights.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        super().__init__()
        self.writes = False
        """Whether there was a write, so that every step from now on has to be followed."""
        self.compiled = False
        """Whether compiled code has run, in which nothing can be followed."""
        self.paused = False
        self._quantizer = quantizer
        self._number = ""
        self._written: set[int] = set()
        self._owners = StorageOwners(quantizer)
        self._shadows = Shadows(quantizer, self._owners)

    def begin(self) -> None:
        """Begin a step: what Python took from weights in an earlier one is forgotten."""
        self._number = ""

    def end(self) -> None:
        """End a step, or following altogether: where compiled code runs, writes are only found.

        Raises:
            LostWriteError: If compiled code ran, which may have read what was written to, or computed what is written.
        """
        if self.compiled:
            self._quantizer.followed = False
            self._refuse([each for each in self._written if each in self._quantizer.places], BESIDE_COMPILED)

    def settled(self, arguments: Any) -> bool:
        """Quantize again what was written to, and tell whether nothing in arguments has a shadow."""
        self._quantizer.settle()
        return not any(
            self._shadows.value(each) is not None or self._shadows.is_spoiled(each) for each in tensors_in(arguments)
        )

    def refuse_made(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse parameters, by name, that were made in a step and took something of quantized values with them."""
        names = [name for name, parameter in parameters if self._shadows.is_spoiled(parameter)]
        if names:
            raise LostWriteError(
                names, "it was replaced by a parameter made of what was computed with quantized values"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            self.compiled = True  # which is done again, afterwards, whenever the compiled code runs
            return func(*args, **kwargs)
        if self.paused or self._quantizer.busy:
            return func(*args, **kwargs)
        if self.compiled:
            self.end()
            return func(*args, **kwargs)
        name = name_of(func)
        if name in ACCESSORS and getattr(func.__self__, "__name__", "") not in ALIASES:
            return func(*args, **kwargs)
        if name in PLAIN:
            self._settle(tensors_in(args))  # kernels of somebody's own may read at an address
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if not any(self._shadows.value(each) is not None for each in tensors):
            return self._without(func, name, args, kwargs, tensors)
        targets = targets_of(name, args, kwargs)
        if not self._quantizer.engaged:
            return self._released(func, args, kwargs, targets)
        weights = [weight for each in targets if (weight := self._shadows.weight(each)) is not None]
        # A parameter that is not quantized takes what it would take without QAT: values of the masters.
        ours = bool(weights) or (bool(targets) and all(map(self._is_other_parameter, targets)))
        # Autograd refuses to write to what it differentiates: it shall do so here too.
        refused = name != "__set__" and torch.is_grad_enabled() and any(each.requires_grad for each in targets)
        if ours and not refused and name not in RESHAPING:
            if name in ACCESSORS:
                self._owners.moved = True
            return self._write(func, args, kwargs, tensors, weights)
        if name not in LAZY:
            self._settle(tensors)
        if name in LAYERS and any(self._shadows.value(each) is None for each in tensors):
            return self._layer(func, args, kwargs, tensors)
        return self._both(func, name, args, kwargs, tensors, targets)

    def _write(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], weights: list[int]) -> Any:
        """Run it with shadows only, so that what a graph has saved of the tensors stays as it is."""
        self._check(weights, tensors)
        with torch.no_grad():
            result = func(*self._shadows.swap(args), **self._shadows.swap(kwargs))
        self.writes = True
        for weight in weights:
            self._take_down(weight)
        back = {id(self._shadows.swap(each)): each for each in tensors}
        return mapped(result, lambda each: back.get(id(each), each))

    def _released(self, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> Any:
        """Write to a master that is in place, with what was read when it was not."""
        if any(id(each) in self._quantizer.places for each in targets):
            return func(*self._shadows.swap(args), **self._shadows.swap(kwargs))
        return func(*args, **kwargs)

    def _layer(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        before = [version_of(each) for each in tensors]
        result = func(*args, **kwargs)
        moved = [each for each, version in zip(tensors, before, strict=True) if version_of(each) != version]
        self._refuse(
            [weight for each in moved if (weight := self._shadows.weight(each)) is not None],
            "a layer's function wrote to its own weight",
        )
        return result

    def _both(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], targets: list[Tensor]) -> Any:
        """Run it with the tensors that are seen, then, with the same random numbers, with their shadows."""
        generators = (*args, *kwargs.values())
        before, random = [version_of(each) for each in tensors], random_states(tensors, generators)
        result = func(*args, **kwargs)
        written = [each for each, version in zip(tensors, before, strict=True) if version_of(each) != version] + targets
        weights = [weight for each in written if (weight := self._shadows.weight(each)) is not None]
        others = [each for each in written if self._shadows.value(each) is None]
        mixed = any(self._shadows.value(each) is None and not _is_parameter(each) for each in tensors)
        mixed = mixed and any(each.requires_grad for each in tensors_in(result))
        # What was mixed with data and is differentiated is part of a forward pass.
        if others or mixed or any(self._shadows.is_spoiled(each) for each in tensors):
            self._refuse(weights, "the operator wrote to other tensors too")
            self._shadows.spoil(others)
            self._shadows.spoil(tensors_in(result))
            return result
        after = random_states(tensors, generators)
        set_random_states(random)
        try:
            # What watches the user's operators, as selective checkpoints and counters of flops do, sees each once.
            with torch.no_grad(), resolve("torch.utils._python_dispatch", "_disable_current_modes")():
                there = func(*self._shadows.swap(args), **self._shadows.swap(kwargs))
        except Exception:  # the user's own call went well
            self._refuse(weights, "the operator does not take the master")
            self._shadows.spoil(tensors_in(result))
            return result
        finally:
            set_random_states(after)
        if name in NUMBERS and not same_numbers(result, there):
            self._number = self._number or name.strip("_")
        self._shadows.pair(result, there, tensors)
        for weight in (*weights, *self._owners.masters_in(map(self._shadows.swap, targets))):
            self._take_down(weight)
        return result

    def _without(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run what no weight takes part in, unless it is a view of one, or what a state dict shows of a master."""
        targets = targets_of(name, args, kwargs) if self._quantizer.engaged else []
        masters = self._owners.masters_in(targets)
        if masters:
            self._check(masters, tensors)
        self._refuse(
            self._owners.shown_in(targets),
            "it went through a view that was taken outside of the steps that are followed",
        )
        result = func(*args, **kwargs)
        for weight in masters:
            self._take_down(weight)
        if self._shadows.spoiled and name not in LAYERS and any(self._shadows.is_spoiled(each) for each in tensors):
            self._shadows.spoil((*targets, *tensors_in(result)))
        return result

    def _is_other_parameter(self, tensor: Tensor) -> bool:
        return self._shadows.value(tensor) is None and self._owners.is_other_parameter(tensor)

    def _settle(self, tensors: Iterable[Tensor]) -> None:
        """Quantize again what was written to, if somebody reads it."""
        if any(self._is_stale(each) for each in tensors):
            self._quantizer.settle()

    def _is_stale(self, tensor: Tensor) -> bool:
        weight = self._shadows.weight(tensor)
        if weight is None:
            return False
        group, index = self._quantizer.places[weight]
        return index in group.written

    def _take_down(self, weight: int) -> None:
        self.writes = True
        self._written.add(weight)
        self._quantizer.wrote(weight)

    def _check(self, weights: list[int], tensors: list[Tensor]) -> None:
        """Refuse a write that may depend on quantized values."""
        if self._number:
            why = f"it may depend on a number that {self._number}() read from quantized values, not from masters"
            self._refuse(weights, why)
        if any(self._shadows.is_spoiled(each) for each in tensors):
            self._refuse(weights, "what was written was computed with quantized values")

    def _refuse(self, weights: list[int], why: str) -> None:
        if weights:
            raise LostWriteError(self._quantizer.names(dict.fromkeys(weights)), why)


def _is_parameter(tensor: Tensor) -> bool:
    """Tell whether a tensor is a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
