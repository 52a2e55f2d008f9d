"""A CPU measures what encoding loses in an eighth of a large tensor, and the guard is not misled by that."""

import math

import pytest
import torch
from torch import Tensor

from q8lightning.checkpoint.encode.checkpoint import encode_and_report
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many, is_sampled, measure
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN
from q8lightning.quantization.spec.sampling import WHOLE_ON_CPU, stretches_on_cpu

CODECS = [
    get_codec("linear", 128),
    get_codec("softsign", 256),
    get_codec("linear", 128, residual_bits=8),
    get_codec("log", 128),
    get_codec("int4", 64),
    get_codec("dynamic", 4096),
    get_codec("softsign", 128, 6),
    get_codec("linear", 256, residual_bits=4),
    get_codec("log", 128, 5),
    get_codec("softsign", 128, 6, scale_dtype="bfloat16"),
    get_codec("log", 128, 5, scale_dtype="bfloat16"),
]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
NUMEL = 600_003


def values(numel: int = NUMEL, unsigned: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator).mul(2).exp()
    x[::29] = 0.0
    return x.square() if unsigned else x


def taken_of(numel: int, codec: Codec) -> Tensor:
    """The indices of the elements in the sample."""
    stretches, length = stretches_on_cpu(numel, codec.block_size)
    assert stretches is not None
    return (stretches[:, None] * length + torch.arange(length)).flatten()


def packed(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    result = encode_many([x], [codec], measure=True)
    assert result.statistics is not None
    return result.data[0], result.statistics[0]


@each_codec
def test_of_a_large_tensor_an_eighth_is_measured_and_stands_for_all(codec: Codec) -> None:
    x = values(unsigned=codec.unsigned)
    data, statistics = packed(x, codec)
    decoded = codec.decode(codec.split(data, NUMEL), x.dtype)
    taken = taken_of(NUMEL, codec)
    expected = reference.measure(x[taken], decoded[taken])
    weight = NUMEL / len(taken)
    torch.testing.assert_close(statistics, expected * torch.tensor([weight, weight, 1.0, weight, weight]).double())
    whole = reference.measure(x, decoded)
    torch.testing.assert_close(measure(x, codec, data), whole)
    assert float((statistics[0] / statistics[1]).sqrt()) == pytest.approx(float((whole[0] / whole[1]).sqrt()), rel=0.2)


@each_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_measured_is_lost_in_the_dtype_of_the_tensor(codec: Codec, dtype: torch.dtype) -> None:
    x = values(unsigned=codec.unsigned).to(dtype)
    data, statistics = packed(x, codec)
    taken = taken_of(NUMEL, codec)
    expected = reference.measure(x[taken], codec.decode(codec.split(data, NUMEL), dtype)[taken])
    assert float(statistics[0] / statistics[1]) == pytest.approx(float(expected[0] / expected[1]), rel=1e-9)


def test_small_tensors_and_those_with_blocks_that_cannot_be_encoded_are_measured_in_whole() -> None:
    codec = get_codec("linear", 128)
    for x in (values(WHOLE_ON_CPU), values().index_fill(0, torch.tensor([NUMEL - 1]), math.nan)):
        data, statistics = packed(x, codec)
        expected = reference.measure(x, codec.decode(codec.split(data, x.numel()), x.dtype))
        torch.testing.assert_close(statistics, expected, equal_nan=True)
    assert not is_sampled(values(WHOLE_ON_CPU), codec)
    assert is_sampled(values(WHOLE_ON_CPU + 1), codec)


@pytest.mark.parametrize("name", [*BUILTIN])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e13])
def test_no_tensor_loses_more_than_its_scales_allow(name: str, scale: float) -> None:
    """Not even one of the values that are farthest from all levels."""
    book = BUILTIN[name]
    if book.end == 0:
        pytest.skip("not for checkpoints")
    codec = get_codec(name, 64)
    thresholds = torch.cat([book.thresholds, book.thresholds.nextafter(torch.tensor(2.0))])
    worst = torch.cat([torch.tensor([1.0]), thresholds]).repeat(codec.block_size)  # in the company of all others
    ends = torch.full((len(thresholds), 64), float(book.end))
    ends[:, 1:] = thresholds[:, None]
    for x in (worst, ends.flatten(), values().clamp(-3, 3).abs() if codec.unsigned else values()):
        y = x * scale
        data, _ = packed(y, codec)
        lost = measure(y, codec, data)
        bound = codec.relative_error_bound(y, codec.split(data, y.numel()))
        assert float((lost[0] / lost[1]).sqrt()) <= bound
        if name in ("linear", "softsign"):
            assert bound < 0.1  # it says something


def test_no_tensor_loses_more_in_two_stages_than_its_scales_allow() -> None:
    codec = get_codec("linear", 64, residual_bits=8)
    ends = torch.ones(254, 64)
    ends[:, 1:] = BUILTIN["linear"].thresholds[:, None]
    for x in (ends.flatten(), values(), torch.rand(70_000)):
        data, _ = packed(x, codec)
        lost = measure(x, codec, data)
        assert float((lost[0] / lost[1]).sqrt()) <= codec.relative_error_bound(x, codec.split(data, x.numel())) < 1e-3


def hidden(codec: Codec, plain: float, lossy: Tensor) -> Tensor:
    """A tensor that loses nothing in its sample, and elsewhere as much as blocks like ``lossy``."""
    x = lossy.repeat(-(-NUMEL // lossy.numel()))[:NUMEL]
    taken = taken_of(NUMEL, codec)
    x[taken] = plain
    _, statistics = packed(x, codec)
    assert float(statistics[0]) == 0.0
    return x


def test_the_guard_finds_weights_that_lose_too_much_where_no_sample_is_taken() -> None:
    codec = get_codec("linear", 128)
    lossy = torch.full((128,), 0.45 / 127)  # becomes zero beside the one
    lossy[0] = 1.0
    x = hidden(codec, 1e-3, lossy)
    policy = CheckpointPolicy([Rule("state_dict.*", "linear", block_size=128)], min_sqnr_db=30)
    encoded, report = encode_and_report({"state_dict": {"w": x, "fine": torch.randn(NUMEL)}}, policy)
    assert [each.path for each in report.guarded] == ["state_dict.w"]
    payload = encoded["state_dict"]["w"]
    decoded = payload.decode() if isinstance(payload, QuantizedTensor) else payload
    assert 20 * math.log10(float(x.norm() / (decoded - x).norm())) > 30


def test_the_guard_finds_second_moments_that_become_zero_where_no_sample_is_taken() -> None:
    lossy = torch.full((128,), 1e-4)
    lossy[0] = 1.0
    x = hidden(get_codec("linear", 128), 1e-3, lossy)
    policy = CheckpointPolicy([Rule("optimizer_states.*.exp_avg_sq", "linear", block_size=128)])
    state = {"state": {0: {"exp_avg_sq": x}}, "param_groups": [{"params": [0], "eps": 1e-8}]}
    encoded, report = encode_and_report({"optimizer_states": [state]}, policy)
    assert [each.remedy for each in report.guarded] == ["raw"]
    assert torch.equal(encoded["optimizer_states"][0]["state"][0]["exp_avg_sq"], x)


def test_what_is_reported_of_weights_that_cannot_lose_much_is_the_estimate() -> None:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    policy = CheckpointPolicy([Rule("state_dict.*", "softsign", block_size=256)])
    _, report = encode_and_report({"state_dict": {"w": x}}, policy)
    _, statistics = packed(x, get_codec("softsign", 256))
    assert report.tensors[0].statistics == tuple(statistics.tolist())
    assert not report.guarded


@each_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_are_measured_together_lose_what_each_loses_alone(codec: Codec, dtype: torch.dtype) -> None:
    sizes = (WHOLE_ON_CPU, 4096, 5003, 50_000, WHOLE_ON_CPU + 1, NUMEL, 8192, 70_001)
    tensors = [values(numel, codec.unsigned).to(dtype) for numel in sizes]
    tensors[3][7] = math.nan
    together = encode_many(tensors, [codec] * len(tensors), measure=True)
    assert together.statistics is not None
    assert together.failed.tolist() == [i == 3 for i in range(len(tensors))]
    for x, data, statistics in zip(tensors, together.data, together.statistics, strict=True):
        alone, expected = packed(x, codec)
        assert torch.equal(data, alone)
        torch.testing.assert_close(statistics, expected, rtol=1e-12, atol=0.0, equal_nan=True)
