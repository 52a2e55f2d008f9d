"""Know what lies under a user's own keys: states of modules and optimizers, and their place in Lightning's layout.

Fabric and loops of the user's own save ``{"model": ..., "optimizer": ...}``. Rules are written for Lightning's layout,
so what is found here is encoded as if it stood there. The file keeps the user's keys.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from q8lightning.checkpoint.tree import Keys

STATE_DICT = "state_dict"
"""The section of the weights that are evaluated and deployed."""

OPTIMIZER_STATES = "optimizer_states"
"""The section of the optimizers' state dicts, ``{"state": {parameter: {key: value}}, "param_groups": [...]}`` each."""

BUFFERS = "buffers"
"""The place of a module's buffers, where these are known: no section, so that no rule applies."""

VERSION_KEY = "pytorch-lightning_version"
"""A key that every checkpoint of a Trainer has; in those nothing is looked for."""

Places = Mapping[Keys, Keys]
"""Where something stands in Lightning's layout, by the keys that lead to it in the checkpoint, such as
``{("model",): ("state_dict",), ("optimizer",): ("optimizer_states", 0)}``. Longer keys decide before shorter ones."""

NOWHERE: Places = MappingProxyType({})
"""Of a checkpoint in Lightning's layout."""

_DEPTH = 4
"""How many containers may be around a state; deeper ones are data of the user's own."""

_LONG = 1000
"""Items from which on a list is data of the user's own."""


def find_places(checkpoint: Any, known: Mapping[str, Any]) -> Places:
    """Find the states of modules and optimizers under a user's own keys.

    A mapping with ``state`` and ``param_groups`` is an optimizer's. A module's is what ``state_dict()`` returns, or
    a mapping of nothing but tensors of which at least one has the name of a parameter: ``weight``, ``bias``, or a name
    with a dot. The checkpoint itself may be such a state; its keys are then ``()``.

    Args:
        checkpoint: Anything; empty for one of a Trainer.
        known: The sections of Lightning, which are in their place.
    """
    if not isinstance(checkpoint, dict) or VERSION_KEY in checkpoint:
        return NOWHERE
    own = checkpoint.get(OPTIMIZER_STATES)
    optimizers = len(own) if isinstance(own, list | tuple) else 0
    places: dict[Keys, Keys] = {}
    for keys, place in _states((), checkpoint, known):
        places[keys] = (place,) if place == STATE_DICT else (place, optimizers)
        optimizers += place == OPTIMIZER_STATES
    return places


def place_of(keys: Keys, places: Places) -> Keys:
    """Return the keys that would lead to something in Lightning's layout; the keys themselves if that is not known."""
    if places:
        for length in range(len(keys), -1, -1):
            place = places.get(keys[:length])
            if place is not None:
                return (*place, *keys[length:])
    return keys


def item_at(checkpoint: Any, keys: Keys) -> Any:
    """Return what keys lead to; None if there is nothing."""
    for key in keys:
        try:
            checkpoint = checkpoint[key]
        except (KeyError, IndexError, TypeError):
            return None
    return checkpoint


def is_optimizer(value: Any) -> bool:
    """Whether a container is the state dict of an optimizer."""
    return isinstance(value, dict) and "state" in value and "param_groups" in value


def is_module(value: Any) -> bool:
    """Whether a container is the state dict of a module; see :func:`find_places`."""
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        return False
    if hasattr(value, "_metadata"):
        return any(map(_is_tensor, value.values()))
    return all(map(_is_tensor, value.values())) and any("." in name or name in ("weight", "bias") for name in value)


def _states(keys: Keys, container: Any, known: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    if is_optimizer(container):
        yield keys, OPTIMIZER_STATES
    elif is_module(container):
        yield keys, STATE_DICT
    elif len(keys) < _DEPTH:
        for key, item in _items(container):
            if keys or key not in known:
                yield from _states((*keys, key), item, known)


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, dict):
        yield from container.items()
    elif isinstance(container, list | tuple) and len(container) < _LONG:
        yield from enumerate(container)


def _is_tensor(value: Any) -> bool:
    """Whether something is a tensor, a payload or a tensor of a folder."""
    return hasattr(value, "shape") and hasattr(value, "dtype")
