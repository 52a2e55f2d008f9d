"""What the Trainer's strategy must be for checkpoints to be quantized, and for weights to be trained so."""

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from q8lightning.trainer.lightning_internals import saves_in_shards
from q8lightning.trainer.twins import is_a, is_from_lightning


def check_saves(strategy: Strategy) -> None:
    """Raise ValueError for strategies whose saves pass no door of ours: nothing would be quantized."""
    if bypasses_io(strategy) or (saves_in_shards(strategy) and not _saves_as_lightning(strategy)):
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints without the Trainer's CheckpointIO, so they cannot be"
            " quantized; use ModelParallelStrategy (FSDP2, tensor parallelism), FSDPStrategy, DDP or a single device,"
            " or remove the QuantizationCallback (or pass it checkpoint=None)"
        )


def _saves_as_lightning(strategy: Strategy) -> bool:
    """Whether a strategy that saves in shards does it as its class in Lightning does."""
    own = type(strategy).save_checkpoint
    return is_from_lightning(own.__module__)


def check_qat(strategy: Strategy) -> None:
    """Raise ValueError for strategies that flatten parameters, or hold none between steps."""
    if is_a(strategy, DeepSpeedStrategy, FSDPStrategy):
        raise ValueError(
            "QAT needs a strategy that keeps parameters whole or shards each by itself, got"
            f" {type(strategy).__name__}; use ModelParallelStrategy (FSDP2), DDP or a single device, or remove qat"
        )


def bypasses_io(strategy: Strategy) -> bool:
    """Whether a strategy never saves through a CheckpointIO."""
    return is_a(strategy, DeepSpeedStrategy)


def optimizer_device(strategy: Strategy) -> torch.device | None:
    """Return where a strategy wants optimizer states as they are in the file; None if it distributes them itself."""
    return None if is_a(strategy, FSDPStrategy, ModelParallelStrategy) else strategy.root_device
