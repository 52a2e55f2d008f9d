"""What lies inside Lightning and is relied upon: each use is here, so that a change there is one edit.

``system/private_names.py`` lists these names, with what their absence costs; the callback says at its setup which the
installed Lightning does not have. What is not needed is done without then.
"""

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from q8lightning.system.private_names import check_names
from q8lightning.trainer.twins import is_a

try:
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
except ImportError:
    check_names(["saving"])  # which says what is missing
    raise

__all__ = ["WrappingCheckpointIO", "logged_steps", "logs_next_step", "replace_wrapped", "saves_in_shards"]


def replace_wrapped(wrapper: WrappingCheckpointIO, checkpoint_io: CheckpointIO) -> None:
    """Let a CheckpointIO wrap another one than it does; Lightning lets what is wrapped be given once only."""
    if "_checkpoint_io" in vars(wrapper):
        wrapper._checkpoint_io = checkpoint_io


def saves_in_shards(strategy: Strategy) -> bool:
    """Whether a strategy lets each process write a part of a checkpoint, through no CheckpointIO."""
    if is_a(strategy, FSDPStrategy):
        return getattr(strategy, "_state_dict_type", None) == "sharded"
    return is_a(strategy, ModelParallelStrategy) and bool(getattr(strategy, "_save_distributed_checkpoint", False))


def logged_steps(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs at this moment: steps of optimizers that step together count once."""
    steps: int = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return steps


def logs_next_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning hands the values of the training step that begins to its loggers."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.should_stop or (logged_steps(trainer) + 1) % every == 0)
