"""The tensors of a checkpoint: where each lies, whose it is, and which codec the policy wants for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.candidates import Candidate, Pair
from q8lightning.checkpoint.payload import is_dense, is_ordinary
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.quantization.codec import Codec
from q8lightning.quantization.weight_codec import WeightCodec

WEIGHTS = ("state_dict", "current_model_state")
"""Sections that hold a model's state dict; the second is where WeightAveraging keeps the weights being trained."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The keys of the moments by which Adam and its kin step."""


@dataclass(frozen=True)
class ModelNames:
    """What a checkpoint does not say about the model it is of.

    Attributes:
        parameters: Names of the model's parameters. What else its state dict holds (buffers, states of metrics, extra
            state) is left alone, unless it holds none of these names, as when a hook renames them.
        optimizer_parameters: For each optimizer, the names of its parameters in the order of its groups.
        quantized: How weights that are trained quantized are, by name.
        restored: How often the run was restored from a quantized checkpoint.
    """

    parameters: frozenset[str] = frozenset()
    optimizer_parameters: tuple[tuple[str, ...], ...] = ()
    quantized: Mapping[str, WeightCodec] = field(default_factory=dict)
    restored: int = 0


class Leaf(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        keys: Keys and indices that lead to it.
        path: The same, joined by dots.
        parameter: The name of the parameter that it is or belongs to, None if nobody knows.
        tensor: The tensor.
        codec: What the policy wants for it, None to store it as it is.
        storage: The same for tensors that share memory; None for one that has none to look at.
    """

    keys: tuple[Any, ...]
    path: str
    parameter: str | None
    tensor: Tensor
    codec: Codec | None
    storage: tuple[torch.device, int] | None

    @property
    def kind(self) -> str:
        """See :class:`~q8lightning.checkpoint.losses.TensorLoss`."""
        return kind_of(self.keys)

    def candidate(self, codec: Codec | None) -> Candidate:
        """Return it as something to encode with ``codec``."""
        return Candidate(self.path, self.kind, self.parameter or self.path, self.tensor, codec)


def kind_of(keys: tuple[Any, ...]) -> str:
    """Return the kind of the tensor that the keys lead to; see :class:`~q8lightning.checkpoint.losses.TensorLoss`."""
    if keys[0] in WEIGHTS:
        return "weights"
    return str(keys[-1] if _is_state(keys) else keys[0])


def names_from(checkpoint: Mapping[str, Any]) -> ModelNames:
    """Take what names the checkpoint has: those of optimizers that were made from named parameters."""
    optimizers = checkpoint.get("optimizer_states", ())
    return ModelNames(
        optimizer_parameters=tuple(
            tuple(name for group in state.get("param_groups", ()) for name in group.get("param_names", ()))
            for state in optimizers
            if isinstance(state, Mapping)
        )
    )


def leaves_of(checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames) -> Iterator[Leaf]:
    """Yield all tensors of a checkpoint, in its order."""
    known = {section for section in WEIGHTS if not names.parameters.isdisjoint(checkpoint.get(section, ()))}
    for keys, tensor in tensors_of(checkpoint):
        path = ".".join(map(str, keys))
        parameter = _parameter_of(keys, names)
        wanted = storage = None
        if is_ordinary(tensor):
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            if (
                tensor.numel() >= policy.min_numel
                and not (keys[0] in known and parameter not in names.parameters)
                and _is_encodable(tensor)
            ):
                wanted = policy.codec_for(path, parameter)
                if wanted is not None and wanted.encoded_bytes(tensor.numel()) >= tensor.nbytes:
                    wanted = None
        yield Leaf(keys, path, parameter, tensor, wanted, storage)


def tensors_of(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Return the tensors in nested dicts, lists and tuples with the keys that lead to them."""
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    _collect(value, keys, found)
    return found


def _collect(value: Any, keys: tuple[Any, ...], found: list[tuple[tuple[Any, ...], Tensor]]) -> None:
    if isinstance(value, Tensor):
        found.append((keys, value))
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, (*keys, key), found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _collect(item, (*keys, index), found)


def _parameter_of(keys: tuple[Any, ...], names: ModelNames) -> str | None:
    """Return the name of the parameter that a tensor is or belongs to, None if nobody knows."""
    if keys[0] in WEIGHTS:
        return ".".join(map(str, keys[1:]))
    if _is_state(keys):
        _, optimizer, _, parameter, _ = keys
        if isinstance(parameter, str):  # optimizer states of FSDP go by name
            return parameter
        if isinstance(optimizer, int) and optimizer < len(names.optimizer_parameters):
            known = names.optimizer_parameters[optimizer]
            return known[parameter] if isinstance(parameter, int) and parameter < len(known) else None
    return None


def _is_state(keys: tuple[Any, ...]) -> bool:
    """Whether the keys lead to what an optimizer remembers of one parameter."""
    return keys[0] == "optimizer_states" and len(keys) == 5 and keys[2] == "state"


def _is_encodable(tensor: Tensor) -> bool:
    """Whether a codec can take an ordinary tensor."""
    return (
        tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and not tensor.requires_grad
        and not tensor.is_neg()
        and tensor.ndim > 0
        and is_dense(tensor)
    )


def epsilons_of(checkpoint: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    """Return the eps of each optimizer's groups, by what precedes the key of their parameters' states."""
    epsilons: dict[tuple[Any, ...], float] = {}
    optimizers = checkpoint.get("optimizer_states", ())
    for index, optimizer in enumerate(optimizers if isinstance(optimizers, list | tuple) else ()):
        for group in optimizer.get("param_groups", ()) if isinstance(optimizer, Mapping) else ():
            if isinstance(eps := group.get("eps"), float):
                epsilons |= {("optimizer_states", index, "state", key): eps for key in group.get("params", ())}
    return epsilons


def pairs_of(
    leaves: list[Leaf], candidates: Mapping[int, Candidate], epsilons: Mapping[tuple[Any, ...], float]
) -> Iterator[Pair]:
    """Yield the two moments of each parameter of which one is a candidate and whose elements correspond."""
    moments = {leaf.keys: leaf for leaf in leaves if _is_state(leaf.keys) and leaf.keys[-1] in MOMENTS}
    for keys, first in moments.items():
        second = moments.get((*keys[:-1], MOMENTS[1])) if keys[-1] == MOMENTS[0] else None
        if second is None or not _correspond(first, second):
            continue
        one, two = (candidates.get(id(leaf.tensor)) or leaf.candidate(None) for leaf in (first, second))
        if one.codec is not None or two.codec is not None:
            yield Pair(one, two, epsilons.get(keys[:-1], 1e-8))


def _correspond(first: Leaf, second: Leaf) -> bool:
    """Whether elements at the same place in memory have the same index."""
    for leaf in (first, second):
        if leaf.codec is None and not (leaf.storage and leaf.tensor.numel() and _is_encodable(leaf.tensor)):
            return False
    one, two = first.tensor, second.tensor
    return one.shape == two.shape and one.stride() == two.stride() and one.device == two.device
