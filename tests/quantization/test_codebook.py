"""Codebooks hold the published levels, and their thresholds and tables find the nearest one."""

import math
import pickle
import re
from statistics import NormalDist
from typing import get_args

import numpy as np
import pytest
import torch
from support import oracle
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.cell_table import CellTable
from q8lightning.quantization.spec.codebook import ALIASES, BUILTIN, Codebook, CodebookName, get_codebook

ULP = 2.0**-23  # of float32, relative: at most this far apart are neighbouring floats


def neighbour(x: Tensor, direction: float) -> Tensor:
    return torch.nextafter(x, torch.tensor(direction))


def crowded(centre: float, count: int) -> tuple[float, ...]:
    """``count`` levels one float32 ulp apart from ``centre`` on, with both ends and 0."""
    first = torch.tensor(centre).view(torch.int32)
    levels = (first + torch.arange(count, dtype=torch.int32)).view(torch.float32)
    return (-1.0, 0.0, *levels.sort().values.tolist(), 1.0)


CUSTOM = [
    Codebook("two", (0.0, 1.0)),
    Codebook("ternary", (-1.0, 0.0, 1.0)),
    Codebook("uneven", (-1.0, -0.999, -1e-30, 0.0, 1e-38, 1e-3, 0.5, 1.0)),
    Codebook("neither end", (-0.5, 0.0, 0.25)),
    Codebook("powers of two", (0.0, *(2.0**-k for k in range(126, -1, -1)))),
    Codebook("one cell", (-1.0, *(k * 2.0**-20 for k in range(-100, 101)), 1.0)),
    Codebook("one cell, off zero", (0.0, *(0.75 + k * 2.0**-20 for k in range(200)), 1.0)),
    Codebook("an ulp apart", crowded(0.3, 253)),
    Codebook("an ulp apart, subnormal", crowded(1e-40, 253)),
]
CODEBOOKS = [*BUILTIN.values(), *CUSTOM]
WITH_CLOSED_FORM = [codebook for codebook in BUILTIN.values() if codebook.closed_form is not None]

every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
every_builtin = pytest.mark.parametrize("codebook", BUILTIN.values(), ids=lambda codebook: codebook.name)
every_closed_form = pytest.mark.parametrize("codebook", WITH_CLOSED_FORM, ids=lambda codebook: codebook.name)


def code_of(codebook: Codebook, y: Tensor) -> list[int]:
    """Encode values in [-1, 1] in one block of scale exactly 1."""
    codes, scale = reference.quantize(torch.cat([torch.ones(1), y]), codebook, y.numel() + 1)
    assert scale.tolist() == [1.0]
    return codes[1:].tolist()


def critical_values(codebook: Codebook) -> Tensor:
    """All levels, all thresholds, their float neighbours on both sides, and both zeros, where they lie in [-1, 1]."""
    points = torch.cat([codebook.tensor(), codebook.thresholds, torch.tensor([0.0, -0.0, -1.0, 1.0])])
    values = torch.cat([points, neighbour(points, -2.0), neighbour(points, 2.0)])
    return values[values.abs() <= 1]


# The levels


def test_the_builtin_codebooks_are_those_of_the_design() -> None:
    assert set(BUILTIN) == {
        *("linear", "softsign", "dynamic", "dynamic_unsigned", "normal_float4", "fp8_e4m3", "fp8_e5m2"),
        *(f"int{bits}" for bits in range(2, 9)),
    }
    assert all(name == codebook.name for name, codebook in BUILTIN.items())


def test_linear_is_k_over_127() -> None:
    expected = np.arange(-127, 128) / 127
    assert oracle.same_bits(BUILTIN["linear"].levels, expected.astype(np.float32))


def test_softsign_is_y_over_2_minus_its_magnitude() -> None:
    k = np.arange(-127, 128)
    y = k / 127
    expected = k / (254 - np.abs(k))
    np.testing.assert_allclose(y / (2 - np.abs(y)), expected, rtol=1e-15)  # the two ways to write it
    assert oracle.same_bits(BUILTIN["softsign"].levels, expected.astype(np.float32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_int_is_two_s_complement_over_the_magnitude_of_its_smallest(bits: int) -> None:
    half = 2 ** (bits - 1)
    assert BUILTIN[f"int{bits}"].levels == tuple(k / half for k in range(-half, half))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_is_every_finite_pattern_over_the_largest(name: str, dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = values[values.isfinite()].unique()  # sorted, and with one zero
    assert BUILTIN[name].levels == tuple((finite / finite.max()).float().tolist())


@every_codebook
def test_the_code_of_zero_decodes_to_a_zero_that_is_not_negative(codebook: Codebook) -> None:
    assert math.copysign(1.0, codebook.levels[codebook.zero_code]) == 1.0
    codes, scale = torch.tensor([codebook.zero_code], dtype=torch.uint8), torch.tensor([2.0])
    for backend in (reference, cpu):
        assert not torch.signbit(backend.dequantize(codes, scale, codebook, 32, torch.float32))


@pytest.mark.parametrize("levels", [[-1.0, -0.0, 1.0], torch.tensor([-1.0, -0.0, 1.0])], ids=["list", "tensor"])
def test_a_negative_zero_among_ones_own_levels_becomes_a_zero(levels: list[float] | Tensor) -> None:
    assert get_codebook(levels).spec == get_codebook([-1.0, 0.0, 1.0]).spec


def test_normal_float4_is_the_table_of_qlora() -> None:
    published = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022833423, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
    levels = BUILTIN["normal_float4"].levels
    assert levels == tuple(torch.tensor(published).tolist())
    # It comes from probabilities in float32: their grid ends at the rounded 0.9677083 instead of 929/960 (3.4e-8 off),
    # is stepped (one ulp below 1) and rounded (half an ulp). A quantile z moves by that much over the normal density
    # at z, and so does the largest quantile, which all are divided by.
    normal = NormalDist()
    largest = normal.inv_cdf(929 / 960)
    off = 3.4e-8 + 2.0**-24 + 2.0**-25
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    exact = [
        *(-normal.inv_cdf(offset + (0.5 - offset) * j / 7) / largest for j in range(7)),
        0.0,
        *reversed([normal.inv_cdf(offset + (0.5 - offset) * j / 8) / largest for j in range(8)]),
    ]
    for ours, quantile in zip(levels, exact, strict=True):
        at_level, at_end = off / normal.pdf(ours * largest), off / normal.pdf(largest)
        tolerance = (at_level + abs(ours) * at_end) / largest + 2.0**-24
        assert abs(ours - quantile) <= tolerance < 2e-6


@pytest.mark.parametrize(("name", "signed"), [("dynamic", True), ("dynamic_unsigned", False)])
def test_dynamic_is_the_map_of_bitsandbytes(name: str, signed: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    theirs = bitsandbytes.create_dynamic_map(signed=signed).view(torch.int32)
    ours = BUILTIN[name].tensor().view(torch.int32)
    ulps = (ours.long() - theirs.long()).abs()
    assert int(ulps.max()) <= 1


DYNAMIC_LITERALS = {  # printed by bitsandbytes 0.50.2
    "dynamic": {
        **{0: -0.992968738079071, 1: -0.9789062738418579, 64: -0.09859374910593033, 120: -8.874999912222847e-05},
        **{126: -5.500000384017767e-07, 127: 0.0, 128: 5.500000384017767e-07, 129: 3.250000190746505e-06},
        **{130: 7.749999895168003e-06, 131: 2.1249998098937795e-05, 140: 0.0007187500596046448, 192: 0.12109375},
        **{200: 0.23359374701976776, 254: 0.992968738079071, 255: 1.0},
    },
    "dynamic_unsigned": {
        **{0: 0.0, 1: 3.2500003044333425e-07, 64: 0.012109375558793545, 120: 0.09085937589406967},
        **{126: 0.09929687529802322, 127: 0.103515625, 128: 0.11054687201976776, 129: 0.11757812649011612},
        **{130: 0.12460937350988388, 131: 0.13164061307907104, 140: 0.19492188096046448, 192: 0.560546875},
        **{200: 0.6167968511581421, 254: 0.9964843988418579, 255: 1.0},
    },
}
DYNAMIC_CHECKSUMS = {  # sum, and sum of squares, of the same maps
    "dynamic": (1.0, 48.595837667290176),
    "dynamic_unsigned": (75.1052632433869, 48.59745210510095),
}


@pytest.mark.parametrize("name", DYNAMIC_LITERALS)
def test_dynamic_holds_the_known_levels(name: str) -> None:
    levels = BUILTIN[name].levels
    assert len(levels) == 256
    for code, level in DYNAMIC_LITERALS[name].items():
        assert abs(levels[code] - level) <= ULP * abs(level)
    total, squares = DYNAMIC_CHECKSUMS[name]  # one ulp in every level moves a sum by at most ULP * sum(|level|)
    assert abs(math.fsum(levels) - total) <= ULP * math.fsum(map(abs, levels))
    assert abs(math.fsum(x * x for x in levels) - squares) <= 2 * ULP * squares


@pytest.mark.parametrize(("name", "sides"), [("dynamic", 2), ("dynamic_unsigned", 1)])
def test_dynamic_divides_every_decade_as_designed(name: str, sides: int) -> None:
    positive = [level for level in BUILTIN[name].levels if 0 < level < 1]
    expected = []
    for i in range(7):
        parts = 2**i if sides == 2 else 2 ** (i + 1)
        expected += [(0.1 + 0.9 * (j + 0.5) / parts) * 10.0 ** (i - 6) for j in range(parts)]
    # bitsandbytes adds in float32: the parts' ends are off by 3 roundings below 1, which an end near 0.1 feels tenfold.
    np.testing.assert_allclose(positive, expected, rtol=30 * 2.0**-24)


@every_codebook
def test_the_properties_follow_from_the_levels(codebook: Codebook) -> None:
    levels = codebook.levels
    assert codebook.signed == any(level < 0 for level in levels)
    assert levels[codebook.zero_code] == 0
    assert codebook.end in (-1, 0, 1)
    assert (codebook.end == 0) == (max(map(abs, levels)) < 1)
    assert codebook.end == 0 or codebook.end in levels
    assert codebook.one_sided == (codebook.signed and (-1.0 in levels) != (1.0 in levels))
    assert codebook.tensor().dtype == torch.float32
    assert codebook.tensor().tolist() == list(levels)


def test_exactly_dynamic_and_the_integers_reach_one_end_only() -> None:
    one_sided = {name for name, codebook in BUILTIN.items() if codebook.one_sided}
    assert one_sided == {"dynamic", *(f"int{bits}" for bits in range(2, 9))}


# The thresholds


@every_codebook
def test_each_level_encodes_to_itself(codebook: Codebook) -> None:
    assert code_of(codebook, codebook.tensor()) == list(range(len(codebook.levels)))


@every_codebook
def test_a_value_on_a_threshold_takes_the_lower_code_and_its_successor_the_upper(codebook: Codebook) -> None:
    thresholds = codebook.thresholds
    assert thresholds.dtype == torch.float32
    assert code_of(codebook, thresholds) == list(range(len(codebook.levels) - 1))
    assert code_of(codebook, neighbour(thresholds, 2.0)) == list(range(1, len(codebook.levels)))


@every_codebook
def test_thresholds_lie_between_their_levels(codebook: Codebook) -> None:
    lower, upper = codebook.tensor()[:-1], codebook.tensor()[1:]
    adjacent = neighbour(lower, 2.0) == upper  # no float lies between: the lower level is its own threshold
    assert bool(torch.where(adjacent, codebook.thresholds == lower, codebook.thresholds > lower).all())
    assert bool((codebook.thresholds < upper).all())
    assert codebook.name in {custom.name for custom in CUSTOM} or not bool(adjacent.any())


@every_builtin
def test_thresholds_leave_8_bits_free_where_no_closed_form_sets_them(codebook: Codebook) -> None:
    free = codebook.thresholds.view(torch.int32) & 0xFF
    assert codebook.closed_form is not None or bool((free == 0).all())


def gap_fraction(codebook: Codebook) -> Tensor:
    """How far each threshold is from the midpoint, as a fraction of the gap it divides."""
    levels = codebook.tensor().double()
    return (codebook.thresholds.double() - (levels[1:] + levels[:-1]) / 2).abs() / levels.diff()


@every_builtin
def test_thresholds_are_midpoints_within_a_512th_of_the_gap(codebook: Codebook) -> None:
    allowed = 0.002 if codebook.name == "softsign" else 1 / 512
    assert float(gap_fraction(codebook).max()) <= allowed


@pytest.mark.parametrize("codebook", CUSTOM, ids=lambda codebook: codebook.name)
def test_thresholds_of_any_codebook_are_midpoints_as_far_as_float32_can_tell(codebook: Codebook) -> None:
    spacing = (neighbour(codebook.thresholds, 2.0) - codebook.thresholds).double()
    rounding = spacing / codebook.tensor().double().diff()
    assert bool((gap_fraction(codebook) <= torch.maximum(torch.tensor(1 / 512), rounding)).all())


@every_builtin
@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.5, math.inf], ids=lambda sigma: f"sigma={sigma}")
def test_rounded_thresholds_cost_less_than_a_10000th_of_the_squared_error(codebook: Codebook, deviation: float) -> None:
    """Exact midpoints are optimal; moving one from m to t adds the integral of 2 gap (y - m) p(y) from m to t."""
    nodes, weights = np.polynomial.legendre.leggauss(16)  # exact to the last digits on pieces this short

    def integral(function, start, stop):
        y = (start + stop)[:, None] / 2 + (stop - start)[:, None] / 2 * nodes
        return float((function(y) * density(y) * weights * (stop - start)[:, None] / 2).sum())

    def density(y):
        return np.exp(-0.5 * (y / deviation) ** 2)  # constant for an infinite deviation

    levels, thresholds = oracle.float64(codebook.levels), oracle.float64(codebook.thresholds)
    lower, upper = levels[:-1], levels[1:]
    middle, gap = (lower + upper) / 2, upper - lower
    least = integral(lambda y: (y - lower[:, None]) ** 2, lower, middle)
    least += integral(lambda y: (y - upper[:, None]) ** 2, middle, upper)
    excess = integral(lambda y: 2 * gap[:, None] * (y - middle[:, None]), middle, thresholds)
    assert 0 <= excess < 1e-4 * least


# The ways to find a code quickly


@every_closed_form
def test_a_closed_form_steps_exactly_at_the_thresholds(codebook: Codebook) -> None:
    around = torch.arange(-100, 101, dtype=torch.int32)  # floats on either side: no rounding may make it step back
    near = (codebook.thresholds.view(torch.int32)[:, None] + around).view(torch.float32).flatten()
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(500_000, generator=generator) * 2 - 1
    magnitudes = 2.0 ** -(126 * torch.rand(500_000, generator=generator))
    y = torch.cat([critical_values(codebook), near[near.abs() <= 1], random, magnitudes * random.sign()])
    assert codebook.closed_form is not None
    code = codebook.closed_form(y.clone())
    assert code.shape == y.shape
    wrong = y[code.long() != torch.searchsorted(codebook.thresholds, y)]
    assert [value.hex() for value in wrong.tolist()] == []


def cell_of(y: Tensor, table: CellTable) -> Tensor:
    return (y.view(torch.int32).long() & 0xFFFFFFFF) >> table.shift


def search(y: Tensor, table: CellTable, thresholds: Tensor) -> Tensor:
    """Find the code by the table: its first code, then ``rounds`` halvings."""
    code = table.first.long()[cell_of(y, table)]
    padded = torch.cat([thresholds, torch.full((2**table.rounds,), torch.inf)])
    for step in (2**i for i in reversed(range(table.rounds))):
        code = torch.where(y > padded[code + step - 1], code + step, code)
    return code


@every_codebook
def test_the_cell_table_finds_the_same_codes_as_a_search_through_all_thresholds(codebook: Codebook) -> None:
    table = codebook.cells
    assert table.first.dtype == torch.int32
    assert table.first.numel() == 2 ** (32 - table.shift)
    cells = torch.arange(table.first.numel(), dtype=torch.int64)
    first_and_last = torch.cat([cells << table.shift, (cells << table.shift) + 2**table.shift - 1])
    ends = first_and_last.to(torch.int32).view(torch.float32)  # wraps to the sign bit: every cell, both its ends
    y = torch.cat([critical_values(codebook), ends[ends.abs() <= 1], torch.linspace(-1, 1, 10_001)])
    assert torch.equal(search(y, table, codebook.thresholds), torch.searchsorted(codebook.thresholds, y))


def test_one_search_step_is_enough_for_the_builtin_codebooks_and_more_are_taken_where_levels_crowd() -> None:
    rounds = {codebook.name: codebook.cells.rounds for codebook in CODEBOOKS}
    assert {rounds[name] for name in BUILTIN} == {1}
    assert rounds["an ulp apart"] == 8  # 253 thresholds in one cell
    assert rounds["one cell, off zero"] > 4


# Codebooks that are none


@pytest.mark.parametrize(
    ("levels", "rule", "received"),
    [
        ((), "2 to 256 levels", "got 0"),
        ((0.0,), "2 to 256 levels", "got 1"),
        (tuple(k / 300 for k in range(257)), "2 to 256 levels", "got 257"),
        ((0.0, 1.5), r"in \[-1, 1\]", "got 0 to 1.5"),
        ((-1.5, 0.0), r"in \[-1, 1\]", "got -1.5 to 0"),
        ((0.0, 1.0 + 2**-23), r"in \[-1, 1\]", "got 0 to 1"),
        ((0.0, 2.0, 1.0), r"in \[-1, 1\]", "to 2"),
        ((-1.0, math.nan, 1.0), r"in \[-1, 1\]", "got nan"),
        ((0.0, math.inf), r"in \[-1, 1\]", "inf"),
        ((-math.inf, 0.0), r"in \[-1, 1\]", "got -inf"),
        ((0.0, 1.0, 0.5), "increase strictly", "got 1 before 0.5 at position 1"),
        ((1.0, 0.0, -1.0), "increase strictly", "got 1 before 0 at position 0"),
        ((0.0, 0.5, 0.5, 1.0), "increase strictly", "got 0.5 before 0.5 at position 1"),
        ((0.0, 0.5, 0.5 + 1e-12, 1.0), "increase strictly in float32", "got 0.5 before 0.5"),
        ((-1.0, 1.0), "holds the level 0", "got 2 levels"),
        ((-1.0, 0.25, 1.0), "holds the level 0", "got 3 levels"),
    ],
)
@pytest.mark.parametrize("make", [lambda levels: Codebook("mine", levels), get_codebook], ids=["Codebook", "get"])
def test_levels_that_are_no_codebook_are_refused_with_the_rule_and_what_was_received(
    make, levels: tuple[float, ...], rule: str, received: str
) -> None:
    with pytest.raises(ValueError, match=rule) as error:
        make(levels)
    assert received in str(error.value)


@pytest.mark.parametrize("name", ["int1", "Linear", "log", ""])
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"codebook is one of linear, softsign, .* or a list of levels") as error:
        get_codebook(name)
    assert f"got {name!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("NF4", "did you mean 'nf4'?"),
        ("normalfloat4", "did you mean 'normal_float4'?"),
        ("int44", "did you mean 'int4'?"),
        ("fp8", "did you mean 'fp8_e4m3' or 'fp8_e5m2'?"),
        ("fp8_e5m3", "did you mean 'fp8_e5m2'?"),
        ("lineer", "did you mean 'linear'?"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_are_meant(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {name!r}; {hint}")):
        get_codebook(name)


@pytest.mark.parametrize("alias", ALIASES)
def test_what_others_call_a_codebook_is_understood_and_never_stored(alias: str) -> None:
    book = BUILTIN[ALIASES[alias]]
    assert get_codebook(alias) is book
    assert book.spec == ALIASES[alias] == WeightCodec(alias).codebook == get_codec(alias).name


def test_the_names_for_type_checkers_are_those_there_are() -> None:
    assert set(get_args(CodebookName)) == {*BUILTIN, *ALIASES}


@pytest.mark.parametrize("spec", ["levels:", "levels:zz", "levels:0000", "levels:0000803f"])
def test_a_mangled_spec_is_refused(spec: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whichever rule it breaks first
        get_codebook(spec)


# Names, specs and other ways to say which


@every_codebook
def test_a_spec_says_which_codebook_in_a_string(codebook: Codebook) -> None:
    assert (codebook.spec == codebook.name) == (codebook.name in BUILTIN)
    again = get_codebook(codebook.spec)
    assert again.levels == codebook.levels
    assert again.spec == codebook.spec
    assert torch.equal(again.thresholds, codebook.thresholds)


def test_a_codebook_is_known_by_its_levels_not_only_by_its_name() -> None:
    impostor = Codebook("linear", (-1.0, 0.0, 1.0))
    assert impostor != BUILTIN["linear"]
    assert get_codebook(impostor.spec).levels == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "code",
    [
        Codebook("mine", (-1.0, 0.0, 0.1, 1.0)),
        (-1.0, 0.0, 0.1, 1.0),
        [-1, 0, 0.1, 1],
        np.array([-1.0, 0.0, 0.1, 1.0]),
        torch.tensor([-1.0, 0.0, 0.1, 1.0]),
        torch.tensor([-1.0, 0.0, 0.1, 1.0], dtype=torch.float64),
        torch.tensor([-1.0, 0.0, 0.1, 1.0], requires_grad=True),
    ],
    ids=["codebook", "tuple", "list", "numpy", "tensor", "float64 tensor", "parameter"],
)
def test_a_codebook_can_be_given_as_itself_or_as_its_levels(code) -> None:
    assert get_codebook(code).levels == (-1.0, 0.0, float(np.float32(0.1)), 1.0)


@every_codebook
def test_a_codebook_is_a_value(codebook: Codebook) -> None:
    again = pickle.loads(pickle.dumps(codebook))
    assert again == codebook
    assert hash(again) == hash(codebook)
    assert torch.equal(again.thresholds, codebook.thresholds)
