"""Operators on any device, and kernels while they encode, measure right what a quantization loses.

The oracle is float64 NumPy. Sums of float32 squares are rounded once a value, so a relative 2e-6 is allowed.
"""

import math

import pytest
import torch
from support import oracle
from support.devices import each_device
from torch import Tensor

from q8lightning import fake_quantize, quantize_blockwise
from q8lightning.quantization import ops
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
CODECS = [
    get_codec("linear", 64),
    get_codec("softsign", 256),
    get_codec("dynamic", 128),
    get_codec("linear", 128, None, 8),
    get_codec("log", 64),
    get_codec("softsign", 128, 5),
    get_codec("linear", 256, None, 4),
    get_codec("log", 64, 4),
    get_codec("softsign", 128, 6, scale_dtype="bfloat16"),
    get_codec("log", 128, 5, scale_dtype="bfloat16"),
]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
SIZES = (0, 1, 33, 4096, 70_001)


def _sample(numel: int, dtype: torch.dtype, codec: Codec) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-2, 2, (numel,), generator=generator)
    x[torch.rand(numel, generator=generator) < 0.1] = 0.0
    return (x.abs() if codec.unsigned else x).to(dtype)


def assert_measured(statistics: Tensor, x: Tensor, decoded: Tensor) -> None:
    """Compare with float64 NumPy; the counts exactly."""
    expected = oracle.error_statistics(x.cpu(), decoded.cpu())
    assert statistics.dtype == torch.float64
    assert statistics.tolist()[:3] == pytest.approx(expected[:3], rel=2e-6, abs=0.0)
    assert statistics.tolist()[3:] == list(expected[3:])


@each_device
@each_codec
@each_dtype
def test_statistics_are_those_of_the_decoded_tensor(device: str, codec: Codec, dtype: torch.dtype) -> None:
    for numel in SIZES:
        x = _sample(numel, dtype, codec).to(device)
        parts, statistics = codec.encode_and_measure(x)
        assert_measured(statistics, x, codec.decode(parts, dtype))
        for measured, plain in zip(parts, codec.encode(x), strict=True):
            assert torch.equal(measured, plain), "measuring changes what is encoded"


@each_device
@each_dtype
@pytest.mark.parametrize("codebook", ["linear", "softsign", "dynamic", "int2"])
@pytest.mark.parametrize("block_size", [32, 256, 2048])
def test_fake_quantize_measures_on_the_way(device: str, dtype: torch.dtype, codebook: str, block_size: int) -> None:
    for numel in SIZES:
        x = _sample(numel, dtype, get_codec("linear")).to(device)
        values, statistics = fake_quantize(x, codebook, block_size, return_statistics=True)
        assert torch.equal(values, fake_quantize(x, codebook, block_size))
        assert_measured(statistics, x, values)


@each_device
def test_the_affine_codec_is_measured_too(device: str) -> None:
    x = _sample(5000, torch.float32, get_codec("linear")).to(device)
    *parts, statistics = ops.quantize_affine(x, 64, measure=True)
    assert_measured(statistics, x, ops.dequantize_affine(*parts, 64, torch.float32))


@each_device
@each_codec
@pytest.mark.parametrize("magnitude", [1e-37, 1e-25, 1e-15, 1e-3, 1e18, 1e30, 1e38])
def test_squares_leave_the_range_of_float32_without_harm(device: str, codec: Codec, magnitude: float) -> None:
    x = (torch.rand(40_000, generator=torch.Generator().manual_seed(0)) * 2 - 1) * magnitude
    x = (x.abs() if codec.unsigned else x).to(device)
    parts, statistics = codec.encode_and_measure(x)
    assert_measured(statistics, x, codec.decode(parts, torch.float32))
    if not codec.unsigned and not codec.residual_bits:
        values, statistics = fake_quantize(x, codec.name, codec.block_size, return_statistics=True)
        assert_measured(statistics, x, values)


@each_device
@each_codec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_error_of_what_is_not_finite_is_no_number(device: str, codec: Codec, value: float) -> None:
    x = _sample(70_001, torch.float32, codec)
    x[12_345] = value
    zeros = int((x == 0).sum())
    parts, statistics = codec.encode_and_measure(x.to(device))
    decoded = codec.decode(parts, torch.float32).cpu()
    assert not statistics[:3].isfinite().any()
    assert statistics[3:].tolist() == [zeros, int(((x != 0) & (decoded == 0)).sum())]
    if not codec.unsigned and not codec.residual_bits:
        values, statistics = fake_quantize(x.to(device), codec.name, codec.block_size, return_statistics=True)
        assert not statistics[:3].isfinite().any()
        assert statistics[3:].tolist() == [zeros, int(((x != 0) & (values.cpu() == 0)).sum())]


@each_device
def test_the_error_of_a_negative_value_under_log_is_no_number(device: str) -> None:
    x = _sample(4096, torch.float32, get_codec("log")).to(device)
    x[1234] = -1.0
    _, statistics = get_codec("log", 64).encode_and_measure(x)
    assert statistics[[0, 2]].isnan().all()
    assert statistics[1].isfinite()


@each_device
def test_a_second_run_measures_the_same_bits(device: str) -> None:
    x = _sample(3_000_001, torch.float32, get_codec("linear")).to(device)
    first = fake_quantize(x, "linear", 64, return_statistics=True)[1]
    for _ in range(3):
        assert torch.equal(fake_quantize(x, "linear", 64, return_statistics=True)[1], first)


@each_device
def test_quantize_blockwise_writes_statistics_into_a_buffer(device: str) -> None:
    x = _sample(5000, torch.float32, get_codec("linear")).to(device)
    statistics = torch.empty(5, dtype=torch.float64, device=device)
    codes, absmax = quantize_blockwise(x, "softsign", 64, statistics=statistics)
    assert_measured(statistics, x, ops.dequantize(codes, absmax, "softsign", 64, torch.float32))
    for wrong in (statistics.float(), statistics[:4]):
        with pytest.raises(ValueError, match="statistics must be"):
            quantize_blockwise(x, "softsign", 64, statistics=wrong)


@each_device
def test_the_gradient_goes_straight_through_where_it_is_measured(device: str) -> None:
    x = torch.randn(100, device=device, requires_grad=True)
    values, statistics = fake_quantize(x, "int3", 32, return_statistics=True)
    assert not statistics.requires_grad
    (values * torch.arange(100, device=device)).sum().backward()
    assert torch.equal(x.grad, torch.arange(100.0, device=device))
