"""Quantize distributed weights part by part, as if they were whole: refuse blocks that cross parts, add up statistics.

A process quantizes the part of a weight that it holds, without communication. The result is that of the whole weight
if no block lies in two parts, by any number of processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from q8lightning.qat.rules import WeightRule
from q8lightning.quantization.codecs.weight import WHOLE_ROW, WeightCodec
from q8lightning.quantization.spec.portion import Portion, pieces
from q8lightning.system.shards import is_distributed, local_of

_BLOCK_SIZES = tuple(2**exponent for exponent in range(12, 4, -1))


def portion_of(name: str, parameter: Tensor) -> Portion | None:
    """Return which part of a parameter this process holds; None for an ordinary parameter.

    Raises:
        ValueError: If the parts are no boxes that follow from the placements.
    """
    if not is_distributed(parameter):
        return None
    distributed: Any = parameter
    mesh, shape = distributed.device_mesh, tuple(parameter.shape)
    coordinate = mesh.get_coordinate()
    sharding: list[list[tuple[int, bool]]] = [[] for _ in shape]
    for mesh_dim, placement in enumerate(distributed.placements):
        if hasattr(placement, "dim"):
            sharding[placement.dim].append((mesh_dim, getattr(placement, "split_factor", 1) > 1))
        elif not placement.is_replicate():
            raise ValueError(f"QAT needs weights that are sharded or replicated, but {name} is {placement}; exclude it")
    parts = []
    for length, dividing in zip(shape, sharding, strict=True):
        order = [mesh_dim for mesh_dim, strided in dividing if not strided]
        order += [mesh_dim for mesh_dim, strided in reversed(dividing) if strided]  # those divide what others left
        index = 0
        for mesh_dim in order:
            index = index * mesh.size(mesh_dim) + (0 if coordinate is None else coordinate[mesh_dim])
        all_parts = pieces(length, [mesh.size(mesh_dim) for mesh_dim in order])
        borders = tuple(sorted({start for start, _ in all_parts if 0 < start < length}))
        parts.append((*all_parts[index], borders))
    portion = Portion(shape, *(tuple(each) for each in zip(*parts, strict=True)))
    held = tuple(local_of(parameter).shape)
    if coordinate is not None and portion.sizes != held:
        raise ValueError(
            f"QAT cannot tell which part of {name}, of shape {shape} and placements {distributed.placements}, a process"
            f" holds: it has shape {held}, where {portion.sizes} was expected; exclude it"
        )
    return portion


def check_blocks(name: str, portion: Portion, codec: WeightCodec, rule: WeightRule) -> None:
    """Refuse a codec with blocks that lie in the parts of two processes.

    Args:
        name: Of the parameter.
        portion: Which part of it this process holds.
        codec: Fitted to the shape of the whole.
        rule: Where the codec comes from.

    Raises:
        ValueError: Naming the rule, the parameter and what to write instead; in every process.
    """
    cut = portion.cut(codec.block_size, codec.axis)
    if cut is None:
        return
    blocks = "along the flattened tensor" if codec.axis is None else f"along the rows of axis {codec.axis}"
    instead = _instead(portion, rule)
    remedy = "exclude it, or shard it along dimension 0" if instead is None else f"write {instead}, or exclude it"
    raise ValueError(
        f"the weight rule for {rule.pattern!r} quantizes {name} in blocks of {codec.block_size} {blocks}, and a block"
        f" lies in the parts of two processes: the tensor of shape {portion.shape} is divided along dimension"
        f" {cut.dim}, at {cut.place} among others. Quantized values must not depend on the number of processes;"
        f" {remedy}"
    )


def add_up(statistics: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return what whole weights lost, of what the parts lost that processes hold; all of them call this at once.

    Args:
        statistics: ``[weights, 5]`` float64, the fields of ``ErrorStatistics`` in their order.
        weights: The weights, ordinary ones among them.

    Returns:
        The same for the wholes, the same in all processes that hold a part.
    """
    together: dict[tuple[Any, int], list[int]] = {}
    for index, weight in enumerate(weights):
        if is_distributed(weight):
            mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
            for mesh_dim, placement in enumerate(placements):
                if hasattr(placement, "dim") and mesh.size(mesh_dim) > 1:
                    together.setdefault((mesh, mesh_dim), []).append(index)
    result = statistics.clone()
    for (mesh, mesh_dim), indices in together.items():
        rows, group = result[indices].to(mesh.device_type), mesh.get_group(mesh_dim)
        largest = rows[:, 2].clone()
        torch.distributed.all_reduce(rows, group=group)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
        rows[:, 2] = largest
        result[indices] = rows.to(result.device)
    return result


def _instead(portion: Portion, rule: WeightRule) -> str | None:
    """Return a rule for the same parameter that is exact: blocks within rows, or smaller ones; None if none is."""
    asked = rule.resolve()
    assert asked is not None
    smaller = [size for size in _BLOCK_SIZES if size <= asked.block_size]
    tried = [(asked.block_size, 0), *((size, asked.axis) for size in smaller), *((size, 0) for size in smaller)]
    for size, axis in tried:
        fitted = WeightCodec(asked.codebook, size, axis).fitted(portion.shape)
        if portion.cut(fitted.block_size, fitted.axis) is None:
            shown = repr("row") if size == WHOLE_ROW else size
            along = "" if axis is None else f", axis={axis}"
            along += "" if rule.scale_dtype == "float32" else f", scale_dtype={rule.scale_dtype!r}"
            return f"WeightRule({rule.pattern!r}, {rule.codebook!r}, block_size={shown}{along})"
    return None
