"""The implementation for CPU tensors returns what the reference returns, bit for bit, however it divides the work."""

import itertools
import math
from collections.abc import Callable, Iterator

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.schemes import Scheme
from torch import Tensor

from q8lightning.quantization.backends import cpu
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
CHUNK = 4096  # small enough to cross often, large enough for a block


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cuts the work into chunks of so many elements: at the real size, these tests would take minutes."""

    def cut(numel: int) -> None:
        monkeypatch.setattr(cpu, "CHUNK", numel)
        monkeypatch.setattr(cpu, "SHARED_CHUNK", numel)

    return cut


@pytest.fixture
def small_chunks(chunked: Callable[[int], None]) -> None:
    chunked(CHUNK)


def random(numel: int, seed: int = 0) -> Tensor:
    """Values of many magnitudes, with zeros of both signs and blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, numel, generator=generator, dtype=torch.float64)
    x = normal[0] * normal[1].mul(2).exp()
    x[5::17], x[6::17] = 0.0, -0.0
    x[64:128] = 0.0
    return x


def assert_same(scheme: Scheme, x: Tensor, block_size: int, *dtypes: torch.dtype) -> None:
    """Compare codes of both backends, and what both decode them to (each dtype, or the dtype of ``x``)."""
    expected = scheme.encode(reference, x, block_size)
    encoded = scheme.encode(cpu, x, block_size)
    assert [part.dtype for part in encoded] == [part.dtype for part in expected]
    for part, expected_part in zip(encoded, expected, strict=True):
        assert oracle.same_bits(part, expected_part)
        assert part.is_contiguous()
    for dtype in dtypes or (x.dtype,):
        decoded = scheme.decode(cpu, expected, block_size, dtype)
        assert decoded.dtype == dtype
        assert decoded.is_contiguous()
        assert oracle.same_bits(decoded, scheme.decode(reference, expected, block_size, dtype))


@pytest.mark.usefixtures("small_chunks")
def test_it_equals_the_reference_in_every_dtype_and_block_size(scheme: Scheme) -> None:
    x = scheme.admissible(random(3 * CHUNK + 77))
    for dtype, block_size in itertools.product(DTYPES, (32, 128, 4096)):
        assert_same(scheme, x.to(dtype), block_size)


@pytest.mark.usefixtures("small_chunks")
def test_it_equals_the_reference_around_the_borders_of_a_chunk(scheme: Scheme) -> None:
    x = scheme.admissible(random(2 * CHUNK + 33)).float()
    for numel in (0, 1, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 31, CHUNK + 32, 2 * CHUNK, 2 * CHUNK + 33):
        assert_same(scheme, x[:numel], 32)


def test_it_equals_the_reference_whatever_the_chunk(scheme: Scheme, chunked: Callable[[int], None]) -> None:
    for chunk in (32, 100, 1000, 1024):  # elements; not all hold whole blocks
        chunked(chunk)
        assert_same(scheme, scheme.admissible(random(2500)).float(), 32)


def test_it_equals_the_reference_with_chunks_as_they_are(scheme: Scheme) -> None:
    assert_same(scheme, scheme.admissible(random(cpu.CHUNK + 300)).float(), 256)


@pytest.mark.usefixtures("small_chunks")
def test_it_equals_the_reference_in_chunks_with_blocks_that_cannot_be_encoded(scheme: Scheme) -> None:
    for poison in (math.nan, math.inf, -math.inf, 3e38, -1.0):
        x = scheme.admissible(random(4 * CHUNK + 77)).float()
        x[[3, CHUNK + 40, CHUNK + 41, -1]] = poison  # first chunk, second chunk, not the third, the short last block
        assert_same(scheme, x, 64, torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.usefixtures("small_chunks")
def test_it_equals_the_reference_whatever_the_strides(scheme: Scheme) -> None:
    x = scheme.admissible(random(9000)).float()
    assert_same(scheme, x.view(100, 90).t(), 64)
    assert_same(scheme, x[::2], 64)
    assert_same(scheme, x[1:], 64)
    assert_same(scheme, x.view(9, 10, 10, 10).to(memory_format=torch.channels_last), 64)
    assert_same(scheme, x[:95, None].expand(95, 95), 64)


def test_it_equals_the_reference_in_every_shape(scheme: Scheme) -> None:
    for shape in ((), (1,), (0,), (2, 0, 3), (1, 1, 5), (3, 4, 5)):
        x = scheme.admissible(random(200)).float()[: math.prod(shape)].view(shape)
        assert_same(scheme, x, 32)
        assert scheme.encode(cpu, x, 32)[0].shape == shape


def test_it_equals_the_reference_to_the_sign_of_a_zero(scheme: Scheme) -> None:
    zeros = ([0.0], [-0.0], [-0.0, 0.0], [0.0, -0.0])
    others = ([], [1e-40], [-1e-40], [-1e-40, 1e-40], [2.0**-126], [1.0])
    for some, more, count in itertools.product(zeros, others, (1, 32, 40)):
        assert_same(scheme, scheme.admissible(torch.tensor(some * count + more)), 32)


def test_it_equals_the_reference_in_blocks_of_nearly_one_value(scheme: Scheme) -> None:
    first = torch.arange(0x3F800000, 0x40000000, 99_997)[:, None]
    for ulps in (0, 1, 2, 5, 13, 100, 2**14):
        x = (first + torch.randint(0, ulps + 1, (len(first), 32), generator=torch.Generator().manual_seed(ulps))).int()
        assert_same(scheme, x.view(torch.float32), 32)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    patterns=hnp.arrays(np.uint32, st.integers(1, 90)),
    keep=st.sampled_from([0xFFFFFFFF, 0x007FFFFF, 0x80FFFFFF, 0x3F8000FF]),  # any; subnormal; tiny; near 1
)
def test_it_equals_the_reference_on_any_bit_pattern(scheme: Scheme, patterns: np.ndarray, keep: int) -> None:
    x = torch.from_numpy((patterns & np.uint32(keep)).view(np.float32))
    assert_same(scheme, scheme.admissible(x), 32)


def critical_values(codebook: Codebook) -> Tensor:
    """The floats around every threshold and level, where a rounding decides."""
    points = torch.cat([codebook.thresholds, codebook.tensor()])
    around = (points.view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)).view(torch.float32).flatten()
    return around[around.abs() <= 1]


CROWDED = [
    Codebook("an ulp apart", (0.0, *torch.arange(0x3F000000, 0x3F0000FE).int().view(torch.float32).tolist(), 1.0)),
    Codebook("one cell", (-1.0, *(k * 2.0**-20 for k in range(-100, 101)), 1.0)),
    Codebook("two", (0.0, 1.0)),
]


@pytest.mark.parametrize("codebook", [*BUILTIN.values(), *CROWDED], ids=lambda codebook: codebook.name)
def test_it_equals_the_reference_around_every_threshold(codebook: Codebook) -> None:
    for scale, signed_scale in itertools.product((1.0, 1 / 3, 2.0**-126, 3.4e38), (False, True)):
        x = torch.cat([torch.ones(1), critical_values(codebook)]) * scale
        expected = reference.quantize(x, codebook, x.numel(), signed_scale)
        for part, expected_part in zip(cpu.quantize(x, codebook, x.numel(), signed_scale), expected, strict=True):
            assert oracle.same_bits(part, expected_part)


@pytest.mark.parametrize("name", [*BUILTIN])
def test_every_code_decodes_as_in_the_reference(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)
    for scale, dtype in itertools.product(([1.0, -1 / 3, 0.0], [1.0, math.nan, math.inf]), DTYPES):
        given = codes, torch.tensor(scale), BUILTIN[name], 256, dtype
        assert oracle.same_bits(cpu.dequantize(*given), reference.dequantize(*given))


@pytest.mark.parametrize("name", [*BUILTIN])
def test_fake_quantize_equals_the_reference(name: str) -> None:
    x = random(1000).view(8, 125)
    for dtype in DTYPES:
        decoded = cpu.fake_quantize(x.to(dtype), BUILTIN[name], 64)
        assert decoded.dtype == dtype
        assert oracle.same_bits(decoded, reference.fake_quantize(x.to(dtype), BUILTIN[name], 64))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_a_bit(scheme: Scheme) -> None:
    x = scheme.admissible(random(2**16 + 1000)).float()  # torch splits work above 2**15 elements
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        parts = scheme.encode(cpu, x, 128)
        results.append((*parts, scheme.decode(cpu, parts, 128, torch.float32)))
    for other in results[1:]:
        assert all(map(oracle.same_bits, results[0], other))


def test_results_share_no_memory(scheme: Scheme) -> None:
    """An operator must not return two views of one storage, nor a view of its input (torch refuses both)."""
    x = scheme.admissible(random(100)).float()
    parts = scheme.encode(cpu, x, 32)
    tensors = (x, *parts, scheme.decode(cpu, parts, 32, torch.float32))
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_the_input_is_left_alone(scheme: Scheme) -> None:
    x = scheme.admissible(random(300)).float()
    before = x.clone()
    parts = scheme.encode(cpu, x, 32)
    kept = [part.clone() for part in parts]
    scheme.decode(cpu, parts, 32, torch.float32)
    assert oracle.same_bits(x, before)
    assert all(map(oracle.same_bits, parts, kept))
