"""Know what a checkpoint does not say about its model: names of parameters, buffers, what is trained quantized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from q8lightning.checkpoint.layout.places import BUFFERS, NOWHERE, OPTIMIZER_STATES, STATE_DICT, Places
from q8lightning.checkpoint.layout.sections import parameter_names_in, places_in
from q8lightning.checkpoint.tree import Keys
from q8lightning.quantization.codecs.weight import WeightCodec


@dataclass(frozen=True)
class ModelNames:
    """What a checkpoint does not say about its model.

    Attributes:
        parameters: Names of the model's parameters. What else its state dict holds (buffers, states of metrics, extra
            state) is not encoded. If it holds none of these names, as when a hook renames them, they do not count.
        optimizer_parameters: For each optimizer, the names of its parameters in the order of its groups.
        quantized: The codecs of weights that are trained quantized, by name.
        inputs: How inputs of modules are trained quantized, by the modules' names.
        restored: How often the run was restored from a quantized checkpoint.
        places: The places of what stands under a user's own keys.
    """

    parameters: frozenset[str] = frozenset()
    optimizer_parameters: tuple[tuple[str, ...], ...] = ()
    quantized: Mapping[str, WeightCodec] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    restored: int = 0
    places: Places = field(default_factory=lambda: NOWHERE)

    def is_same_model(self, other: "ModelNames") -> bool:
        """Whether both name the same parameters, quantized alike."""
        return self is other or (
            self.parameters == other.parameters
            and self.optimizer_parameters == other.optimizer_parameters
            and self.quantized == other.quantized
            and self.places == other.places
        )


def names_in(checkpoint: Mapping[str, Any]) -> ModelNames:
    """Return what a checkpoint says itself: the names in optimizers that were made from named parameters, and where
    states of modules and optimizers are."""
    return ModelNames(optimizer_parameters=parameter_names_in(checkpoint), places=places_in(checkpoint))


def describe_state(state: Mapping[str, Any], rename: Callable[[str], str] = str) -> ModelNames:
    """Return what is known of a state: where modules and optimizers are, which entries are buffers, parameters' names.

    Args:
        state: Modules, optimizers and anything else by keys of the user's own.
        rename: Returns what a parameter is called in state dicts, from what its module calls it.
    """
    places: dict[Keys, Keys] = {}
    parameters: dict[int, str] = {}
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    for key, module in modules.items():
        places[(key,)] = (STATE_DICT,)
        for name, _ in module.named_buffers(remove_duplicate=False):
            places[key, rename(name)] = (BUFFERS, rename(name))
        before = f"{key}." if len(modules) > 1 else ""
        for name, parameter in module.named_parameters():
            parameters.setdefault(id(parameter), before + rename(name))
    optimizers = [*parameter_names_in({OPTIMIZER_STATES: state.get(OPTIMIZER_STATES)})]
    for key, value in state.items():
        if isinstance(value, Optimizer):
            places[(key,)] = (OPTIMIZER_STATES, len(optimizers))
            groups = (group["params"] for group in value.param_groups)
            optimizers.append(tuple(parameters.get(id(each), "") for group in groups for each in group))
    for keys, place in places_in({key: value for key, value in state.items() if (key,) not in places}).items():
        is_optimizer = place[0] == OPTIMIZER_STATES
        places[keys] = (OPTIMIZER_STATES, len(optimizers)) if is_optimizer else place
        optimizers += [()] * is_optimizer
    return ModelNames(optimizer_parameters=tuple(optimizers), places=places)


def as_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with the state dicts of its modules and optimizers in their place."""
    return {
        key: value.state_dict() if isinstance(value, nn.Module | Optimizer) else value for key, value in state.items()
    }
