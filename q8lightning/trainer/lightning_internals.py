"""Use what is private in Lightning, all in one place.

``system/private_names.py`` lists these names and what is lost without them. The callback's setup warns of those that
the installed Lightning does not have; what depends on them is then left out.
"""

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from q8lightning.system.private_names import check_names
from q8lightning.trainer.twins import is_a

try:
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
except ImportError:
    check_names(["saving"])  # warns of what is missing
    raise

__all__ = ["WrappingCheckpointIO", "logged_steps", "logs_next_step", "replace_wrapped", "saves_in_shards"]


def replace_wrapped(wrapper: WrappingCheckpointIO, checkpoint_io: CheckpointIO) -> None:
    """Let a CheckpointIO wrap another one; Lightning has no public way to do that."""
    if "_checkpoint_io" in vars(wrapper):
        wrapper._checkpoint_io = checkpoint_io


def saves_in_shards(strategy: Strategy) -> str | None:
    """Return how to make a strategy save whole checkpoints through a CheckpointIO; None if it does."""
    if is_a(strategy, FSDPStrategy) and getattr(strategy, "_state_dict_type", None) == "sharded":
        return 'FSDPStrategy(state_dict_type="full")'
    if is_a(strategy, ModelParallelStrategy) and getattr(strategy, "_save_distributed_checkpoint", False):
        return "ModelParallelStrategy(save_distributed_checkpoint=False)"
    return None


def logged_steps(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs now; steps that several optimizers take together count once."""
    steps: int = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return steps


def logs_next_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the values of the training step that begins."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.should_stop or (logged_steps(trainer) + 1) % every == 0)
