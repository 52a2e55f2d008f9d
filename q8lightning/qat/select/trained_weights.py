"""The parameters and inputs that were trained quantized, for saves during and after training."""

from dataclasses import dataclass

from torch import nn

from q8lightning.qat.select.selected import SelectedModule, SelectedWeight
from q8lightning.quantization.codecs.weight import WeightCodec


@dataclass(frozen=True)
class TrainedWeights:
    """The weights of the last selection. They are known by identity, since their names may change.

    Attributes:
        weights: The selected weights.
        modules: The modules whose inputs are quantized.
    """

    weights: tuple[SelectedWeight, ...] = ()
    modules: tuple[SelectedModule, ...] = ()

    @property
    def inputs(self) -> dict[str, dict[str, str]]:
        """How inputs are quantized, by the names of their modules: ``{"codebook": ..., "per": ...}``."""
        return {each.name: {"codebook": str(each.rule.codebook), "per": each.rule.per} for each in self.modules}

    def codecs(self, module: nn.Module) -> dict[str, WeightCodec]:
        """Return the codec of each parameter of a model that was trained quantized, by all of its present names."""
        codecs = {weight.parameter: weight.codec for weight in self.weights}
        named = module.named_parameters(remove_duplicate=False)
        return {name: codecs[each] for name, each in named if each in codecs}

    def replaced(self, module: nn.Module) -> list[str]:
        """Return the names of selected weights that stand for other parameters now."""
        trained = {weight.parameter for weight in self.weights}
        named = dict(module.named_parameters(remove_duplicate=False))
        names = (name for weight in self.weights for name in weight.names)
        return [name for name in names if name in named and named[name] not in trained]
