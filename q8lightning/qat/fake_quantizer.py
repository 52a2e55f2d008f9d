"""Show the quantized values of a model's weights, or their masters: engage and release."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q8lightning.qat.compiled import forget_compiled_code
from q8lightning.qat.config import QATConfig
from q8lightning.qat.fingerprints import Fingerprints
from q8lightning.qat.hooks import Blocks, QuantizeInputs, StateDictHooks
from q8lightning.qat.lost_write import LostWriteError
from q8lightning.qat.selection import SelectedWeight, Selection, select
from q8lightning.qat.structure import Structure
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.system.ambient import untraced

Place = tuple[FakeQuantizeGroup, int]
"""A group, and the index of one of its tensors."""

_opened: "weakref.WeakSet[FakeQuantizer]" = weakref.WeakSet()


class FakeQuantizer:
    """Engages and releases the selected weights of a model.

    A gradient taken at the quantized values and applied to the masters is the straight-through estimator (Bengio et
    al., arXiv:1308.3432). The graph needs no autograd function for it, and nothing in the model is replaced:
    parameters, their names and their order stay. A state dict that is taken while the weights are engaged holds the
    masters. Only ``keep_vars=True``, which asks for the live parameters, shows the quantized values.

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
        """What the last :meth:`follow` changed; None if the same weights and modules are quantized."""
        self.busy = False
        """Whether the operators that run are the quantizer's own, not the user's."""
        self.generation = 0
        """A number that grows whenever a weight may have got other memory."""
        self.followed = False
        """Whether all writes are followed at the moment."""
        self._state: Blocks | None = None
        self._suspended = 0  # how many contexts of masters() are open
        self._statistics: dict[str, ErrorStatistics] = {}
        self._handles: list[RemovableHandle] = []
        self._attach(select(module, config))

    def _attach(self, selection: Selection) -> None:
        """Group the selected weights, and hook into their modules."""
        self._selection = selection
        self._structure = Structure(self.module)
        self._groups = _groups(self.weights)
        self.places: dict[int, Place] = {
            id(tensor): (group, i) for group in self._groups for i, tensor in enumerate(group.tensors)
        }
        """The place of each selected parameter, by its identity. Each selection has a dictionary of its own."""
        self.fingerprints = Fingerprints(self.places)
        self._inputs = [QuantizeInputs(each.rule.codebook, each.rule.per == "tensor") for each in selection.modules]
        for each, hook in zip(selection.modules, self._inputs, strict=True):
            self._handles.append(each.module.register_forward_pre_hook(hook))
        if selection.modules:
            forget_compiled_code()
        selected = {weight.parameter for weight in self.weights}
        for owner in self.module.modules():
            if not selected.isdisjoint(owner.parameters(recurse=False)):
                self._handles += StateDictHooks(self).attach(owner)
        _opened.add(self)

    def follow(self) -> bool:
        """Select again if a parameter or module was added, removed or replaced since the last selection.

        The weights hold their masters after that, and :attr:`change` says what joined and what left.

        Returns:
            Whether the model had changed.

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
        """Return the parameters that have taken the place of selected weights since the last selection, by name."""
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
    def engaged(self) -> bool:
        """Whether the weights hold quantized values."""
        return self._state is not None

    @property
    def statistics(self) -> Mapping[str, ErrorStatistics]:
        """What each selected weight lost when it was last measured, by its first name; empty if it never was."""
        return self._statistics

    @untraced
    def engage(self, step: int | None = None, training: bool = False, measure: bool = False) -> bool:
        """Let the weights show their quantized values, unless they show the right ones already.

        Args:
            step: The global step, by which the schedule decides. None quantizes everything, whatever the schedule.
            training: Whether the ramp applies.
            measure: Whether to compute :attr:`statistics`.

        Returns:
            Whether the weights are quantized now.
        """
        if self._suspended:
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
        """Put the masters back, bit for bit, if the weights are engaged.

        Raises:
            LostWriteError: If somebody wrote to the quantized values of a weight. The masters are back then, too.
        """
        with self._at_work():
            lost = [id(group.tensors[index]) for group in self._groups for index in group.lost()]
            lost = lost or self.fingerprints.changed()
        self.restore()
        if lost:
            raise LostWriteError(self.names(lost))

    def restore(self) -> None:
        """Put the masters back as :meth:`release` does, without looking for lost writes: an error is on its way."""
        with self._at_work():
            for group in self._groups:
                group.release()
        self._state = None
        self.fingerprints.clear()
        for hook in self._inputs:
            hook.enabled = False

    def requantize(self) -> None:
        """Quantize those masters again that were written to."""
        if self._state is not None and any(group.written for group in self._groups):
            with self._at_work():
                weights = [weight for weight, (group, index) in self.places.items() if index in group.written]
                for group in self._groups:
                    group.settle(*self._state)
                self.fingerprints.record(weight for weight in weights if weight in self.fingerprints)

    def note_write(self, parameter: int) -> None:
        """Note that the master of a weight, given by its identity, was written to; :meth:`requantize` quantizes it."""
        group, index = self.places[parameter]
        group.wrote(index)

    def note_access(self, parameter: int) -> None:
        """Note that the memory of what may be a weight was handed out: a write there shows only in its fingerprint."""
        if self._state is None or self.busy or self.followed or parameter not in self.places:
            return
        if parameter not in self.fingerprints:
            with self._at_work():
                self.fingerprints.record([parameter])

    def interrupt(self) -> Blocks | None:
        """Put the masters back, and return what :meth:`resume` needs; None if they were there.

        Raises:
            LostWriteError: As :meth:`release`.
        """
        interrupted = self._state
        self.release()
        return interrupted

    def resume(self, blocks: Blocks) -> None:
        """Quantize the masters as they are now, and the same blocks as before :meth:`interrupt`."""
        self._write(*blocks, measure=False)

    @contextmanager
    def masters(self) -> Iterator[None]:
        """Put the masters back for a while; what they hold at the end is quantized, if the weights were engaged."""
        interrupted = self.interrupt()
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1
            if interrupted is not None and not self._suspended:
                self.resume(interrupted)

    def names(self, parameters: Iterable[int]) -> list[str]:
        """Return the first names of selected parameters that are given by their identity."""
        names = {id(weight.parameter): weight.names[0] for weight in self.weights}
        return [names[each] for each in parameters]

    def drop_frozen_gradients(self, step: int) -> None:
        """Remove the gradients of parameters that are frozen at a step: optimizers skip parameters without one."""
        for parameter, first in self._selection.frozen:
            if step >= first:
                parameter.grad = None

    def master(self, parameter: Tensor) -> Tensor | None:
        """Return the master of an engaged weight, None for any other tensor."""
        if not self.engaged or id(parameter) not in self.places:
            return None
        group, index = self.places[id(parameter)]
        return group.masters[index].detach()  # a tensor of its own: the caller may set its data

    def close(self) -> None:
        """Put the masters back, and remove all hooks from the model."""
        self.restore()
        _opened.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Mark operators as the quantizer's own, so that neither autograd nor the following of writes sees them."""
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
                self.fingerprints.record(self.places if self.fingerprints.compare_all else ())
        except BaseException:
            self.restore()  # some groups are engaged already
            raise
        self._state = (share, seed)
        for hook in self._inputs:
            hook.enabled = True
        if measure:
            rows = [row for of_group in measured if of_group is not None for row in of_group]
            names = self.names(id(tensor) for group in self._groups for tensor in group.tensors)
            self._statistics = {name: ErrorStatistics(*row.unbind()) for name, row in zip(names, rows, strict=True)}


def open_quantizers() -> list[FakeQuantizer]:
    """Return the fake quantizers of this process that are not closed."""
    return list(_opened)


def _groups(weights: list[SelectedWeight]) -> list[FakeQuantizeGroup]:
    """Group weights by codec and device, because a group is quantized in one launch for each dtype."""
    together: dict[tuple[WeightCodec, torch.device], list[Tensor]] = {}
    for weight in weights:
        together.setdefault((weight.codec, weight.parameter.device), []).append(weight.parameter)
    return [
        FakeQuantizeGroup(tensors, codec.book, codec.block_size, codec.axis) for (codec, _), tensors in together.items()
    ]
