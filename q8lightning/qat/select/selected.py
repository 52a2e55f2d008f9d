"""What the rules select of a model: weights, modules whose inputs are quantized, and parameters that are frozen."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from q8lightning.qat.rules import ActivationRule
from q8lightning.qat.select.candidates import some
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.portion import Portion


@dataclass(frozen=True)
class SelectedWeight:
    """A parameter that is trained quantized.

    Attributes:
        names: Its full names, several if it is tied. The first is what ``named_parameters`` calls it.
        parameter: The parameter itself.
        codec: How it is quantized.
        portion: Which part of it this process holds; None if it is an ordinary parameter.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    codec: WeightCodec
    portion: Portion | None = None


@dataclass(frozen=True)
class SelectedModule:
    """A module whose inputs are quantized, with its full name and the rule that selects it."""

    name: str
    module: nn.Module
    rule: ActivationRule


@dataclass(frozen=True)
class Selection:
    """What the rules select of a model.

    Attributes:
        weights: The parameters that are trained quantized, in the order of the model.
        modules: The modules whose inputs are quantized.
        frozen: The parameters that stop changing, each with the first step whose update it misses.
    """

    weights: list[SelectedWeight]
    modules: list[SelectedModule]
    frozen: list[tuple[nn.Parameter, int]]

    def change_to(self, other: "Selection") -> str | None:
        """Describe what another selection adds, replaces and drops; None if it is the same.

        A name that stands for another parameter or module was replaced.
        """
        before, after = self._named(), other._named()
        changes = {
            "new": [name for name in after if name not in before],
            "replaced": [name for name in after if name in before and after[name] is not before[name]],
            "no longer quantized": [name for name in before if name not in after],
        }
        return "; ".join(f"{what}: {some(names)}" for what, names in changes.items() if names) or None

    def _named(self) -> Mapping[str, object]:
        modules = {f"inputs of {each.name}": each.module for each in self.modules}
        return {name: weight.parameter for weight in self.weights for name in weight.names} | modules
