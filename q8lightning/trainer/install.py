"""Install the quantizing CheckpointIO of a callback in a Trainer, around the one that the Trainer has."""

import lightning.pytorch as pl

from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.describe_model import DescribeModel, Quantizes
from q8lightning.trainer.lightning_internals import saves_in_shards
from q8lightning.trainer.strategies import bypasses_io, check_saves, optimizer_device
from q8lightning.trainer.warm_up import WarmUp


def install(
    trainer: pl.Trainer, callback: Quantizes, policy: CheckpointPolicy | None, verify: bool
) -> QuantizedCheckpointIO | None:
    """Return the quantizing CheckpointIO of a Trainer, which knows the model from now on.

    Args:
        trainer: The Trainer.
        callback: What the CheckpointIO asks about the model.
        policy: What is quantized; None to install nothing, and only find what the user installed.
        verify: Whether files are compared with their checksums.

    Returns:
        The one that was there, the callback's or the user's own, or a new one; None without a policy if there is none.

    Raises:
        ValueError: If the strategy does not save through a CheckpointIO, or there is one with another policy.
    """
    strategy = trainer.strategy
    if policy is not None:
        check_saves(strategy)
    elif bypasses_io(strategy):
        return None
    installed = find_quantized_io(strategy.checkpoint_io)
    if installed is None and policy is not None:
        installed = QuantizedCheckpointIO(strategy.checkpoint_io, policy, verify=verify)
        strategy.checkpoint_io = installed
    elif installed is not None and policy not in (None, installed.policy):
        raise ValueError(
            "the Trainer has another QuantizationCallback, or a QuantizedCheckpointIO, with another policy than"
            " this QuantizationCallback; give the policy to one of them and remove the other"
        )
    if installed is not None:
        installed.describe_model = DescribeModel(trainer, callback)
        if saves_in_shards(strategy):
            from q8lightning.trainer.sharded import open_sharded_door  # which imports what nobody else needs

            open_sharded_door(strategy, installed)
    return installed


def is_installed(trainer: pl.Trainer, callback: Quantizes) -> bool:
    """Whether a Trainer has a quantizing CheckpointIO that asks this callback about the model."""
    installed = find_quantized_io(trainer.strategy.checkpoint_io)
    describe = None if installed is None else installed.describe_model
    return isinstance(describe, DescribeModel) and describe.trainer is trainer and describe.callback is callback


def warm_up_for(trainer: pl.Trainer) -> WarmUp | None:
    """Return what loads the kernels of a Trainer's saves; None if this process needs none."""
    installed, strategy = find_quantized_io(trainer.strategy.checkpoint_io), trainer.strategy
    device = optimizer_device(strategy)  # what is sharded is saved from the host
    if installed is None or device is None or device.type != "cuda":
        return None
    if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
        return None
    return WarmUp(installed.policy, trainer.lightning_module, strategy.optimizers, device, installed.async_save)
