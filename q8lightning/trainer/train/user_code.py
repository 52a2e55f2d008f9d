"""Know whether code of the user runs between two parts of a step, in a hook of the model or of a callback."""

from collections.abc import Iterable
from typing import Any

from q8lightning.trainer.lightning_api.both_packages import is_from_lightning

BETWEEN = ("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward")
"""Hooks between forward and backward."""

AFTER_BACKWARD = ("on_after_backward",)

EVERY_BATCH = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

ACCUMULATING = (
    *AFTER_BACKWARD,
    *EVERY_BATCH,
    "on_train_batch_end",
    "on_train_batch_start",
    "optimizer_step",
    "lr_scheduler_step",
    "on_validation_model_zero_grad",
    "on_validation_model_eval",
)
"""Hooks between backward and the next forward when no optimizer step comes between."""

EVALUATING = (
    *EVERY_BATCH,
    "write_on_batch_end",
    *(f"on_{stage}_batch_{end}" for stage in ("validation", "test", "predict") for end in ("start", "end")),
)
"""Hooks between two batches of an evaluation."""

READERS = ("weight_averaging", "stochastic_weight_avg", "lambda_function", "pruning", "finetuning")
"""Modules of Lightning's own callbacks whose hooks read or write weights."""


def somebody_runs(hooks: Iterable[str], owners: Iterable[Any]) -> bool:
    """Whether one of ``hooks`` is defined outside of Lightning, or by a callback of Lightning that reads weights."""
    functions = [getattr(owner, hook, None) for owner in owners for hook in hooks]
    modules = [getattr(function, "__module__", None) or "" for function in functions if function is not None]
    return any(not is_from_lightning(module) or module.rsplit(".", 1)[-1] in READERS for module in modules)
