"""The specification, ``reference.py``, keeps the promises of every codec. Other suites compare backends with it."""

import itertools
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.schemes import DTYPES, Scheme, every_dtype
from torch import Tensor

from q8lightning.quantization.spec import logarithm, reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, name_with_bits

LAYOUTS = [((1000,), 32), ((7, 13, 11), 256), ((1,), 32), ((3, 1500), 4096)]  # shapes with block sizes
HALF_ULP = 2.0**-24  # what one float32 operation rounds, relative
LARGEST = torch.finfo(torch.float32).max

# In octaves, as reference.py documents them:
LOG2_OFF, EXP2_OFF = 1.2e-4, 1.5e-4  # what the polynomials are off
LOG_MARGIN = 2.0**-11  # how far the grid reaches beyond both bounds
LOG_ROUNDING = 2.0**-14  # distances up to 2**8 octaves in float32, half an ulp of which is 2**-17, in a few operations

every_layout = pytest.mark.parametrize(("shape", "block_size"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values of many magnitudes, float64: normal ones times the exponential of normal ones."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return normal[0] * normal[1].exp()


def encode(scheme: Scheme, x: Tensor, block_size: int = 32) -> tuple[Tensor, ...]:
    return scheme.encode(reference, x, block_size)


def decode(
    scheme: Scheme, parts: tuple[Tensor, ...], block_size: int = 32, dtype: torch.dtype = torch.float32
) -> Tensor:
    return scheme.decode(reference, parts, block_size, dtype)


def round_trip(scheme: Scheme, x: Tensor, block_size: int = 32) -> Tensor:
    return decode(scheme, encode(scheme, x, block_size), block_size, x.dtype)


def scale_of(scheme: Scheme, parts: tuple[Tensor, ...]) -> Tensor:
    return parts[2] if scheme.family == "residual" else parts[1]


def same(parts: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(parts) == len(others) and all(map(oracle.same_bits, parts, others))


# Against the oracle


def off_midpoints(codebook: Codebook) -> float:
    """Return how far thresholds may be off the midpoints, in gaps: softsign rounds k, not the level of k."""
    if codebook.closed_form is None or codebook.closed_form.kind != "softsign":
        return 0.0
    half = codebook.closed_form.half
    k = np.arange(half)

    def level(k: np.ndarray) -> np.ndarray:
        return k / (2 * half - k)

    gap = level(k + 1) - level(k)
    return float((np.abs(level(k + 0.5) - (level(k) + level(k + 1)) / 2) / gap).max())


def test_codes_are_the_nearest_levels(codebook_scheme: Scheme) -> None:
    codebook = codebook_scheme.codebook
    levels, end = codebook.levels, codebook.end if codebook_scheme.signed_scale else 0
    for (shape, block_size), dtype in itertools.product(LAYOUTS, DTYPES):
        x = codebook_scheme.admissible(random(*shape)).to(dtype)
        codes, scale = encode(codebook_scheme, x, block_size)
        narrow = codebook_scheme.narrow
        expected_codes, expected_scale = oracle.quantize(x.float() if narrow else x, levels, block_size, end, narrow)
        assert codes.dtype == torch.uint8
        assert scale.dtype == torch.float32
        assert oracle.same_bits(scale, expected_scale.astype(np.float32))

        y = oracle.normalise(x, expected_scale, block_size)
        decided = ~oracle.undecided(y, levels, gap_fraction=0.002 + off_midpoints(codebook))
        assert oracle.same_bits(codes[decided], expected_codes[decided])
        assert np.abs(oracle.float64(codes) - expected_codes).max() <= 1

        expected = torch.from_numpy(oracle.dequantize(codes, scale, levels, block_size)).float()
        assert oracle.same_bits(decode(codebook_scheme, (codes, scale), block_size), expected)
        assert oracle.same_bits(decode(codebook_scheme, (codes, scale), block_size, dtype), expected.to(dtype))


@every_dtype
@every_layout
@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (5, 3), (2, 2)], ids=str)
def test_the_residual_stage_encodes_what_the_first_lost(
    shape: tuple[int, ...], block_size: int, dtype: torch.dtype, bits: tuple[int, int]
) -> None:
    x, linear = random(*shape).to(dtype), BUILTIN[name_with_bits("linear", bits[0])]
    codes, residual, scale = reference.quantize_residual(x, block_size, *bits)
    assert codes.dtype == residual.dtype == torch.uint8
    assert same((codes, scale), reference.quantize(x, linear, block_size))

    first = oracle.dequantize(codes, scale, linear.levels, block_size)
    left = oracle.float64(x.float()) - first
    expected = oracle.quantize_residual(left, scale, block_size, *bits)
    steps_a_scale, most = oracle.residual_steps(*bits), 2 ** (bits[1] - 1) - 1
    assert oracle.float64(residual).max() <= 2 * most
    steps = oracle.normalise(left, scale, block_size) * steps_a_scale
    # The difference, the reciprocal and two products round, at up to half a first step, and first itself, at up to one
    # scale; and the linear codes of the first stage are nearest ones but for a rounding.
    tied = np.abs(steps - np.floor(steps) - 0.5) <= (2 * (most + 1) * 4 + steps_a_scale) * HALF_ULP
    assert oracle.same_bits(residual[~tied], expected[~tied])

    per_element = np.abs(oracle.spread(scale, block_size, x))
    decoded = oracle.float64(reference.dequantize_residual(codes, residual, scale, block_size, *bits, torch.float32))
    value = first + (oracle.float64(residual) - most) * oracle.spread(scale, block_size, x) / steps_a_scale
    assert np.all(np.abs(decoded - value) <= 4 * HALF_ULP * per_element)  # first, the sum, the step and its multiple
    # Half a residual step, also for the first stage's largest error: most + 0.5 steps, of which the code keeps most.
    bound = per_element * (0.5 / steps_a_scale + 7 * HALF_ULP)
    assert np.all(np.abs(decoded - oracle.float64(x.float())) <= bound)


def second_moments(*shape: int) -> Tensor:
    """Squares over many orders of magnitude, with zeros among them."""
    x = random(*shape).square() * 1e-9
    x.view(-1)[3::7] = 0
    return x


@every_dtype
@every_layout
@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_log_keeps_bounds_and_relative_errors(
    shape: tuple[int, ...], block_size: int, dtype: torch.dtype, bits: int, scale_dtype: str
) -> None:
    x = (second_moments(*shape) * (1e6 if dtype == torch.float16 else 1)).to(dtype)
    codes, bounds = reference.quantize_log(x, block_size, bits, scale_dtype)
    expected = oracle.quantize_log(x.float(), block_size, bits, scale_dtype == "bfloat16")
    assert codes.dtype == torch.uint8
    assert oracle.same_bits(bounds, expected.bounds)
    assert oracle.same_bits(codes == 0, expected.codes == 0)

    decoded = oracle.float64(reference.dequantize_log(codes, bounds, block_size, bits, torch.float32))
    original = oracle.float64(x.float())
    low, high = (oracle.spread(bounds[:, side], block_size, x) for side in range(2))
    value = np.where(original > 0, np.clip(original, low, high), 0.0)  # what lies beyond rounded bounds
    assert np.all(np.abs(value - original) <= original * (2.0**-7 if scale_dtype == "bfloat16" else 0))
    assert oracle.same_bits(decoded == 0, value == 0)
    with np.errstate(divide="ignore"):
        low, high = np.log2(oracle.float64(bounds)).T
    octaves = np.where(high > low, high - low, 0.0)
    # A step is that of the oracle, but of a span that both ends' logarithms and two margins may widen; a value is half
    # a step off, and what its logarithm, the one of the smallest and the power are off together.
    steps = np.clip(np.floor((octaves - 2 * LOG2_OFF) * 64), 1, 2**bits - 2)
    half_step = (octaves + 2 * LOG2_OFF + 2 * LOG_MARGIN) / steps / 2
    bound = oracle.spread(half_step + 2 * LOG2_OFF + EXP2_OFF + LOG_ROUNDING, block_size, value)
    positive = value > 0
    error = np.abs(np.log2(decoded[positive]) - np.log2(value[positive]))
    assert np.all(error <= bound[positive])
    # Where there are many steps, that is hardly more than equal steps of the true logarithm are off.
    ideal = oracle.spread(expected.step, block_size, value)[positive] / 2
    wide = octaves.min() > 16
    assert np.all(bound[positive] <= ideal * 1.03) if wide else True


@every_dtype
@every_layout
@pytest.mark.parametrize("shift", [0.0, 3.0, -1e3], ids=lambda shift: f"shift={shift}")
def test_affine_divides_the_range_of_each_block_by_255(
    shape: tuple[int, ...], block_size: int, dtype: torch.dtype, shift: float
) -> None:
    x = (random(*shape) + shift).to(dtype)
    codes, scale, zero_point = reference.quantize_affine(x, block_size)
    expected_codes, expected_scale, expected_zero_point = oracle.quantize_affine(x.float(), block_size)
    assert codes.dtype == zero_point.dtype == torch.uint8
    assert scale.dtype == torch.float32
    np.testing.assert_allclose(oracle.float64(scale), expected_scale, rtol=4 * HALF_ULP)  # two quotients, a difference
    # Everything is at most 255, to a relative 8 roundings.
    noise = 256 * 8 * HALF_ULP
    low = np.array([min(block.min(), 0.0) for block in oracle.blocks_of(x.float(), block_size)])
    position = 0.5 - np.divide(low, expected_scale, out=np.zeros_like(low), where=expected_scale != 0)
    decided = np.abs(position - np.round(position)) > noise
    assert oracle.same_bits(zero_point[decided], expected_zero_point[decided])
    per_code = oracle.normalise(x.float(), expected_scale, block_size) + 0.5
    decided = (np.abs(per_code - np.round(per_code)) > noise) & oracle.spread(decided, block_size, x).astype(bool)
    assert oracle.same_bits(codes[decided], expected_codes[decided])

    decoded = reference.dequantize_affine(codes, scale, zero_point, block_size, torch.float32)
    exact = oracle.dequantize_affine(codes, scale, zero_point, block_size)
    assert oracle.same_bits(decoded, exact.astype(np.float32))
    half_step = oracle.spread(scale, block_size, x) / 2
    assert np.all(np.abs(oracle.float64(decoded) - oracle.float64(x.float())) <= half_step * (1 + 2 * noise))


def test_affine_is_torch_s_fake_quantization_of_each_block() -> None:
    blocks = (random(50, 64) + 0.7).float()
    codes, scale, zero_point = reference.quantize_affine(blocks, 64)
    decoded = reference.dequantize_affine(codes, scale, zero_point, 64, torch.float32)
    theirs = torch.fake_quantize_per_channel_affine(blocks, scale, zero_point.int(), 0, 0, 255)
    differs = decoded != theirs  # they round halves to even: at most one step, and only there
    position = blocks.double() / scale.double()[:, None]
    tied = ((position - position.floor()) - 0.5).abs() <= 256 * 8 * HALF_ULP
    assert not bool((differs & ~tied).any())
    assert bool(((decoded - theirs).abs() <= scale[:, None] * (1 + 1e-6)).all())


@pytest.mark.parametrize("x", [[5.0], [-5.0], [1.0, 2.0, 3.0], [-3.0, -2.0], [-1.0, 0.0, 2.5]], ids=str)
def test_affine_holds_zero_exactly(x: list[float]) -> None:
    values = torch.tensor([*x, 0.0])
    codes, scale, zero_point = reference.quantize_affine(values, 32)
    assert codes[-1] == zero_point[0]
    assert reference.dequantize_affine(codes, scale, zero_point, 32, torch.float32)[-1] == 0.0


def test_affine_reaches_from_minus_to_plus_the_largest_float() -> None:
    x = torch.tensor([-LARGEST, 0.0, LARGEST])
    codes, scale, zero_point = reference.quantize_affine(x, 32)
    decoded = reference.dequantize_affine(codes, scale, zero_point, 32, torch.float64)
    assert bool(scale.isfinite().all())
    assert bool(((decoded - x.double()).abs() <= scale.double() * 0.501).all())


# Edge cases, the same for every way to encode


def test_an_all_zero_block_has_scale_zero_and_decodes_to_zeros(scheme: Scheme) -> None:
    x = scheme.admissible(random(96)).float()
    x[32:64] = 0.0
    parts = encode(scheme, x)
    scale = scale_of(scheme, parts)[1]
    assert oracle.same_bits(scale, torch.zeros_like(scale))
    assert bool((decode(scheme, parts)[32:64] == 0).all())
    assert bool((decode(scheme, parts)[:32] != 0).any())


def test_a_block_that_is_not_finite_decodes_to_nothing_finite_and_leaves_the_others_alone(scheme: Scheme) -> None:
    clean = scheme.admissible(random(71))
    positions = (0, 40, 63, 70)  # in a first, a second and a short last block
    for dtype, poison, position in itertools.product(DTYPES, (math.nan, math.inf, -math.inf), positions):
        x = clean.to(dtype)
        expected = round_trip(scheme, x)
        x[position] = poison
        parts = encode(scheme, x)
        decoded = decode(scheme, parts, dtype=dtype)
        inside = torch.arange(71) // 32 == position // 32
        assert not bool(scale_of(scheme, parts)[position // 32].isfinite().any())
        assert not bool(decoded[inside].isfinite().any())
        assert oracle.same_bits(decoded[~inside], expected[~inside])


def test_the_codes_of_a_block_that_is_not_finite_do_not_depend_on_what_is_in_it(scheme: Scheme) -> None:
    for poison in (math.nan, math.inf, -math.inf):
        x = scheme.admissible(random(32)).float()
        x[7] = poison
        codes, *more = encode(scheme, x)
        if scheme.family in ("log", "affine"):
            assert set(codes.tolist()) == {1 if scheme.family == "log" else 0}
        else:  # as for zeros
            assert set(codes.tolist()) == {scheme.codebook.zero_code}
        assert scheme.family != "residual" or set(more[0].tolist()) == {2 ** (scheme.bits[1] - 1) - 1}


def test_a_float64_beyond_float32_counts_as_infinite(scheme: Scheme) -> None:
    for value in (1e39, -1e39, 1e300):
        x = scheme.admissible(random(64))
        x[5] = value
        decoded = round_trip(scheme, x)
        assert not bool(decoded[:32].isfinite().any())
        assert bool(decoded[32:].isfinite().all())


def test_a_block_below_the_smallest_normal_is_stored_as_zeros(scheme: Scheme) -> None:
    if scheme.family == "log":
        return  # goes on below: test_log_keeps_subnormal_numbers
    largest = 2.0**-126 - 2.0**-149
    for values in ([largest], [-largest], [largest, 0.0], [2.0**-127], [-(2.0**-127)], [1e-45], [-1e-45, 1e-45]):
        parts = encode(scheme, scheme.admissible(torch.tensor(values)))
        assert oracle.same_bits(scale_of(scheme, parts), torch.zeros(1)), values
        assert bool((decode(scheme, parts) == 0).all()), values


def test_the_largest_element_of_a_block_is_exact_but_for_its_scale(checkpoint_scheme: Scheme) -> None:
    for largest, sign in itertools.product((2.0**-126, 1.0, 1 / 3, LARGEST), (1, -1)):
        x = checkpoint_scheme.admissible(sign * torch.tensor([largest, 0.0, largest / 3, -largest / 7]))
        assert round_trip(checkpoint_scheme, x)[0] == checkpoint_scheme.kept(x[0])


def test_of_two_largest_elements_of_both_signs_the_positive_one_is_exact(checkpoint_scheme: Scheme) -> None:
    x = checkpoint_scheme.admissible(torch.tensor([-3.0, 1.0, 3.0]))
    assert round_trip(checkpoint_scheme, x)[2] == 3.0


def test_empty_tensors_have_no_blocks(scheme: Scheme) -> None:
    for shape in ((0,), (3, 0), (0, 32)):
        parts = encode(scheme, torch.empty(shape))
        assert parts[0].shape == shape
        assert scale_of(scheme, parts).shape[0] == 0
        assert decode(scheme, parts).shape == shape


def test_one_element_is_exact_but_for_its_scale(checkpoint_scheme: Scheme) -> None:
    for shape, value, dtype in itertools.product(((), (1,), (1, 1)), (0.0, 1.0, -1.0, 1 / 3, -77.7), DTYPES):
        x = checkpoint_scheme.admissible(torch.full(shape, value, dtype=dtype))
        decoded = round_trip(checkpoint_scheme, x)
        assert decoded.shape == shape
        assert decoded.dtype == dtype
        assert torch.equal(decoded, checkpoint_scheme.kept(x.float()).to(dtype))


def test_a_block_of_one_value_is_exact_but_for_its_scale(checkpoint_scheme: Scheme) -> None:
    values = checkpoint_scheme.admissible(torch.cat([random(500), random(500) * 1e30, random(500) * 1e-30]).float())
    x = values[:, None].expand(-1, 32)
    assert torch.equal(round_trip(checkpoint_scheme, x), checkpoint_scheme.kept(x))


def test_a_short_last_block_is_a_block(scheme: Scheme) -> None:
    x = scheme.admissible(random(75)).float()
    parts, alone = encode(scheme, x), encode(scheme, x[64:])
    for whole, last in zip(parts, alone, strict=True):
        assert oracle.same_bits(whole[64:] if whole.shape == x.shape else whole[2:], last)
    assert oracle.same_bits(decode(scheme, parts)[64:], decode(scheme, alone))


def test_strides_do_not_matter(scheme: Scheme) -> None:
    flat = scheme.admissible(random(960)).float()
    for x in (
        flat.view(24, 40).t(),
        flat[::3],
        flat.view(8, 120).t()[5:50, 1::2],
        flat.view(2, 4, 10, 12).to(memory_format=torch.channels_last),
        flat[:7, None].expand(7, 9),
    ):
        parts = encode(scheme, x)
        assert same(parts, encode(scheme, x.clone(memory_format=torch.contiguous_format)))
        assert parts[0].shape == x.shape
        codes = torch.empty_strided(x.shape, [stride * 2 for stride in parts[0].stride()], dtype=torch.uint8)
        codes.copy_(parts[0])
        assert oracle.same_bits(decode(scheme, (codes, *parts[1:])), decode(scheme, parts))


def test_every_dtype_is_read_and_written_by_way_of_float32(scheme: Scheme) -> None:
    for dtype in DTYPES:
        x = scheme.admissible(random(1000)).to(dtype)
        parts = encode(scheme, x)
        assert same(parts, encode(scheme, x.float()))
        decoded = decode(scheme, parts, dtype=dtype)
        assert decoded.dtype == dtype
        assert oracle.same_bits(decoded, decode(scheme, parts).to(dtype))


def test_minus_zero_is_zero(scheme: Scheme) -> None:
    for zeros, others in itertools.product(([-0.0], [-0.0, 0.0], [-0.0] * 32), ([], [1.0, 0.25], [-2.0, 1.0])):
        x = torch.cat([torch.tensor(zeros), scheme.admissible(torch.tensor(others))])
        parts = encode(scheme, x)
        assert same(parts, encode(scheme, x + 0.0)), x  # which turns -0 into 0
        assert bool((decode(scheme, parts)[: len(zeros)] == 0).all())


def test_the_input_is_left_alone(scheme: Scheme) -> None:
    x = scheme.admissible(random(100)).float()
    before = x.clone()
    parts = encode(scheme, x)
    kept = [part.clone() for part in parts]
    decode(scheme, parts)
    assert oracle.same_bits(x, before)
    assert same(parts, tuple(kept))


@pytest.mark.parametrize("name", [*BUILTIN])
def test_a_code_that_the_codebook_lacks_decodes_to_zero(name: str) -> None:
    codebook = BUILTIN[name]
    codes = torch.arange(256, dtype=torch.uint8)
    values = reference.dequantize(codes, torch.tensor([2.0]), codebook, 256, torch.float32)
    assert values.tolist() == [2.0 * level for level in codebook.levels] + [0.0] * (256 - len(codebook.levels))


@pytest.mark.parametrize("name", [*BUILTIN])
def test_every_code_decodes_to_nan_where_the_scale_is_not_finite(name: str) -> None:
    codes, scale = torch.arange(256, dtype=torch.uint8).repeat(3), torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert bool(reference.dequantize(codes, scale, BUILTIN[name], 256, torch.float32).isnan().all())


@pytest.mark.parametrize("name", [*BUILTIN])
def test_fake_quantize_is_a_round_trip(name: str) -> None:
    for dtype in DTYPES:
        x = random(7, 30).to(dtype)
        codes, scale = reference.quantize(x, BUILTIN[name], 32)
        expected = reference.dequantize(codes, scale, BUILTIN[name], 32, dtype)
        assert oracle.same_bits(reference.fake_quantize(x, BUILTIN[name], 32), expected)


# Saving again loses nothing more


def in_the_normal_range(x: Tensor) -> Tensor:
    """Bring values between 2**-6 and 2**15, the rest to zero: no level between them is subnormal in float16."""
    x = x / x.abs().max() * 2.0**15
    return torch.where(x.abs() < 2.0**-6, 0.0, x)


DISTRIBUTIONS = {
    "normal": lambda: random(4096).sign() * random(4096, seed=1).abs().log1p(),
    "heavy tailed": lambda: random(4096).pow(3) * random(4096, seed=1).exp().clamp(max=1e12),
    "many zeros": lambda: random(4096).clamp(min=0) - random(4096, seed=1).clamp(min=3) + 3,
    "constant to 1e-3": lambda: 0.7 + 1e-3 * torch.linspace(-1, 1, 4096, dtype=torch.float64),
    "constant to 1e-6": lambda: 0.7 * (1 + 1e-6 * random(4096).tanh()),
    "constant to 1e-7": lambda: -77.7 * (1 + 1e-7 * random(4096).tanh()),
    "huge": lambda: random(4096).tanh() * 3.38e38,  # below the largest bfloat16
    "small": lambda: random(4096).tanh() * 2.0**-80,  # the levels nearest zero are 2**-32 of it
    "barely normal": lambda: random(4096).tanh() * 2.0**-125,
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_encoding_ten_times_gives_the_codes_of_the_first(checkpoint_scheme: Scheme, distribution: str) -> None:
    x = checkpoint_scheme.admissible(DISTRIBUTIONS[distribution]())
    # Subnormal in 16 bits; test_encoding_again_finds_the_same_codes_for_every_bfloat16 goes as far as it can.
    for dtype in DTYPES[::2] if distribution == "barely normal" else DTYPES:
        values = in_the_normal_range(x) if dtype == torch.float16 else x
        first = parts = encode(checkpoint_scheme, values.to(dtype), 64)
        for _ in range(10):
            parts = encode(checkpoint_scheme, decode(checkpoint_scheme, parts, 64, dtype), 64)
            assert same(parts, first), dtype


def every_bfloat16_below(exponent: int, count: int) -> Tensor:
    """For each of the 128 bfloat16 from ``2**exponent`` on, a row of the ``count`` bfloat16 up to it, and minus those.

    The largest itself appears with one sign only, as otherwise signed scales would always be positive.
    """
    largest = torch.arange(128)[:, None] + ((exponent + 127) << 7)
    patterns = (largest - torch.arange(count)).clamp(min=0)
    positive = patterns.to(torch.int16).view(torch.bfloat16)
    return torch.cat([positive, -positive[:, 1:]], dim=1)


@pytest.mark.parametrize("count", [2, 3, 40, 100, 128, 180, 256, 512, 18 * 128], ids=lambda count: f"{count} values")
def test_encoding_again_finds_the_same_codes_for_every_bfloat16(checkpoint_scheme: Scheme, count: int) -> None:
    exponents = [0]  # all that lie 18 octaves below a scale: subnormal numbers aside, other exponents are the same
    if checkpoint_scheme.wide.startswith(("linear", "softsign", "residual-8", "log")):  # those of the presets
        exponents.append(-126)  # subnormal numbers too; there, uneven levels can fall on a neighbour's side
    for exponent in exponents:
        x = every_bfloat16_below(exponent, count)
        for signed in (x, -x):
            values = checkpoint_scheme.admissible(signed)
            block_size = values.shape[1]
            first = encode(checkpoint_scheme, values, block_size)
            decoded = decode(checkpoint_scheme, first, block_size, torch.bfloat16)
            assert same(encode(checkpoint_scheme, decoded, block_size), first)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    array=hnp.arrays(
        np.float32, st.integers(1, 80), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_encoding_again_finds_the_same_codes_for_any_float32(checkpoint_scheme: Scheme, array: np.ndarray) -> None:
    x = checkpoint_scheme.admissible(torch.from_numpy(array))
    first = encode(checkpoint_scheme, x)
    decoded = decode(checkpoint_scheme, first)
    again = encode(checkpoint_scheme, decoded)
    assert same(again, first)
    assert oracle.same_bits(decode(checkpoint_scheme, again), decoded)


SCALES = [1.0, 1 / 3, 0.1, 127.0, 253.0, math.pi * 1e-20, 2.0**-100, 2.0**-126, 2.0**-125, 1e38, LARGEST]


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (8, 3), (6, 4), (3, 7), (2, 2)], ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_no_residual_moves_a_first_stage_code(scale: float, bits: tuple[int, int]) -> None:
    """All pairs of codes, but for those that lie outside of the block: those never come out of encoding."""
    half, zero = (2 ** (each - 1) - 1 for each in bits)
    codes, residual = torch.meshgrid(torch.arange(2 * half + 1), torch.arange(2 * zero + 1), indexing="ij")
    inside = ~((codes == 2 * half) & (residual > zero) | (codes == 0) & (residual < zero))
    largest = torch.tensor([2 * half]), torch.tensor([zero])  # one more element, the scale itself
    codes = torch.cat([largest[0], codes[inside]]).to(torch.uint8)
    residual = torch.cat([largest[1], residual[inside]]).to(torch.uint8)
    block_size, parts = codes.numel(), (codes, residual, torch.tensor([scale]))
    decoded = reference.dequantize_residual(*parts, block_size, *bits, torch.float32)
    assert decoded[0] == torch.tensor(scale)
    assert same(reference.quantize_residual(decoded, block_size, *bits), parts)


# The logarithm


def log_round_trip(x: Tensor) -> Tensor:
    return reference.dequantize_log(*reference.quantize_log(x, 32, 8), 32, 8, x.dtype)


def test_the_polynomials_are_as_close_as_documented() -> None:
    octave, mantissa = logarithm.OCTAVE, torch.linspace(1, 2, 2**16 + 1)[:-1]
    for exponent in (-126, -1, 0, 127):
        x = mantissa * 2.0**exponent
        pattern = x.view(torch.int32)
        constant = logarithm.log2_correction(torch.ones(1).view(torch.int32)).double()
        log2 = (pattern.double() + logarithm.log2_correction(pattern).double() - constant) / octave - 127
        assert float((log2 - x.double().log2()).abs().max()) <= 2 * LOG2_OFF  # relative to the one at 1
        position = ((x.double().log2() + 127) * octave).round().to(torch.int32)
        power = logarithm.exp2_pattern(position).view(torch.float32)
        assert float((power.double().log2() - x.double().log2()).abs().max()) <= EXP2_OFF + 2 / octave


@pytest.mark.parametrize("bits", [8, 5, 3])
def test_codes_lie_at_equal_steps_of_the_logarithm(bits: int) -> None:
    codes = torch.arange(1, 2**bits, dtype=torch.uint8)
    for low, octaves in ((1.0, 4), (1 / 3, 10), (1e-30, 60), (2.0**-126, 253.9)):
        bounds = torch.tensor([[low, low * 2.0**octaves]])
        position = reference.dequantize_log(codes, bounds, 256, bits, torch.float64).log2()
        equal = torch.linspace(float(position[0]), float(position[-1]), 2**bits - 1, dtype=torch.float64)
        assert float((position - equal).abs().max()) <= LOG_MARGIN + 2 * LOG2_OFF + EXP2_OFF + LOG_ROUNDING


@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [
        *((1.0, 2.0**k, 254) for k in (4, 5, 10, 60, 127)),
        *((1e-30, 1e-12, 254), (3.3e-9, 0.77, 254), (2.0**-126, LARGEST, 254), (1e-45, LARGEST, 254)),
        *((1.0, 2.0, 64), (1.0, 1.5, 37), (1.0, 1.1, 8), (1.0, 1.01, 1)),  # never finer than 1/64 octave
        (2.0**-149, 2.0**-127, 37),  # below the smallest normal, the logarithm is linear in the pattern
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_log_finds_every_code_again(low: float, high: float, steps: int, bits: int) -> None:
    steps = min(steps, 2**bits - 2)
    codes, bounds = torch.arange(steps + 2, dtype=torch.uint8), torch.tensor([[low, high]])
    values = reference.dequantize_log(codes, bounds, 256, bits, torch.float32)
    assert values[:2].tolist() == [0, bounds[0, 0]]
    assert values[-1] == bounds[0, 1]
    assert bool((values.diff() > 0).all())
    assert same(reference.quantize_log(values, 256, bits), (codes, bounds))


@pytest.mark.parametrize("ulps", [*range(17), 100, 2**10, 2**14, 2**17, 2**18 + 1, 2**23, 20 * 2**23])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_log_returns_both_ends_of_a_block_exactly_however_close(ulps: int, bits: int) -> None:
    below_and_from_the_smallest_normal, from_one = (
        torch.arange(1, 2**24, 997),
        torch.arange(0x3F800000, 0x40000000, 997),
    )
    first = torch.cat([below_and_from_the_smallest_normal, from_one]).int()
    x = torch.stack([first, first + ulps // 2, first + ulps, torch.zeros_like(first)], dim=1).view(torch.float32)
    codes, bounds = reference.quantize_log(x, 4, bits)
    decoded = reference.dequantize_log(codes, bounds, 4, bits, torch.float32)
    assert torch.equal(decoded[:, ::2], x[:, ::2])  # the smallest and the largest
    assert bool(((decoded[:, 1] >= x[:, 0]) & (decoded[:, 1] <= x[:, 2])).all())
    assert bool((decoded[:, 3] == 0).all())
    assert same(reference.quantize_log(decoded, 4, bits), (codes, bounds))


def test_log_tells_every_float_of_an_octave_from_its_successor() -> None:
    octave = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32)  # the others have the same mantissas
    for first in octave.split(2**19):
        x = torch.stack([first, first + 1], dim=1).view(torch.float32)
        codes, bounds = reference.quantize_log(x, 2, 8)
        assert bool((codes == torch.tensor([1, 2])).all())
        assert torch.equal(bounds, x)


def test_log_keeps_subnormal_numbers() -> None:
    x = torch.tensor([0.0, 1e-45, 3e-45, 1e-42, 1e-40, 5e-39])
    for block in (x, torch.cat([x, torch.tensor([1.0])]), torch.cat([x, torch.tensor([LARGEST])])):
        decoded = log_round_trip(block)
        assert decoded[:2].tolist() == block[:2].tolist()
        assert decoded[-1] == block[-1]
        assert torch.equal(decoded == 0, block == 0)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    array=hnp.arrays(np.float32, st.integers(1, 80), elements=st.floats(0.0, LARGEST, width=32)),
)
def test_log_never_decodes_a_nonzero_value_to_zero_nor_beyond_the_bounds(array: np.ndarray) -> None:
    x = torch.from_numpy(array).abs()
    decoded = log_round_trip(x)
    assert torch.equal(decoded == 0, x == 0)
    assert decoded.max() == x.max()
    assert bool((decoded[x > 0] >= x.where(x > 0, torch.inf).min()).all())


def test_log_takes_a_float64_that_float32_cannot_hold_for_zero() -> None:
    x = torch.tensor([1e-60, 1.0], dtype=torch.float64)
    assert log_round_trip(x).tolist() == [0.0, 1.0]


@every_dtype
@pytest.mark.parametrize("negative", [-1.0, -1e-7])
def test_log_refuses_a_block_with_a_negative_value_by_decoding_it_to_nan(negative: float, dtype: torch.dtype) -> None:
    x = random(96).abs().to(dtype)
    expected = log_round_trip(x)
    x[40] = negative
    decoded = log_round_trip(x)
    assert bool(decoded[32:64].isnan().all())
    assert oracle.same_bits(decoded[:32], expected[:32])
    assert oracle.same_bits(decoded[64:], expected[64:])


# Error statistics


@every_dtype
def test_error_statistics_are_those_of_the_oracle(dtype: torch.dtype) -> None:
    x = random(37, 41).to(dtype)
    x[::3, ::2] = 0
    decoded = reference.fake_quantize(x, BUILTIN["int4"], 64)
    measured = reference.error_statistics(x, decoded)
    expected = oracle.error_statistics(x, decoded)
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in measured)
    # A float64 sum of n terms is off by n roundings at most, relative to terms that are all positive.
    np.testing.assert_allclose([float(v) for v in measured[:2]], expected[:2], rtol=2 * x.numel() * 2.0**-53)
    assert [float(v) for v in measured[2:]] == [*expected[2:]]
    assert measured.zeros == (x == 0).sum()
    assert measured.zeroed > 0


def test_error_statistics_of_nothing_are_zeros() -> None:
    assert [float(v) for v in reference.error_statistics(torch.empty(0, 3), torch.empty(0, 3))] == [0.0] * 5
