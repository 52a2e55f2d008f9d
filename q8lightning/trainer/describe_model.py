"""Tell a CheckpointIO at each save what the checkpoint does not say about the model."""

from typing import Protocol

import lightning.pytorch as pl

from q8lightning.checkpoint.encode.leaves import ModelNames
from q8lightning.quantization.weight_codec import WeightCodec


class Quantizes(Protocol):
    """What of a callback is told: how weights are quantized by name, and how often the run was restored."""

    restored: int

    def codecs(self, trainer: pl.Trainer) -> dict[str, WeightCodec]: ...


class DescribeModel:
    """Knows the names of the parameters of a Trainer's model; goes with the Trainer when it is pickled.

    Args:
        trainer: Whose model.
        callback: Whose weights are quantized, and how.
    """

    def __init__(self, trainer: pl.Trainer, callback: Quantizes) -> None:
        self.trainer = trainer
        self.callback = callback

    def __call__(self) -> ModelNames:
        """Return the names of the parameters as they are now, and how they are quantized."""
        module = self.trainer.lightning_module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return ModelNames(
            parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
            optimizer_parameters=tuple(
                tuple(names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"])
                for optimizer in self.trainer.optimizers
            ),
            quantized=self.callback.codecs(self.trainer),
            restored=self.callback.restored,
        )
