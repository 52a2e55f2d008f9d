"""Choose miniatures: one small checkpoint for each way in which a model's parameters are saved.

A kernel is compiled for the codec, the dtype and the alignment of its tensors, not for their number or sizes. So one
small tensor for each of these needs the same kernels as the real ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q8lightning.checkpoint.encode.select.leaves import Shard
from q8lightning.checkpoint.memory import has_memory
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.tree import tensors
from q8lightning.quantization.codecs.weight import WeightCodec

NUMEL = 4096
"""Elements of a miniature tensor: whole blocks of every codec."""

ALIGNED = 16
"""The fastest kernels need addresses, in bytes, and numbers of elements that are multiples of this."""


class Form(NamedTuple):
    """The properties of a tensor that a kernel is compiled for.

    Attributes:
        dtype: Its dtype.
        is_whole: Whether its number of elements is a multiple of 16.
        is_aligned: Whether its address is a multiple of 16 bytes.
    """

    dtype: torch.dtype
    is_whole: bool
    is_aligned: bool

    @staticmethod
    def of(tensor: Tensor) -> "Form":
        """Return the form of a tensor; of a DTensor, that of the shard which this process has."""
        own = _local(tensor)
        return Form(own.dtype, own.numel() % ALIGNED == 0, own.data_ptr() % ALIGNED == 0)

    def tensor(self, device: torch.device, lossless: bool, row: int | None = None) -> Tensor:
        """Return a tensor of this form.

        Args:
            device: The device of the tensor.
            lossless: Whether every codec holds it without loss. Otherwise every codec loses something.
            row: Makes the shape ``[rows, row]`` instead of one dimension.
        """
        skip = 0 if self.is_aligned else 1
        rows = ALIGNED * max(NUMEL // (ALIGNED * (row or 1)), 1) + (0 if self.is_whole else 1)
        numel = skip + rows * (row or 1)
        values = torch.linspace(1.0 if lossless else 0.01, 1.0, numel, dtype=torch.float32, device=device)
        if not lossless:
            values[::2].mul_(0.01)  # 12 bits hold numbers of bfloat16 exactly, unless they are small in their block
        flat = values.to(self.dtype)[skip:]
        return flat if row is None else flat.view(rows, row)


class Miniature(NamedTuple):
    """A parameter that stands for all parameters that are saved alike.

    Attributes:
        name: The name of the parameter.
        weight: The form of its values; None if they are stored as they are.
        place: The optimizer that has it, and its number there; None if no optimizer has it.
        states: The keys and forms of what the optimizer keeps for it, or will; empty if all of it is stored as it is.
        trained: The codec by which it is trained quantized, if kernels encode that; None otherwise.
        row: The elements of a channel, if that codec's blocks end with channels; None otherwise.
        shard: What its tensors are a part of in this process; None if they are whole.
    """

    name: str
    weight: Form | None
    place: tuple[int, int] | None
    states: tuple[tuple[str, Form], ...]
    trained: WeightCodec | None = None
    row: int | None = None
    shard: Shard | None = None

    def checkpoint(self, device: torch.device, lossless: bool = True) -> dict[str, Any]:
        """Return a checkpoint of this parameter alone; see :meth:`Form.tensor`."""
        result: dict[str, Any] = {"state_dict": {}, "optimizer_states": []}
        if self.weight is not None:
            result["state_dict"][self.name] = self.weight.tensor(device, lossless, self.row)
        if self.place is not None and self.states:
            optimizer, index = self.place
            state = {index: {key: form.tensor(device, lossless) for key, form in self.states}}
            groups = [{"eps": 1e-8, "params": [index]}]
            nothing: dict[str, Any] = {"state": {}, "param_groups": []}
            result["optimizer_states"] = [nothing] * optimizer + [{"state": state, "param_groups": groups}]
        return result

    def shards(self, checkpoint: dict[str, Any]) -> dict[int, Shard]:
        """Return what the tensors of :meth:`checkpoint` are a part of, by their ids."""
        return {} if self.shard is None else {id(tensor): self.shard for _, tensor in tensors(checkpoint)}


def miniatures_of(
    policy: CheckpointPolicy,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    quantized: Mapping[str, WeightCodec] = MappingProxyType({}),
) -> list[Miniature]:
    """Return a miniature for each way in which the policy will encode a parameter and its states.

    Args:
        policy: The policy.
        module: The model.
        optimizers: Its optimizers, which need not have any state yet.
        device: Only parameters of this device count.
        quantized: The codecs of weights that are trained quantized, by name.
    """
    places = {
        id(parameter): (i, index)
        for i, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(parameters_of(optimizer))
    }
    in_shards = any(_local(each) is not each for each in module.parameters())
    found: dict[Any, Miniature] = {}
    for name, parameter in module.named_parameters():
        own = _local(parameter)
        if not has_memory(own) or not own.numel():
            continue  # sparse, of a lazy layer that has no shape yet, or without a part in this process
        if own.device != device or parameter.numel() < policy.min_numel:
            continue
        place = places.get(id(parameter))
        weight, codec = Form.of(parameter), policy.codec_for(f"state_dict.{name}", name)
        shard = _shard_of(parameter) if in_shards else None
        states = () if place is None else tuple(states_to_come(optimizers[place[0]], parameter))
        path = "" if place is None else "optimizer_states.{}.state.{}".format(*place)
        codecs = tuple(policy.codec_for(f"{path}.{key}", name) for key, _ in states)
        if codec is not None or any(codecs):
            kept = states if any(codecs) else ()
            trained = quantized.get(name)
            if trained is not None and trained.axis:
                trained = None  # no kernel encodes across rows
            row = None if trained is None or trained.axis != 0 else parameter.shape[1:].numel()
            aligned = [each and shard and shard.aligned(each) for each in (codec, *codecs)]
            way = codec and (codec, weight, trained, row), kept and (codecs, kept), tuple(aligned)
            found.setdefault(way, Miniature(name, weight if codec else None, place, kept, trained, row, shard))
    return list(found.values())


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of an optimizer in the order of its groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def states_to_come(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Form]]:
    """Yield the keys and forms of what an optimizer keeps for a parameter, or will keep if it has no state yet."""
    state = optimizer.state.get(parameter)
    if state:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and has_memory(_local(value)):
                yield key, Form.of(value)
        return
    options = getattr(optimizer, "defaults", {})
    keys = ["exp_avg", "exp_avg_sq"] if "betas" in options else []
    keys += ["max_exp_avg_sq"] if options.get("amsgrad") else []
    keys += ["momentum_buffer"] if options.get("momentum") else []
    keys += ["square_avg"] if "alpha" in options else []
    dtype, is_whole, _ = Form.of(parameter)
    for key in keys:
        yield key, Form(dtype, is_whole, is_aligned=True)


def _shard_of(parameter: Tensor) -> Shard:
    """Return what is saved of a parameter among shards; a tensor that is not divided is the only shard of itself."""
    own = _local(parameter)
    rows = (each.shape[1:].numel() if each.ndim > 1 else 0 for each in (parameter, own))
    return Shard(parameter.numel(), math.gcd(*rows))


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this process has; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
