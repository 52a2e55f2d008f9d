"""Use what is private in Lightning, all in one place.

``system/private_names.py`` lists these names and what is lost without them. The callback's setup warns of those that
the installed Lightning does not have; what depends on them is then left out.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from q8lightning.system.private_names import check_names
from q8lightning.trainer.lightning_api.both_packages import is_a

try:
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
except ImportError:
    check_names(["saving"])  # warns of what is missing
    raise

__all__ = ["WrappingCheckpointIO", "logged_steps", "logs_next_step", "replace_wrapped", "saves_in_shards", "unmark"]


def replace_wrapped(wrapper: WrappingCheckpointIO, checkpoint_io: CheckpointIO) -> None:
    """Let a CheckpointIO wrap another one; Lightning has no public way to do that."""
    if "_checkpoint_io" in vars(wrapper):
        wrapper._checkpoint_io = checkpoint_io


def saves_in_shards(strategy: Strategy) -> bool:
    """Whether a strategy lets each process write a part of a checkpoint, through no CheckpointIO."""
    if is_a(strategy, FSDPStrategy):
        return getattr(strategy, "_state_dict_type", None) == "sharded"
    return is_a(strategy, ModelParallelStrategy) and bool(getattr(strategy, "_save_distributed_checkpoint", False))


def unmark(strategy: Strategy, checkpoint: dict[str, Any]) -> None:
    """Take from the weights what FSDP notes on the copies that it makes for a whole checkpoint.

    A tensor with attributes of its own is stored as it is.
    """
    state = checkpoint.get("state_dict")
    if is_a(strategy, FSDPStrategy) and isinstance(state, dict):
        for name, tensor in state.items():
            state[name] = tensor.detach() if type(tensor) is Tensor else tensor


def logged_steps(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs now; steps that several optimizers take together count once."""
    steps: int = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return steps


def logs_next_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the values of the training step that begins."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.should_stop or (logged_steps(trainer) + 1) % every == 0)
