"""Which parameters were trained quantized, for whoever saves them, also when training is over."""

from dataclasses import dataclass

from torch import nn

from q8lightning.qat.selection import SelectedWeight
from q8lightning.quantization.codecs.weight import WeightCodec


@dataclass(frozen=True)
class TrainedWeights:
    """The parameters that were selected last, to be known under whatever names they have now.

    Attributes:
        weights: The selected weights.
    """

    weights: tuple[SelectedWeight, ...] = ()

    def codecs(self, module: nn.Module) -> dict[str, WeightCodec]:
        """Return how each parameter of a model that was trained quantized is quantized, by all of its names."""
        codecs = {weight.parameter: weight.codec for weight in self.weights}
        named = module.named_parameters(remove_duplicate=False)
        return {name: codecs[each] for name, each in named if each in codecs}

    def replaced(self, module: nn.Module) -> list[str]:
        """Return the names that stand for other parameters now than for those that were trained quantized."""
        trained = {weight.parameter for weight in self.weights}
        named = dict(module.named_parameters(remove_duplicate=False))
        names = (name for weight in self.weights for name in weight.names)
        return [name for name in names if name in named and named[name] not in trained]
