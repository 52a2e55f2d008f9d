"""What the Trainer's strategy must be for checkpoints to be quantized, and for weights to be trained so."""

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from q8lightning.trainer.lightning_internals import saves_in_shards
from q8lightning.trainer.twins import is_a


def check_saves(strategy: Strategy) -> None:
    """Raise ValueError for strategies whose saves bypass the CheckpointIO: nothing would be quantized."""
    whole = saves_in_shards(strategy)
    if whole is not None or bypasses_io(strategy):
        remedy = "use another strategy" if whole is None else f"pass {whole}"
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints without the Trainer's CheckpointIO, so they cannot be"
            f" quantized; {remedy}, or remove the QuantizationCallback (or pass it checkpoint=None)"
        )


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
