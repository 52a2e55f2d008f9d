"""Install what saves pass in a Trainer: the CheckpointIO that encodes, around the Trainer's own, and the doors."""

from functools import partial
from typing import Protocol

import lightning.pytorch as pl

from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.metrics.recorder import Recorder
from q8lightning.qat.config import QATConfig
from q8lightning.system.private_names import Part, check_names
from q8lightning.trainer.checkpoint_io.chain import check_not_async
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.lightning_api.internals import saves_in_shards
from q8lightning.trainer.lightning_api.model import in_state_dict
from q8lightning.trainer.lightning_api.strategies import bypasses_io, check_saves, optimizer_device
from q8lightning.trainer.record.publish import warn_safely
from q8lightning.trainer.save.describe_model import DescribeModel, Quantizes
from q8lightning.trainer.save.describe_saves import describe_saves
from q8lightning.trainer.save.door import door_of, open_door
from q8lightning.trainer.save.pauses import pause_of


class SavingCallback(Quantizes, Protocol):
    """The part of a callback that says what is saved, and how."""

    policy: CheckpointPolicy | None
    async_save: bool
    verify: bool
    recorder: Recorder

    @property
    def qat(self) -> QATConfig | None: ...


def set_up(trainer: pl.Trainer, callback: SavingCallback, stage: str) -> None:
    """Install what a stage of the Trainer needs, once.

    Raises:
        ValueError: As :func:`install`, or if both the callback and an AsyncCheckpointIO save in the background.
    """
    installed = install(trainer, callback)
    if installed is None:
        return
    if callback.policy is not None and callback.async_save:
        check_not_async(trainer.strategy.checkpoint_io)
        installed.async_save = True
    installed.optimizer_device = optimizer_device(trainer.strategy) if stage == "fit" else None
    open_door(trainer, installed, callback.recorder)


def set_up_late(trainer: pl.Trainer, callback: SavingCallback) -> None:
    """Install what a save needs if ``setup`` did not run here: before the first run, or if other processes ran it."""
    if door_of(trainer) is None and not _is_installed(trainer, callback):
        install(trainer, callback)


def install(trainer: pl.Trainer, callback: SavingCallback) -> QuantizedCheckpointIO | None:
    """Install the CheckpointIO unless it is there, and let it ask the callback about the model.

    Returns:
        The CheckpointIO, also if the user passed it to the Trainer; None if there is none and no policy.

    Raises:
        ValueError: If the strategy does not save through a CheckpointIO, or there is one with another policy.
    """
    strategy, policy = trainer.strategy, callback.policy
    if policy is not None:
        check_saves(strategy)
    elif bypasses_io(strategy):
        return None
    installed = find_quantized_io(strategy.checkpoint_io)
    if installed is None:
        if policy is None:
            if callback.qat is not None:
                describe_saves(trainer, callback)
            return None
        installed = QuantizedCheckpointIO(strategy.checkpoint_io, policy, verify=callback.verify)
        strategy.checkpoint_io = installed
    elif policy not in (None, installed.policy):
        raise ValueError(
            "the Trainer has another QuantizationCallback, or a QuantizedCheckpointIO, with another policy than"
            " this QuantizationCallback; give the policy to one of them and remove the other"
        )
    installed.describe_model = DescribeModel(trainer, callback)
    installed.pause = partial(pause_of, trainer)
    if saves_in_shards(strategy):
        from q8lightning.trainer.save.shards import open_sharded_door  # imports what other strategies do not need

        open_sharded_door(strategy, installed)
    return installed


def check_installed_versions(trainer: pl.Trainer, callback: SavingCallback) -> None:
    """Warn of what the installed versions lack of what a callback asks for; raise if that cannot work then.

    Raises:
        MissingNameError: If it cannot.
    """
    asked: dict[Part, bool] = {
        "sharded": callback.policy is not None and saves_in_shards(trainer.strategy),
        "background": callback.policy is not None and callback.async_save,
        "logging": callback.recorder.detail is not None,
        "qat": callback.qat is not None,
    }
    check_names([part for part, is_asked in asked.items() if is_asked], warn_safely)


def check_policy(trainer: pl.Trainer, policy: CheckpointPolicy) -> None:
    """Raise ValueError for a policy that quantizes nothing of a model, which has its parameters by now."""
    sharded = saves_in_shards(trainer.strategy)
    names = (name for name, _ in trainer.lightning_module.named_parameters())
    policy.check_matches(in_state_dict(name, sharded=sharded) for name in names)


def _is_installed(trainer: pl.Trainer, callback: Quantizes) -> bool:
    """Whether a Trainer has a quantizing CheckpointIO that asks this callback about the model."""
    installed = find_quantized_io(trainer.strategy.checkpoint_io)
    describe = None if installed is None else installed.describe_model
    return isinstance(describe, DescribeModel) and describe.trainer is trainer and describe.callback is callback
