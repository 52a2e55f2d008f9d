"""A model whose selected weights hold quantized values while it is engaged, and their masters at every other time."""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q8lightning.qat.config import QATConfig
from q8lightning.qat.fingerprints import Fingerprints
from q8lightning.qat.lost_write import LostWriteError
from q8lightning.qat.selection import SelectedWeight, Selection, select
from q8lightning.qat.structure import Structure
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.functional import fake_quantize_rows
from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.system.ambient import untraced

Place = tuple[FakeQuantizeGroup, int]
"""A group, and which of its tensors."""

_opened: "weakref.WeakSet[FakeQuantizer]" = weakref.WeakSet()


class FakeQuantizer:
    """Engages and releases the weights of a model, and hooks into it so that nobody takes quantized values for masters.

    A gradient taken at the quantized values and applied to the masters is the straight-through estimator (Bengio et
    al., arXiv:1308.3432), without an autograd function in the graph. Nothing in the model is replaced: parameters,
    their names and their order stay; a state dict that is taken while engaged holds the masters (those of
    ``keep_vars=True``, which asks for the live parameters, aside), and loading one releases for the time it takes.

    Args:
        module: The model, on its device.
        config: What to quantize, and when.

    Raises:
        ValueError: If a pattern matches nothing, or a selected parameter cannot be changed in place.

    Example:
        >>> model = nn.Linear(64, 64)
        >>> quantizer = FakeQuantizer(model, QATConfig())
        >>> quantizer.engage()
        True
        >>> _ = model(torch.zeros(1, 64))  # with weights on the grid of 8-bit codes
        >>> quantizer.release()
    """

    def __init__(self, module: nn.Module, config: QATConfig) -> None:
        self.module = module
        self.config = config
        self.change: str | None = None
        """What :meth:`follow` changed when it last did; None if nothing that is quantized."""
        self._state: tuple[float, int] | None = None
        self._held = 0
        self.busy = False
        """Whether the quantizer itself is at work, in operators that are not the user's."""
        self.generation = 0
        """Grows whenever a weight may have got other memory."""
        self.followed = False
        """Whether somebody follows all writes at the moment."""
        self._statistics: dict[str, ErrorStatistics] = {}
        self._handles: list[RemovableHandle] = []
        self._attach(select(module, config))

    def _attach(self, selection: Selection) -> None:
        """Take over a selection: lay the groups, hook into the modules."""
        self._selection = selection
        self._structure = Structure(self.module)
        self._groups = _groups(self.weights)
        self.places: dict[int, Place] = {
            id(tensor): (group, i) for group in self._groups for i, tensor in enumerate(group.tensors)
        }
        """Where each selected parameter is, by its identity; another dictionary for another selection."""
        self.fingerprints = Fingerprints(self.places)
        self._activations = [_Activation(each.rule.codebook, each.rule.per == "tensor") for each in selection.modules]
        for each, activation in zip(selection.modules, self._activations, strict=True):
            self._handles.append(each.module.register_forward_pre_hook(activation))
        if selection.modules:
            _forget_compiled()
        selected = {weight.parameter for weight in self.weights}
        for owner in self.module.modules():
            if not selected.isdisjoint(owner.parameters(recurse=False)):
                self._handles += _StateDictHooks(self).attach(owner)
        _opened.add(self)

    def follow(self) -> bool:
        """Select again if a parameter or module of the model was added, removed or replaced since the last time.

        The weights hold their masters afterwards, if so; :attr:`change` says what joined and what left.

        Returns:
            Whether there was something to follow.

        Raises:
            ValueError: If a parameter that the rules select now cannot be changed in place.
        """
        if self._structure.unchanged():
            return False
        self.release()
        selection = select(self.module, self.config, again=True)
        self.change = self._selection.change_to(selection)
        self.close()
        self._attach(selection)
        return True

    def replaced(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that have taken the names of selected weights since the last :meth:`follow`."""
        if self._structure.unchanged():
            return []
        selected = {name: weight.parameter for weight in self.weights for name in weight.names}
        now = self.module.named_parameters(remove_duplicate=False)
        return [(name, each) for name, each in now if name in selected and each is not selected[name]]

    @property
    def weights(self) -> list[SelectedWeight]:
        """The selected weights."""
        return self._selection.weights

    @property
    def codecs(self) -> dict[str, WeightCodec]:
        """How each selected weight is quantized, by all of its names."""
        return {name: weight.codec for weight in self.weights for name in weight.names}

    @property
    def engaged(self) -> bool:
        """Whether the weights hold quantized values."""
        return self._state is not None

    @property
    def statistics(self) -> Mapping[str, ErrorStatistics]:
        """What each selected weight lost when it was last measured, by its first name."""
        return self._statistics

    @untraced
    def engage(self, step: int | None = None, training: bool = False, measure: bool = False) -> bool:
        """Write the quantized values of the masters into the weights, unless the right ones are there.

        Args:
            step: The global step, which decides by the schedule; None quantizes everything, whatever the schedule.
            training: Whether the ramp applies.
            measure: Whether to compute :attr:`statistics`.

        Returns:
            Whether the weights are quantized now.
        """
        if self._held:
            return False
        share, seed = 1.0, 0
        if step is not None:
            share = self.config.share(step) if training else float(self.config.active(step))
            seed = self.config.seed_at(step) if share < 1.0 else 0
        if share == 0.0:
            self.release()
        elif self._state != (share, seed):
            self._write(share, seed, measure)
        return self.engaged

    @untraced
    def release(self) -> None:
        """Put the masters back, bit for bit; nothing happens if they are there.

        Raises:
            LostWriteError: With the masters back, if somebody wrote to a weight while it held its quantized values.
        """
        with self._at_work():
            lost = [id(group.tensors[index]) for group in self._groups for index in group.lost()]
            lost = lost or self.fingerprints.altered()
        self.restore()
        if lost:
            raise LostWriteError(self.names(lost))

    def restore(self) -> None:
        """Put the masters back as :meth:`release` does, whatever was written in between; for errors on their way."""
        with self._at_work():
            for group in self._groups:
                group.release()
        self._state = None
        self.fingerprints.forget()
        for activation in self._activations:
            activation.enabled = False

    def settle(self) -> None:
        """Quantize those masters again that were written to since they were quantized."""
        if self._state is not None and any(group.written for group in self._groups):
            with self._at_work():
                weights = [weight for weight, (group, index) in self.places.items() if index in group.written]
                for group in self._groups:
                    group.settle(*self._state)
                self.fingerprints.take(weight for weight in weights if weight in self.fingerprints)

    def wrote(self, parameter: int) -> None:
        """Take down that the master of a weight, given by its identity, was written to; :meth:`settle` quantizes it."""
        group, index = self.places[parameter]
        group.wrote(index)

    @contextmanager
    def masters(self) -> Iterator[None]:
        """Put the masters back for a while; what is in them at the end is quantized, if they were."""
        interrupted = self._state
        self.release()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if interrupted is not None and not self._held:
                self._write(*interrupted, measure=False)

    def touched(self, parameter: int) -> None:
        """Take down that somebody looks into the memory of what may be a weight: a release compares it then."""
        if self._state is None or self.busy or self.followed or parameter not in self.places:
            return
        if parameter not in self.fingerprints:
            with self._at_work():
                self.fingerprints.take([parameter])

    def names(self, parameters: Iterable[int]) -> list[str]:
        """Return the first names of parameters that are given by their identity."""
        known = {id(weight.parameter): weight.names[0] for weight in self.weights}
        return [known[each] for each in parameters]

    def drop_frozen_gradients(self, step: int) -> None:
        """Forget the gradients of parameters that are frozen at a step: optimizers pass over what has none."""
        for parameter, first in self._selection.frozen:
            if step >= first:
                parameter.grad = None

    def master(self, parameter: Tensor) -> Tensor | None:
        """Return the master of a weight that holds quantized values now; None for others."""
        if not self.engaged or id(parameter) not in self.places:
            return None
        group, index = self.places[id(parameter)]
        return group.masters[index].detach()  # another tensor, whose owner may change what it points at

    def close(self) -> None:
        """Put the masters back and take all hooks off the model."""
        self.restore()
        _opened.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Surround operators that nobody shall follow, and that autograd has nothing to do with."""
        outer, self.busy = self.busy, True
        self.generation += 1
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = outer

    def _write(self, share: float, seed: int, measure: bool) -> None:
        self.release()
        try:
            with self._at_work():
                measured = [group.engage(share, seed, measure) for group in self._groups]
                self.fingerprints.take(self.places if self.fingerprints.of_all else ())
        except BaseException:
            self.restore()  # those groups that got so far
            raise
        self._state = (share, seed)
        for activation in self._activations:
            activation.enabled = True
        if measure:
            names = {id(weight.parameter): weight.names[0] for weight in self.weights}
            self._statistics = {
                names[id(tensor)]: ErrorStatistics(*row.unbind())
                for group, rows in zip(self._groups, measured, strict=True)
                if rows is not None
                for tensor, row in zip(group.tensors, rows, strict=True)
            }


def open_quantizers() -> list[FakeQuantizer]:
    """Return the fake quantizers of this process that are not closed."""
    return list(_opened)


def _forget_compiled() -> None:
    """Let compiled code be compiled again: what was compiled before a hook was there goes on without it."""
    if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
        torch.compiler.reset()


def _groups(weights: list[SelectedWeight]) -> list[FakeQuantizeGroup]:
    """Group weights by codec and device: each group is quantized in one launch."""
    together: dict[tuple[WeightCodec, torch.device], list[Tensor]] = {}
    for weight in weights:
        together.setdefault((weight.codec, weight.parameter.device), []).append(weight.parameter)
    return [
        FakeQuantizeGroup(tensors, codec.book, codec.block_size, codec.axis) for (codec, _), tensors in together.items()
    ]


class _Activation:
    """A forward pre-hook that quantizes the float tensors among a module's positional arguments."""

    def __init__(self, codebook: Any, per_tensor: bool) -> None:
        self.codebook = codebook
        self.per_tensor = per_tensor
        self.enabled = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.enabled:
            return args
        return tuple(
            fake_quantize_rows(x, self.codebook, self.per_tensor)
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in args
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _Activation, (self.codebook, self.per_tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Activation":
        return _Activation(self.codebook, self.per_tensor)


class _StateDictHooks:
    """Hooks of a module that owns selected weights; copies of the module carry copies of these, which do nothing."""

    def __init__(self, quantizer: FakeQuantizer | None = None) -> None:
        self._quantizer = (lambda: None) if quantizer is None else weakref.ref(quantizer)
        self._interrupted: tuple[float, int] | None = None

    def attach(self, owner: nn.Module) -> list[RemovableHandle]:
        """Register all hooks."""
        return [
            owner.register_state_dict_post_hook(self),  # type: ignore[no-untyped-call]
            owner.register_load_state_dict_pre_hook(self.before_load),  # type: ignore[no-untyped-call]
            owner.register_load_state_dict_post_hook(self.after_load),  # type: ignore[no-untyped-call]
        ]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Show the masters where the state dict would show quantized values."""
        quantizer = self._quantizer()
        if quantizer is None or not quantizer.engaged:
            return
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            value = state_dict.get(prefix + name)
            if value is parameter or not isinstance(value, Tensor) or value.data_ptr() != parameter.data_ptr():
                continue
            master = quantizer.master(parameter)
            if master is not None:
                state_dict[prefix + name] = master

    def before_load(self, *_: Any) -> None:
        """Let the values that are loaded become masters."""
        quantizer = self._quantizer()
        if quantizer is not None and quantizer.engaged:
            self._interrupted = quantizer._state
            quantizer.release()

    def after_load(self, *_: Any) -> None:
        """Go on with what was loaded."""
        quantizer, interrupted, self._interrupted = self._quantizer(), self._interrupted, None
        if quantizer is not None and interrupted is not None:
            quantizer._write(*interrupted, measure=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _StateDictHooks, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StateDictHooks":
        return _StateDictHooks()
