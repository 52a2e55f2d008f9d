"""Install the quantizing CheckpointIO in a Trainer, around the one that the Trainer has."""

from collections.abc import Mapping

import lightning.pytorch as pl

from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.lightning_api.internals import saves_in_shards
from q8lightning.trainer.lightning_api.strategies import bypasses_io, check_saves, encoding_device
from q8lightning.trainer.prepare.warm_up import WarmUp
from q8lightning.trainer.save.describe_model import DescribeModel, Quantizes
from q8lightning.trainer.save.pending_names import leave_callbacks_alone


def install(
    trainer: pl.Trainer, callback: Quantizes, policy: CheckpointPolicy | None, verify: bool
) -> QuantizedCheckpointIO | None:
    """Install the quantizing CheckpointIO unless it is there, and let it ask the callback about the model.

    Args:
        trainer: The Trainer.
        callback: What the CheckpointIO asks about the model.
        policy: What is quantized. None to install nothing, and only to find what the user installed.
        verify: Whether files are compared with their checksums when they are loaded.

    Returns:
        The CheckpointIO, also if the user passed it to the Trainer; None if there is none and no policy.

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
            from q8lightning.trainer.save.shards import open_sharded_door  # imports what other strategies do not need

            open_sharded_door(strategy, installed)
    return installed


def is_installed(trainer: pl.Trainer, callback: Quantizes) -> bool:
    """Whether a Trainer has a quantizing CheckpointIO that asks this callback about the model."""
    installed = find_quantized_io(trainer.strategy.checkpoint_io)
    describe = None if installed is None else installed.describe_model
    return isinstance(describe, DescribeModel) and describe.trainer is trainer and describe.callback is callback


def finish_saves(trainer: pl.Trainer, end_background: bool) -> None:
    """Finish the pending saves of a Trainer, and let its callbacks ask the disk again which names are taken.

    Args:
        trainer: The Trainer.
        end_background: Let later saves, which are outside of the Trainer's loops, return when the file is there.

    Raises:
        BackgroundSaveError: If a save or removal failed that was not reported yet.
    """
    installed = find_quantized_io(trainer.strategy.checkpoint_io)
    if installed is not None:
        if end_background:
            installed.async_save = False
        try:
            installed.finish()
        finally:
            leave_callbacks_alone(trainer)


def warm_up_for(trainer: pl.Trainer, quantized: Mapping[str, WeightCodec]) -> WarmUp | None:
    """Return what loads the kernels of a Trainer's saves; None if this process needs none.

    Args:
        trainer: The Trainer.
        quantized: How weights that are trained quantized are, by name.
    """
    installed, strategy = find_quantized_io(trainer.strategy.checkpoint_io), trainer.strategy
    device = encoding_device(strategy)
    if installed is None or device is None or device.type != "cuda":
        return None
    encodes = trainer.is_global_zero or saves_in_shards(strategy)
    if trainer.fast_dev_run or not encodes:  # type: ignore[attr-defined]
        return None
    module, optimizers = trainer.lightning_module, strategy.optimizers
    return WarmUp(installed.policy, module, optimizers, device, installed.async_save, quantized)
