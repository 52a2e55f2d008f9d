"""Select the parameters and modules of a model that are quantized, and refuse those that cannot be."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from q8lightning.qat.compiled import is_compiled_wrapper
from q8lightning.qat.config import QATConfig
from q8lightning.qat.rules import WeightRule
from q8lightning.qat.select.candidates import Tied, is_eligible, matches, parameters_of, some, uncompiled
from q8lightning.qat.select.checks import check_in_place, check_patterns
from q8lightning.qat.select.selected import SelectedModule, SelectedWeight, Selection
from q8lightning.qat.select.shards import check_blocks, portion_of
from q8lightning.quantization.codecs.weight import WeightCodec


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
    tied = parameters_of(module)
    modules = _called_modules(module)
    if not again:
        check_patterns(tied, modules, config)
    weights = _select_weights(module, tied, config)
    if not weights and not config.activation_rules and not again:
        eligible = (each.names[0] for each in tied if is_eligible(each.parameter, config.min_rank))
        raise ValueError(
            f"QAT selects nothing: exclude and the rules leave none of {some(eligible)}; loosen them, or remove qat"
        )
    frozen = []
    for each in tied:
        steps = [rule.step for rule in config.freeze_rules if each.matches(rule.pattern)]
        if steps:
            frozen.append((each.parameter, min(steps)))
    return Selection(weights, _select_modules(module, modules, config), frozen)


def _select_weights(module: nn.Module, tied: Sequence[Tied], config: QATConfig) -> list[SelectedWeight]:
    ends = {id(parameter) for parameter in _first_and_last(module, config)} if config.exclude_first_and_last else set()
    scripts = (each for each in module.modules() if isinstance(each, torch.jit.ScriptModule))
    scripted = {id(parameter) for each in scripts for parameter in each.parameters()}
    embeddings = (each for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))
    renormalized = {id(each.weight) for each in embeddings if each.max_norm is not None}
    selected = []
    for each in tied:
        if not is_eligible(each.parameter, config.min_rank) or id(each.parameter) in ends:
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


def _selected(tied: Tied, codec: WeightCodec, rule: WeightRule) -> SelectedWeight:
    check_in_place(tied)
    name, parameter = tied.names[0], tied.parameter
    fitted, portion = _fitted(codec, tied), portion_of(name, parameter)
    if portion is not None:
        check_blocks(name, portion, fitted, rule)
    return SelectedWeight(tied.names, parameter, fitted, portion)


def _called_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name, without the model and without the wrappers of ``torch.compile``."""
    return {name: each for name, each in module.named_modules() if uncompiled(name) and not is_compiled_wrapper(each)}


def _select_modules(module: nn.Module, modules: Mapping[str, nn.Module], config: QATConfig) -> list[SelectedModule]:
    selected = []
    for name, each in modules.items():
        first = next((rule for rule in config.activation_rules if matches(name, rule.pattern)), None)
        if first is not None and first.codebook is not None:
            selected.append(SelectedModule(name, each, first))
    past_hooks = _past_hooks(module)
    never = [each.name for each in selected if id(each.module) in past_hooks]
    if never:
        warnings.warn(
            f"the activation rules select {some(never)}, but what ScriptModules and the parts of MultiheadAttention"
            " receive cannot be quantized; give the module around them a rule, or these the codebook None",
            stacklevel=2,
        )
    return [each for each in selected if id(each.module) not in past_hooks]


def _past_hooks(module: nn.Module) -> set[int]:
    """Return the ids of modules whose hooks never run: ScriptModules, and parts that attention uses without a call."""
    attention = (each for each in module.modules() if isinstance(each, nn.MultiheadAttention))
    parts = {id(part) for each in attention for part in each.children()}
    return parts | {id(each) for each in module.modules() if isinstance(each, torch.jit.ScriptModule)}


def _first_and_last(module: nn.Module, config: QATConfig) -> list[nn.Parameter]:
    layers = [
        weights
        for each in module.modules()
        if (weights := [p for p in each.parameters(recurse=False) if is_eligible(p, config.min_rank)])
    ]
    return [*layers[0], *layers[-1]] if layers else []


def _fitted(codec: WeightCodec, tied: Tied) -> WeightCodec:
    try:
        return codec.fitted(tied.parameter.shape)
    except ValueError as error:
        raise ValueError(f"weight rule for {tied.names[0]!r}: {error}") from None
