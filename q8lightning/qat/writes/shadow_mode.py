"""Let writes to quantized weights reach the masters, with the values that they would have without QAT.

While weights are engaged, the user reads their quantized values, but what the user writes belongs to the masters. So
all that is computed from weights is computed twice: with quantized values, which the user sees, and with masters. The
second result is the *shadow* of the first. A write to a weight changes its master, and takes the shadows of its
arguments; the weight is quantized again when it is read next.

What a layer returns (a linear map, a convolution, an embedding, attention) has no shadow, because layers are meant to
compute with quantized weights. A tensor is *tainted* if it was computed from quantized values and has no shadow. A
tainted tensor must not be written to a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
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
    """A mode in which every write to an engaged weight reaches its master, or raises.

    Args:
        quantizer: Has the weights and their masters.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        super().__init__()
        self.writes = False
        """Whether there was a write. Then every later step has to be followed."""
        self.compiled = False
        """Whether compiled code has run, in which nothing can be followed."""
        self.paused = False
        """Whether operators run as they are for now."""
        self._quantizer = quantizer
        self._reader = ""  # what read a number that differs for quantized values and masters
        self._written: set[int] = set()
        self._owners = StorageOwners(quantizer)
        self._shadows = Shadows(quantizer, self._owners)

    def begin(self) -> None:
        """Begin a step: numbers that were read in an earlier one no longer count."""
        self._reader = ""

    def end(self) -> None:
        """End a step. If compiled code ran in it, this also ends following.

        Raises:
            LostWriteError: If compiled code ran and a weight was written to: the code may have read that weight, or
                computed what was written.
        """
        if self.compiled:
            self._quantizer.followed = False
            self._refuse([each for each in self._written if each in self._quantizer.places], BESIDE_COMPILED)

    def may_leave(self, arguments: Any) -> bool:
        """Tell whether code that takes these arguments may run without being followed.

        It may if no argument has a shadow. Weights that were written to are quantized first, since the code may read
        them.
        """
        self._quantizer.requantize()
        return not any(
            self._shadows.value(each) is not None or self._shadows.is_tainted(each) for each in tensors_in(arguments)
        )

    def refuse_computed(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse parameters, given with their names, that a step computed from quantized values."""
        names = [name for name, parameter in parameters if self._shadows.is_tainted(parameter)]
        if names:
            raise LostWriteError(names, "it was replaced by a parameter that was computed from quantized values")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            self.compiled = True  # compiled code repeats this assignment whenever it runs
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
            self._requantize_stale(tensors_in(args))  # a kernel of the user's may read at the address
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if not any(self._shadows.value(each) is not None for each in tensors):
            return self._run_without_shadows(func, name, args, kwargs, tensors)
        targets = targets_of(name, args, kwargs)
        if not self._quantizer.engaged:
            return self._run_released(func, args, kwargs, targets)
        weights = [weight for each in targets if (weight := self._shadows.weight(each)) is not None]
        # A parameter that is not quantized takes what it would take without QAT: values computed from masters.
        ours = bool(weights) or (bool(targets) and all(map(self._is_other_parameter, targets)))
        # Autograd refuses in-place writes to what it differentiates. It has to see those calls as they are.
        refused = name != "__set__" and torch.is_grad_enabled() and any(each.requires_grad for each in targets)
        if ours and not refused and name not in RESHAPING:
            if name in ACCESSORS:
                self._owners.moved = True
            return self._run_on_masters(func, args, kwargs, tensors, weights)
        if name not in LAZY:
            self._requantize_stale(tensors)
        if name in LAYERS and any(self._shadows.value(each) is None for each in tensors):
            return self._run_layer(func, args, kwargs, tensors)
        return self._run_twice(func, name, args, kwargs, tensors, targets)

    def _run_on_masters(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], weights: list[int]) -> Any:
        """Run a write with shadows only: a graph may have saved the quantized values for backward."""
        self._check(weights, tensors)
        with torch.no_grad():
            result = func(*self._shadows.swap(args), **self._shadows.swap(kwargs))
        self.writes = True
        for weight in weights:
            self._note_write(weight)
        back = {id(self._shadows.swap(each)): each for each in tensors}
        return mapped(result, lambda each: back.get(id(each), each))

    def _run_released(self, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> Any:
        """Run an operator while the masters are in place: a write takes the shadows of what was read before."""
        if any(id(each) in self._quantizer.places for each in targets):
            return func(*self._shadows.swap(args), **self._shadows.swap(kwargs))
        return func(*args, **kwargs)

    def _run_layer(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run a layer's function as it is, and refuse what it writes to its weights."""
        before = [version_of(each) for each in tensors]
        result = func(*args, **kwargs)
        moved = [each for each, version in zip(tensors, before, strict=True) if version_of(each) != version]
        self._refuse(
            [weight for each in moved if (weight := self._shadows.weight(each)) is not None],
            "a layer's function wrote to its own weight",
        )
        return result

    def _run_twice(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], targets: list[Tensor]
    ) -> Any:
        """Run an operator with what the user sees, then with shadows and the same random numbers."""
        generators = (*args, *kwargs.values())
        before, random = [version_of(each) for each in tensors], random_states(tensors, generators)
        result = func(*args, **kwargs)
        written = [each for each, version in zip(tensors, before, strict=True) if version_of(each) != version] + targets
        weights = [weight for each in written if (weight := self._shadows.weight(each)) is not None]
        others = [each for each in written if self._shadows.value(each) is None]
        mixed = any(self._shadows.value(each) is None and not _is_parameter(each) for each in tensors)
        mixed = mixed and any(each.requires_grad for each in tensors_in(result))
        # A differentiable result of weights and data is part of a forward pass, as what a layer returns.
        if others or mixed or any(self._shadows.is_tainted(each) for each in tensors):
            self._refuse(weights, "the operator wrote to other tensors too")
            self._shadows.taint(others)
            self._shadows.taint(tensors_in(result))
            return result
        after = random_states(tensors, generators)
        set_random_states(random)
        try:
            # Modes that watch operators, such as selective checkpointing and flop counters, must see each call once.
            with torch.no_grad(), resolve("torch.utils._python_dispatch", "_disable_current_modes")():
                there = func(*self._shadows.swap(args), **self._shadows.swap(kwargs))
        except Exception:  # must not reach the user, whose call has succeeded
            self._refuse(weights, "the operator does not take the master")
            self._shadows.taint(tensors_in(result))
            return result
        finally:
            set_random_states(after)
        if name in NUMBERS and not same_numbers(result, there):
            self._reader = self._reader or name.strip("_")
        self._shadows.pair(result, there, tensors)
        for weight in (*weights, *self._owners.masters_in(map(self._shadows.swap, targets))):
            self._note_write(weight)
        return result

    def _run_without_shadows(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run an operator whose arguments have no shadow: it may write to a master's memory, or pass on taint."""
        targets = targets_of(name, args, kwargs) if self._quantizer.engaged else []
        masters = self._owners.masters_in(targets)
        if masters:
            self._check(masters, tensors)
        self._refuse(
            self._owners.shown_in(targets),
            "it went through a view that was made outside of the steps that are followed",
        )
        result = func(*args, **kwargs)
        for weight in masters:
            self._note_write(weight)
        if self._shadows.tainted and name not in LAYERS and any(self._shadows.is_tainted(each) for each in tensors):
            self._shadows.taint((*targets, *tensors_in(result)))
        return result

    def _is_other_parameter(self, tensor: Tensor) -> bool:
        return self._shadows.value(tensor) is None and self._owners.is_other_parameter(tensor)

    def _requantize_stale(self, tensors: Iterable[Tensor]) -> None:
        """Quantize weights again that were written to, if one of them is among the tensors that are read."""
        if any(self._is_stale(each) for each in tensors):
            self._quantizer.requantize()

    def _is_stale(self, tensor: Tensor) -> bool:
        weight = self._shadows.weight(tensor)
        if weight is None:
            return False
        group, index = self._quantizer.places[weight]
        return index in group.written

    def _note_write(self, weight: int) -> None:
        """Note that a weight's master was written to."""
        self.writes = True
        self._written.add(weight)
        self._quantizer.note_write(weight)

    def _check(self, weights: list[int], tensors: list[Tensor]) -> None:
        """Refuse a write of ``tensors`` to weights if it may depend on quantized values."""
        if self._reader:
            why = f"it may depend on a number that {self._reader}() read from quantized values, not from masters"
            self._refuse(weights, why)
        if any(self._shadows.is_tainted(each) for each in tensors):
            self._refuse(weights, "what was written was computed from quantized values")

    def _refuse(self, weights: list[int], why: str) -> None:
        if weights:
            raise LostWriteError(self._quantizer.names(dict.fromkeys(weights)), why)


def _is_parameter(tensor: Tensor) -> bool:
    """Tell whether a tensor is a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
