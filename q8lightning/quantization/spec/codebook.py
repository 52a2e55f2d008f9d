"""Codebooks: the levels of codes of up to 8 bits, as data.

A codebook is a name and at most 256 increasing levels in [-1, 1]. The thresholds between the levels, and the tables
that find a code quickly, are derived from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from q8lightning.quantization.spec.cell_table import CellTable
from q8lightning.quantization.spec.closed_form import ClosedForm
from q8lightning.quantization.spec.levels import dynamic_levels, float8_levels, integer_levels, normal_float4_levels
from q8lightning.quantization.spec.scale_dtype import check_scale_dtype, round_scale, rounding_code
from q8lightning.system.ambient import lasting, neutral
from q8lightning.system.arguments import did_you_mean

_CUSTOM_PREFIX = "levels:"
_WITH, _SCALES = " with ", " scales"

CodebookName = Literal[
    "linear", "softsign", "dynamic", "dynamic_unsigned", "normal_float4", "nf4",
    "linear2", "linear3", "linear4", "linear5", "linear6", "linear7",
    "softsign2", "softsign3", "softsign4", "softsign5", "softsign6", "softsign7",
    "int2", "int3", "int4", "int5", "int6", "int7", "int8",
    "fp8_e4m3", "fp8_e4m3fn", "float8_e4m3fn", "fp8_e5m2", "float8_e5m2",
]  # fmt: skip
"""The names of :data:`BUILTIN` and :data:`ALIASES`, for type checkers."""

ALIASES = {
    "nf4": "normal_float4",
    "fp8_e4m3fn": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}
"""Names that others use for built-in codebooks. Files hold the built-in names only."""


@dataclass(frozen=True)
class Codebook:
    """At most 256 increasing levels in [-1, 1]; code ``i`` stands for ``levels[i]`` times the scale of its block.

    Args:
        name: Its name.
        levels: 2 to 256 strictly increasing numbers in [-1, 1], 0 among them. They are rounded to float32.
        closed_form: Computes the codes of normalised values without a table. The thresholds are then the points at
            which it steps.
        scale_dtype: To what the scales of blocks are rounded, so that a target can store them: ``"float32"``,
            ``"float16"`` or ``"bfloat16"``. See :attr:`scale_unit`.

    Raises:
        ValueError: If the levels are too few or too many, unsorted, out of range, or lack 0, or the dtype is unknown.
    """

    name: str
    levels: tuple[float, ...]
    closed_form: ClosedForm | None = field(default=None, repr=False, compare=False)
    scale_dtype: str = "float32"

    @neutral()
    def __post_init__(self) -> None:
        check_scale_dtype(self.scale_dtype)
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a codebook's name is a word, got {self.name!r}; write such as 'mine'")
        try:
            levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"codebook levels are numbers, got {self.levels!r}; write such as (-1.0, 0.0, 1.0)"
            ) from None
        if levels.ndim != 1 or not 2 <= levels.numel() <= 256:
            raise ValueError(
                f"a codebook has 2 to 256 levels, got {levels.numel()}; give a 1-D sequence of that length"
            )
        if not bool(torch.isfinite(levels).all()) or levels[0] < -1 or levels[-1] > 1 or bool((levels.abs() > 1).any()):
            raise ValueError(
                f"codebook levels lie in [-1, 1], got {float(levels.min()):g} to {float(levels.max()):g};"
                " divide them by the largest magnitude"
            )
        falling = torch.nonzero(levels[1:] <= levels[:-1])
        if falling.numel():
            at = int(falling[0])
            raise ValueError(
                f"codebook levels increase strictly in float32, got {float(levels[at]):g} before"
                f" {float(levels[at + 1]):g} at position {at}; sort them and remove duplicates"
            )
        if not bool((levels == 0).any()):
            raise ValueError(
                f"a codebook holds the level 0, got {levels.numel()} levels without it; add 0, so that zeros stay zeros"
            )
        # Adding 0.0 turns -0.0 into 0.0, so that zeros do not decode to -0.0.
        object.__setattr__(self, "levels", tuple((levels + 0.0).tolist()))

    @property
    def signed(self) -> bool:
        """Whether there are negative levels."""
        return self.levels[0] < 0

    @property
    def end(self) -> int:
        """The end of [-1, 1] that the levels reach: 1 if they do, else -1 (two's-complement integers), else 0.

        Only at an end is a block's largest element stored exactly, so that encoding again finds the same scale. With
        a plain absmax, a codebook that reaches one end shrinks the largest elements of the other sign at every save. A
        signed scale avoids that.
        """
        return 1 if self.levels[-1] == 1.0 else -1 if self.levels[0] == -1.0 else 0

    @property
    def one_sided(self) -> bool:
        """Whether signed levels reach only one of -1 and 1, so that checkpoints need a signed scale."""
        return self.signed and (self.levels[0] == -1.0) != (self.levels[-1] == 1.0)

    @property
    def scale_end(self) -> int:
        """The end to which a signed scale turns a block's largest element; 0 if a plain absmax will do."""
        return self.end if self.one_sided else 0

    @property
    def scale_unit(self) -> float:
        """What scales are divided by in the dtype that they are rounded to.

        Targets with the integers of two's complement store a step, which is the scale over ``2**(bits - 1)``. The unit
        matters for small values of float16 only, since it is a power of two. For other levels it is 1.
        """
        half = 2 ** (self.bits - 1)
        return float(half) if self.levels == tuple(k / half for k in range(-half, half)) else 1.0

    @property
    def rounding(self) -> int:
        """How scales are rounded, as a number for kernels; 0 for float32."""
        return rounding_code(self.scale_dtype, self.scale_unit)

    def with_scales(self, scale_dtype: str) -> "Codebook":
        """Return the codebook with scales of a dtype.

        Raises:
            ValueError: If the dtype is unknown.
        """
        return self if scale_dtype == self.scale_dtype else replace(self, scale_dtype=scale_dtype)

    def round_scale(self, scale: Tensor) -> Tensor:
        """Return scales, float32, as they are stored."""
        return round_scale(scale, self.scale_dtype, self.scale_unit)

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def zero_code(self) -> int:
        """The code of the level 0."""
        return self.levels.index(0.0)

    @property
    def spec(self) -> str:
        """A string that :func:`get_codebook` turns into this codebook: its name, or its levels in hexadecimal.

        If scales are rounded, their dtype follows: ``"int4 with float16 scales"``.
        """
        if self.scale_dtype != "float32":
            return f"{self.with_scales('float32').spec}{_WITH}{self.scale_dtype}{_SCALES}"
        if BUILTIN.get(self.name) == self:
            return self.name
        with neutral():
            levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
            return _CUSTOM_PREFIX + bytes(levels.view(torch.uint8).tolist()).hex()

    @cached_property
    @lasting()
    def thresholds(self) -> Tensor:
        """The points between the levels, ``[len(levels) - 1]`` float32; a value on a threshold takes the lower code.

        They are the midpoints of neighbouring levels, rounded to 16 significant bits unless that moves one by more
        than 1/512 of its gap. A kernel keeps a code in the bits that this frees. The mean squared error grows by less
        than one part in 10,000 (``test_codebook.py``). With a closed form, they are the points at which it steps.
        """
        if self.closed_form is not None:
            return self.closed_form.steps()
        levels = torch.tensor(self.levels, dtype=torch.float64, device="cpu")
        midpoints = (levels[1:] + levels[:-1]) / 2
        rounded = _round_to_16_bits(midpoints)
        moved = (rounded.double() - midpoints).abs() / (levels[1:] - levels[:-1])
        if bool((moved <= 1 / 512).all()):
            return rounded
        exact = midpoints.float()
        # Between neighbouring float32 levels there is no float32, so the lower level itself is the threshold.
        return torch.where(exact >= levels[1:].float(), levels[:-1].float(), exact)

    @cached_property
    @lasting()
    def cells(self) -> CellTable:
        """The table that nearly finishes the search for a code in one step."""
        return CellTable.of(self.thresholds)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the levels, ``[len(levels)]`` float32, on ``device``, where they stay after the first call."""
        return _levels_on(self, torch.device(device))


def _round_to_16_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**16) / 2**16, exponent).float()


FAMILIES: tuple[Literal["linear", "softsign"], ...] = ("linear", "softsign")
"""The codebooks that there are with codes of 2 to 8 bits."""


def name_with_bits(family: str, bits: int) -> str:
    """Return the name of a codebook of a family: ``softsign`` with 8 bits, ``softsign6`` with 6."""
    return family if bits == 8 else f"{family}{bits}"


def _of_family(family: Literal["linear", "softsign"], bits: int) -> Codebook:
    form = ClosedForm(family, 2 ** (bits - 1) - 1)
    # Under 5 bits, the steps of softsign's formula would cost 1% of the squared error and more.
    as_good = family == "linear" or bits >= 5
    return Codebook(name_with_bits(family, bits), form.levels, form if as_good else None)


BUILTIN: dict[str, Codebook] = {
    book.name: book
    for book in (
        *(_of_family(family, bits) for bits in range(8, 1, -1) for family in FAMILIES),
        Codebook("dynamic", dynamic_levels(signed=True)),
        Codebook("dynamic_unsigned", dynamic_levels(signed=False)),
        Codebook("normal_float4", normal_float4_levels()),
        *(Codebook(f"int{bits}", integer_levels(bits)) for bits in range(2, 9)),
        Codebook("fp8_e4m3", float8_levels(4, 3, finite_only=True)),
        Codebook("fp8_e5m2", float8_levels(5, 2, finite_only=False)),
    )
}
"""The built-in codebooks by name."""

FAMILY_OF = {name_with_bits(family, bits): family for family in FAMILIES for bits in range(2, 9)}
"""The family of each codebook that belongs to one, by its name."""


def get_codebook(code: "str | Codebook | Tensor | Sequence[float]") -> Codebook:
    """Return the codebook that ``code`` means.

    Args:
        code: A codebook, its name, an alias of :data:`ALIASES`, its :attr:`Codebook.spec`, or 2 to 256 increasing
            levels in [-1, 1] with 0. Levels on a GPU are copied to the host, which synchronizes. Make a
            :class:`Codebook` once to avoid that.

    Raises:
        ValueError: If the name is unknown or the levels are no codebook.

    Example:
        >>> get_codebook("int2").levels
        (-1.0, -0.5, 0.0, 0.5)
        >>> get_codebook([-1.0, 0.0, 1.0]).zero_code
        1
    """
    if isinstance(code, Codebook):
        return code
    if isinstance(code, str):
        return _parse(code)
    with neutral():
        levels = code.detach().flatten().tolist() if isinstance(code, Tensor) else code
    try:
        numbers = tuple(float(level) for level in levels)
    except (TypeError, ValueError):
        raise ValueError(
            f"codebook is a name, a Codebook or a list of levels in [-1, 1], got {code!r};"
            " write such as 'linear' or [-1.0, 0.0, 1.0]"
        ) from None
    return Codebook("custom", numbers)


@lru_cache(maxsize=256)
@neutral()
def _parse(spec: str) -> Codebook:
    if spec.endswith(_SCALES) and _WITH in spec:
        base, scale_dtype = spec.removesuffix(_SCALES).split(_WITH, 1)
        return _parse(base).with_scales(scale_dtype)
    name = ALIASES.get(spec, spec)
    if name in BUILTIN:
        return BUILTIN[name]
    if spec.startswith(_CUSTOM_PREFIX):
        data = bytearray.fromhex(spec.removeprefix(_CUSTOM_PREFIX))
        return Codebook("custom", tuple(torch.frombuffer(data, dtype=torch.float32).tolist()))
    hint = did_you_mean(spec, (*BUILTIN, *ALIASES))
    raise ValueError(f"codebook is one of {', '.join(BUILTIN)} or a list of levels, got {spec!r}{hint}")


@lru_cache(maxsize=256)
@lasting()
def _levels_on(codebook: Codebook, device: torch.device) -> Tensor:
    return torch.tensor(codebook.levels, dtype=torch.float32, device=device)
