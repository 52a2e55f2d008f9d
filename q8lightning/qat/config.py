"""The configuration of QAT: rules, and a schedule over the global step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from q8lightning.qat.rules import ActivationRule, FreezeRule, WeightRule, as_rules, check_types
from q8lightning.qat.targets import Target, rule_for
from q8lightning.system.arguments import check_integer, check_keys, check_patterns, end_in_one_line, names_arguments


@names_arguments
@dataclass(frozen=True)
class QATConfig:
    """Which weights and activations are quantized in the forward and backward pass, and at which steps.

    Args:
        weights: Rules, or mappings of their arguments. The first that matches a parameter decides, so several rules
            give mixed precision. The default quantizes every parameter of rank 2 or more to 8-bit ``linear``.
        exclude: Patterns of parameters that are never quantized.
        exclude_first_and_last: Never quantize the first and the last layer, in the order in which the model registers
            its modules.
        min_rank: Parameters of a lower rank (biases, norms) are never quantized, also if a rule matches them.
        activations: Rules, or mappings of their arguments, for the inputs of modules.
        start_step: The first global step (count of optimizer steps) that is quantized.
        end_step: The first global step that is not quantized any more; None for never.
        ramp: The number of steps, from ``start_step`` on, over which the share of quantized blocks grows to 1. Each
            step chooses its blocks at random (Quant-Noise, arXiv:2004.07320). Evaluation quantizes all blocks.
        freeze: Rules, or mappings of their arguments, for parameters that stop changing at a step.
        seed: Seeds the random choices of the ramp.
        follow_steps: The number of quantized training steps, and of evaluation steps, in which writes to weights are
            followed to the masters. After a first write they are followed in every step. A write that begins later
            stops the training. 0 follows no step.

    Raises:
        ValueError: If a rule is wrong (the message says which), the steps are out of order or negative, or nothing
            would ever be quantized.

    Example:
        >>> config = QATConfig([WeightRule("*.weight", "int4", 64)], start_step=100, ramp=50)
        >>> config.share(99), config.share(124), config.share(10_000)
        (0.0, 0.5, 1.0)
    """

    weights: Sequence[WeightRule | Mapping[str, Any]] = (WeightRule(),)
    exclude: Sequence[str] = ()
    exclude_first_and_last: bool = False
    min_rank: int = 2
    activations: Sequence[ActivationRule | Mapping[str, Any]] = ()
    start_step: int = 0
    end_step: int | None = None
    ramp: int = 0
    freeze: Sequence[FreezeRule | Mapping[str, Any]] = ()
    seed: int = 0
    follow_steps: int = 100

    @end_in_one_line
    def __post_init__(self) -> None:
        for name, kind in (("weights", WeightRule), ("activations", ActivationRule), ("freeze", FreezeRule)):
            object.__setattr__(self, name, as_rules(name, kind, getattr(self, name)))
        check_types(self)
        check_integer("min_rank", self.min_rank, 0, "; write 0 to quantize parameters of every rank")
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))
        rules: tuple[WeightRule | ActivationRule, ...] = (*self.weight_rules, *self.activation_rules)
        if all(rule.codebook is None for rule in rules):
            raise ValueError("QATConfig has no rule with a codebook, so nothing is quantized; pass qat=None for that")
        if self.start_step < 0 or self.ramp < 0:
            raise ValueError(
                f"start_step and ramp are at least 0, got {self.start_step} and {self.ramp}; write 0 to quantize all"
                " blocks from the first step on"
            )
        if self.follow_steps < 0:
            raise ValueError(f"follow_steps is at least 0, got {self.follow_steps}; write 0 to follow no step")
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(
                f"end_step must be after start_step, got {self.end_step} and {self.start_step}; write None for no end"
            )
        if self.end_step is not None and self.start_step + self.ramp > self.end_step:
            raise ValueError(
                f"the ramp must end before end_step, got {self.start_step} + {self.ramp} > {self.end_step}; shorten it"
            )

    @property
    def weight_rules(self) -> tuple[WeightRule, ...]:
        """The rules for weights."""
        return as_rules("weights", WeightRule, self.weights)

    @property
    def activation_rules(self) -> tuple[ActivationRule, ...]:
        """The rules for activations."""
        return as_rules("activations", ActivationRule, self.activations)

    @property
    def freeze_rules(self) -> tuple[FreezeRule, ...]:
        """The rules for parameters that stop changing."""
        return as_rules("freeze", FreezeRule, self.freeze)

    @staticmethod
    def of(config: "QATConfig | Mapping[str, Any]") -> "QATConfig":
        """Return a configuration, or make one of a mapping of its arguments.

        Raises:
            ValueError: If it is neither, or a key of the mapping is unknown.
        """
        if isinstance(config, QATConfig):
            return config
        if not isinstance(config, Mapping):
            raise ValueError(
                f"qat is a QATConfig or a mapping of its arguments, got {config!r}; write qat={_meant(config)}"
            )
        check_keys("qat", QATConfig, config)
        return QATConfig(**config)

    @staticmethod
    def for_target(
        target: Target, patterns: Sequence[str] = ("*",), *, transpose: Sequence[str] = (), **options: Any
    ) -> "QATConfig":
        """Return a configuration whose weights a format of ``export_quantized`` holds to the bit.

        Args:
            target: The format, and which codes: such as ``"gguf-q4_0"``.
            patterns: Patterns of parameters.
            transpose: Patterns of matrices that the target holds transposed, as for ``export_quantized``.
            options: The other arguments of the configuration, such as ``exclude``.

        Raises:
            ValueError: If the target is unknown, or the options do not fit.

        Example:
            >>> QATConfig.for_target("gguf-q4_0", exclude=["head.*"]).weight_rules
            (WeightRule(pattern='*', codebook='int4', block_size=32, axis=0, scale_dtype='float16'),)
        """
        patterns, transpose = check_patterns("patterns", patterns), check_patterns("transpose", transpose)
        if "weights" in options:
            raise ValueError(
                f"the target decides the rules for weights, got weights={options['weights']!r}; name parameters in"
                " patterns, or write QATConfig(weights=...)"
            )
        transposed = (rule_for(target, pattern, True) for pattern in transpose)
        return QATConfig([*transposed, *(rule_for(target, pattern) for pattern in patterns)], **options)

    def active(self, step: int) -> bool:
        """Whether the global step ``step`` is quantized."""
        return self.start_step <= step and (self.end_step is None or step < self.end_step)

    def share(self, step: int) -> float:
        """Return the share of the blocks that training quantizes at the global step ``step``, 0 to 1."""
        if not self.active(step):
            return 0.0
        return min(1.0, (step - self.start_step + 1) / self.ramp) if self.ramp else 1.0

    def seed_at(self, step: int) -> int:
        """Return the seed of the ramp's choice at a step. Different steps of a run have different seeds."""
        return (self.seed * 0x9E3779B1 + step) & 0xFFFFFFFF


def _meant(config: Any) -> str:
    """Return what was probably meant by something that is no configuration."""
    if isinstance(config, str):
        return f"{{'weights': [{{'codebook': {config!r}}}]}}"
    if isinstance(config, Sequence):
        rules = [{"codebook": each} if isinstance(each, str) else each for each in config]
        return f"{{'weights': {rules!r}}}"
    return "{} for 8-bit weights, or None for no QAT"
