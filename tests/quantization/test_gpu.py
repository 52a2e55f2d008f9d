"""Tests that need a GPU: millions of values against the reference, graphs, compiled steps, other devices."""

import pytest
import torch
from torch import Tensor

from q8lightning import (
    dequantize_affine_blockwise,
    fake_quantize,
    quantize_affine_blockwise,
    quantize_blockwise,
)
from q8lightning.quantization import ops
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUMEL = 2**24
CODEBOOKS = [*BUILTIN.values(), Codebook("three", (-1.0, 0.0, 0.3))]


def _distributions() -> dict[str, Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(NUMEL, device="cuda")
    return {
        "normal": normal,
        "uniform": torch.rand(NUMEL, device="cuda") * 2 - 1,
        "Cauchy": torch.empty(NUMEL, device="cuda").cauchy_(),
        "log-normal over sixty orders of magnitude": normal.sign() * (normal * 14).exp(),
        "any pattern that is a number": torch.randint(-(2**31), 2**31, (NUMEL,), device="cuda", dtype=torch.int32)
        .view(torch.float32)
        .nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0),
    }


@pytest.fixture(scope="module")
def distributions() -> dict[str, Tensor]:
    return _distributions()


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda book: book.name)
def test_millions_of_codes_are_those_of_the_reference(codebook: Codebook, distributions: dict[str, Tensor]) -> None:
    for name, x in distributions.items():
        codes, scale, _ = ops.quantize(x, codebook.spec, 64, codebook.one_sided)
        expected_codes, expected_scale = reference.quantize(x, codebook, 64, codebook.one_sided)
        assert torch.equal(scale, expected_scale), name
        assert torch.equal(codes, expected_codes), name
        values = ops.dequantize(codes, scale, codebook.spec, 64, torch.float32)
        assert torch.equal(values, reference.dequantize(codes, scale, codebook, 64, torch.float32)), name


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("residual", bits) for bits in ((8, 8), (8, 4), (8, 3), (5, 3))),
        *(("log", (bits,)) for bits in (8, 5, 2)),
        ("affine", ()),
    ],
    ids=str,
)
def test_millions_of_values_of_the_other_codecs_are_those_of_the_reference(
    name: str, bits: tuple[int, ...], distributions: dict[str, Tensor]
) -> None:
    for distribution, x in distributions.items():
        given = x.abs() if name == "log" else x
        *parts, _ = getattr(ops, f"quantize_{name}")(given, 128, *bits)
        for ours, theirs in zip(parts, getattr(reference, f"quantize_{name}")(given, 128, *bits), strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), distribution
        values = getattr(ops, f"dequantize_{name}")(*parts, 128, *bits, torch.float32)
        expected = getattr(reference, f"dequantize_{name}")(*parts, 128, *bits, torch.float32)
        assert torch.equal(values.nan_to_num(), expected.nan_to_num()), distribution


@pytest.mark.parametrize("bits", range(2, 8))
def test_millions_of_affine_codes_of_fewer_bits_are_those_of_the_reference(
    bits: int, distributions: dict[str, Tensor]
) -> None:
    for distribution, x in distributions.items():
        parts = quantize_affine_blockwise(x, 128, bits)
        for ours, theirs in zip(parts, reference.quantize_affine(x, 128, bits), strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), distribution
        values = dequantize_affine_blockwise(*parts, 128, torch.float32)
        assert torch.equal(values, reference.dequantize_affine(*parts, 128, torch.float32)), distribution


@pytest.mark.parametrize(
    ("distribution", "block_size", "absolute", "relative"),
    [
        ("normal", 64, 0.00752, 0.0142),
        ("normal", 256, 0.00852, 0.0154),
        ("normal", 4096, 0.01001, 0.0170),
        ("uniform", 64, 0.00311, 0.0098),
        ("uniform", 256, 0.00318, 0.0099),
        ("uniform", 4096, 0.00321, 0.0100),
    ],
)
def test_the_dynamic_map_errs_as_little_as_an_exact_nearest_quantizer(
    distribution: str, block_size: int, absolute: float, relative: float, distributions: dict[str, Tensor]
) -> None:
    # The limits that bitsandbytes accepts its own kernels by, from an exact quantizer; two percent above is allowed.
    x = distributions[distribution]
    error = (fake_quantize(x, "dynamic", block_size) - x).abs().double()
    assert error.mean().item() <= 1.02 * absolute
    assert (error / (x.abs().double() + 1e-8)).mean().item() <= 1.02 * relative


def _step(x: Tensor) -> tuple[Tensor, ...]:
    codes, absmax = quantize_blockwise(x, "softsign", 128)
    values, statistics = fake_quantize(x, "dynamic", 64, return_statistics=True)
    return codes, absmax, values, statistics, *ops.quantize_log(x.abs(), 128, 5), *ops.quantize_residual(x, 256, 8, 4)


def test_a_captured_graph_replays_on_new_values() -> None:
    x = torch.randn(100_003, device="cuda")
    _step(x)  # compiles the kernels and moves the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(x)
    x.copy_(torch.randn_like(x) * 3)
    graph.replay()
    for replayed, eager in zip(captured, _step(x), strict=True):
        assert torch.equal(replayed, eager)


def test_packing_can_be_captured_in_a_graph() -> None:
    tensors = [torch.randn(size, device="cuda") for size in (4096, 5001, 70_000)]
    codecs = [get_codec("linear", 256, None, 8), get_codec("softsign", 128), get_codec("softsign", 128)]
    encode_many(tensors, codecs, measure=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = encode_many(tensors, codecs, measure=True)
    for tensor in tensors:
        tensor.normal_()
    graph.replay()
    eager = encode_many(tensors, codecs, measure=True)
    assert all(torch.equal(one, other) for one, other in zip(captured.data, eager.data, strict=True))
    assert torch.equal(captured.statistics, eager.statistics)


def test_the_operators_compile_into_one_graph() -> None:
    x = torch.randn(1000, 37, device="cuda")
    compiled = torch.compile(_step, fullgraph=True)
    for ours, eager in zip(compiled(x), _step(x), strict=True):
        assert torch.equal(ours, eager)


def test_a_compiled_step_learns_through_quantized_weights() -> None:
    def loss(weight: Tensor, batch: Tensor) -> Tensor:
        return (batch @ fake_quantize(weight, "int4", 64)).square().mean()

    batch = torch.randn(32, 128, device="cuda")
    weights = [torch.randn(128, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) for _ in range(2)]
    for weight, function in zip(weights, (loss, torch.compile(loss, fullgraph=True)), strict=True):
        weight.requires_grad_()
        function(weight, batch).backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_need_not_be_the_tensors() -> None:
    x = torch.randn(10_000, device="cuda:1")
    with torch.cuda.device(0):
        results = _step(x)
        packed = encode_many([x], [get_codec("log", 128)], measure=True)
    assert packed.data[0].device == x.device
    for one, other in zip(results[:3], _step(x.to("cuda:0"))[:3], strict=True):
        assert one.device == x.device
        assert torch.equal(one.cpu(), other.cpu())


def test_bitsandbytes_decodes_our_codes_to_the_same_values() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x = torch.randn(2**20, device="cuda")
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    theirs = functional.dequantize_blockwise(codes, state)
    ours = ops.dequantize(codes, state.absmax, "dynamic", 256, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0.0)
