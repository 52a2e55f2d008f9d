"""Ask a strategy of Fabric in which way it saves."""

from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy

from q8lightning.trainer.lightning_api.both_packages import is_a, twin_of


def saves_in_shards(strategy: Strategy) -> bool:
    """Whether a strategy of Fabric lets each process write a part of a checkpoint."""
    if is_a(strategy, FSDPStrategy):
        return getattr(strategy, "_state_dict_type", None) == "sharded"
    return is_a(strategy, ModelParallelStrategy) and bool(getattr(strategy, "_save_distributed_checkpoint", False))


def uses_io(strategy: Strategy) -> bool:
    """Whether a strategy saves through a CheckpointIO: it has the method of all strategies."""
    methods = (getattr(each, "save_checkpoint", None) for each in (Strategy, twin_of(Strategy)))
    return type(strategy).save_checkpoint in methods


def check_gathers(strategy: Strategy) -> None:
    """Raise ValueError for strategies that write their checkpoints in a way of their own (DeepSpeed, XLA)."""
    if not is_a(strategy, FSDPStrategy, ModelParallelStrategy):
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints in a way of its own, so they cannot be quantized; use"
            " ModelParallelStrategy (FSDP2, tensor parallelism), FSDPStrategy, DDP or a single device, or fabric.save"
        )
