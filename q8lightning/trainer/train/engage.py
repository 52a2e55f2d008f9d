"""Engage weights while forward and backward run, and release them before other code can look.

Lightning calls methods of its precision plugin around forward, backward and the optimizer's step. They are wrapped on
the Trainer's plugin, which works for every strategy, precision and kind of optimization.

Between forward and backward, and between two batches, the weights stay engaged if no code of the user runs there (a
hook of the model or of another callback). They are then quantized once for an optimizer step, also while gradients
accumulate. Where such code runs, it sees the masters, and what it leaves is quantized before the next forward or
backward.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.qat.writes.follow import WriteFollower
from q8lightning.system.ambient import untraced
from q8lightning.trainer.lightning_api.stand_in import StandIn
from q8lightning.trainer.train.user_code import ACCUMULATING, AFTER_BACKWARD, BETWEEN, EVALUATING, somebody_runs


class Engagement:
    """Engages a :class:`FakeQuantizer` around every step of a run, until :meth:`close`.

    Args:
        quantizer: What is engaged.
        precision: Lightning's precision plugin; some of its methods are wrapped until :meth:`close`.
        owners: The model and the callbacks, whose hooks may run in between.
        step: Returns the global step while training, None if the schedule does not apply.
        manual: Whether the model steps its optimizers itself, within its training step.
        measure: Returns whether statistics are wanted for the step that begins.
        follow: Called before each step, when no graph is alive, to let the quantizer follow the model.
    """

    def __init__(
        self,
        quantizer: FakeQuantizer,
        precision: Any,
        owners: Iterable[Any],
        step: Callable[[], int | None],
        manual: bool,
        measure: Callable[[], bool] = lambda: False,
        follow: Callable[[], None] = lambda: None,
    ) -> None:
        owners = list(owners)
        self.quantizer = quantizer
        self._writes = WriteFollower(quantizer)
        self._precision = precision
        self._step = step
        self._manual = manual
        self._measure = measure
        self._follow = follow
        self._between = somebody_runs(BETWEEN, owners)
        self._after_backward = somebody_runs(AFTER_BACKWARD, owners)
        self._accumulating = somebody_runs(ACCUMULATING, owners)
        self._evaluating = somebody_runs(EVALUATING, owners)
        self._in_manual_step = self._in_backward = self._in_optimizer_step = False
        around: dict[str, Callable[..., Any]] = {
            "train_step_context": self._around_training_step,
            "val_step_context": self._around_evaluation,
            "test_step_context": self._around_evaluation,
            "predict_step_context": self._around_evaluation,
            "pre_backward": self._around_hook_before_backward,
            "backward": self._around_backward,
            "post_backward": self._around_hook_after_backward,
            "optimizer_step": self._around_optimizer_step,
        }
        self._own = {name: precision.__dict__[name] for name in around if name in precision.__dict__}
        self._wrapped = list(around)
        for name, wrapper in around.items():
            setattr(precision, name, _Around(getattr(precision, name), wrapper))
        self._handles = [
            register_optimizer_step_pre_hook(self._before_any_step),
            register_optimizer_step_post_hook(self._after_any_step),
        ]

    def close(self) -> None:
        """Put the masters back, the plugin as it was, and remove all hooks."""
        self.quantizer.close()
        self._writes.close()
        for name in self._wrapped:
            self._precision.__dict__.pop(name, None)
        self._precision.__dict__.update(self._own)
        self._wrapped.clear()
        for handle in self._handles:
            handle.remove()

    @untraced
    def _engage(self, training: bool = True) -> None:
        measure = training and not self.quantizer.engaged and self._measure()
        self.quantizer.engage(self._step(), training, measure)

    @contextmanager
    def _engaged(self, training: bool = True) -> Iterator[None]:
        """Engage for the block; if the block raises, put the masters back."""
        self._engage(training)
        try:
            yield
        except BaseException:
            self.quantizer.restore()
            raise

    @contextmanager
    def _around_training_step(self, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        self._follow()
        self._writes.begin("training")
        with self._engaged():
            self._in_manual_step = self._manual
            try:
                with context(), self._writes.step("training"):
                    yield
            finally:
                self._in_manual_step = False
        if self._manual or self._between or (self._accumulating and not self._in_optimizer_step):
            self.quantizer.release()

    @contextmanager
    def _around_evaluation(self, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        self._follow()
        self._writes.begin("evaluation")
        with self._engaged(training=False), context(), self._writes.step("evaluation"):
            yield
        if self._evaluating:
            self.quantizer.release()

    def _around_hook_before_backward(self, pre_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._between:
            self.quantizer.release()
        return pre_backward(*args, **kwargs)

    def _around_backward(self, backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        were_engaged = self.quantizer.engaged
        with self._engaged(), self._writes.outside():
            if not were_engaged:
                self.quantizer.wait_for_writes()
            self._in_backward = True
            try:
                result = backward(*args, **kwargs)
            finally:
                self._in_backward = False
        if self._after_backward or (self._accumulating and not self._in_optimizer_step and not self._in_manual_step):
            self.quantizer.release()
        return result

    def _around_hook_after_backward(self, post_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = post_backward(*args, **kwargs)
        if self._in_manual_step:
            self._engage()
        return result

    def _around_optimizer_step(
        self, optimizer_step: Callable[..., Any], optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Release as soon as the closure has returned, which runs forward and backward."""

        def closure_then_release() -> Any:
            if self._in_manual_step:
                self._engage()
            try:
                result = closure()
            except BaseException:
                self.quantizer.restore()
                raise
            self.quantizer.release()
            self.quantizer.drop_frozen_gradients(self._step() or 0)
            return result

        outer, self._in_optimizer_step = self._in_optimizer_step, True
        try:
            result = optimizer_step(optimizer, model=model, closure=closure_then_release, **kwargs)
        finally:
            self._in_optimizer_step = outer
        if self._in_manual_step:
            self._engage()
        return result

    @untraced
    def _before_any_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Put the masters back for an optimizer that the Trainer does not step, or raise if that is impossible."""
        if self._in_backward and self._updates_selected(optimizer):
            raise RuntimeError(
                f"QAT needs optimizer steps outside of backward, but {type(optimizer).__name__} steps inside it, where"
                " the weights hold quantized values; step it after backward"
            )
        if self._in_optimizer_step or not self.quantizer.engaged or not self._updates_selected(optimizer):
            return
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                f"QAT needs to know when a closure ends, but {type(optimizer).__name__}.step was called with one past"
                " the Trainer; call the step of self.optimizers() instead"
            )
        self.quantizer.release()
        self.quantizer.drop_frozen_gradients(self._step() or 0)

    @untraced
    def _after_any_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._in_manual_step and not self._in_optimizer_step:
            self._engage()
        self.quantizer.note_others()

    def _updates_selected(self, optimizer: torch.optim.Optimizer) -> bool:
        selected = {id(weight.parameter) for weight in self.quantizer.weights}
        return any(id(parameter) in selected for group in optimizer.param_groups for parameter in group["params"])


class _Around(StandIn):
    """A method with something around it."""

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any]) -> None:
        super().__init__(method)
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self.method, *args, **kwargs)
