"""The rules of QAT, which select parameters and modules by name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from q8lightning.quantization.codecs.weight import WHOLE_ROW, WeightCodec
from q8lightning.quantization.spec.codebook import CodebookName, get_codebook
from q8lightning.quantization.spec.layout import check_block_size
from q8lightning.quantization.spec.scale_dtype import ScaleDtype, check_scale_dtype
from q8lightning.system.arguments import as_integer, check_keys, check_pattern, names_arguments


def check_types(rule: Any) -> None:
    """Refuse values of another type than an integer's, bool's or pattern's field has, such as a string from YAML."""
    for each in fields(rule):
        value: Any = getattr(rule, each.name)
        kind: Any = each.type
        if kind not in (int, int | None, bool, str):
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            remedy = "; write True or False" if kind is bool else as_integer(value)
            raise ValueError(f"{each.name} is of type {getattr(kind, '__name__', kind)}, got {value!r}{remedy}")
        if each.name == "pattern":
            check_pattern("pattern", value)


@names_arguments
@dataclass(frozen=True)
class WeightRule:
    """Train the parameters whose name matches ``pattern`` with a codec.

    Args:
        pattern: Shell-style pattern over the full parameter name, such as ``encoder.*.weight``. ``*`` also matches
            dots. In a compiled module, names match with and without ``_orig_mod``.
        codebook: A codebook's name, the levels of one, or None to leave these parameters as they are.
        block_size: Elements that share a scale; a power of two between 32 and 4096, or ``"row"`` for one scale for each
            channel, however long.
        axis: The axis of the channels (0 for Linear, Conv and Embedding), which no block crosses. A block size of at
            least a channel's elements gives one scale a channel. None: blocks run along the flattened tensor, in the
            order of memory.
        scale_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``. Scales are rounded to the nearest value that a
            target can store in that dtype before weights are coded, so that training sees what is deployed. For the
            integers ``int2`` to ``int8``, that value is the step, the scale over ``2**(bits - 1)``.

    Raises:
        ValueError: If the codebook, the block size or the dtype does not fit.
    """

    pattern: str = "*"
    codebook: CodebookName | Sequence[float] | None = "linear"
    block_size: int | Literal["row"] = 256
    axis: int | None = None
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        try:
            _spell_out_codebook(self)
            check_types(self)
            self.resolve()
        except ValueError as error:
            raise ValueError(f"weight rule for {self.pattern!r}: {error}") from None

    def resolve(self) -> WeightCodec | None:
        """Return the codec, None if the parameters stay as they are."""
        if self.block_size != "row":
            check_block_size(self.block_size)
        check_scale_dtype(self.scale_dtype)
        if self.codebook is None:
            return None
        book = get_codebook(self.codebook).with_scales(self.scale_dtype)
        if self.block_size != "row":
            return WeightCodec(book.spec, self.block_size, self.axis)
        if self.axis is None:
            raise ValueError('block_size="row" needs the axis of the channels, got None; write axis=0')
        return WeightCodec(book.spec, WHOLE_ROW, self.axis)


@names_arguments
@dataclass(frozen=True)
class ActivationRule:
    """Quantize the inputs of modules whose name matches ``pattern``, each with scales of its own.

    Args:
        pattern: Shell-style pattern over the full module name, with and without ``_orig_mod``. The first rule that
            matches a module decides.
        codebook: A codebook's name, the levels of one, or None to leave these inputs as they are.
        per: ``"token"`` for one scale for each vector along the last axis, ``"tensor"`` for one scale an input.

    Raises:
        ValueError: If the codebook or ``per`` is unknown.
    """

    pattern: str
    codebook: CodebookName | Sequence[float] | None = "linear"
    per: Literal["token", "tensor"] = "token"

    def __post_init__(self) -> None:
        check_types(self)
        if self.per not in ("token", "tensor"):
            raise ValueError(
                f'per is "token" or "tensor", got {self.per!r} in the activation rule for {self.pattern!r}'
            )
        try:
            _spell_out_codebook(self)
        except ValueError as error:
            raise ValueError(f"activation rule for {self.pattern!r}: {error}") from None


@names_arguments
@dataclass(frozen=True)
class FreezeRule:
    """Let no optimizer update the parameters whose name matches ``pattern`` from a global step on.

    Args:
        pattern: Shell-style pattern over the full parameter name.
        step: The first global step whose update they miss.

    Raises:
        ValueError: If the step is negative.
    """

    pattern: str
    step: int

    def __post_init__(self) -> None:
        check_types(self)
        if self.step < 0:
            raise ValueError(
                f"step must not be negative, got {self.step} in the freeze rule for {self.pattern!r}; write 0 to freeze"
                " from the first step on"
            )


def _spell_out_codebook(rule: WeightRule | ActivationRule) -> None:
    """Replace the codebook of a rule, which may be an alias or levels, by its :attr:`Codebook.spec`."""
    if rule.codebook is not None:
        object.__setattr__(rule, "codebook", get_codebook(rule.codebook).spec)


R = TypeVar("R", WeightRule, ActivationRule, FreezeRule)


def as_rules(name: str, kind: type[R], rules: Sequence[Any]) -> tuple[R, ...]:
    """Return rules of one kind, made of mappings of their arguments where they are mappings.

    Raises:
        ValueError: If one is something else, or its arguments do not fit; ``name`` says which.
    """
    if isinstance(rules, str | Mapping) or not isinstance(rules, Iterable):
        raise ValueError(f"{name} is a list of rules, got {rules!r}; put it into a list")
    return tuple(_as_rule(f"{name}[{index}]", kind, rule) for index, rule in enumerate(rules))


def _as_rule(where: str, kind: type[R], rule: Any) -> R:
    if isinstance(rule, kind):
        return rule
    if not isinstance(rule, Mapping):
        remedy = f"; write {{'codebook': {rule!r}}}" if isinstance(rule, str) and kind is WeightRule else ""
        raise ValueError(f"{where} is of type {kind.__name__} or a mapping of its arguments, got {rule!r}{remedy}")
    check_keys(where, kind, rule)
    try:
        return kind(**rule)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
