"""Show the quantized values of a model's weights, or their masters: engage and release."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from q8lightning.qat.config import QATConfig
from q8lightning.qat.engage.attachment import Attachment
from q8lightning.qat.engage.hooks import Blocks
from q8lightning.qat.engage.sharded_model import ShardedModel
from q8lightning.qat.lost_write import BESIDE_SHARDED, NOT_FOLLOWED, SHARDED, LostWriteError
from q8lightning.qat.select.selected import SelectedModule, SelectedWeight, Selection
from q8lightning.qat.select.selection import select
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
        sharded = ShardedModel(module)
        sharded.drop_gathered()
        self._attach(select(module, config), sharded)

    def _attach(self, selection: Selection, sharded: ShardedModel) -> None:
        """Hook a selection into the model."""
        self._sharded = sharded
        self._attached = Attachment(self, self.module, selection)
        self._groups = self._attached.groups
        self.places = self._groups.places
        """The place of each selected parameter, by its identity. Each selection has a dictionary of its own."""
        self.fingerprints = self._groups.fingerprints
        parts = [weight.parameter for weight in selection.weights if weight.portion is not None]
        sharded.select(self.module, parts, self.places.keys())
        _opened.add(self)

    def follow(self) -> bool:
        """Select again if a parameter or module was added, removed or replaced since the last selection.

        The weights hold their masters after that, and :attr:`change` says what joined and what left.

        Returns:
            Whether the model had changed.

        Raises:
            ValueError: If a parameter that the rules select now cannot be changed in place.
        """
        if self._sharded.hides_nothing_but(self._attached.structure):
            return False
        self.release()
        sharded = ShardedModel(self.module)
        selection = select(self.module, self.config, again=True)
        self.change = self._attached.selection.change_to(selection)
        self.close()
        self._attach(selection, sharded)
        return True

    def replaced(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that have taken the place of selected weights since the last selection, by name."""
        if self._sharded.hides_nothing_but(self._attached.structure):
            return []
        return self._attached.replaced()

    @property
    def distributed(self) -> bool:
        """Whether there are weights of which this process holds a part."""
        return bool(self._sharded.parts)

    @property
    def weights(self) -> list[SelectedWeight]:
        """The selected weights."""
        return self._attached.selection.weights

    @property
    def modules(self) -> list[SelectedModule]:
        """The modules whose inputs are quantized."""
        return self._attached.selection.modules

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
            others = self._sharded.written_others()
        self.restore()
        if lost:
            parts = set(map(id, self._sharded.parts))
            raise LostWriteError(self.names(lost), NOT_FOLLOWED if parts.isdisjoint(lost) else SHARDED)
        if others:
            raise LostWriteError(others, BESIDE_SHARDED)

    def restore(self) -> None:
        """Put the masters back as :meth:`release` does, without looking for lost writes: an error is on its way."""
        with self._at_work():
            if self.engaged:
                self._sharded.before_change()
            self._sharded.written_others()  # forget them
            self._groups.release()
        self._state = None
        self._attached.quantize_inputs(False)

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
        for parameter, first in self._attached.selection.frozen:
            if step >= first:
                parameter.grad = None

    def master(self, parameter: Tensor) -> Tensor | None:
        """Return the master of an engaged weight, None for any other tensor."""
        return self._groups.master(parameter) if self.engaged else None

    def has_weights_of(self, module: nn.Module) -> bool:
        """Whether a module has selected weights, also while others stand in for them because they are gathered."""
        return self._attached.has_weights_of(module)

    def wait_for_writes(self) -> None:
        """Let the host wait until the weights are written, if what gathers them next would not."""
        self._sharded.wait_for_writes(self._groups.devices)

    def note_others(self) -> None:
        """Note that parameters which are not quantized were updated as they should, by an optimizer."""
        if self.engaged:
            self._sharded.note_others()

    def add_up_statistics(self) -> None:
        """Make :attr:`statistics` those of whole weights; all processes call this at once, after the same step."""
        if self.distributed and self._of_parts:
            self._statistics = self._groups.of_whole_weights(self._statistics)
            self._of_parts = False

    def close(self) -> None:
        """Put the masters back, and remove all hooks from the model."""
        self.restore()
        _opened.discard(self)
        self._attached.remove()

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
                self._sharded.before_change()
                statistics = self._groups.engage(share, seed, measure)
        except BaseException:
            self.restore()  # some groups are engaged already
            raise
        self._state = (share, seed)
        self.note_others()
        self._attached.quantize_inputs(True)
        if measure:
            self._statistics, self._of_parts = statistics, True


def open_quantizers() -> list[FakeQuantizer]:
    """Return the fake quantizers of this process that are not closed."""
    return list(_opened)
