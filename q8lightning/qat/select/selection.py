"""Select the parameters and modules of a model that are quantized, and refuse those that cannot be."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from q8lightning.qat.compiled import COMPILED, is_compiled_wrapper
from q8lightning.qat.config import QATConfig
from q8lightning.qat.rules import ActivationRule, WeightRule
from q8lightning.qat.select.shards import check_blocks, portion_of
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.portion import Portion
from q8lightning.system.shards import local_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class SelectedWeight:
    """A parameter that is trained quantized.

    Attributes:
        names: Its full names, several if it is tied. The first is what ``named_parameters`` calls it.
        parameter: The parameter itself.
        codec: How it is quantized.
        portion: Which part of it this process holds; None if it is an ordinary parameter.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    codec: WeightCodec
    portion: Portion | None = None


@dataclass(frozen=True)
class SelectedModule:
    """A module whose inputs are quantized, with its full name and the rule that selects it."""

    name: str
    module: nn.Module
    rule: ActivationRule


@dataclass(frozen=True)
class Selection:
    """What the rules select of a model.

    Attributes:
        weights: The parameters that are trained quantized, in the order of the model.
        modules: The modules whose inputs are quantized.
        frozen: The parameters that stop changing, each with the first step whose update it misses.
    """

    weights: list[SelectedWeight]
    modules: list[SelectedModule]
    frozen: list[tuple[nn.Parameter, int]]

    def change_to(self, other: "Selection") -> str | None:
        """Describe what another selection adds, replaces and drops; None if it is the same.

        A name that stands for another parameter or module was replaced.
        """
        before, after = self._named(), other._named()
        changes = {
            "new": [name for name in after if name not in before],
            "replaced": [name for name in after if name in before and after[name] is not before[name]],
            "no longer quantized": [name for name in before if name not in after],
        }
        return "; ".join(f"{what}: {_some(names)}" for what, names in changes.items() if names) or None

    def _named(self) -> Mapping[str, object]:
        modules = {f"inputs of {each.name}": each.module for each in self.modules}
        return {name: weight.parameter for weight in self.weights for name in weight.names} | modules


def select(module: nn.Module, config: QATConfig, again: bool = False) -> Selection:
    """Return what the rules select.

    Args:
        module: The model.
        config: The rules.
        again: Whether the model has changed during a run. Patterns may match nothing then.

    Raises:
        ValueError: If a pattern matches nothing that could be quantized, an axis does not exist, a block lies in the
            parts of two processes, or a selected parameter cannot be changed in place, because it is lazy or not dense
            in memory.
    """
    tied = _names_by_parameter(module)
    modules = _called_modules(module)
    if not again:
        _check_patterns(tied, modules, config)
    weights = _select_weights(module, tied, config)
    if not weights and not config.activation_rules and not again:
        eligible = (each.names[0] for each in tied if _eligible(each.parameter, config.min_rank))
        raise ValueError(
            f"QAT selects nothing: exclude and the rules leave none of {_some(eligible)}; loosen them, or remove qat"
        )
    frozen = []
    for each in tied:
        steps = [rule.step for rule in config.freeze_rules if each.matches(rule.pattern)]
        if steps:
            frozen.append((each.parameter, min(steps)))
    return Selection(weights, _select_modules(module, modules, config), frozen)


def _select_weights(module: nn.Module, tied: Sequence["_Tied"], config: QATConfig) -> list[SelectedWeight]:
    ends = {id(parameter) for parameter in _first_and_last(module, config)} if config.exclude_first_and_last else set()
    scripts = (each for each in module.modules() if isinstance(each, torch.jit.ScriptModule))
    scripted = {id(parameter) for each in scripts for parameter in each.parameters()}
    embeddings = (each for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))
    renormalized = {id(each.weight) for each in embeddings if each.max_norm is not None}
    selected = []
    for each in tied:
        if not _eligible(each.parameter, config.min_rank) or id(each.parameter) in ends:
            continue
        if any(each.matches(pattern) for pattern in config.exclude):
            continue
        rule = next((rule for rule in config.weight_rules if each.matches(rule.pattern)), None)
        codec = None if rule is None else rule.resolve()
        if rule is None or codec is None:
            continue
        if id(each.parameter) in scripted:
            raise ValueError(
                f"QAT hooks into the modules whose weights it trains, but {each.names[0]} belongs to a"
                " ScriptModule, which allows no hooks; exclude it, or script the model after training"
            )
        weight = _selected(each, codec, rule)
        if weight.portion is not None and id(each.parameter) in renormalized:
            raise ValueError(
                f"{each.names[0]} is sharded, and its embedding's max_norm would renormalize a copy that was gathered,"
                " never the weight; exclude it, or renormalize it in a hook such as on_train_batch_end"
            )
        selected.append(weight)
    return selected


def _selected(tied: "_Tied", codec: WeightCodec, rule: WeightRule) -> SelectedWeight:
    _check_in_place(tied)
    name, parameter = tied.names[0], tied.parameter
    fitted, portion = _fitted(codec, tied), portion_of(name, parameter)
    if portion is not None:
        check_blocks(name, portion, fitted, rule)
    return SelectedWeight(tied.names, parameter, fitted, portion)


def _called_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name, without the model and without the wrappers of ``torch.compile``."""
    return {name: each for name, each in module.named_modules() if _uncompiled(name) and not is_compiled_wrapper(each)}


def _select_modules(module: nn.Module, modules: Mapping[str, nn.Module], config: QATConfig) -> list[SelectedModule]:
    selected = []
    for name, each in modules.items():
        first = next((rule for rule in config.activation_rules if _matches(name, rule.pattern)), None)
        if first is not None and first.codebook is not None:
            selected.append(SelectedModule(name, each, first))
    past_hooks = _past_hooks(module)
    never = [each.name for each in selected if id(each.module) in past_hooks]
    if never:
        warnings.warn(
            f"the activation rules select {_some(never)}, but what ScriptModules and the parts of MultiheadAttention"
            " receive cannot be quantized; give the module around them a rule, or these the codebook None",
            stacklevel=2,
        )
    return [each for each in selected if id(each.module) not in past_hooks]


def _past_hooks(module: nn.Module) -> set[int]:
    """Return the ids of modules whose hooks never run: ScriptModules, and parts that attention uses without a call."""
    attention = (each for each in module.modules() if isinstance(each, nn.MultiheadAttention))
    parts = {id(part) for each in attention for part in each.children()}
    return parts | {id(each) for each in module.modules() if isinstance(each, torch.jit.ScriptModule)}


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer], weights: Sequence[SelectedWeight]) -> None:
    """Refuse optimizers that evaluate their closure several times a step, or that step inside backward.

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
        if fused or getattr(weight.parameter, "_post_accumulate_grad_hooks", None):
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
        return any(_matches(name, pattern) for name in self.names)


def _uncompiled(name: str) -> str:
    """Return the name that a parameter or module had before ``torch.compile`` took a module around it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(_uncompiled(name), pattern)


def _names_by_parameter(module: nn.Module) -> list[_Tied]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [_Tied(tuple(each), parameter) for parameter, each in names.items()]


def _eligible(parameter: Tensor, min_rank: int) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return True  # if a rule selects it, _check_in_place refuses it
    return parameter.dtype in FLOATS and parameter.ndim >= min_rank and parameter.numel() > 0


def _first_and_last(module: nn.Module, config: QATConfig) -> list[nn.Parameter]:
    layers = [
        weights
        for each in module.modules()
        if (weights := [p for p in each.parameters(recurse=False) if _eligible(p, config.min_rank)])
    ]
    return [*layers[0], *layers[-1]] if layers else []


def _check_patterns(tied: Sequence[_Tied], modules: Mapping[str, nn.Module], config: QATConfig) -> None:
    eligible = [each for each in tied if _eligible(each.parameter, config.min_rank)]
    for rule in config.weight_rules:
        _check_pattern("weight rule", rule.pattern, eligible, config)
    for pattern in config.exclude:
        _check_pattern("exclude", pattern, tied, config)
    for freeze in config.freeze_rules:
        _check_pattern("freeze rule", freeze.pattern, tied, config)
    for activation in config.activation_rules:
        if not any(_matches(name, activation.pattern) for name in modules):
            raise ValueError(
                f"the activation rule {activation.pattern!r} matches no module of this model; modules are"
                f" {_some(modules)}; patterns match full names, such as 'encoder.*.linear1'"
            )


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
    local = local_of(parameter).data
    if type(local) is not Tensor:
        raise ValueError(
            f"QAT needs parameters that are ordinary tensors, or distributed ones that are made of these, but {name} is"
            f" a {type(local).__name__}, as of a model that is quantized already; exclude it"
        )
    if local.is_meta:
        raise ValueError(f"QAT needs parameters with values, but {name} is on the meta device; initialize it first")
    if torch.empty_like(local, device="meta").stride() != local.stride():
        raise ValueError(
            f"QAT needs parameters that are dense in memory, but {name} of shape {tuple(local.shape)} has strides"
            f" {local.stride()}; make it contiguous, or exclude it"
        )


def _fitted(codec: WeightCodec, tied: _Tied) -> WeightCodec:
    try:
        return codec.fitted(tied.parameter.shape)
    except ValueError as error:
        raise ValueError(f"weight rule for {tied.names[0]!r}: {error}") from None
