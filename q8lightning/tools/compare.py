"""Compare two checkpoints tensor by tensor, whichever of them is quantized; one tensor of each is decoded at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.report import relative_error, sqnr_db
from q8lightning.checkpoint.sections import (
    DEFAULT_EPS,
    FIRST_OF_ADAM,
    OPTIMIZER_STATES,
    SECONDS_OF_ADAM,
    optimizers_in,
    parameter_names_in,
    path_of,
)
from q8lightning.checkpoint.tree import Keys
from q8lightning.tools.inspect import label
from q8lightning.tools.source import KINDS, CommandError, Source, kind_of, leaves

CHUNK = 2**18
"""Elements that are compared at a time, in float64."""

_Value = Tensor | QuantizedTensor


@dataclass(frozen=True)
class Difference:
    """How far values are from those that they are compared with.

    Attributes:
        error: Sum of the squared differences.
        signal: Sum of the squares of the first values.
        max_error: The largest difference.
    """

    error: float = 0.0
    signal: float = 0.0
    max_error: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        largest = math.nan if math.isnan(self.max_error + other.max_error) else max(self.max_error, other.max_error)
        return Difference(self.error + other.error, self.signal + other.signal, largest)

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the first values; 0 where both are the same."""
        return relative_error(self.error, self.signal)

    @property
    def sqnr_db(self) -> float:
        """The same as a signal-to-noise ratio in dB; infinite where both are the same."""
        return sqnr_db(self.error, self.signal)


@dataclass(frozen=True)
class Row:
    """The comparison of one tensor, or of the update direction of one parameter.

    Attributes:
        path: Its path, or the name of the parameter.
        kind: What it is; ``update_direction`` for exp_avg / (sqrt(exp_avg_sq) + eps).
        first: Dtype or codec in the first file.
        second: The same in the second one.
        difference: How far the second is from the first.
    """

    path: str
    kind: str
    first: str
    second: str
    difference: Difference


UPDATE_DIRECTION = "update_direction"


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        rows: Tensors that both have, in the first file's order, then update directions.
        only_first: Paths of tensors that only the first file has.
        only_second: Paths of those that only the second has.
        reshaped: Paths of those whose shapes differ, and both shapes.
    """

    rows: list[Row] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def by_kind(self) -> dict[str, Difference]:
        """Return the differences of all tensors of a kind together."""
        totals: dict[str, Difference] = {}
        for kind in (*KINDS, UPDATE_DIRECTION):
            for row in self.rows:
                if row.kind == kind:
                    totals[kind] = totals.get(kind, Difference()) + row.difference
        return totals


def compare(first: Source, second: Source, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Compare all tensors that have the same path.

    Raises:
        CommandError: If the files have no tensor in common.
        CorruptCheckpointError: If a payload is damaged.
    """
    one = {path_of(keys): (keys, value) for keys, value in leaves(first.content)}
    two = {path_of(keys): value for keys, value in leaves(second.content)}
    if one.keys().isdisjoint(two):
        raise CommandError(f"{first.path} and {second.path} have no tensor in common; `q8lightning inspect` shows both")
    result = Comparison(
        only_first=[path for path in one if path not in two], only_second=[path for path in two if path not in one]
    )
    for index, (path, (keys, a)) in enumerate(one.items()):
        if progress is not None:
            progress(index + 1, len(one))
        b = two.get(path)
        if b is None:
            continue
        if tuple(a.shape) != tuple(b.shape):
            result.reshaped.append((path, tuple(a.shape), tuple(b.shape)))
            continue
        difference = _sum(_differences(first.values(a).detach(), second.values(b).detach()))
        result.rows.append(Row(path, kind_of(keys, a), _stored_as(a), _stored_as(b), difference))
    result.rows.extend(_update_directions(first, second))
    return result


def _stored_as(value: _Value) -> str:
    return label(value) if isinstance(value, QuantizedTensor) else str(value.dtype).removeprefix("torch.")


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
    gap = (two - one).masked_fill_(one == two, 0)  # infinities that agree
    return Difference(float(gap.square().sum()), float(one.square().sum()), float(gap.abs().max()))


def _sum(differences: Iterator[Difference]) -> Difference:
    return sum(differences, Difference())


def _update_directions(first: Source, second: Source) -> Iterator[Row]:
    """Yield by how much Adam would step into another direction, for each parameter that both have moments of."""
    optimizers = [optimizers_in(source.content) for source in (first, second)]
    names = parameter_names_in(first.content) if optimizers[0] else ()
    for index, (one, two) in enumerate(zip(*optimizers, strict=False)):
        for key, state in one.get("state", {}).items():
            moments = [_moments(state), _moments(two.get("state", {}).get(key))]
            if moments[0] is None or moments[1] is None or moments[0][0].shape != moments[1][0].shape:
                continue
            eps = _eps(one, key)
            directions = [
                _direction(source.values(pair[0]).detach(), source.values(pair[1]).detach(), eps)
                for source, pair in zip((first, second), moments, strict=True)
                if pair
            ]
            difference = _sum(_difference(a, b) for a, b in zip(*directions, strict=True))
            known = names[index] if index < len(names) else ()
            name = known[key] if isinstance(key, int) and key < len(known) else str(key)
            path = name if name != str(key) else path_of((OPTIMIZER_STATES, index, "state", key))
            yield Row(path, UPDATE_DIRECTION, _stored_as(moments[0][0]), _stored_as(moments[1][0]), difference)


def _moments(state: Any) -> tuple[_Value, _Value] | None:
    if not isinstance(state, Mapping):
        return None
    m, v = state.get(FIRST_OF_ADAM), next((state[key] for key in SECONDS_OF_ADAM if key in state), None)
    if not isinstance(m, _Value) or not isinstance(v, _Value) or tuple(m.shape) != tuple(v.shape):
        return None
    return m, v


def _eps(optimizer: Mapping[str, Any], key: Keys) -> float:
    for group in optimizer.get("param_groups", ()):
        if key in group.get("params", ()):
            return float(group.get("eps", DEFAULT_EPS))
    return DEFAULT_EPS


def _direction(m: Tensor, v: Tensor, eps: float) -> Iterator[Tensor]:
    for first_moment, second_moment in zip(_chunks(m), _chunks(v), strict=True):
        yield first_moment / (second_moment.sqrt() + eps)


def as_json(result: Comparison) -> dict[str, Any]:
    """Return everything that was found as JSON has it; ratios that are no finite number are None."""
    return {
        "kinds": {kind: _numbers(difference) for kind, difference in result.by_kind().items()},
        "tensors": [
            {"path": row.path, "kind": row.kind, "first": row.first, "second": row.second, **_numbers(row.difference)}
            for row in result.rows
        ],
        "only_first": result.only_first,
        "only_second": result.only_second,
        "different_shapes": [{"path": path, "first": one, "second": two} for path, one, two in result.reshaped],
    }


def _numbers(difference: Difference) -> dict[str, Any]:
    numbers = {
        "relative_error": difference.relative_error,
        "sqnr_db": difference.sqnr_db,
        "max_error": difference.max_error,
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
