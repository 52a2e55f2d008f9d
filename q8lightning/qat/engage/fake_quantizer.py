"""Show the quantized values of a model's weights, or their masters: engage and release."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q8lightning.qat.compiled import forget_compiled_code
from q8lightning.qat.config import QATConfig
from q8lightning.qat.engage.hooks import Blocks, QuantizeInputs, StateDictHooks
from q8lightning.qat.engage.sharded_model import Gathered, OtherParameters, wait_for_readers
from q8lightning.qat.engage.weight_groups import WeightGroups
from q8lightning.qat.lost_write import BESIDE_SHARDED, NOT_FOLLOWED, SHARDED, LostWriteError
from q8lightning.qat.select.selection import SelectedModule, SelectedWeight, Selection, select
from q8lightning.qat.select.structure import Structure
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.system.ambient import untraced

_opened: "weakref.WeakSet[FakeQuantizer]" = weakref.WeakSet()


class FakeQuantizer:
    """Engages and releases the selected weights of a model.

    A gradient taken at the quantized values and applied to the masters is the straight-through estimator (Bengio et
    al., arXiv:1308.3432). The graph needs no autograd function for it, and nothing in the model is replaced:
    parameters, their names and their order stay. A state dict that is taken while the weights are engaged holds the
    masters. Only ``keep_vars=True``, which asks for the live parameters, shows the quantized values.

    Of a distributed weight, the part that this process holds is quantized. Modules that gather weights (FSDP2) gather
    quantized ones; what they had gathered before is dropped whenever the weights change.

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
        self._of_parts = False  # whether the statistics are those of the parts that this process holds
        self._handles: list[RemovableHandle] = []
        self._gathered = Gathered(module)
        self._gathered.drop()
        self._attach(select(module, config))

    def _attach(self, selection: Selection) -> None:
        """Group the selected weights, and hook into their modules."""
        self._selection = selection
        self._parts = [weight.parameter for weight in selection.weights if weight.portion is not None]
        self._structure = Structure(self.module)
        self._groups = WeightGroups(self.weights)
        self.places = self._groups.places
        """The place of each selected parameter, by its identity. Each selection has a dictionary of its own."""
        self.fingerprints = self._groups.fingerprints
        self._others = OtherParameters(self.module, self.places) if self.distributed else None
        self._inputs = [QuantizeInputs(each.rule.codebook, each.rule.per == "tensor") for each in selection.modules]
        for each, hook in zip(selection.modules, self._inputs, strict=True):
            self._handles.append(each.module.register_forward_pre_hook(hook))
        if selection.modules:
            forget_compiled_code()
        selected = {weight.parameter for weight in self.weights}
        self._owners = [each for each in self.module.modules() if not selected.isdisjoint(each.parameters(False))]
        for owner in self._owners:
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
        if self._gathered.hides_nothing_but(self._structure):
            return False
        self.release()
        self._gathered = Gathered(self.module)
        selection = select(self.module, self.config, again=True)
        self.change = self._selection.change_to(selection)
        self.close()
        self._attach(selection)
        return True

    def replaced(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that have taken the place of selected weights since the last selection, by name."""
        if self._gathered.hides_nothing_but(self._structure):
            return []
        selected = {name: weight.parameter for weight in self.weights for name in weight.names}
        now = self.module.named_parameters(remove_duplicate=False)
        return [(name, each) for name, each in now if name in selected and each is not selected[name]]

    @property
    def distributed(self) -> bool:
        """Whether there are weights of which this process holds a part."""
        return bool(self._parts)

    @property
    def weights(self) -> list[SelectedWeight]:
        """The selected weights."""
        return self._selection.weights

    @property
    def modules(self) -> list[SelectedModule]:
        """The modules whose inputs are quantized."""
        return self._selection.modules

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
            step: The global step, by which the schedule decides. None quantizes everything.
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
            LostWriteError: If code wrote to the quantized values of a weight, or, beside sharded weights, to a
                parameter that is not quantized. The masters are back then, too.
        """
        with self._at_work():
            lost = self._groups.lost()
            others = self._others.written() if self._others is not None else []
        self.restore()
        if lost:
            parts = set(map(id, self._parts))
            raise LostWriteError(self.names(lost), NOT_FOLLOWED if parts.isdisjoint(lost) else SHARDED)
        if others:
            raise LostWriteError(others, BESIDE_SHARDED)

    def restore(self) -> None:
        """Put the masters back as :meth:`release` does, without looking for lost writes: an error is on its way."""
        with self._at_work():
            if self.engaged:
                self._before_change()
            if self._others is not None:
                self._others.written()  # forget them
            self._groups.release()
        self._state = None
        for hook in self._inputs:
            hook.enabled = False

    def requantize(self) -> None:
        """Quantize those masters again that were written to."""
        if self._state is not None and self._groups.is_stale:
            with self._at_work():
                self._groups.requantize(*self._state)

    def note_write(self, parameter: int) -> None:
        """Note that the master of a weight, given by its identity, was written to; :meth:`requantize` quantizes it."""
        self._groups.note_write(parameter)

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
        return self._groups.names(parameters)

    def drop_frozen_gradients(self, step: int) -> None:
        """Remove the gradients of parameters that are frozen at a step: optimizers skip parameters without one."""
        for parameter, first in self._selection.frozen:
            if step >= first:
                parameter.grad = None

    def master(self, parameter: Tensor) -> Tensor | None:
        """Return the master of an engaged weight, None for any other tensor."""
        return self._groups.master(parameter) if self.engaged else None

    def has_weights_of(self, module: nn.Module) -> bool:
        """Whether a module has selected weights, also while others stand in for them because they are gathered."""
        owners = set(map(id, self._owners))
        return any(id(each) in owners for each in module.modules()) or any(
            id(parameter) in self.places for parameter in module.parameters()
        )

    def wait_for_writes(self) -> None:
        """Let the host wait until the weights are written, if what gathers them next would not."""
        for device in self._groups.devices if self.distributed and self._gathered else ():
            if device.type != "cpu":
                torch.accelerator.current_stream(device).synchronize()

    def note_others(self) -> None:
        """Note that parameters which are not quantized were updated as they should, by an optimizer."""
        if self._others is not None and self.engaged:
            self._others.note()

    def add_up_statistics(self) -> None:
        """Make :attr:`statistics` those of whole weights; all processes call this at once, after the same step."""
        if self.distributed and self._of_parts:
            self._statistics = self._groups.of_whole_weights(self._statistics)
            self._of_parts = False

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

    def _before_change(self) -> None:
        """Drop the gathered values of sharded weights, and wait until nothing reads the parts."""
        if self._parts:
            self._gathered.drop()
            wait_for_readers(self._parts)

    def _write(self, share: float, seed: int, measure: bool) -> None:
        self.release()
        try:
            with self._at_work():
                self._before_change()
                statistics = self._groups.engage(share, seed, measure)
        except BaseException:
            self.restore()  # some groups are engaged already
            raise
        self._state = (share, seed)
        self.note_others()
        for hook in self._inputs:
            hook.enabled = True
        if measure:
            self._statistics, self._of_parts = statistics, True


def open_quantizers() -> list[FakeQuantizer]:
    """Return the fake quantizers of this process that are not closed."""
    return list(_opened)
