"""Codebooks: the levels of an 8-bit (or smaller) code, as data.

A codebook is a name and at most 256 increasing levels in [-1, 1]. Everything else is derived from the levels: the
thresholds between them and the lookup table that finds a code quickly. Nothing here quantizes a tensor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from q8lightning.system.ambient import lasting, neutral
from q8lightning.system.arguments import did_you_mean

_CUSTOM_PREFIX = "levels:"

CodebookName = Literal[
    "linear", "softsign", "dynamic", "dynamic_unsigned", "normal_float4", "nf4",
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
"""What others call some of the built-in codebooks. Files hold the built-in names only."""


@dataclass(frozen=True)
class Codebook:
    """At most 256 increasing levels in [-1, 1]; code ``i`` stands for ``levels[i]`` times the scale of its block.

    Args:
        name: What people call it.
        levels: 2 to 256 strictly increasing numbers in [-1, 1], 0 among them, each rounded to float32 on entry; a
            zero is stored as +0.0.
        closed_form: Computes the codes (int32) of normalised values (float32, of any shape, which it may overwrite)
            without a table. Where it is given, the thresholds are the points at which it steps; they must be as good
            as midpoints.

    Raises:
        ValueError: If the levels are too few or too many, unsorted, out of range, or lack 0.
    """

    name: str
    levels: tuple[float, ...]
    closed_form: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)

    @neutral()
    def __post_init__(self) -> None:
        levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
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
        # A level -0.0 would decode zeros to -0.0; adding 0.0 makes it 0.0.
        object.__setattr__(self, "levels", tuple((levels + 0.0).tolist()))

    @property
    def signed(self) -> bool:
        """Whether there are negative levels."""
        return self.levels[0] < 0

    @property
    def end(self) -> int:
        """The end of [-1, 1] that the levels reach: 1, else -1 (two's-complement integers), or 0 for neither.

        A block's largest element can be stored exactly only at an end, and only then does encoding again find the same
        scale. With a plain absmax, a codebook that reaches one end shrinks the largest elements of the other sign at
        every save; a signed scale avoids that.
        """
        return 1 if self.levels[-1] == 1.0 else -1 if self.levels[0] == -1.0 else 0

    @property
    def one_sided(self) -> bool:
        """Whether the levels are signed but reach only one of -1 and +1, so that checkpoints need a signed scale."""
        return self.signed and (self.levels[0] == -1.0) != (self.levels[-1] == 1.0)

    @property
    def scale_end(self) -> int:
        """The end that a signed scale turns a block's largest element to; 0 where a plain absmax is stable."""
        return self.end if self.one_sided else 0

    @property
    def zero_code(self) -> int:
        """The code of the level 0."""
        return self.levels.index(0.0)

    @property
    def spec(self) -> str:
        """A string that :func:`get_codebook` turns into this codebook: its name, or its levels in hexadecimal."""
        if BUILTIN.get(self.name) == self:
            return self.name
        with neutral():
            levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
            return _CUSTOM_PREFIX + bytes(levels.view(torch.uint8).tolist()).hex()

    @cached_property
    @lasting()
    def thresholds(self) -> Tensor:
        """The ``len(levels) - 1`` float32 decision points; a value on a threshold takes the lower code.

        They are the midpoints of neighbouring levels, rounded to 16 significant bits where that moves none by more
        than 1/512 of the gap it divides (the free bits let a kernel keep threshold and code in one word; the mean
        squared error grows by less than one part in 10,000, which ``test_codebook.py`` shows). With a closed
        form they are the points at which it steps.
        """
        if self.closed_form is not None:
            return _steps_of(self.closed_form, len(self.levels))
        levels = torch.tensor(self.levels, dtype=torch.float64, device="cpu")
        midpoints = (levels[1:] + levels[:-1]) / 2
        rounded = _round_to_16_bits(midpoints)
        moved = (rounded.double() - midpoints).abs() / (levels[1:] - levels[:-1])
        if bool((moved <= 1 / 512).all()):
            return rounded
        exact = midpoints.float()
        # Neighbouring float32 levels have no float32 between them: the lower level itself is then the threshold.
        return torch.where(exact >= levels[1:].float(), levels[:-1].float(), exact)

    @cached_property
    @lasting()
    def cells(self) -> "CellTable":
        """The lookup table that brings a search for the code close to its end in one step."""
        return CellTable.of(self.thresholds)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the levels, ``[len(levels)]`` float32, on ``device`` (kept there after the first call)."""
        return _levels_on(self, torch.device(device))


@dataclass(frozen=True)
class CellTable:
    """For every pattern of a float's leading bits, how many thresholds lie below all floats that begin so.

    Attributes:
        shift: How many trailing bits of the float32 pattern are ignored.
        first: ``[2 ** (32 - shift)]`` int32: the lowest code that a float of the cell can have.
        rounds: Binary search steps that remain from there, 1 where no cell holds more than one threshold.
    """

    shift: int
    first: Tensor
    rounds: int

    @staticmethod
    def of(thresholds: Tensor) -> "CellTable":
        """Use 6 mantissa bits, or 7 if that saves a search step (it does for the unsigned dynamic map)."""
        six, seven = (CellTable._with_mantissa_bits(thresholds, bits) for bits in (6, 7))
        return seven if seven.rounds < six.rounds else six

    @staticmethod
    def _with_mantissa_bits(thresholds: Tensor, bits: int) -> "CellTable":
        shift = 23 - bits
        cell = torch.arange(2 ** (32 - shift), dtype=torch.int64, device="cpu") << shift
        ends = torch.stack([cell, cell | (2**shift - 1)])
        ends = (ends - 2**32 * (ends >= 2**31).long()).int().view(torch.float32)  # as signed 32-bit patterns
        ends = torch.where(ends.isnan(), ends.new_tensor(torch.inf).copysign(ends), ends)  # NaN is never asked for
        low, high = ends.min(dim=0).values, ends.max(dim=0).values
        first = torch.searchsorted(thresholds, low, out_int32=True)
        last = torch.searchsorted(thresholds, high, out_int32=True)
        return CellTable(shift, first, max(1, int((last - first).max()).bit_length()))


def _round_to_16_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**16) / 2**16, exponent).float()


def _steps_of(closed_form: Callable[[Tensor], Tensor], levels: int) -> Tensor:
    """Find, for each code, the largest float32 that a monotone closed form maps to it or below, by bisection."""

    def floats(ordered: Tensor) -> Tensor:  # integers in the order of the floats they stand for
        bits = torch.where(ordered < 0, -(2**31) - ordered - 1, ordered)
        return bits.int().view(torch.float32)

    def order(x: float) -> int:
        bits = int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))
        return bits if bits >= 0 else -(2**31) - bits - 1

    code = torch.arange(levels - 1, dtype=torch.int64, device="cpu")
    low, high = torch.full_like(code, order(-1.0)), torch.full_like(code, order(1.0))
    while int((high - low).max()) > 1:
        middle = (low + high) >> 1
        below = closed_form(floats(middle)).long() <= code
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return floats(low)


_TO_INTEGER = 2.0**23 + 127
"""Added to a float32 in [-127.5, 127.5], it leaves the nearest integer plus 127 in the low bits of the pattern."""


def _linear_code(y: Tensor) -> Tensor:
    return y.mul_(127.0).add_(_TO_INTEGER).view(torch.int32).bitwise_and_(0xFF)


def _softsign_code(y: Tensor) -> Tensor:
    # The inverse of the levels, k = 254 l / (1 + l), rounded: its steps differ from midpoints by at most 0.2% of a gap.
    # Written as 1 - 1 / (1 + l), each rounding keeps the order of the values; that of l / (1 + l) would not.
    share = y.abs().add_(1.0).reciprocal_().neg_().add_(1.0)
    return share.copysign_(y).mul_(254.0).add_(_TO_INTEGER).view(torch.int32).bitwise_and_(0xFF)


def _dynamic_levels(signed: bool) -> tuple[float, ...]:
    """The dynamic map of Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561)."""
    # Float32 steps, added up from the nearer end with one rounding each: bit for bit the map that bitsandbytes builds.
    start, end = torch.tensor([0.1, 1.0], dtype=torch.float32, device="cpu")
    positive: list[float] = []
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step = ((end - start) / parts).double()
        j = torch.arange(parts + 1, dtype=torch.float64, device="cpu")
        boundaries = torch.where(j < (parts + 1) // 2, start.double() + step * j, end - step * (parts - j)).float()
        positive += (
            (boundaries[:-1] + boundaries[1:]) / 2 * torch.tensor(10.0 ** (i - 6), dtype=torch.float32, device="cpu")
        ).tolist()
    return (*(-x for x in reversed(positive) if signed), 0.0, *positive, 1.0)


def _normal_float4_levels() -> tuple[float, ...]:
    """The NF4 of QLoRA (arXiv:2305.14314): normal quantiles, 8 positive and 7 negative, scaled to [-1, 1]."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(offset + (0.5 - offset) * j / count) for j in range(count)]

    negative, positive = quantiles(7), quantiles(8)
    return (*(-x / negative[0] for x in negative), 0.0, *(x / positive[0] for x in reversed(positive)))


def _integer_levels(bits: int) -> tuple[float, ...]:
    """Two's complement, ``-2**(bits-1) .. 2**(bits-1) - 1``, divided by ``2**(bits-1)``."""
    half = 2 ** (bits - 1)
    return tuple(k / half for k in range(-half, half))


def _float8_levels(exponent_bits: int, mantissa_bits: int, finite_only: bool) -> tuple[float, ...]:
    """The finite values of an OCP 8-bit float (arXiv:2209.05433), divided by the largest one."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = set()
    for pattern in range(128):
        exponent, mantissa = pattern >> mantissa_bits, pattern & (2**mantissa_bits - 1)
        if exponent == 2**exponent_bits - 1 and (not finite_only or mantissa == 2**mantissa_bits - 1):
            continue  # infinity and NaN; e4m3fn keeps all patterns of the top exponent but one
        lead = mantissa / 2**mantissa_bits + (exponent > 0)
        values.add(math.ldexp(lead, max(exponent, 1) - bias))
    largest = max(values)
    return tuple(sorted({sign * value / largest for value in values for sign in (-1.0, 1.0)}))


BUILTIN: dict[str, Codebook] = {
    book.name: book
    for book in (
        Codebook("linear", tuple(k / 127 for k in range(-127, 128)), _linear_code),
        Codebook("softsign", tuple(k / (254 - abs(k)) for k in range(-127, 128)), _softsign_code),
        Codebook("dynamic", _dynamic_levels(signed=True)),
        Codebook("dynamic_unsigned", _dynamic_levels(signed=False)),
        Codebook("normal_float4", _normal_float4_levels()),
        *(Codebook(f"int{bits}", _integer_levels(bits)) for bits in range(2, 9)),
        Codebook("fp8_e4m3", _float8_levels(4, 3, finite_only=True)),
        Codebook("fp8_e5m2", _float8_levels(5, 2, finite_only=False)),
    )
}


def get_codebook(code: "str | Codebook | Tensor | Sequence[float]") -> Codebook:
    """Return the codebook that ``code`` names, is, or lists the levels of.

    Args:
        code: A built-in name or one of :data:`ALIASES`, a :attr:`Codebook.spec`, a codebook, or 2 to 256 increasing
            levels in [-1, 1] with 0. Levels on a GPU are copied to the host, which synchronizes; make a
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
        raise ValueError(f"codebook is a name, a Codebook or a list of levels in [-1, 1], got {code!r}") from None
    return Codebook("custom", numbers)


@lru_cache(maxsize=256)
@neutral()
def _parse(spec: str) -> Codebook:
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
