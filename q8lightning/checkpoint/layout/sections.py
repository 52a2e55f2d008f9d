"""Know what lies where in a checkpoint: a table of its sections, and functions over keys.

Lightning, its callbacks and this package save under the keys of :data:`SECTIONS`. Other keys are the user's own;
``places.py`` says what lies under those.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from q8lightning.checkpoint.layout.places import NOWHERE, Places, find_places, item_at, place_of
from q8lightning.checkpoint.layout.places import OPTIMIZER_STATES as OPTIMIZER_STATES
from q8lightning.checkpoint.layout.places import STATE_DICT as STATE_DICT
from q8lightning.checkpoint.tree import Keys


class Section(NamedTuple):
    """A section: what a key at the top of a checkpoint holds.

    Attributes:
        holds: ``"weights"`` for a state dict; ``"optimizers"`` for a list of optimizers' states; ``"exact"`` for what
            must come back to the bit, so that no rule of a policy applies to it; ``"other"`` for the rest.
        is_for_training: Whether only training needs it, so that a file to deploy leaves it out.
    """

    holds: str
    is_for_training: bool = False


SECTIONS = {
    "state_dict": Section("weights"),
    "current_model_state": Section("weights", True),  # WeightAveraging's: the weights that are being trained
    "averaging_state": Section("other", True),  # WeightAveraging's: how many it has averaged
    "optimizer_states": Section("optimizers", True),
    "lr_schedulers": Section("exact", True),
    "loops": Section("exact", True),
    "callbacks": Section("other", True),
    "hyper_parameters": Section("exact"),
    "datamodule_hyper_parameters": Section("exact"),
    "MixedPrecision": Section("exact"),  # the gradient scaler
}

WEIGHTS = tuple(key for key, section in SECTIONS.items() if section.holds == "weights")
NEVER = tuple(key for key, section in SECTIONS.items() if section.holds == "exact")
FOR_TRAINING = tuple(key for key, section in SECTIONS.items() if section.is_for_training)

SUMMARY_KEY = "q8lightning"
"""The key of the summary: how the checkpoint was written and what that lost, in dicts, lists, numbers and strings. Only
the codes of weights are tensors."""

CODES_KEY = "qat"
"""The key in the summary for the weights that are trained quantized; see ``qat_codes.py``."""

INPUTS_KEY = "qat_inputs"
"""The key in the summary for the modules whose inputs are trained quantized, each with its codebook and ``per``."""

PARAMETERS_KEY = "parameters"
"""The key in the summary for the names of each optimizer's parameters, in the order of its groups."""

RUNNING_STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of BatchNorm's buffers in a state dict."""

DEFAULT_EPS = 1e-8
"""The eps of Adam, where a checkpoint does not have it."""


def places_in(checkpoint: Any) -> Places:
    """Return the places of states under a user's own keys; see :func:`find_places`."""
    return find_places(checkpoint, {**SECTIONS, SUMMARY_KEY: None})


def path_of(keys: Keys) -> str:
    """Return the path that policies and messages use for keys."""
    return ".".join(map(str, keys))


def is_state(keys: Keys) -> bool:
    """Whether the keys lead to a state that an optimizer keeps for one parameter."""
    return len(keys) == 5 and is_in_state(keys)


def is_in_state(keys: Keys) -> bool:
    """Whether the keys lead to such a state, or to something in it, as a matrix in a list of them."""
    return len(keys) >= 5 and keys[0] == OPTIMIZER_STATES and keys[2] == "state"


def name_of(keys: Keys, parameter: str | None, places: Places = NOWHERE) -> str:
    """Return the name of a tensor in messages: ``layer.weight: exp_avg`` for an optimizer's state, or else its path.

    Args:
        keys: Keys that lead to the tensor.
        parameter: The name of the parameter that it belongs to; None if that is not known.
        places: Those of the checkpoint.
    """
    known = parameter is not None and is_state(place_of(keys, places))
    return f"{parameter}: {keys[-1]}" if known else path_of(keys)


def kind_of(keys: Keys) -> str:
    """Return the kind of a tensor: ``weights``, the key of an optimizer's state, or else its section."""
    if keys[0] in WEIGHTS:
        return "weights"
    return str(keys[-1] if is_state(keys) else keys[0])


def parameter_of(keys: Keys, optimizer_parameters: Sequence[Sequence[str]]) -> str | None:
    """Return the name of the parameter that a tensor is or belongs to; None if that is not known.

    Args:
        keys: Keys that lead to the tensor.
        optimizer_parameters: For each optimizer, the names of its parameters in the order of its groups.
    """
    if keys[0] in WEIGHTS:
        return path_of(keys[1:])
    if is_state(keys):
        _, optimizer, _, parameter, _ = keys
        if isinstance(parameter, str):  # optimizer states of FSDP go by name
            return parameter
        if isinstance(optimizer, int) and optimizer < len(optimizer_parameters):
            known = optimizer_parameters[optimizer]
            return known[parameter] if isinstance(parameter, int) and parameter < len(known) else None
    return None


def state_dicts_in(checkpoint: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the sections that hold a state dict of the model."""
    return {section: found for section in WEIGHTS if isinstance(found := checkpoint.get(section), Mapping)}


def summary_in(checkpoint: Any) -> Mapping[str, Any]:
    """Return the summary of a checkpoint; empty if it has none."""
    found = checkpoint.get(SUMMARY_KEY) if isinstance(checkpoint, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def optimizer_keys(checkpoint: Any, places: Places | None = None) -> list[Keys]:
    """Return the keys that lead to the state of each optimizer; first Lightning's, then those under other keys.

    Args:
        checkpoint: The checkpoint, or a part of it.
        places: Those of the whole checkpoint; None to look.
    """
    if places is None:
        places = places_in(checkpoint)
    states = listed(checkpoint.get(OPTIMIZER_STATES)) if isinstance(checkpoint, Mapping) else ()
    own: list[Keys] = [(OPTIMIZER_STATES, index) for index in range(len(states))]
    others = [keys for keys, place in places.items() if place[0] == OPTIMIZER_STATES]
    return [*own, *others]


def optimizers_in(checkpoint: Any, places: Places | None = None) -> list[Mapping[str, Any]]:
    """Return the state of each optimizer; empty for anything else that a hook has put there.

    Args:
        checkpoint: The checkpoint, or a part of it.
        places: Those of the whole checkpoint; None to look.
    """
    states = (item_at(checkpoint, keys) for keys in optimizer_keys(checkpoint, places))
    return [state if isinstance(state, Mapping) else {} for state in states]


def groups_of(optimizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parameter groups in an optimizer's state."""
    return [group for group in listed(optimizer.get("param_groups")) if isinstance(group, Mapping)]


def parameter_names_in(checkpoint: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the names of each optimizer's parameters in the order of its groups, as far as the checkpoint has them.

    The summary may have them. So do the groups of an optimizer that was made from named parameters.
    """
    said = listed(summary_in(checkpoint).get(PARAMETERS_KEY))
    return tuple(
        tuple(listed(said[index]))
        if index < len(said)
        else tuple(name for group in groups_of(optimizer) for name in listed(group.get("param_names")))
        for index, optimizer in enumerate(optimizers_in(checkpoint))
    )


def epsilons_of(checkpoint: Mapping[str, Any], places: Places | None = None) -> dict[Keys, float]:
    """Return the eps of each parameter's optimizer group, by the keys that lead to the parameter's states.

    Args:
        checkpoint: The checkpoint, or a part of it.
        places: Those of the whole checkpoint; None to look.
    """
    groups = options_in(checkpoint, places).items()
    return {keys: eps for keys, group in groups if isinstance(eps := group.get("eps"), float)}


def options_in(checkpoint: Mapping[str, Any], places: Places | None = None) -> dict[Keys, Mapping[str, Any]]:
    """Return the optimizer group of each parameter, by the keys that lead to the parameter's states.

    Args:
        checkpoint: The checkpoint, or a part of it.
        places: Those of the whole checkpoint; None to look.
    """
    if places is None:
        places = places_in(checkpoint)
    there = optimizer_keys(checkpoint, places)
    return {
        (*keys, "state", key): group
        for keys, optimizer in zip(there, optimizers_in(checkpoint, places), strict=True)
        for group in groups_of(optimizer)
        for key in listed(group.get("params"))
    }


def listed(value: Any) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple, or an empty one for anything else that a hook has put into a checkpoint."""
    return value if isinstance(value, list | tuple) else ()
