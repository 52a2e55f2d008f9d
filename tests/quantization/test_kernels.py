"""The Triton kernels return every bit of the reference: codes, scales, bounds, zero points, values.

On a GPU they are compiled; elsewhere ``TRITON_INTERPRET=1 pytest tests/quantization/test_kernels.py`` interprets them,
which takes milliseconds a tile, so the tensors are small and the cases cover pairs of properties, not all combinations.

The reference runs on the CPU throughout, so that both backends answer to the same bits.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.devices import NOT_COMPILED
from support.schemes import DTYPES
from torch import Tensor
from torch.overrides import TorchFunctionMode

from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

pytest.importorskip("triton", reason="Triton is not installed")
from q8lightning.quantization.backends.kernels import blockwise


def _uneven(count: int) -> Codebook:
    """``count`` levels in [-1, 1] at random distances, 0 and -1 among them but not 1."""
    generator = torch.Generator().manual_seed(count)
    levels = torch.rand(count - 2, generator=generator) * 1.9 - 0.95
    return Codebook("uneven", tuple(sorted([*levels.tolist(), -1.0, 0.0])))


CODEBOOKS = {
    **{
        name: BUILTIN[name]
        for name in (
            *("linear", "softsign", "dynamic", "dynamic_unsigned", "normal_float4", "int2", "int8", "fp8_e4m3"),
            *("linear2", "linear5", "softsign3", "softsign6"),
        )
    },
    "two levels": Codebook("two levels", (0.0, 1.0)),
    "256 uneven levels": _uneven(256),
}
each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())

BLOCK_SIZES = (32, 64, 256, 1024, 4096)
SHAPES = {"empty": (3, 0), "one": (1,), "short block": (3, 1367), "whole blocks": (2, 4096), "transposed": (61, 70)}

# Every shape with every block size; dtypes in turn, so that each meets every shape and nearly every block size.
CASES = [
    pytest.param(
        shape, block_size, DTYPES[(i + j) % 4], id=f"{name}-{block_size}-{DTYPES[(i + j) % 4]}".replace(" ", "-")
    )
    for i, (name, shape) in enumerate(SHAPES.items())
    for j, block_size in enumerate(BLOCK_SIZES)
]
each_case = pytest.mark.parametrize(("shape", "block_size", "dtype"), CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values of sizes that change along the tensor, and some zeros; (61, 70) is not contiguous."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.randint(-3, 3, (shape[0],) + (1,) * (len(shape) - 1), generator=generator)
    x = torch.randn(shape, generator=generator) * 10.0**sizes
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    x = x.to(dtype)
    return x.t() if shape == (61, 70) else x


def _edge_blocks(block_size: int) -> Tensor:
    """One block of each kind that is easy to get wrong, and a short one at the end; flat float32."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(block_size, generator=generator) * 2 - 1
    tiny, huge = 2.0**-126, torch.finfo(torch.float32).max

    def with_values(*values: float) -> Tensor:
        block = base.clone()
        block[3 : 3 + len(values)] = torch.tensor(values)
        return block

    half = torch.arange(block_size) % 2 == 0
    subnormal = tiny / 2 + base.abs() * tiny / 4
    blocks = [
        torch.zeros(block_size),
        torch.full((block_size,), -0.0),
        torch.where(half, 0.0, -0.0),
        with_values(-0.0, 0.0, 1.0),
        subnormal,
        -subnormal,
        torch.where(half, subnormal, -2 * subnormal),
        torch.where(half, tiny, -subnormal),  # the smallest scale that counts, and subnormals beside it
        torch.where(half, -tiny, base * tiny),
        base * 2.0**-120,
        base * 2.0**127,
        with_values(huge),  # the reciprocal of the scale is subnormal
        with_values(-huge, huge / 2),
        with_values(torch.nan),
        with_values(-torch.nan, torch.inf),
        with_values(torch.inf),
        with_values(-torch.inf),
        with_values(torch.inf, -torch.inf),
        torch.full((block_size,), torch.nan),
        with_values(2.0, -2.0),  # +a and -a: +a is the largest
        with_values(-2.0, 1.999),
        with_values(2.0, -1.999),
        base.abs(),
        -base.abs(),
        base.abs() + tiny,
        torch.ones(block_size),
        torch.full((block_size,), -3.0),
        torch.where(half, base.abs(), 0.0),
        torch.where(half, 1e-45, 1e30),  # as far apart as float32 gets
        torch.linspace(1.0, 1.0 + 2.0**-20, block_size),
        with_values(-1e-3).abs() * torch.where(torch.arange(block_size) == 7, -1.0, 1.0),  # one negative value
        -base.abs() - 1.0,
    ]
    return torch.cat([*blocks, -base[: block_size // 2 + 1].abs() - 0.5])


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    """Compare dtype, shape and bits, with the signs of zeros; all NaN are the same."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual, expected = actual.cpu().contiguous(), expected.contiguous()
    if expected.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        actual, expected = (x.masked_fill(x.isnan(), torch.nan).view(as_integers) for x in (actual, expected))
    differ = torch.nonzero(actual != expected)
    assert not len(differ), f"{len(differ)} of {actual.numel()} differ, the first at {differ[0].tolist()}"


TWO_STAGES = [(8, 4), (8, 2), (6, 3), (5, 5), (4, 7), (3, 6), (2, 2)]


def _one_of(choices: Sequence[Any], shape: tuple[int, ...], block_size: int, dtype: torch.dtype) -> Any:
    """Choose by a case, so that all cases together have all choices."""
    return choices[
        CASES.index(next(case for case in CASES if case.values == (shape, block_size, dtype))) % len(choices)
    ]


def _check(device: str, name: str, *arguments: object) -> tuple[Tensor, ...]:
    """Call the function ``name`` of the kernels and of the reference, compare, and return the reference's results."""
    on_device = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    actual, expected = getattr(blockwise, name)(*on_device), getattr(reference, name)(*arguments)
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        _assert_same(one, other)
        assert one.device.type == device
    return expected


# Shapes, block sizes and dtypes


def _cases_of(codebook: Codebook) -> Iterator[tuple[tuple[int, ...], int, torch.dtype, bool]]:
    """A third of the cases for each codebook in turn, with and without a signed scale."""
    first = list(CODEBOOKS.values()).index(codebook)
    for i, case in enumerate(CASES[first % 3 :: 3]):
        shape, block_size, dtype = case.values
        yield shape, block_size, dtype, (i + first // 3) % 2 == 0


@each_codebook
def test_quantize_and_dequantize_return_the_bits_of_the_reference(device: str, codebook: Codebook) -> None:
    for shape, block_size, dtype, signed_scale in _cases_of(codebook):
        codes, scale = _check(device, "quantize", _sample(shape, dtype), codebook, block_size, signed_scale)
        _check(device, "dequantize", codes, scale, codebook, block_size, dtype)


@each_codebook
def test_fake_quantize_returns_the_bits_of_the_reference(device: str, codebook: Codebook) -> None:
    for shape, block_size, dtype, _ in _cases_of(codebook):
        _check(device, "fake_quantize", _sample(shape, dtype), codebook, block_size)


@each_case
def test_two_stages_return_the_bits_of_the_reference(
    device: str, shape: tuple[int, ...], block_size: int, dtype: torch.dtype
) -> None:
    for bits in ((8, 8), _one_of(TWO_STAGES, shape, block_size, dtype)):
        parts = _check(device, "quantize_residual", _sample(shape, dtype), block_size, *bits)
        _check(device, "dequantize_residual", *parts, block_size, *bits, dtype)


@each_case
def test_the_log_codec_returns_the_bits_of_the_reference(
    device: str, shape: tuple[int, ...], block_size: int, dtype: torch.dtype
) -> None:
    for bits, scales in ((8, "float32"), (_one_of(range(2, 8), shape, block_size, dtype), "bfloat16")):
        parts = _check(device, "quantize_log", _sample(shape, dtype).abs(), block_size, bits, scales)
        _check(device, "dequantize_log", *parts, block_size, bits, dtype)


@each_case
def test_the_affine_codec_returns_the_bits_of_the_reference(
    device: str, shape: tuple[int, ...], block_size: int, dtype: torch.dtype
) -> None:
    for bits in (8, _one_of(range(2, 8), shape, block_size, dtype)):
        parts = _check(device, "quantize_affine", _sample(shape, dtype), block_size, bits)
        _check(device, "dequantize_affine", *parts, block_size, dtype)


def test_codes_and_scales_need_not_be_contiguous(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8).t()
    scale = torch.rand(16)[::2]
    _check(device, "dequantize", codes, scale, BUILTIN["linear"], 32, torch.float32)
    _check(device, "dequantize_residual", codes, codes.flip(0), scale, 32, 8, 8, torch.float32)
    _check(device, "dequantize_affine", codes, scale, codes[3, ::4], 32, torch.float32)
    _check(device, "dequantize_log", codes, torch.tensor([[1.0] * 8, [9.0] * 8]).t(), 32, 8, torch.float32)


# Edge cases


@each_codebook
@pytest.mark.parametrize("signed_scale", [False, True])
def test_edge_cases_of_a_codebook_are_those_of_the_reference(
    device: str, codebook: Codebook, signed_scale: bool
) -> None:
    x = _edge_blocks(32)
    codes, scale = _check(device, "quantize", x, codebook, 32, signed_scale)
    _check(device, "dequantize", codes, scale, codebook, 32, torch.float32)
    if not signed_scale:
        _check(device, "fake_quantize", x, codebook, 32)


@each_dtype
def test_edge_cases_of_a_dtype_are_those_of_the_reference(device: str, dtype: torch.dtype) -> None:
    x = _edge_blocks(64).to(dtype)
    if dtype == torch.float64:
        x[5::64] *= 1e100  # becomes infinite in float32
    for codebook in (BUILTIN["softsign"], BUILTIN["dynamic"]):
        codes, scale = _check(device, "quantize", x, codebook, 64, True)
        _check(device, "dequantize", codes, scale, codebook, 64, dtype)
        _check(device, "fake_quantize", x, codebook, 64)
    for bits in ((8, 8), (8, 4), (3, 5)):
        _check(device, "dequantize_residual", *_check(device, "quantize_residual", x, 64, *bits), 64, *bits, dtype)
    for affine_bits in (8, 4, 2):
        _check(device, "dequantize_affine", *_check(device, "quantize_affine", x, 64, affine_bits), 64, dtype)


@each_dtype
def test_edge_cases_of_the_log_codec_are_those_of_the_reference(device: str, dtype: torch.dtype) -> None:
    x = _edge_blocks(32).to(dtype)
    for values, bits, scales in itertools.product((x, x.abs()), (8, 5, 2), ("float32", "bfloat16")):
        _check(device, "dequantize_log", *_check(device, "quantize_log", values, 32, bits, scales), 32, bits, dtype)


def test_the_bounds_of_a_block_of_negative_zeros_are_zero(device: str) -> None:
    codes, bounds = blockwise.quantize_log(torch.full((40,), -0.0, device=device), 32, 8)
    assert not codes.any()
    _assert_same(bounds, torch.zeros(2, 2))
    _assert_same(blockwise.dequantize_log(codes, bounds, 32, 8, torch.float32), torch.zeros(40))


@each_codebook
def test_a_block_that_is_not_finite_decodes_to_no_number(device: str, codebook: Codebook) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.linspace(-1, 1, 96, device=device)
        x[40] = value
        finite = blockwise.fake_quantize(x, codebook, 32).view(3, 32).isfinite().cpu()
        assert finite.all(dim=1).tolist() == [True, False, True]
        assert not finite[1].any()


# Finite sets, enumerated


def _ulps(x: Tensor, offsets: int) -> Tensor:
    """``x`` and its neighbours, up to ``offsets`` units in the last place away; flat."""
    around = torch.arange(-offsets, offsets + 1, dtype=torch.int32)
    return (x.view(torch.int32)[:, None] + around).view(torch.float32).flatten()


@each_codebook
def test_every_threshold_takes_the_lower_code_and_its_successor_the_higher(device: str, codebook: Codebook) -> None:
    at = codebook.thresholds
    values = torch.cat([_ulps(at, 3), codebook.tensor()])
    values = values[values.abs() <= 1]
    filled = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    x = torch.nn.functional.pad(filled, (0, 1), value=1.0)  # a 1 in each block of 256, so that its scale is 1

    codes, scale = _check(device, "quantize", x, codebook, 256)
    assert (scale == 1).all()
    codes = codes[:, :-1].flatten()[: len(values)]
    assert torch.equal(codes.long(), (values[:, None] > at).sum(dim=1))


def test_every_residual_code_begins_where_that_of_the_reference_does(device: str) -> None:
    values = _ulps((torch.arange(-127, 127) + 0.5) / (255 * 127), 3)  # at scale 1, whose first stage is then 0
    x = torch.nn.functional.pad(values.view(-1, 254), (0, 2), value=1.0)
    codes, residual, scale = _check(device, "quantize_residual", x, 256, 8, 8)
    assert (scale == 1).all()
    assert (codes[:, :254] == 127).all()
    assert residual[:, :254].unique().tolist() == list(range(255))


def test_every_affine_code_begins_where_that_of_the_reference_does(device: str) -> None:
    halves = torch.arange(255) + 0.5
    ends = torch.tensor([0.0, 255.0])  # so that the scale of a block is 1
    for sign in (1.0, -1.0):
        for towards in (-torch.inf, halves, torch.inf):
            x = torch.cat([halves.nextafter(torch.as_tensor(towards)), ends]) * sign
            _, scale, zero_point = _check(device, "quantize_affine", x, 512)
            assert (scale.item(), zero_point.item()) == (1.0, 0 if sign > 0 else 255)


@each_codebook
def test_every_code_decodes_at_every_kind_of_scale(device: str, codebook: Codebook) -> None:
    special = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 3.4e38, -3.4e38, torch.nan, -torch.nan, torch.inf, -torch.inf]
    scale = torch.cat([torch.tensor(special), torch.randn(21, generator=torch.Generator().manual_seed(0))])
    codes = torch.arange(256, dtype=torch.uint8).expand(len(scale), 256)
    _check(device, "dequantize", codes, scale, codebook, 256, torch.float32)


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (2, 3)], ids=str)
def test_every_pair_of_stages_decodes_as_in_the_reference(device: str, bits: tuple[int, int]) -> None:
    first = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)
    second = torch.arange(256, dtype=torch.uint8).repeat(256)
    scale = torch.rand(16, generator=torch.Generator().manual_seed(0))
    scale[1:7] = torch.tensor([0.0, 2.0**-126, 3.4e38, torch.nan, torch.inf, 1.0])
    _check(device, "dequantize_residual", first, second, scale, 4096, *bits, torch.float32)


def test_every_code_and_zero_point_decode_as_in_the_reference(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    scale = torch.rand(256, generator=torch.Generator().manual_seed(0))
    scale[1::50] = torch.tensor([0.0, 2.0**-126, 1e36, torch.nan, torch.inf, 1.0])
    _check(device, "dequantize_affine", codes, scale, torch.arange(256, dtype=torch.uint8), 256, torch.float32)


@pytest.mark.parametrize("bits", [8, 5, 2])
def test_every_log_code_decodes_as_in_the_reference(device: str, bits: int) -> None:
    """Between bounds over all positive float32, subnormals too, and bounds less than one step apart."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(1, 0x7F800000, (96, 2), generator=generator).sort(dim=1).values
    patterns[:32, 1] = patterns[:32, 0] + torch.randint(0, 2**18, (32,), generator=generator)
    patterns[32:48, 0] >>= 9
    bounds = patterns.clamp(max=0x7F7FFFFF).int().view(torch.float32)
    bounds[-4:] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [torch.nan, torch.nan], [1e-45, 3.4e38]])
    bounds[-5] = torch.tensor([2.0 - 2.0**-22, 1e3])  # rounding makes the logarithm fall a little at the lower one
    codes = (torch.arange(256) % 2**bits).to(torch.uint8).expand(len(bounds), 256)
    _check(device, "dequantize_log", codes, bounds, 256, bits, torch.float32)


# Values spread over all of float32


def _floats_of_all_sizes(count: int, negative: bool) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(0, 0x7F800000, (count,), generator=generator).int().view(torch.float32)
    return torch.where(torch.rand(count, generator=generator) < 0.5, -x, x) if negative else x


@pytest.mark.parametrize("name", ["linear", "softsign", "dynamic"])
def test_blocks_of_any_scale_have_the_codes_of_the_reference(device: str, name: str) -> None:
    """The largest element over the scale can be a little more or less than 1, since the reciprocal is rounded."""
    absmax = _floats_of_all_sizes(512, negative=True)
    x = absmax[:, None] * torch.linspace(-1, 1, 32)
    _check(device, "quantize", x, BUILTIN[name], 32, True)
    _check(device, "fake_quantize", x, BUILTIN[name], 32)


def test_other_codecs_agree_on_blocks_of_any_scale(device: str) -> None:
    absmax = _floats_of_all_sizes(512, negative=True)
    x = absmax[:, None] * torch.rand(512, 32, generator=torch.Generator().manual_seed(0))
    for name, bits in (("residual", (8, 8)), ("residual", (8, 4)), ("affine", ())):
        parts = _check(device, f"quantize_{name}", x, 32, *bits)
        _check(device, f"dequantize_{name}", *parts, 32, *bits, torch.float32)
    for values, bits in itertools.product((x.abs(), _floats_of_all_sizes(8192, negative=False)), (8, 4)):
        _check(device, "dequantize_log", *_check(device, "quantize_log", values, 32, bits), 32, bits, torch.float32)


# What a launch touches


class Guarded(TorchFunctionMode):
    """Gives every new tensor memory of its own, with a margin before and behind it that holds 77."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        shape = torch.Size(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
        buffer = torch.full((shape.numel() + 8192,), 77, **(kwargs or {}))
        self.buffers.append((buffer, shape.numel()))
        return buffer[4096 : 4096 + shape.numel()].view(shape)


def test_nothing_is_written_outside_the_results_or_to_the_input(device: str) -> None:
    x = torch.randn(3, 11, device=device)
    original = x.clone()
    expected = blockwise.quantize(x, BUILTIN["dynamic"], 32), blockwise.quantize_log(x.abs(), 32, 8)
    with Guarded() as guard:
        codes, scale = blockwise.quantize(x, BUILTIN["dynamic"], 32)
        assert torch.equal(codes, expected[0][0])
        assert codes.untyped_storage().nbytes() > 8192, "the guarded buffers are what is written"
        blockwise.dequantize(codes, scale, BUILTIN["dynamic"], 32, torch.float32)
        blockwise.fake_quantize(x, BUILTIN["dynamic"], 32)
        for name, bits in (("residual", (8, 4)), ("log", (8,)), ("affine", ())):
            parts = getattr(blockwise, f"quantize_{name}")(x, 32, *bits)
            getattr(blockwise, f"dequantize_{name}")(*parts, 32, *bits, torch.float32)
    assert len(guard.buffers) >= 2 + 1 + 1 + 3 + 1 + 2 + 1 + 3 + 1
    for buffer, numel in guard.buffers:
        assert (buffer[:4096] == 77).all()
        assert (buffer[4096 + numel :] == 77).all()
    assert torch.equal(x, original)


@pytest.mark.parametrize("name", ["quantize", "fake_quantize", "quantize_residual", "quantize_log", "quantize_affine"])
@pytest.mark.parametrize(
    ("wrong", "magnitude"), [(None, 1e-30), (None, 1.0), (None, 1e30), (-1.0, 1.0), (torch.nan, 1.0), (torch.inf, 1e30)]
)
def test_what_is_lost_is_measured_on_the_way(device: str, name: str, wrong: float | None, magnitude: float) -> None:
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0)) * magnitude
    x[::7] = 0.0
    if wrong is not None:
        x[1234] = wrong * magnitude  # for log, -1 makes its block one that is not finite
    codebook = (BUILTIN["softsign"],) if name in ("quantize", "fake_quantize") else ()
    bits = {"quantize_residual": (8, 4), "quantize_log": (5,)}.get(name, ())
    statistics = torch.full((5,), 77.0, dtype=torch.float64, device=device)
    parts = getattr(blockwise, name)(x.to(device), *codebook, 64, *bits, statistics=statistics)
    if name != "fake_quantize":
        parts = [part.cpu() for part in parts]
        parts = getattr(reference, f"de{name}")(*parts, *codebook, 64, *bits, torch.float32)
    expected = reference.measure(x, parts.cpu())
    finite = expected.isfinite()
    torch.testing.assert_close(statistics.cpu()[finite], expected[finite], rtol=2e-6, atol=0.0)
    assert not statistics.cpu()[~finite].isfinite().any()


@pytest.mark.parametrize(
    ("name", "arguments"), [("fake_quantize", (BUILTIN["dynamic"], 32)), ("quantize_residual", (32, 8, 4))]
)
def test_the_input_is_read_by_a_single_kernel(
    device: str, launched: list[Any], name: str, arguments: tuple[object, ...]
) -> None:
    getattr(blockwise, name)(torch.randn(100, device=device), *arguments)
    assert len(launched) == 1


def test_codebooks_that_differ_in_their_closed_form_alone_are_told_apart(device: str) -> None:
    by_formula = BUILTIN["linear"]
    by_threshold = Codebook("linear", by_formula.levels)
    assert by_threshold == by_formula
    steps = by_formula.thresholds  # those of the other are rounded to 16 bits
    x = torch.cat([steps, steps.nextafter(torch.tensor(2.0)), torch.ones(1)])
    results = [_check(device, "quantize", x, book, 1024)[0] for book in (by_formula, by_threshold, by_formula)]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.gpu
@NOT_COMPILED
def test_offsets_beyond_31_bits_reach_their_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    codebook, tail = BUILTIN["linear"], 1000
    x = torch.zeros(2**31 + tail, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(tail, dtype=torch.bfloat16)
    x[-tail:] = last.cuda()
    codes, scale = blockwise.quantize(x, codebook, 256)
    expected_codes, expected_scale = reference.quantize(last, codebook, 256)
    _assert_same(codes[-tail:], expected_codes)
    _assert_same(scale[-len(expected_scale) :], expected_scale)
    assert (codes[:-tail] == codebook.zero_code).all()
    expected = reference.dequantize(expected_codes, expected_scale, codebook, 256, torch.bfloat16)
    del x
    values = blockwise.dequantize(codes, scale, codebook, 256, torch.bfloat16)
    _assert_same(values[-tail:], expected)
