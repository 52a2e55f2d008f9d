"""The tensors of a checkpoint: where each lies, whose it is, and which codec the policy wants for it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.candidates import Candidate, Pair
from q8lightning.checkpoint.payload import is_dense
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.tree import PATHS, has_memory, tensors
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.weight import WeightCodec

WEIGHTS = ("state_dict", "current_model_state")
"""Sections that hold a model's state dict; the second is where WeightAveraging keeps the weights being trained."""

FIRST_MOMENT = "exp_avg"
SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq")
"""The keys of the moments of Adam and its kin. Of the second ones it steps by the first that there is: AMSGrad keeps,
beside the one that it updates, the largest that there was."""

_PAIRED = (FIRST_MOMENT, *SECOND_MOMENTS)


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
        refused: Why what the policy wants cannot be, if the user should hear of it.
    """

    keys: tuple[Any, ...]
    path: str
    parameter: str | None
    tensor: Tensor
    codec: Codec | None
    storage: tuple[torch.device, int] | None
    refused: str | None = None

    @property
    def kind(self) -> str:
        """See :class:`~q8lightning.checkpoint.report.TensorLoss`."""
        return kind_of(self.keys)

    def candidate(self, codec: Codec | None) -> Candidate:
        """Return it as something to encode with ``codec``."""
        return Candidate(self.path, self.kind, self.parameter or self.path, self.tensor, codec)


def kind_of(keys: tuple[Any, ...]) -> str:
    """Return the kind of the tensor that the keys lead to; see :class:`~q8lightning.checkpoint.report.TensorLoss`."""
    if keys[0] in WEIGHTS:
        return "weights"
    return str(keys[-1] if _is_state(keys) else keys[0])


def names_from(checkpoint: Mapping[str, Any]) -> ModelNames:
    """Take what names the checkpoint has: those of optimizers that were made from named parameters."""
    return ModelNames(
        optimizer_parameters=tuple(
            tuple(name for group in groups for name in _listed(group.get("param_names")))
            for groups in _param_groups(checkpoint)
        )
    )


def _param_groups(checkpoint: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """Return the groups of each optimizer, none of what is no optimizer's state; a hook may have put anything there."""
    states = [each if isinstance(each, Mapping) else {} for each in _listed(checkpoint.get("optimizer_states"))]
    return [[group for group in _listed(state.get("param_groups")) if isinstance(group, Mapping)] for state in states]


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple as it is, nothing of anything else."""
    return value if isinstance(value, list | tuple) else ()


def state_dicts_in(checkpoint: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the sections that hold the model's state dict, as far as they are one."""
    return {section: found for section in WEIGHTS if isinstance(found := checkpoint.get(section), Mapping)}


def leaves_of(checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames) -> Iterator[Leaf]:
    """Yield all tensors of a checkpoint, in its order."""
    known = _known_sections(checkpoint, names)
    for keys, tensor in tensors(checkpoint, PATHS):
        path = ".".join(map(str, keys))
        parameter = _parameter_of(keys, names)
        wanted = storage = refused = None
        if has_memory(tensor):
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            if (
                tensor.numel() >= policy.min_numel
                and not (keys[0] in known and parameter not in names.parameters)
                and is_encodable(tensor)
            ):
                wanted = policy.codec_for(path, parameter)
                if wanted is not None and wanted.encoded_bytes(tensor.numel()) >= tensor.nbytes:
                    wanted = None
                if wanted is not None and tensor.__dict__:
                    wanted = None
                    refused = f"it has attributes ({', '.join(tensor.__dict__)}); put its .detach() there"
        yield Leaf(keys, path, parameter, tensor, wanted, storage, refused)


def _known_sections(checkpoint: Mapping[str, Any], names: ModelNames) -> set[str]:
    """Return the sections in which names tell what is a parameter."""
    return {name for name, found in state_dicts_in(checkpoint).items() if not names.parameters.isdisjoint(found)}


def moments_of(path: str) -> list[str]:
    """Return the paths of the moments that make a direction, which goes by the path of the first."""
    state = path.removesuffix(FIRST_MOMENT)
    return [path, *(f"{state}{key}" for key in SECOND_MOMENTS)]


def passed_over(checkpoint: Mapping[str, Any], leaves: Iterable[Leaf], policy: CheckpointPolicy) -> list[str]:
    """Return the paths of the tensors that are large enough for the policy but that none of its rules names."""
    sections = state_dicts_in(checkpoint)
    return [
        leaf.path
        for leaf in leaves
        if leaf.storage is not None
        and leaf.tensor.numel() >= policy.min_numel
        and is_encodable(leaf.tensor)
        and not (leaf.keys and leaf.keys[0] in sections)
        and not policy.names(leaf.path, leaf.parameter)
    ]


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


def is_encodable(tensor: Tensor) -> bool:
    """Whether a codec can take the values of a tensor that has memory."""
    return (
        tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and not tensor.is_neg()
        and tensor.ndim > 0
        and is_dense(tensor)
    )


def epsilons_of(checkpoint: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    """Return the eps of each optimizer's groups, by what precedes the key of their parameters' states."""
    epsilons: dict[tuple[Any, ...], float] = {}
    for index, groups in enumerate(_param_groups(checkpoint)):
        for group in groups:
            if isinstance(eps := group.get("eps"), float):
                epsilons |= {("optimizer_states", index, "state", key): eps for key in _listed(group.get("params"))}
    return epsilons


def pairs_of(
    leaves: list[Leaf], candidates: Mapping[int, Candidate], epsilons: Mapping[tuple[Any, ...], float]
) -> Iterator[Pair]:
    """Yield the moments of each parameter of which one is a candidate and whose elements correspond.

    With AMSGrad these are two pairs: each second moment is judged beside the first one, and by the greatest, which
    comes first, the optimizer steps.
    """
    moments = {leaf.keys: leaf for leaf in leaves if _is_state(leaf.keys) and leaf.keys[-1] in _PAIRED}
    for keys, first in moments.items():
        if keys[-1] != FIRST_MOMENT:
            continue
        one = candidates.get(id(first.tensor)) or first.candidate(None)
        seconds = [moments[place] for key in SECOND_MOMENTS if (place := (*keys[:-1], key)) in moments]
        for second in seconds:
            two = candidates.get(id(second.tensor)) or second.candidate(None)
            if (one.codec is not None or two.codec is not None) and _correspond(first, second):
                yield Pair(one, two, epsilons.get(keys[:-1], 1e-8), is_stepped_by=second is seconds[0])


def _correspond(first: Leaf, second: Leaf) -> bool:
    """Whether elements at the same place in memory have the same index."""
    for leaf in (first, second):
        if leaf.codec is None and not (leaf.storage and leaf.tensor.numel() and is_encodable(leaf.tensor)):
            return False
    one, two = first.tensor, second.tensor
    return one.shape == two.shape and one.stride() == two.stride() and one.device == two.device
