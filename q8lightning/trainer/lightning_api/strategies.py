"""Check whether a Trainer's strategy can save quantized checkpoints and train quantized weights."""

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from q8lightning.trainer.lightning_api.both_packages import is_a, is_from_lightning
from q8lightning.trainer.lightning_api.internals import saves_in_shards


def check_saves(strategy: Strategy) -> None:
    """Raise ValueError for strategies whose saves the package cannot reach, so that nothing would be quantized."""
    if bypasses_io(strategy) or (saves_in_shards(strategy) and not _saves_as_lightning(strategy)):
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints without the Trainer's CheckpointIO, so they cannot be"
            " quantized; use ModelParallelStrategy (FSDP2, tensor parallelism), FSDPStrategy, DDP or a single device,"
            " or remove the QuantizationCallback (or pass it checkpoint=None)"
        )


def _saves_as_lightning(strategy: Strategy) -> bool:
    """Whether a strategy that saves in shards does so as its class in Lightning does."""
    return is_from_lightning(type(strategy).save_checkpoint.__module__)


def check_qat(strategy: Strategy) -> None:
    """Raise ValueError for strategies that flatten parameters, or hold none between steps."""
    if is_a(strategy, DeepSpeedStrategy, FSDPStrategy):
        raise ValueError(
            "QAT needs a strategy that keeps parameters whole or shards each by itself, got"
            f" {type(strategy).__name__}; use ModelParallelStrategy (FSDP2), DDP or a single device, or remove qat"
        )


def bypasses_io(strategy: Strategy) -> bool:
    """Whether a strategy writes all its checkpoints without a CheckpointIO."""
    return is_a(strategy, DeepSpeedStrategy)


def optimizer_device(strategy: Strategy) -> torch.device | None:
    """Return the device that optimizer states are loaded to; None if the strategy shards them itself."""
    return None if is_a(strategy, FSDPStrategy, ModelParallelStrategy) else strategy.root_device


def encoding_device(strategy: Strategy) -> torch.device | None:
    """Return the device that encodes what a process saves; None if its states are handed out on the host."""
    on_host = is_a(strategy, FSDPStrategy) or (is_a(strategy, ModelParallelStrategy) and not saves_in_shards(strategy))
    return None if on_host else strategy.root_device
