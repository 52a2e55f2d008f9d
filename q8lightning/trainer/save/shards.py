"""The door that checkpoints in shards pass: what FSDP and ModelParallel save and load without a CheckpointIO.

These strategies hand their states to torch.distributed.checkpoint in ``save_checkpoint`` and take them from it in
``load_checkpoint``. Both are replaced on the Trainer's strategy, so that a folder is written encoded, and compared with
its sums before it is loaded. Without this door, a folder loads as the same tensors.
"""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from q8lightning.checkpoint.encode.select.model_names import ModelNames, names_in
from q8lightning.checkpoint.format import check_version
from q8lightning.checkpoint.integrity import without_verification
from q8lightning.checkpoint.layout.sections import summary_in
from q8lightning.checkpoint.sharded.check import check_shards, is_sharded
from q8lightning.checkpoint.sharded.ranks import talking
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlanner, state_for_dcp
from q8lightning.trainer.checkpoint_io.file_names import is_exact
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO
from q8lightning.trainer.checkpoint_io.shards import ShardSaver
from q8lightning.trainer.lightning_api.both_packages import is_a
from q8lightning.trainer.lightning_api.model import in_state_dict

PathLike = str | Path

_in_states = partial(in_state_dict, sharded=True)


class ShardedDoor:
    """Saves and loads the checkpoints of one strategy.

    Args:
        strategy: Whose; a FSDPStrategy or a ModelParallelStrategy.
        checkpoint_io: What encodes, and writes in the background.
    """

    def __init__(self, strategy: Strategy, checkpoint_io: QuantizedCheckpointIO) -> None:
        self.io = checkpoint_io
        self._strategy = strategy
        self._weights = "model" if is_a(strategy, FSDPStrategy) else "state_dict"
        self._saver = ShardSaver(checkpoint_io)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any = None) -> None:
        """Save a checkpoint to the folder ``filepath``; to be called in all processes.

        Raises:
            BackgroundSaveError: In all processes, if an earlier save in the background failed.
        """
        own = type(self._strategy).save_checkpoint
        if storage_options is not None or is_exact(filepath):
            with talking():
                self._saver.ranks.together(self.io.wait)
                own(self._strategy, checkpoint, filepath, storage_options)  # which refuses options
            return
        with talking():
            state = state_for_dcp(checkpoint, self._weights)
        self._saver.save(filepath, checkpoint, state, ShardPlanner(), lambda: self._names(checkpoint))

    def _names(self, checkpoint: Mapping[str, Any]) -> ModelNames:
        """Return what is known of the model, by the names that the states of sharded models have."""
        names = self.io.describe_model() if self.io.describe_model is not None else names_in(checkpoint)
        return replace(
            names,
            parameters=frozenset(map(_in_states, names.parameters)),
            optimizer_parameters=tuple(tuple(map(_in_states, each)) for each in names.optimizer_parameters),
            quantized={_in_states(name): codec for name, codec in names.quantized.items()},
        )

    def load_checkpoint(self, checkpoint_path: PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, after every file of it was compared with what was written; in all processes.

        Raises:
            CorruptCheckpointError: In all processes, if the checkpoint is not what was saved.
            NewerFormatError: If it was written in a later format than this version reads.
            BackgroundSaveError: If a save in the background failed.
        """
        ranks = self._saver.ranks
        ranks.together(self.io.wait)
        path, in_shards = ranks.at_first(lambda: (os.path.abspath(checkpoint_path), is_sharded(checkpoint_path)))
        own = type(self._strategy).load_checkpoint
        if in_shards and self.io.verify:
            check_shards(path, ranks, *args, **kwargs)
        try:
            with nullcontext() if self.io.verify else without_verification():
                checkpoint: dict[str, Any] = own(self._strategy, checkpoint_path, *args, **kwargs)
        except CheckpointException as error:  # no Exception, and it hides the one that says what is wrong
            raise _cause(error) from error
        check_version(summary_in(checkpoint))
        return checkpoint


class _StatesOnDevice:
    """Gives the states of a model under FSDP2 where they are; Lightning copies them to the host first."""

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        self._strategy = strategy

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self._strategy.model is not None
        return get_model_state_dict(self._strategy.model, options=StateDictOptions())

    def optimizer_state(self, optimizer: Any) -> Any:
        assert self._strategy.model is not None
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer.optimizer  # Lightning's wrapper
        return get_optimizer_state_dict(self._strategy.model, optimizer, options=StateDictOptions())


def open_sharded_door(strategy: Strategy, checkpoint_io: QuantizedCheckpointIO) -> None:
    """Let what a strategy saves and loads in shards pass a door, from now on; to be called in all processes."""
    if door_of(strategy, checkpoint_io) is not None:
        return
    door = ShardedDoor(strategy, checkpoint_io)
    strategy.save_checkpoint = door.save_checkpoint  # type: ignore[method-assign]
    strategy.load_checkpoint = door.load_checkpoint  # type: ignore[method-assign]
    if is_a(strategy, ModelParallelStrategy) and strategy.root_device.type != "cpu":
        states = _StatesOnDevice(strategy)
        strategy.lightning_module_state_dict = states.lightning_module_state_dict  # type: ignore[method-assign]
        strategy.optimizer_state = states.optimizer_state  # type: ignore[method-assign]


def door_of(strategy: Strategy, checkpoint_io: QuantizedCheckpointIO) -> ShardedDoor | None:
    """Return the door of a strategy to this CheckpointIO, None if there is none."""
    door = getattr(vars(strategy).get("load_checkpoint"), "__self__", None)
    return door if isinstance(door, ShardedDoor) and door.io is checkpoint_io else None


def _cause(error: CheckpointException) -> BaseException:
    """Return the first process's error that DCP tells all of."""
    failures: Mapping[int, tuple[BaseException, Any]] = error.failures
    first = min(failures, default=None)
    return error if first is None else failures[first][0]
