"""Tell a CheckpointIO what a checkpoint does not say about its model."""

from typing import Any, Protocol

import lightning.pytorch as pl
from torch import nn

from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.trainer.lightning_api.model import WeakStructure, in_state_dict


class Quantizes(Protocol):
    """The part of a callback that is asked: codecs of weights and of inputs, and how often the run was restored."""

    restored: int

    def codecs(self, trainer: pl.Trainer) -> dict[str, WeightCodec]: ...
    def inputs(self, trainer: pl.Trainer) -> dict[str, dict[str, str]]: ...


class _Names:
    """The names of a model's parameters, valid while the model has this structure."""

    def __init__(self, module: nn.Module) -> None:
        self.structure = WeakStructure(module)
        parameters = module.named_parameters(remove_duplicate=False)
        named = [(in_state_dict(name), id(parameter)) for name, parameter in parameters]
        self.of = {identity: name for name, identity in reversed(named)}
        """The first name of each parameter, by its identity."""
        self.all = frozenset(name for name, _ in named)


class DescribeModel:
    """Returns the names of a Trainer's parameters, and how they are quantized. It is pickled with the Trainer.

    Args:
        trainer: The Trainer that has the model.
        callback: Knows how the weights are quantized.
    """

    def __init__(self, trainer: pl.Trainer, callback: Quantizes) -> None:
        self.trainer = trainer
        self.callback = callback
        self._names: _Names | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the names, which are known by the identity of objects that a copy does not have."""
        return self.__dict__ | {"_names": None}

    def __call__(self) -> ModelNames:
        """Return the names as they are now."""
        module, names = self.trainer.lightning_module, self._names
        if names is None or not names.structure.is_that_of(module):
            names = self._names = _Names(module)
        groups = (optimizer.param_groups for optimizer in self.trainer.optimizers)
        return ModelNames(
            parameters=names.all,
            optimizer_parameters=tuple(
                tuple(names.of.get(id(parameter), "") for group in each for parameter in group["params"])
                for each in groups
            ),
            quantized={in_state_dict(name): codec for name, codec in self.callback.codecs(self.trainer).items()},
            inputs={in_state_dict(name): each for name, each in self.callback.inputs(self.trainer).items()},
            restored=self.callback.restored,
        )
