"""Ask the modules and optimizers of a state what a checkpoint does not say: buffers, and the names of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from q8lightning.checkpoint.encode.select.find import ModelNames
from q8lightning.checkpoint.layout.places import BUFFERS, OPTIMIZER_STATES, STATE_DICT
from q8lightning.checkpoint.layout.sections import parameter_names_in, places_in
from q8lightning.checkpoint.tree import Keys


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
