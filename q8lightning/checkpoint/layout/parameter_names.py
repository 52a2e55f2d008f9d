"""Find the names of the parameters that an optimizer's states belong to.

torch numbers the parameters of an optimizer. A checkpoint has their names if the optimizer was made from named
parameters, if its states go by name, or if the summary has them. Otherwise they follow from order and shapes, assuming
that the parameters of a group stand in the order of the state dict, as ``module.parameters()`` gives them. A name is
taken only if every assignment that is possible leads to it. Nothing proves the assumption, so these names are for
people to read, and no rule of a policy uses them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.layout.optimizer_states import FIRST_MOMENTS, OTHER_WEIGHTS, SECOND_MOMENTS
from q8lightning.checkpoint.layout.places import Places, item_at
from q8lightning.checkpoint.layout.sections import (
    RUNNING_STATISTICS,
    STATE_DICT,
    groups_of,
    listed,
    name_of,
    optimizer_keys,
    optimizers_in,
    parameter_names_in,
    path_of,
    places_in,
    state_dicts_in,
)
from q8lightning.checkpoint.tree import PATHS, Keys, leaves

Shape = tuple[int, ...]


def names_of_states(checkpoint: Any) -> dict[str, str]:
    """Return the names of optimizer states by their paths, where the parameter is known; see ``sections.name_of``."""
    parameters = parameters_of_states(checkpoint)
    if not parameters:
        return {}
    places = places_in(checkpoint)
    found = [
        (*keys, *inner)
        for keys in optimizer_keys(checkpoint, places)
        for inner, _ in leaves(item_at(checkpoint, keys), PATHS)
    ]
    return {path_of(keys): name_of(keys, parameters[keys[:-1]], places) for keys in found if keys[:-1] in parameters}


def parameters_of_states(checkpoint: Any) -> dict[Keys, str]:
    """Return the names of parameters that are known, by the keys that lead to their states.

    Args:
        checkpoint: A checkpoint with tensors, payloads or other objects that have a shape. For anything else the result
            is empty.

    Returns:
        Such as ``{("optimizer_states", 0, "state", 3): "layer.weight"}``.
    """
    found: dict[Keys, str] = {}
    if not isinstance(checkpoint, Mapping):
        return found
    places = places_in(checkpoint)
    weights = _weights_in(checkpoint, places)
    optimizers = optimizers_in(checkpoint, places)
    for keys_of_one, optimizer, names in zip(
        optimizer_keys(checkpoint, places), optimizers, parameter_names_in(checkpoint), strict=True
    ):
        state = optimizer.get("state")
        if not isinstance(state, Mapping):
            continue
        keys = [key for group in groups_of(optimizer) for key in listed(group.get("params"))]
        said = dict(zip(keys, names, strict=False))
        shown = _shown(optimizer, state, weights)
        for key in state:
            name = key if isinstance(key, str) else said.get(key) or shown.get(key)
            if isinstance(name, str):
                there: Keys = (*keys_of_one, "state", key)
                found[there] = name
    return found


def _shown(
    optimizer: Mapping[str, Any], state: Mapping[Any, Any], weights: Sequence[tuple[str, Shape]]
) -> dict[Any, str]:
    """Return the names that follow from order and shapes, by the parameters' keys; none that fits two parameters."""
    names: dict[Any, str] = {}
    for group in groups_of(optimizer):
        keys = listed(group.get("params"))
        shapes = [_shape_of_parameter(state.get(key)) for key in keys]
        names |= {key: name for key, name in zip(keys, _aligned(shapes, weights), strict=True) if name is not None}
    often = Counter(names.values())
    return {key: name for key, name in names.items() if often[name] == 1}


def _shape_of_parameter(state: Any) -> Shape | None:
    """Return the shape of a parameter, which is that of what an optimizer keeps for it; None if it has none."""
    if isinstance(state, Mapping):
        for key in (*FIRST_MOMENTS, *SECOND_MOMENTS, *OTHER_WEIGHTS):
            if (shape := _shape(state.get(key))) is not None:
                return shape
    return None


def _shape(value: Any) -> Shape | None:
    """Return the shape of a tensor or a similar object; None if it has none that can be compared."""
    if isinstance(value, Tensor) and value.is_nested:
        return None
    shape = getattr(value, "shape", None)
    return tuple(shape) if isinstance(shape, tuple | list) else None


def _aligned(shapes: Sequence[Shape | None], weights: Sequence[tuple[str, Shape]]) -> list[str | None]:
    """Return for each parameter the weight that every assignment by order and shape gives it; None if they differ.

    The earliest and the latest place of each parameter are found from both ends. Where both are the same, there is no
    other.
    """
    first = _earliest(shapes, [shape for _, shape in weights])
    last = _earliest(shapes[::-1], [shape for _, shape in reversed(weights)])
    if first is None or last is None:
        return [None] * len(shapes)
    ends = [len(weights) - 1 - place for place in reversed(last)]
    return [weights[one][0] if one == two else None for one, two in zip(first, ends, strict=True)]


def _earliest(shapes: Sequence[Shape | None], places: Sequence[Shape]) -> list[int] | None:
    """Return the earliest place of each shape among ``places``, in order; None if they do not all fit."""
    found: list[int] = []
    at = 0
    for shape in shapes:
        while at < len(places) and shape is not None and places[at] != shape:
            at += 1
        if at == len(places):
            return None
        found.append(at)
        at += 1
    return found


def _weights_in(checkpoint: Mapping[str, Any], places: Places) -> list[tuple[str, Shape]]:
    """Return names and shapes of entries that may be parameters, in order; the first of tied ones, as optimizers do.

    A buffer among them does no harm: it only makes more assignments possible.
    """
    seen: set[Any] = set()
    result = []
    modules = [keys for keys, place in places.items() if place == (STATE_DICT,)]
    found = {**state_dicts_in(checkpoint).get(STATE_DICT, {})}
    for keys in modules:
        before = f"{path_of(keys)}." if len(modules) > 1 else ""
        found |= {f"{before}{name}": value for name, value in item_at(checkpoint, keys).items()}
    for name, value in found.items():
        shape, dtype = _shape(value), getattr(value, "dtype", None)
        is_number = not isinstance(dtype, torch.dtype) or dtype.is_floating_point or dtype.is_complex
        if (
            shape is not None
            and is_number
            and str(name).rpartition(".")[2] not in RUNNING_STATISTICS
            and (identity := identity_of(value)) not in seen
        ):
            seen.add(identity)
            result.append((str(name), shape))
    return result


def identity_of(value: Any) -> Any:
    """Return a key that only tied tensors share: those that view the same of one memory, or are one payload."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.numel():
        return id(value)
    return (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
