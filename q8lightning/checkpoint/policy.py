"""The policy: ordered rules over paths that say which tensor gets which codec."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

from q8lightning.checkpoint.layout.optimizer_states import FIRST_MOMENTS, OTHER_WEIGHTS, SECOND_MOMENTS
from q8lightning.checkpoint.layout.sections import NEVER, OPTIMIZER_STATES, RUNNING_STATISTICS, WEIGHTS
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import CodecName, get_codec
from q8lightning.quantization.spec.codebook import get_codebook
from q8lightning.quantization.spec.layout import check_block_size
from q8lightning.quantization.spec.scale_dtype import StoredScaleDtype
from q8lightning.system.arguments import (
    as_integer,
    check_integer,
    check_keys,
    check_pattern,
    did_you_mean,
    end_in_one_line,
    names_arguments,
)

Preset = Literal["resume", "compact", "precise"]
"""The names of :data:`PRESETS`, for type checkers."""


@names_arguments
@dataclass(frozen=True)
class Rule:
    """A rule: tensors whose path matches ``pattern`` get this codec.

    Args:
        pattern: Shell-style pattern over the whole path, such as ``state_dict.*`` or ``optimizer_states.*.exp_avg``;
            ``*`` also matches dots.
        codec: ``"log"``, a codebook's name, a codebook's levels, or None to store the tensor as it is.
        block_size: Elements that share a scale; a power of two between 32 and 4096.
        bits: The bits of a code, 2 to 8 for ``linear``, ``softsign`` and ``log``; None for 8, or the bits that the
            codebook's levels need.
        residual_bits: Also store what the first stage lost, in a second code of 2 to 8 bits; 0 for no second code. Only
            ``linear`` can do that.
        scale_dtype: The dtype in which scales are stored: ``"float32"``, or ``"bfloat16"`` for two bytes fewer a scale.
            The largest magnitude of a block is then off by up to 1/256 of itself, the bounds of ``log`` by up to 1/128.
            A codec with a residual needs ``"float32"``.
        parameter: Shell-style pattern over the name of the parameter that the tensor is or belongs to. Tensors whose
            parameter is unknown match only ``*``.

    Raises:
        ValueError: If the codec is unknown, its options do not fit, or an argument is of another type.
    """

    pattern: str
    codec: CodecName | Sequence[float] | None = None
    block_size: int = 256
    bits: int | None = None
    residual_bits: int = 0
    scale_dtype: StoredScaleDtype = "float32"
    parameter: str = "*"

    def __post_init__(self) -> None:
        try:
            if not isinstance(self.codec, str | None):
                object.__setattr__(self, "codec", get_codebook(self.codec).spec)
            check_pattern("pattern", self.pattern)
            check_pattern("parameter", self.parameter)
            if isinstance(self.residual_bits, bool) or not isinstance(self.residual_bits, int):
                raise ValueError(
                    "residual_bits is 0 for no second code, or an integer from 2 to 8, got"
                    f" {self.residual_bits!r}{as_integer(self.residual_bits) or '; write 0, or such as 4'}"
                )
            if codec := self.resolve():
                object.__setattr__(self, "codec", codec.name)  # the name that files have, not an alias
                object.__setattr__(self, "bits", codec.bits)
                object.__setattr__(self, "scale_dtype", codec.scale_dtype)
        except ValueError as error:
            raise ValueError(f"rule for {self.pattern!r}: {error}") from None

    def resolve(self) -> Codec | None:
        """Return the codec of this rule, None to store tensors as they are."""
        if self.codec is None:
            check_block_size(self.block_size)
            if self.bits is not None or self.residual_bits:
                raise ValueError(
                    "bits and residual_bits are a codec's, got"
                    f" codec=None, bits={self.bits!r} and residual_bits={self.residual_bits!r}; name a codec, such as"
                    ' codec="softsign", or leave them out to store these tensors as they are'
                )
            if self.scale_dtype != "float32":
                raise ValueError(
                    f"scale_dtype is a codec's, got codec=None and scale_dtype={self.scale_dtype!r}; name a codec, such"
                    ' as codec="softsign", or leave it out to store these tensors as they are'
                )
            return None
        assert isinstance(self.codec, str)
        return get_codec(self.codec, self.block_size, self.bits, self.residual_bits, self.scale_dtype)

    def matches(self, path: str, parameter: str | None) -> bool:
        """Whether the rule applies to the tensor at ``path`` that is or belongs to ``parameter``."""
        if not fnmatchcase(path, self.pattern):
            return False
        return self.parameter == "*" or (parameter is not None and fnmatchcase(parameter, self.parameter))


@names_arguments
@dataclass(frozen=True)
class CheckpointPolicy:
    """Ordered rules: the first one that matches a tensor's path decides. Other tensors are stored as they are.

    No rule applies to these: integers, bools and complex numbers, sparse tensors and tensor subclasses, scalars,
    tensors under ``min_numel`` elements, the model's buffers (BatchNorm statistics), anything that would not become
    smaller, learning-rate schedulers, loops, hyperparameters and the gradient scaler.

    A tensor that would lose more than a limit allows is stored in 16 bits, with a warning: ``linear`` with 8 bits and a
    residual of 8. If that loses too much as well, the tensor is stored as it is. A second moment is stored as it is if
    any element that is not zero would become zero, whatever the limits.

    Args:
        rules: Rules, or mappings of their arguments (as YAML gives them).
        min_numel: Tensors with fewer elements are stored as they are.
        min_sqnr_db: The smallest signal-to-quantization-noise ratio in dB; None for no limit. The default is an error
            of 3% of the tensor's norm. Trained weights lose less than that under any codec of 8 bits, and more under
            4 bits. The limit does not apply to second moments, because the ratio does not see their small elements, nor
            to first moments that the other limit applies to.
        max_update_direction_error: The largest error of the update direction that one encoded moment may cause,
            relative to the direction's norm; None for no limit. The direction is
            ``exp_avg / (sqrt(exp_avg_sq) + eps)``, and the first moment itself if there is no second. In training the
            presets stay below the default (docs/metrics.md), and a codec that fails is far above it. ``compact`` allows
            0.5, because first moments in 5 bits may exceed 0.2 in the first steps.

    Raises:
        ValueError: If there is no rule with a codec, a rule is wrong, or a limit is not a finite number above 0.

    Example:
        >>> policy = CheckpointPolicy([Rule("state_dict.head.*"), Rule("state_dict.*", "softsign")])
        >>> policy.codec_for("state_dict.head.weight"), policy.codec_for("state_dict.body.weight").name
        (None, 'softsign')
    """

    rules: Sequence[Rule | Mapping[str, Any]]
    min_numel: int = 4096
    min_sqnr_db: float | None = 30.0
    max_update_direction_error: float | None = 0.2
    _rules: tuple[Rule, ...] = field(init=False, repr=False, compare=False)
    _found: dict[tuple[str, str | None], Codec | None] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @end_in_one_line
    def __post_init__(self) -> None:
        if isinstance(self.rules, str | Mapping) or not isinstance(self.rules, Iterable):
            raise ValueError(f"rules is a list of rules, got {self.rules!r}; put it into a list")
        rules = tuple(_rule(f"rules[{index}]", rule) for index, rule in enumerate(self.rules))
        if all(rule.codec is None for rule in rules):
            raise ValueError(
                f"a checkpoint policy has at least one rule with a codec, got {len(rules)} rules and none has one;"
                ' add Rule("state_dict.*", "softsign"), or pass checkpoint=None to quantize nothing'
            )
        check_integer("min_numel", self.min_numel, 1, "; the default is 4096")
        _check_limit("min_sqnr_db", self.min_sqnr_db, "30 (an error of 3%)")
        _check_limit("max_update_direction_error", self.max_update_direction_error, "0.2 (an error of 20%)")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "_rules", rules)

    @staticmethod
    def of(policy: "str | CheckpointPolicy") -> "CheckpointPolicy":
        """Return the preset of that name, or the policy itself.

        Raises:
            ValueError: If there is no such preset.
        """
        if isinstance(policy, CheckpointPolicy):
            return policy
        if not isinstance(policy, str) or policy not in PRESETS:
            hint = did_you_mean(policy, PRESETS) if isinstance(policy, str) else ""
            raise ValueError(
                f"checkpoint must be a preset ({', '.join(PRESETS)}) or a CheckpointPolicy, got {policy!r}"
                + (hint or "; rules go into CheckpointPolicy([Rule(...), ...])")
            )
        return PRESETS[policy]

    def as_primitives(self) -> dict[str, Any]:
        """Return the arguments that make this policy, as dicts, lists, numbers and strings."""
        rules = [asdict(rule) for rule in self._rules]
        limits = {"min_sqnr_db": self.min_sqnr_db, "max_update_direction_error": self.max_update_direction_error}
        return {"rules": rules, "min_numel": self.min_numel, **limits}

    def codec_for(self, path: str, parameter: str | None = None) -> Codec | None:
        """Return the codec of the first rule that matches, None to store the tensor as it is."""
        key = path, parameter
        if key not in self._found:  # every save asks for the same paths
            never = path.split(".", 1)[0] in NEVER
            rules = () if never else self._rules
            self._found[key] = next((rule.resolve() for rule in rules if rule.matches(path, parameter)), None)
        return self._found[key]

    def codec_at(self, path: str, place: str, parameter: str | None = None) -> Codec | None:
        """Return the codec for a tensor under a user's own key: by the rules for its path, or else for its place.

        Args:
            path: Its path in the checkpoint.
            place: Its path in Lightning's layout, such as ``state_dict.weight`` for ``model.weight``.
            parameter: The name of the parameter that it is or belongs to; None if that is not known.
        """
        return self.codec_for(path if path == place or self.names(path, parameter) else place, parameter)

    def names(self, path: str, parameter: str | None = None) -> bool:
        """Whether a rule matches a tensor, with a codec or without, or the tensor is one that no rule applies to."""
        return path.split(".", 1)[0] in NEVER or any(rule.matches(path, parameter) for rule in self._rules)

    def mentions(self, path: str) -> bool:
        """Whether a rule has a pattern for a path, if only for some parameters."""
        return any(fnmatchcase(path, rule.pattern) for rule in self._rules)

    def may_encode(self, section: str) -> bool:
        """Whether a rule with a codec may match tensors of a section."""
        starts = [re.split(r"[*?\[]", rule.pattern, maxsplit=1)[0] for rule in self._rules if rule.codec]
        return any(start.startswith(f"{section}.") or section.startswith(start) for start in starts)

    def check_matches(self, parameters: Iterable[str]) -> None:
        """Raise ValueError if no rule can quantize anything of a model with these parameters."""
        names = list(parameters)
        keys = {rule.pattern.rsplit(".", 1)[-1] for rule in self._rules}
        keys = {*FIRST_MOMENTS, *SECOND_MOMENTS, *OTHER_WEIGHTS, *(key for key in keys if not set("*?[") & set(key))}
        for name in names:
            paths = [f"{section}.{name}" for section in WEIGHTS]
            paths += [f"{OPTIMIZER_STATES}.0.state.{index}.{key}" for index in (0, name) for key in keys]
            if any(self.codec_for(path, name) for path in paths):
                return
        if not names:
            return
        sections = (*WEIGHTS, OPTIMIZER_STATES)
        known = tuple(f"{section}." for section in sections)
        if any(
            rule.codec
            and not rule.pattern.startswith(known)
            and not get_close_matches(rule.pattern.split(".", 1)[0], sections, cutoff=0.9)  # misspelled
            and not any(fnmatchcase(name, rule.pattern) for name in names)  # a name in place of a path
            for rule in self._rules
        ):
            return  # a section of the user's own, which only a save shows
        patterns = ", ".join(repr(rule.pattern) for rule in self._rules if rule.codec)
        raise ValueError(
            f"the checkpoint policy matches no tensor of this model: patterns {patterns}; parameters"
            f" {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; patterns match whole paths, such as"
            " 'state_dict.encoder.*' or 'optimizer_states.*.exp_avg'"
        )


def _rule(where: str, rule: object) -> Rule:
    """Return the rule that a mapping describes, or raise ValueError that says where it stands and what is wrong."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping):
        raise ValueError(
            f"{where} is a Rule or a mapping of its arguments, got {rule!r}; write such as"
            " {'pattern': 'state_dict.*', 'codec': 'softsign'}"
        )
    check_keys(where, Rule, rule)
    try:
        return Rule(**rule)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_limit(name: str, value: object, example: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, or None for no limit, got {value!r}; try {example}")


def _preset(
    weights: Mapping[str, Any],
    first_moments: int,
    second_moments: int,
    scale_dtype: StoredScaleDtype = "bfloat16",
    max_update_direction_error: float = 0.2,
) -> CheckpointPolicy:
    """Return a policy for weights, and for moments in codes of so many bits with scales of a dtype."""
    scales: dict[str, Any] = {"scale_dtype": scale_dtype}
    return CheckpointPolicy(
        [
            # A QuantizedCheckpointIO without a module knows buffers by these names alone.
            *(Rule(f"*.{key}") for key in RUNNING_STATISTICS),
            *(Rule(f"{section}.*", block_size=256, **weights) for section in WEIGHTS),
            *(Rule(f"{OPTIMIZER_STATES}.*.{key}", "softsign", 128, first_moments, **scales) for key in FIRST_MOMENTS),
            *(Rule(f"{OPTIMIZER_STATES}.*.{key}", "log", 128, second_moments, **scales) for key in SECOND_MOMENTS),
            *(Rule(f"{OPTIMIZER_STATES}.*.{key}", block_size=256, **weights) for key in OTHER_WEIGHTS),
        ],
        max_update_direction_error=max_update_direction_error,
    )


PRESETS: dict[str, CheckpointPolicy] = {
    "resume": _preset({"codec": "linear", "residual_bits": 3}, 6, 6),
    "compact": _preset({"codec": "softsign"}, 5, 4, max_update_direction_error=0.5),
    "precise": _preset({"codec": "linear", "residual_bits": 8}, 8, 8, "float32"),
}
"""The policies that have a name. Training with AdamW in float32 takes 2.9 bytes a parameter under ``resume``, the
default, 2.2 under ``compact`` and 4.1 under ``precise``."""
