"""Refuse what cannot be trained quantized: patterns without a match, parameters, optimizers."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from q8lightning.qat.config import QATConfig
from q8lightning.qat.select.candidates import Tied, is_eligible, matches, some
from q8lightning.qat.select.selected import SelectedWeight
from q8lightning.system.shards import local_of


def check_patterns(tied: Sequence[Tied], modules: Mapping[str, nn.Module], config: QATConfig) -> None:
    """Refuse a configuration with a pattern that matches nothing.

    Args:
        tied: The model's parameters.
        modules: The model's modules, by name.
        config: The rules.

    Raises:
        ValueError: Naming the pattern, and what there is.
    """
    eligible = [each for each in tied if is_eligible(each.parameter, config.min_rank)]
    for rule in config.weight_rules:
        _check_pattern("weight rule", rule.pattern, eligible, config)
    for pattern in config.exclude:
        _check_pattern("exclude", pattern, tied, config)
    for freeze in config.freeze_rules:
        _check_pattern("freeze rule", freeze.pattern, tied, config)
    for activation in config.activation_rules:
        if not any(matches(name, activation.pattern) for name in modules):
            raise ValueError(
                f"the activation rule {activation.pattern!r} matches no module of this model; modules are"
                f" {some(modules)}; patterns match full names, such as 'encoder.*.linear1'"
            )


def _check_pattern(what: str, pattern: str, tied: Sequence[Tied], config: QATConfig) -> None:
    if not any(each.matches(pattern) for each in tied):
        rank = f" of rank {config.min_rank} or more" if what == "weight rule" else ""
        raise ValueError(
            f"the {what} {pattern!r} matches no parameter{rank} of this model; there are"
            f" {some(name for each in tied for name in each.names)}; patterns match full names, such as"
            " 'encoder.*.weight'"
        )


def check_in_place(tied: Tied) -> None:
    """Refuse a parameter that cannot be changed in place.

    Raises:
        ValueError: If it is lazy, on meta, not dense in memory, or no ordinary tensor.
    """
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


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer], weights: Iterable[SelectedWeight]) -> None:
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
