"""Compare two checkpoints tensor by tensor, quantized or not; decode one tensor of each at a time."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.layout.optimizer_states import BASES, FIRST_OF_ADAM, SECONDS_OF_ADAM
from q8lightning.checkpoint.layout.places import item_at, place_of
from q8lightning.checkpoint.layout.sections import (
    DEFAULT_EPS,
    epsilons_of,
    name_of,
    optimizer_keys,
    path_of,
)
from q8lightning.checkpoint.tree import Keys
from q8lightning.tools.comparison import UPDATE_DIRECTION, Comparison, Difference, Reshaped, Row
from q8lightning.tools.open_checkpoint import OpenCheckpoint, Progress, ToolError, open_checkpoint, silent
from q8lightning.tools.tensors import (
    Value,
    bytes_a_parameter,
    codec_of,
    dtype_of,
    kind_of,
    tensors_in,
)

CHUNK = 2**18
"""Elements that are compared at a time, in float64."""


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, trust: bool = False, progress: Progress = silent
) -> Comparison:
    """Compare all tensors that have the same path in two checkpoints, quantized or not.

    Args:
        first: The file or folder that errors are relative to.
        second: The other one.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            files.
        progress: Called with the number of tensors compared so far, and of all.

    Raises:
        ToolError: If a file cannot be read, or the files have no tensor in common.
        CorruptCheckpointError: If a file is damaged.
        NewerFormatError: If a file was written in a later format than this version reads.

    Example:
        >>> from q8lightning.tools import compare
        >>> found = compare("plain.ckpt", "small.ckpt")  # doctest: +SKIP
        >>> found.by_kind()["weights"].sqnr_db, found.differing[0].name  # doctest: +SKIP
    """
    one, two = open_checkpoint(first, trust), open_checkpoint(second, trust)
    with one.verified(), two.verified():
        return _compare(one, two, progress)


def _compare(first: OpenCheckpoint, second: OpenCheckpoint, progress: Progress) -> Comparison:
    one = {path_of(keys): (keys, value) for keys, value in tensors_in(first.content)}
    two = {path_of(keys): (keys, value) for keys, value in tensors_in(second.content)}
    if one.keys().isdisjoint(two):
        raise ToolError(f"{first.path} and {second.path} have no tensor in common; `q8lightning inspect` shows both")
    parameters = {**second.parameters, **first.parameters}
    places = {**second.places, **first.places}

    def name(keys: Keys) -> str:
        return name_of(keys, parameters.get(keys[:-1]), places)

    rows: list[Row] = []
    reshaped: list[Reshaped] = []
    for index, (path, (keys, a)) in enumerate(one.items()):
        progress(index + 1, len(one))
        if path not in two:
            continue
        b = two[path][1]
        if tuple(a.shape) != tuple(b.shape):
            reshaped.append(Reshaped(path, name(keys), tuple(a.shape), tuple(b.shape)))
            continue
        difference = _sum(_differences(first.values(a).detach(), second.values(b).detach()))
        rows.append(Row(path, name(keys), kind_of(place_of(keys, places), a), _stored_as(a), _stored_as(b), difference))
    return Comparison(
        rows=(*rows, *_update_directions(first, second, parameters)),
        only_first=tuple(name(keys) for path, (keys, _) in one.items() if path not in two),
        only_second=tuple(name(keys) for path, (keys, _) in two.items() if path not in one),
        reshaped=tuple(reshaped),
        first=bytes_a_parameter(first.content, first.size),
        second=bytes_a_parameter(second.content, second.size),
    )


def _stored_as(value: Value) -> str:
    return codec_of(value) or dtype_of(value)


def _flat(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = _flat(tensor)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].to(torch.float64)


def _differences(a: Tensor, b: Tensor) -> Iterator[Difference]:
    for one, two in zip(_chunks(a), _chunks(b), strict=True):
        yield _difference(one, two)


def _difference(one: Tensor, two: Tensor) -> Difference:
    if not one.numel():
        return Difference()
    same = one == two  # infinities that agree have no difference, and would hide every other one in a signal
    gap, signal = (two - one).masked_fill_(same, 0), one.masked_fill(same & one.isinf(), 0)
    return Difference(float(gap.square().sum()), float(signal.square().sum()), float(gap.abs().max()))


def _sum(differences: Iterator[Difference]) -> Difference:
    return sum(differences, Difference())


def _update_directions(first: OpenCheckpoint, second: OpenCheckpoint, parameters: Mapping[Keys, str]) -> Iterator[Row]:
    """Yield the difference of Adam's update direction for each parameter that both have moments of."""
    epsilons = epsilons_of(first.content) if isinstance(first.content, Mapping) else {}
    for there in optimizer_keys(first.content):
        one, two = item_at(first.content, there), item_at(second.content, there)
        if not isinstance(one, Mapping) or not isinstance(two, Mapping):
            continue
        for key, state in one.get("state", {}).items():
            a, b = _moments(state), _moments(two.get("state", {}).get(key))
            if a is None or b is None or a[0].shape != b[0].shape:
                continue
            keys = (*there, "state", key)
            eps = epsilons.get(keys, DEFAULT_EPS)
            parts = zip(_direction(first, a, eps), _direction(second, b, eps), strict=True)
            difference = _sum(_difference(x, y) for x, y in parts)
            name = f"{parameters.get(keys) or path_of(keys)}: update direction"
            yield Row(path_of(keys), name, UPDATE_DIRECTION, _stored_as(a[0]), _stored_as(b[0]), difference)


def _moments(state: Any) -> tuple[Value, Value] | None:
    if not isinstance(state, Mapping) or any(tensors_in(state.get(key)) for key in BASES):
        return None
    m, v = state.get(FIRST_OF_ADAM), next((state[key] for key in SECONDS_OF_ADAM if key in state), None)
    if not isinstance(m, Value) or not isinstance(v, Value) or tuple(m.shape) != tuple(v.shape):
        return None
    return m, v


def _direction(opened: OpenCheckpoint, moments: tuple[Value, Value], eps: float) -> Iterator[Tensor]:
    """Yield the update direction of a parameter in parts."""
    m, v = (opened.values(moment).detach() for moment in moments)
    for first_moment, second_moment in zip(_chunks(m), _chunks(v), strict=True):
        yield first_moment / (second_moment.sqrt() + eps)
