"""Scales are rounded to what a target stores, alike in the reference, on CPUs and in the kernels; rows may be long."""

import pytest
import torch
from support.oracle import same_bits

from q8lightning import WeightRule
from q8lightning.qat.rules import WeightRule as Rule
from q8lightning.quantization.backends import cpu
from q8lightning.quantization.backends.choose import launching
from q8lightning.quantization.codecs.weight import WHOLE_ROW, WeightCodec
from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, get_codebook

NAMES = ["int4", "int8", "int2", "linear", "linear4", "softsign", "normal_float4", "dynamic", "fp8_e4m3"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MAGNITUDES = [1e-40, 1e-30, 3e-8, 1e-6, 5e-5, 1e-3, 1.0, 3e4, 1e6, 3e38]
"""Below float16's smallest number, below its smallest normal one, and beyond its largest, for every codebook."""


def blocks(seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    rows = [torch.randn(64).clamp(-1, 1) * magnitude for magnitude in MAGNITUDES]
    return torch.cat([*rows, torch.zeros(64), torch.tensor([torch.inf, *[1.0] * 63]), torch.tensor([torch.nan] * 64)])


def with_scales(name: str, scale_dtype: str) -> Codebook:
    return BUILTIN[name].with_scales(scale_dtype)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_stored_scale_is_the_nearest_of_its_dtype(name: str, scale_dtype: str) -> None:
    book, x = with_scales(name, scale_dtype), blocks()
    unit = 2 ** (book.bits - 1) if name.startswith("int") else 1
    _, scale = reference.quantize(x, book, 64, book.one_sided)
    _, plain = reference.quantize(x, BUILTIN[name], 64, book.one_sided)
    finite = plain.isfinite()
    stored = (scale / unit).to(DTYPES[scale_dtype])
    assert torch.equal(finite, scale.isfinite())
    assert same_bits((stored.float() * unit)[finite], scale[finite])
    most = torch.finfo(DTYPES[scale_dtype]).max
    inside = finite & ((plain / unit).abs() <= most)
    distance = (plain.double() - scale.double()).abs() / unit
    for step in (-1, 1):  # the neighbours of what is stored are not nearer
        patterns = stored.view(torch.int16) + step
        other = patterns.view(DTYPES[scale_dtype]).double()
        ok = inside & other.isfinite()
        assert bool((distance[ok] <= (plain.double() / unit - other).abs()[ok]).all())
    assert bool(((scale / unit).abs()[finite & ~inside] == most).all())


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_cpus_and_kernels_return_the_bits_of_the_reference(name: str, scale_dtype: str) -> None:
    from q8lightning.quantization.backends.kernels import blockwise

    book, x = with_scales(name, scale_dtype), blocks()[:-7]
    for signed in {False, book.one_sided}:
        codes, scale = reference.quantize(x, book, 64, signed)
        for backend in (cpu, blockwise):
            got, its_scale = backend.quantize(x, book, 64, signed)
            assert torch.equal(got, codes), backend
            assert same_bits(its_scale, scale), backend
    expected = reference.fake_quantize(x, book, 64)
    for backend in (cpu, blockwise):
        assert same_bits(backend.fake_quantize(x, book, 64), expected), backend


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "linear", "normal_float4"])
def test_many_tensors_are_quantized_as_one_is(name: str, scale_dtype: str, measure: bool) -> None:
    codec = WeightCodec(with_scales(name, scale_dtype).spec, 32, 0)
    for launch in (False, True):
        tensors = [torch.randn(12, 64) * 0.02, torch.randn(3, 40), blocks()[: 10 * 64].view(10, 64)]
        expected = [codec.fake_quantize(each) for each in tensors]
        with launching(launch):
            group = FakeQuantizeGroup(tensors, codec.book, 32, 0)
            group.engage(measure=measure)
        for tensor, values in zip(tensors, expected, strict=True):
            assert same_bits(tensor, values)
        group.release()


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "int8", "linear", "softsign", "normal_float4", "fp8_e4m3"])
def test_what_was_decoded_encodes_to_the_same_again(name: str, scale_dtype: str) -> None:
    codec = WeightCodec(with_scales(name, scale_dtype).spec, 32, 0)
    x = torch.randn(4096, 32) * torch.logspace(-1.5, 3, 4096)[:, None]
    codes, scales = codec.encode(x)
    again, scales_again = codec.encode(codec.decode(codes, scales, x))
    assert torch.equal(again, codes)
    assert same_bits(scales_again, scales)


def test_a_codebook_with_rounded_scales_has_a_name_that_is_read_back() -> None:
    book = with_scales("int4", "float16")
    assert book.spec == "int4 with float16 scales"
    assert get_codebook(book.spec) == book != BUILTIN["int4"]
    own = get_codebook([-1.0, 0.0, 0.5, 1.0]).with_scales("bfloat16")
    assert get_codebook(own.spec) == own
    assert own.with_scales("float32").spec.startswith("levels:")


def test_rules_take_dtypes_and_whole_rows() -> None:
    codec = WeightRule("*", "nf4", "row", axis=0, scale_dtype="bfloat16").resolve()
    assert codec == WeightCodec("normal_float4 with bfloat16 scales", WHOLE_ROW, 0)
    with pytest.raises(ValueError, match="scale_dtype is one of float32, float16, bfloat16, got 'fp16'; try 'float16'"):
        WeightRule("*", scale_dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'block_size="row" needs the axis of the channels, got None; write axis=0'):
        WeightRule("*", block_size="row")
    for size in (8192, "rows", WHOLE_ROW, 100):
        with pytest.raises(ValueError, match="block_size must be"):
            Rule("*", block_size=size, axis=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size must be a power of two between 32 and 4096, got 8192"):
        WeightCodec("int4", 8192)


@pytest.mark.parametrize("name", ["linear", "int4", "softsign", "normal_float4"])
@pytest.mark.parametrize("row", [20, 4096, 5000, 8192])
def test_a_row_has_one_scale_however_long_it_is(row: int, name: str) -> None:
    x = torch.randn(3, row)
    codec = WeightCodec(name, WHOLE_ROW, 0).fitted(x.shape)
    codes, scales = codec.encode(x)
    assert codes.shape == (3, row)
    assert torch.equal(scales[:, 0].abs(), x.abs().amax(dim=1))
    book = BUILTIN[name]
    parts = reference.quantize(x, book, row, book.one_sided)
    expected = reference.dequantize(*parts, book, row, x.dtype)
    assert same_bits(codec.decode(codes, scales, x), expected)
    for launch in (False, True):
        tensor = x.clone()
        with launching(launch):
            group = FakeQuantizeGroup([tensor], book, WHOLE_ROW, 0)
            group.engage(measure=True)
        assert same_bits(tensor, expected)
