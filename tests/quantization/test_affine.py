"""The public functions with a zero point: torch's own affine quantization, float64 NumPy, edges, and what they refuse.

torch rounds halves to even, and we round them up. Both divide in float32, so codes may also differ where a value is
within a few roundings of the middle between two codes, and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.devices import each_device
from support.schemes import every_dtype
from torch import Tensor

from q8lightning import dequantize_affine_blockwise, quantize_affine_blockwise
from q8lightning.quantization.spec import reference

HALF_ULP = 2.0**-24
NOISE = 256 * 8 * HALF_ULP
"""How far a position, at most 256 codes from 0, may be off after eight roundings."""

BITS = [8, 7, 6, 5, 4, 3, 2]
of_torch_ao = pytest.mark.filterwarnings("ignore:.*deprecated")
every_bits = pytest.mark.parametrize("bits", BITS)


def sample(rows: int, block_size: int, shift: float = 0.7) -> Tensor:
    return torch.randn(rows, block_size, generator=torch.Generator().manual_seed(0)) + shift


def is_tied(blocks: Tensor, scale: Tensor) -> Tensor:
    """Where the distance to zero is halfway between two steps, within what float32 rounds."""
    position = blocks.double() / scale.double()[:, None]
    return ((position - position.floor()) - 0.5).abs() <= NOISE


@of_torch_ao
@each_device
@pytest.mark.parametrize("shift", [0.7, -0.7, 5.0, -5.0])
def test_codes_and_values_are_those_of_torch_s_quantized_tensors(device: str, shift: float) -> None:
    blocks = sample(50, 64, shift)
    codes, scale, zero_point = (part.cpu() for part in quantize_affine_blockwise(blocks.to(device), 64))
    theirs = torch.quantize_per_channel(blocks, scale.double(), zero_point.long(), 0, torch.quint8)
    differs = codes != theirs.int_repr()
    assert not bool((differs & ~is_tied(blocks, scale)).any())
    assert bool(((codes.int() - theirs.int_repr().int()).abs() <= 1).all())
    assert differs.float().mean() < 1e-3

    decoded = dequantize_affine_blockwise(
        theirs.int_repr().to(device), scale.to(device), zero_point.to(device), 64, torch.float32
    )
    assert oracle.same_bits(decoded.cpu(), theirs.dequantize())


@each_device
@every_bits
def test_decoded_codes_are_torch_s_fake_quantization(device: str, bits: int) -> None:
    blocks = sample(50, 64)
    parts = quantize_affine_blockwise(blocks.to(device), 64, bits)
    decoded = dequantize_affine_blockwise(*parts, 64, torch.float32).cpu()
    codes, scale, zero_point = (part.cpu() for part in parts)
    assert int(codes.max()) == 2**bits - 1, "a block's largest value has the last code"
    theirs = torch.fake_quantize_per_channel_affine(blocks, scale, zero_point.int(), 0, 0, 2**bits - 1)
    differs = decoded != theirs
    assert not bool((differs & ~is_tied(blocks, scale)).any())
    assert bool(((decoded - theirs).abs() <= scale[:, None] * (1 + 1e-6)).all())


@of_torch_ao
@every_bits
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_scales_and_zero_points_are_those_that_torch_chooses(bits: int, shift: float) -> None:
    choose = torch.ao.quantization.MinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=2**bits - 1, eps=1e-30
    )
    for block in sample(20, 64, shift):
        choose.reset_min_max_vals()
        choose(block)
        their_scale, their_zero_point = choose.calculate_qparams()
        _, scale, zero_point = quantize_affine_blockwise(block, 64, bits)
        torch.testing.assert_close(scale, their_scale, rtol=4 * HALF_ULP, atol=0.0)
        position = 0.5 - min(block.min().item(), 0.0) / scale.item()
        if abs(position - round(position)) > NOISE:
            assert zero_point.item() == their_zero_point.item()


@each_device
@every_bits
@every_dtype
@pytest.mark.parametrize("shape", [(1000,), (7, 13, 11), (1,), (), (0,), (3, 0)], ids=str)
def test_blockwise_affine_quantization_is_that_of_float64(
    device: str, bits: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    A = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3).to(dtype)
    codes, scale, zero_point = quantize_affine_blockwise(A.to(device), 32, bits)
    blocks = -(-A.numel() // 32)
    assert (codes.shape, scale.shape, zero_point.shape) == (A.shape, (blocks,), (blocks,))
    assert (codes.dtype, scale.dtype, zero_point.dtype) == (torch.uint8, torch.float32, torch.uint8)
    values = dequantize_affine_blockwise(codes, scale, zero_point, 32, dtype)
    assert (values.shape, values.dtype, values.device.type) == (A.shape, dtype, device)
    parts = tuple(part.cpu() for part in (codes, scale, zero_point))
    assert all(map(oracle.same_bits, parts, reference.quantize_affine(A, 32, bits)))
    assert oracle.same_bits(values.cpu(), reference.dequantize_affine(*parts, 32, dtype))
    if A.numel() == 0:
        return
    expected, steps, zeros = oracle.quantize_affine(A.float(), 32, bits)
    np.testing.assert_allclose(oracle.float64(parts[1]), steps, rtol=4 * HALF_ULP)
    assert np.all(np.abs(oracle.float64(parts[0]) - expected) <= 1 + np.max(np.abs(oracle.float64(parts[2]) - zeros)))
    step = oracle.spread(parts[1], 32, A)
    exact = oracle.dequantize_affine(*parts, 32)
    assert np.all(np.abs(exact - oracle.float64(A.float())) <= step / 2 * (1 + 2 * NOISE))


# Edges


@each_device
@every_bits
@pytest.mark.parametrize("value", [5.0, -5.0, 1e-3, -3e38, 3e38, 2.0**-118, -(2.0**-118)])
def test_a_constant_block_comes_back_within_rounding_and_zero_exactly(device: str, bits: int, value: float) -> None:
    A = torch.full((64,), value, device=device)
    A[40] = 0.0
    codes, scale, zero_point = quantize_affine_blockwise(A, 32, bits)
    assert zero_point.tolist() == [0, 0] if value > 0 else [2**bits - 1] * 2
    values = dequantize_affine_blockwise(codes, scale, zero_point, 32, torch.float32)
    assert values[40].item() == 0.0
    torch.testing.assert_close(values, A, rtol=4 * HALF_ULP, atol=0.0)


@each_device
def test_zeros_and_values_below_the_smallest_normal_step_become_exact_zeros(device: str) -> None:
    A = torch.zeros(4, 32, device=device)
    A[1] = -0.0
    A[2, 0], A[3] = 2.0**-126, -(2.0**-120)
    codes, scale, zero_point = quantize_affine_blockwise(A, 32)
    assert scale.tolist() == [0.0] * 4
    assert zero_point.tolist() == [0] * 4
    assert not codes.any()
    assert dequantize_affine_blockwise(codes, scale, zero_point, 32, torch.float32).tolist() == [[0.0] * 32] * 4


@each_device
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_says_so_and_leaves_others_alone(device: str, wrong: float) -> None:
    A = sample(3, 32)
    expected = quantize_affine_blockwise(A, 32)
    A[1, 5] = wrong
    codes, scale, zero_point = (part.cpu() for part in quantize_affine_blockwise(A.to(device), 32))
    assert scale.isnan().tolist() == [False, True, False]
    assert not codes[1].any()
    assert zero_point[1] == 0
    for part, whole in zip((codes, scale, zero_point), expected, strict=True):
        assert oracle.same_bits(part[::2], whole[::2])
    values = dequantize_affine_blockwise(codes, scale, zero_point, 32, torch.float32)
    assert values.isnan().all(dim=1).tolist() == [False, True, False]


@each_device
def test_neither_input_nor_buffers_need_be_contiguous(device: str) -> None:
    whole = sample(64, 30).to(device)
    expected = quantize_affine_blockwise(whole.t().contiguous(), 32)
    out = torch.zeros(64, 30, dtype=torch.uint8, device=device).t()
    scale = torch.zeros(len(expected[1]), 2, device=device)[:, 1]
    zero_point = torch.zeros(len(expected[2]), 2, dtype=torch.uint8, device=device)[:, 1]
    returned = quantize_affine_blockwise(whole.t(), 32, scale=scale, zero_point=zero_point, out=out)
    assert all(one is other for one, other in zip(returned, (out, scale, zero_point), strict=True))
    assert all(map(torch.equal, returned, expected))
    values = torch.zeros(64, 30, dtype=torch.bfloat16, device=device).t()
    assert dequantize_affine_blockwise(out, scale, zero_point, 32, out=values) is values
    assert torch.equal(values, dequantize_affine_blockwise(*expected, 32, torch.bfloat16))


@each_device
@every_bits
def test_what_is_lost_is_measured_in_the_same_pass(device: str, bits: int) -> None:
    A = sample(30, 33).to(device)
    statistics = torch.zeros(5, dtype=torch.float64, device=device)
    parts = quantize_affine_blockwise(A, 64, bits, statistics=statistics)
    values = dequantize_affine_blockwise(*parts, 64, torch.float32)
    expected = oracle.error_statistics(A.cpu(), values.cpu())
    assert statistics.tolist() == pytest.approx(expected, rel=2e-6, abs=0.0)


def test_codes_of_a_parameter_hold_no_graph_and_compile_into_one() -> None:
    def both(x: Tensor) -> Tensor:
        return dequantize_affine_blockwise(*quantize_affine_blockwise(x, 64, 4), 64, torch.float32)

    parameter = torch.nn.Parameter(sample(5, 50))
    assert not any(part.requires_grad for part in quantize_affine_blockwise(parameter, 64))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert oracle.same_bits(compiled(parameter.detach()), both(parameter.detach()))


# What is refused


def _float(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


def _byte(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8, **options)


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "A must be a torch.Tensor, got list": (quantize_affine_blockwise, {"A": [1.0, 2.0]}),
    r"A must be float32, .* got torch\.int8": (quantize_affine_blockwise, {"A": _float(2, 32, dtype=torch.int8)}),
    "block_size must be a power of two .* got 100; try 128": (quantize_affine_blockwise, {"blocksize": 100}),
    "bits must be an integer from 2 to 8, got 1": (quantize_affine_blockwise, {"bits": 1}),
    "bits must be an integer from 2 to 8, got 9": (quantize_affine_blockwise, {"bits": 9}),
    "bits must be an integer from 2 to 8, got True": (quantize_affine_blockwise, {"bits": True}),
    r"scale must be .*float32 of shape \[2\]": (quantize_affine_blockwise, {"scale": _float(3)}),
    r"zero_point must be .*uint8 of shape \[2\]": (quantize_affine_blockwise, {"zero_point": _float(2)}),
    r"out must be .* shape \[2, 32\]": (quantize_affine_blockwise, {"out": _byte(64)}),
    "out must be .* on cpu": (quantize_affine_blockwise, {"out": _byte(2, 32, device="meta")}),
    "statistics must be .*float64": (quantize_affine_blockwise, {"statistics": _float(5)}),
    "codes must be uint8, got torch.int32; pass what quantize_affine_blockwise": (
        dequantize_affine_blockwise,
        {"a": _float(2, 32, dtype=torch.int32)},
    ),
    r"scale must be .* got torch\.float64": (dequantize_affine_blockwise, {"scale": _float(2, dtype=torch.float64)}),
    r"zero_point must be .* got torch\.int64": (
        dequantize_affine_blockwise,
        {"zero_point": _float(2, dtype=torch.int64)},
    ),
    "needs a dtype or an out tensor, got neither": (dequantize_affine_blockwise, {"out": None}),
    r"the result must be float32.* got torch\.int32": (dequantize_affine_blockwise, {"dtype": torch.int32}),
    "out must be .*bfloat16": (dequantize_affine_blockwise, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(message: str) -> None:
    function, wrong = REFUSED[message]
    if function is quantize_affine_blockwise:
        buffers = {"out": _byte(2, 32) + 7, "scale": _float(2) + 7, "zero_point": _byte(2) + 7}
        given = {"A": sample(2, 32), "blocksize": 32} | buffers
    else:
        buffers = {"out": _float(2, 32) + 7}
        codes, scale, zero_point = quantize_affine_blockwise(sample(2, 32), 32)
        given = {"a": codes, "scale": scale, "zero_point": zero_point, "blocksize": 32} | buffers
    with pytest.raises(ValueError, match=message):
        function(**given | wrong)
    assert all(bool((buffer == 7).all()) for buffer in buffers.values())
