"""Which parameters and modules of a model the rules select; what cannot work is refused here, before the first step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from q8lightning.qat.config import ActivationRule, QATConfig
from q8lightning.quantization.weight_codec import WeightCodec

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class SelectedWeight:
    """A parameter that is trained quantized.

    Attributes:
        names: Its full names, several where it is tied; the first is what ``named_parameters`` calls it.
        parameter: The parameter itself.
        codec: How it is quantized.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    codec: WeightCodec


def select_weights(module: nn.Module, config: QATConfig) -> list[SelectedWeight]:
    """Return the parameters that the rules select, in the order of the module.

    Raises:
        ValueError: If a pattern matches nothing that could be quantized, an axis does not exist, or a selected
            parameter cannot be changed in place: not initialized, not dense in memory, sharded.
    """
    names = _names_by_parameter(module)
    eligible = [tied for tied in names if _eligible(tied.parameter, config.min_rank)]
    for rule in config.weight_rules:
        _check_pattern("weight rule", rule.pattern, eligible, config)
    for pattern in config.exclude:
        _check_pattern("exclude", pattern, names, config)
    ends = {id(parameter) for parameter in _first_and_last(module, config)} if config.exclude_first_and_last else set()

    selected = []
    for tied in eligible:
        if id(tied.parameter) in ends or any(tied.matches(pattern) for pattern in config.exclude):
            continue
        codec = next((rule.resolve() for rule in config.weight_rules if tied.matches(rule.pattern)), None)
        if codec is not None:
            _check_in_place(tied)
            selected.append(SelectedWeight(tied.names, tied.parameter, _fitted(codec, tied)))
    if not selected and not config.activation_rules:
        raise ValueError(
            f"QAT selects nothing: exclude and the rules leave none of {_some(each.names[0] for each in eligible)};"
            " loosen them, or remove qat"
        )
    return selected


def select_modules(module: nn.Module, config: QATConfig) -> list[tuple[str, nn.Module, ActivationRule]]:
    """Return the modules whose inputs are quantized, each with its rule.

    Raises:
        ValueError: If a pattern matches no module.
    """
    modules = [(name, each) for name, each in module.named_modules() if name]
    for rule in config.activation_rules:
        if not any(fnmatchcase(name, rule.pattern) for name, _ in modules):
            raise ValueError(
                f"the activation rule {rule.pattern!r} matches no module of this model; modules are"
                f" {_some(name for name, _ in modules)}; patterns match full names, such as 'encoder.*.linear1'"
            )
    selected = []
    for name, each in modules:
        first = next((rule for rule in config.activation_rules if fnmatchcase(name, rule.pattern)), None)
        if first is not None and first.codebook is not None:
            selected.append((name, each, first))
    return selected


def select_frozen(module: nn.Module, config: QATConfig) -> list[tuple[nn.Parameter, int]]:
    """Return the parameters that stop to change, each with the step at which.

    Raises:
        ValueError: If a pattern matches no parameter.
    """
    names = _names_by_parameter(module)
    for rule in config.freeze_rules:
        _check_pattern("freeze rule", rule.pattern, names, config)
    frozen = []
    for tied in names:
        steps = [rule.step for rule in config.freeze_rules if tied.matches(rule.pattern)]
        if steps:
            frozen.append((tied.parameter, min(steps)))
    return frozen


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer], weights: Sequence[SelectedWeight]) -> None:
    """Refuse optimizers that cannot be surrounded: the closure evaluated repeatedly, or a step inside backward.

    Raises:
        ValueError: Naming the optimizer or the parameter.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS) or "lbfgs" in type(optimizer).__name__.lower():
            raise ValueError(
                f"QAT needs an optimizer that evaluates its closure once a step, got {type(optimizer).__name__};"
                " use Adam, SGD or another first-order optimizer, or remove qat"
            )
    for weight in weights:
        fused = getattr(weight.parameter, "_in_backward_optimizers", None)
        if fused or weight.parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"QAT needs optimizer steps outside of backward, but {weight.names[0]} has a hook that runs when its"
                " gradient is accumulated, which could update it while it holds quantized values; step the optimizer"
                " after backward, or exclude the parameter"
            )


@dataclass(frozen=True)
class _Tied:
    names: tuple[str, ...]
    parameter: nn.Parameter

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.names)


def _names_by_parameter(module: nn.Module) -> list[_Tied]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [_Tied(tuple(each), parameter) for parameter, each in names.items()]


def _eligible(parameter: Tensor, min_rank: int) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return True  # refused by _check_in_place, if a rule selects it
    return parameter.dtype in FLOATS and parameter.ndim >= min_rank and parameter.numel() > 0


def _first_and_last(module: nn.Module, config: QATConfig) -> list[nn.Parameter]:
    layers = [
        weights
        for each in module.modules()
        if (weights := [p for p in each.parameters(recurse=False) if _eligible(p, config.min_rank)])
    ]
    return [*layers[0], *layers[-1]] if layers else []


def _check_pattern(what: str, pattern: str, tied: Sequence[_Tied], config: QATConfig) -> None:
    if not any(each.matches(pattern) for each in tied):
        rank = f" of rank {config.min_rank} or more" if what == "weight rule" else ""
        raise ValueError(
            f"the {what} {pattern!r} matches no parameter{rank} of this model; there are"
            f" {_some(name for each in tied for name in each.names)}; patterns match full names, such as"
            " 'encoder.*.weight'"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") or "none"


def _check_in_place(tied: _Tied) -> None:
    parameter, name = tied.parameter, tied.names[0]
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"QAT needs initialized parameters, but {name} is lazy; run one batch through the model first")
    if type(parameter.data) is not Tensor:
        raise ValueError(
            f"QAT needs parameters that are ordinary tensors, but {name} is a {type(parameter.data).__name__}, as of a"
            " sharded or already quantized model; exclude it, or use DDP"
        )
    if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        raise ValueError(
            f"QAT needs parameters that are dense in memory, but {name} of shape {tuple(parameter.shape)} has strides"
            f" {parameter.stride()}; make it contiguous, or exclude it"
        )


def _fitted(codec: WeightCodec, tied: _Tied) -> WeightCodec:
    try:
        return codec.fitted(tied.parameter.shape)
    except ValueError as error:
        raise ValueError(f"weight rule for {tied.names[0]!r}: {error}") from None
