"""Weights are encoded along the flattened tensor or row by row, and codes of any width are packed without gaps."""

import pytest
import torch
from support.oracle import same_bits

from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN
from q8lightning.quantization.spec.packed_bits import CHUNK, pack_bits, unpack_bits

WEIGHTS = [name for name, codebook in BUILTIN.items() if codebook.signed]
SHAPES = [(96,), (10, 64), (7, 33), (4, 3, 5, 5), (1, 1), (300, 2)]


@pytest.mark.parametrize("name", WEIGHTS)
def test_flat_blocks_are_those_of_the_reference(name: str) -> None:
    x = torch.randn(7, 33)
    parts = reference.quantize(x, BUILTIN[name], 64, BUILTIN[name].one_sided)
    expected = reference.dequantize(*parts, BUILTIN[name], 64, x.dtype)
    assert same_bits(WeightCodec(name, 64).fake_quantize(x), expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", ["linear", "int4"])
def test_a_block_along_an_axis_never_crosses_a_row(name: str, axis: int) -> None:
    x = torch.randn(6, 70, 5)
    codec = WeightCodec(name, 32, axis)
    values = codec.fake_quantize(x)
    for index in range(x.shape[axis]):  # each row on its own
        row = x.select(axis, index).flatten().contiguous()
        assert same_bits(values.select(axis, index).reshape(-1), WeightCodec(name, 32).fake_quantize(row))


def test_a_block_that_holds_a_row_gives_one_scale_a_channel() -> None:
    codes, scales = WeightCodec("linear", 4096, axis=0).encode(torch.randn(8, 3, 3, 3))
    assert codes.shape == (8, 27)
    assert scales.shape == (8, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_fitting_the_block_to_the_row_changes_no_value(axis: int | None, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    codec = WeightCodec("int4", 1024, axis)
    assert same_bits(codec.fitted(shape).fake_quantize(x), codec.fake_quantize(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_was_decoded_encodes_to_the_same_again(name: str, axis: int | None, shape: tuple[int, ...]) -> None:
    codec = WeightCodec(name, 32, axis)
    x = -torch.randn(shape).abs()  # the worst case for a codebook that reaches +1 only
    codes, scales = codec.encode(x)
    decoded = codec.decode(codes, scales, x)
    again, scales_again = codec.encode(decoded)
    assert torch.equal(again, codes)
    assert same_bits(scales_again, scales)


def test_flat_blocks_follow_the_order_of_memory() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    values = WeightCodec("int4", 32).fake_quantize(x)
    assert values.stride() == x.stride()
    in_memory = x.permute(0, 2, 3, 1).reshape(-1)
    assert same_bits(values.permute(0, 2, 3, 1).reshape(-1), WeightCodec("int4", 32).fake_quantize(in_memory))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dynamic_unsigned",), "has negative levels, got dynamic_unsigned"),
        (("linear", 100), "power of two between 32 and 4096, got 100"),
        (("int9",), "codebook is one of"),
    ],
)
def test_a_codec_that_cannot_hold_weights_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightCodec(*arguments)  # type: ignore[arg-type]


def test_an_axis_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"axis 2 is not one of a tensor of shape \(3, 4\)"):
        WeightCodec("linear", 32, axis=2).fitted((3, 4))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000])
def test_packed_codes_come_back(numel: int, bits: int) -> None:
    codes = torch.randint(2**bits, (numel,), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-numel * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, numel), codes)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_packing_in_chunks_leaves_no_gaps(bits: int) -> None:
    codes = torch.randint(2**bits, (2 * CHUNK + 1000,), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, torch.cat([pack_bits(part, bits) for part in codes.split(CHUNK // 2)]))
    assert torch.equal(unpack_bits(packed, bits, len(codes)), codes)
