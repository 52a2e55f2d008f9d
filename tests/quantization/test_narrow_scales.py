"""Scales of two bytes: every mantissa and code is found again, nothing vanishes, and all backends write the same bytes.

The contract suites (``support/schemes.py``, ``test_codec.py``, ``test_grouped.py``) have these codecs, too.
"""

from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.devices import NOT_INTERPRETED, interpreted
from support.oracle import same_bits
from torch import Tensor

from q8lightning import CheckpointPolicy, Rule, WeightRule
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.quantization.backends import cpu
from q8lightning.quantization.backends.choose import launching
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN
from q8lightning.quantization.spec.scale_dtype import narrow, round_bounds, widen

LARGEST = torch.finfo(torch.float32).max
CLOSE_AT_THE_END = ("dynamic", "dynamic_unsigned")
NAMES = [name for name in BUILTIN if name not in CLOSE_AT_THE_END]
LOWER_HALVES = (0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF)
"""Of a float32 pattern, around every point at which a rounding to bfloat16 changes."""


def patterns(*octaves: int) -> Tensor:
    """Return floats of some octaves: each bfloat16 with each of :data:`LOWER_HALVES` behind it, ``[n]``."""
    upper = torch.cat([torch.arange(128) + 128 * octave for octave in octaves])
    return ((upper[:, None] << 16) + torch.tensor(LOWER_HALVES)).flatten().int().view(torch.float32)


def narrow_codec(name: str, block_size: int = 32, bits: int | None = None) -> Codec:
    return get_codec(name, block_size, bits, scale_dtype="bfloat16")


def test_of_every_mantissa_the_quotient_by_its_scale_is_beyond_the_last_threshold() -> None:
    """In float64, without the package: 257/258 is the least, and every threshold is below it."""
    mantissas = 1 + np.arange(2**23) * 2.0**-23
    quotient = mantissas / oracle.to_bfloat16(mantissas)
    assert quotient.min() > 257 / 258
    assert quotient.max() <= 257 / 256
    for name in NAMES:
        book = BUILTIN[name]
        if book.levels[-1] == 1:
            assert float(book.thresholds[-1]) < 257 / 258 * (1 - 2.0**-22), name
        if book.levels[0] == -1:
            assert float(book.thresholds[0]) > -257 / 258 * (1 - 2.0**-22), name


@pytest.mark.parametrize("name", ["linear", "softsign6", "int8"])
def test_every_mantissa_finds_its_scale_again(name: str) -> None:
    book = BUILTIN[name].with_scales("bfloat16")
    for part in torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).split(2**21):
        x = torch.stack([part.view(torch.float32), torch.zeros(len(part))], dim=1)
        codes, scale = reference.quantize(x, book, 2, book.one_sided)
        assert same_bits(scale.abs(), oracle.to_bfloat16(x[:, 0]))
        decoded = reference.dequantize(codes, scale, book, 2, torch.float32)
        again = reference.quantize(decoded, book, 2, book.one_sided)
        assert same_bits(decoded[:, 0], scale.abs())
        assert torch.equal(again[0], codes)
        assert same_bits(again[1], scale)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_is_found_again_at_every_scale(name: str) -> None:
    """All levels of a block at once, for each of the 128 mantissas of a scale: as few others as there are octaves."""
    book = BUILTIN[name].with_scales("bfloat16")
    scale = patterns(0x01, 0x7F, 0xFE)[:: len(LOWER_HALVES)]
    levels = torch.tensor(book.levels)
    x = levels * scale[:, None]
    codes = torch.arange(len(levels)).expand(x.shape)
    if scale.min() * levels[levels > 0].min() < 2.0**-126:  # a level below the smallest normal number may round
        x, codes, scale = x[128:], codes[128:], scale[128:]
    assert same_bits(oracle.nearest(oracle.normalise(x, scale, len(levels)), levels), codes)
    found, its_scale = reference.quantize(x, book, len(levels), book.one_sided)
    assert torch.equal(found.long(), codes)
    assert same_bits(its_scale.abs(), scale)


def test_bounds_are_the_nearest_inside_of_the_block() -> None:
    low = patterns(0, 1, 2, 0x7F, 0xFD)[1:]
    for distance in (0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x10001, 0x1FFFF, 0x20000, 2**20, 2**23):
        high = (low.view(torch.int32) + distance).view(torch.float32)
        found = round_bounds(torch.stack([low, high], dim=1), "bfloat16")
        expected = oracle.bounds_inside(low, high)
        assert all(map(same_bits, found.unbind(dim=1), expected)), distance
        assert bool((found > 0).all())
        assert bool((found[:, 0] <= found[:, 1]).all())
        assert bool(found.isfinite().all())
        assert same_bits(round_bounds(found, "bfloat16"), found)
        assert same_bits(widen(narrow(found, torch.bfloat16)), found)
    nothing = torch.zeros(1, 2)
    assert same_bits(round_bounds(nothing, "bfloat16"), nothing)


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_both_bounds_of_a_block_come_back_however_close(bits: int) -> None:
    first = patterns(0, 1, 0x7F, 0xFD).view(torch.int32)[1:]
    for distance in (0, 1, 0x7FFF, 0x8000, 0x10000, 0x17FFF, 0x18000, 0x20000, 2**18, 2**20, 2**23):
        x = torch.stack([first, first + distance // 2, first + distance, 0 * first], dim=1).view(torch.float32)
        codes, bounds = reference.quantize_log(x, 4, bits, "bfloat16")
        decoded = reference.dequantize_log(codes, bounds, 4, bits, torch.float32)
        assert same_bits(decoded[:, 0], bounds[:, 0])
        assert same_bits(decoded[:, 2], bounds[:, 1])
        assert torch.equal(decoded == 0, x == 0)
        again = reference.quantize_log(decoded, 4, bits, "bfloat16")
        assert torch.equal(again[0], codes)
        assert same_bits(again[1], bounds)


EDGES = {
    "zeros": [0.0] * 40,
    "one element": [0.7],
    "the smallest": [1e-45, 3e-45, 1e-44, 0.0],
    "below and above the smallest bfloat16": [1e-45, 9.0e-41, 9.3e-41, 1e-39],
    "the largest": [LARGEST, LARGEST / 2, 1.0, 1e-45],
    "only the largest": [LARGEST] * 33,
    "between two neighbours": [1 + 2.0**-9, 1 + 2.0**-8, 1 + 3 * 2.0**-9],
    "a short last block": [*np.geomspace(1e-12, 1e-3, 75).astype(np.float32).tolist()],
    "empty": [],
}
CODECS = [narrow_codec("softsign", 32, 6), narrow_codec("linear"), narrow_codec("int4"), narrow_codec("log", 32, 5)]


@pytest.mark.parametrize("x", [*map(torch.tensor, EDGES.values())], ids=EDGES.keys())
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.label)
def test_ten_generations_have_the_same_bytes_in_every_backend(codec: Codec, x: Tensor) -> None:
    for values in {id(x): x, 1: x if codec.unsigned else -x}.values():
        first = encode_many([values], [codec]).data[0]
        parts = codec.encode(values)
        assert all(map(same_bits, codec.split(first, x.numel()), parts))
        assert bool(parts[1].isfinite().all())
        data, decoded = first, values
        for _ in range(10):
            decoded = codec.decode(codec.split(data, x.numel()), torch.float32)
            data = encode_many([decoded], [codec]).data[0]
            assert torch.equal(data, first)
        assert bool(decoded.isfinite().all())
        assert codec.name != "log" or torch.equal(decoded == 0, values == 0)
        with launching(interpreted()):
            launched = encode_many([values, decoded], [codec, codec], measure=True)
        assert all(torch.equal(each, first) for each in launched.data)
        assert not launched.failed.any()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.label)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told(codec: Codec, poison: float) -> None:
    x = torch.ones(100)
    x[40] = poison
    for launch in {False, interpreted()}:
        with launching(launch):
            encoded = encode_many([x, torch.ones(100)], [codec, codec], measure=True)
        assert encoded.failed.bool().tolist() == [True, False]
        decoded = codec.decode(codec.split(encoded.data[0], 100), torch.float32)
        assert bool(decoded[[*range(32), *range(64, 100)]].isfinite().all())
        assert not bool(decoded[32:64].isfinite().any())


def test_a_scale_takes_two_bytes() -> None:
    for codec, scales in ((narrow_codec("softsign", 128, 6), 1), (narrow_codec("log", 128, 5), 2)):
        assert codec.scale_bytes(1000) == 8 * 2 * scales
        assert codec.encoded_bytes(1000) == 8 * (2 * scales + 16 * codec.bits)
        assert codec.entry["scale_dtype"] == "bfloat16"
    assert "scale_dtype" not in get_codec("softsign", 128, 6).entry


@pytest.mark.parametrize("name", ["linear", "softsign", "softsign5", "int8"])
def test_what_lies_beyond_the_scale_is_in_the_bound_of_the_error(name: str) -> None:
    codec = narrow_codec(name)
    for largest in (1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20):  # rounded down and up
        x = torch.full((320,), largest)
        parts = codec.encode(x)
        lost = float(((codec.decode(parts, x.dtype) - x).norm() / x.norm()).double())
        assert 0.003 < lost <= codec.relative_error_bound(x, parts)


@NOT_INTERPRETED
def test_directions_are_measured_from_scales_of_either_width() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5000, generator=generator)
    second = second.square() * 1e-3
    for codecs in (
        (CODECS[0], get_codec("log", 64, 5)),
        (get_codec("softsign", 64, 6), CODECS[3]),
        (CODECS[0], CODECS[3]),
    ):
        sums = []
        for launch in (False, True):
            with launching(launch):
                data = encode_many([first, second], codecs).data
                stored = [StoredMoment(*each) for each in zip((first, second), codecs, data, strict=True)]
                sums.append(update_direction_sums([Moments(*stored)]))
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=0.0)
        direction = first / (second.sqrt() + 1e-8)
        one, two = (codec.decode(codec.encode(x), x.dtype) for codec, x in zip(codecs, (first, second), strict=True))
        error = one / (two.sqrt() + 1e-8) - direction
        torch.testing.assert_close(sums[0][0, 0], error.double().square().sum(), rtol=1e-4, atol=0.0)


def test_presets_have_them_for_moments_only() -> None:
    for name, policy in PRESETS.items():
        for path in ("state_dict.w", "optimizer_states.0.state.0.exp_avg", "optimizer_states.0.state.0.exp_avg_sq"):
            codec = policy.codec_for(path)
            assert codec is not None
            is_narrow = name != "precise" and path.startswith("optimizer")
            assert codec.scale_dtype == ("bfloat16" if is_narrow else "float32"), (name, path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"codec": "linear", "residual_bits": 4},
        "rule for 'x': the scales of a codec with a residual stage are float32, got scale_dtype='bfloat16'; leave it"
        " out, or drop residual_bits",
    ),
    *(
        ({"codec": name}, f"rule for 'x': .* need the last two levels 1/128 apart, got {name}")
        for name in CLOSE_AT_THE_END
    ),
    (
        {"codec": "log", "scale_dtype": "float16"},
        "rule for 'x': scale_dtype .* is float32 or bfloat16, .* got 'float16'",
    ),
    ({"codec": "int4 with float16 scales", "scale_dtype": "float32"}, "got 'float16'; try 'bfloat16'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_rules_that_cannot_have_them_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule("x", **{"scale_dtype": "bfloat16", **options})


def test_a_rule_says_so_in_either_way_and_is_read_back() -> None:
    rule = Rule("x", "int4", 64, scale_dtype="bfloat16")
    assert rule == Rule("x", "int4 with bfloat16 scales", 64)
    assert (rule.codec, rule.bits) == ("int4", 4)
    policy = CheckpointPolicy([rule])
    assert CheckpointPolicy(**policy.as_primitives()).codec_for("x") == rule.resolve()


def test_a_weight_trained_with_them_has_the_codes_of_its_payload() -> None:
    x = torch.randn(7, 100)
    trained = WeightRule("*", "int4", 64, scale_dtype="bfloat16").resolve()
    stored = Rule("x", "int4", 64, scale_dtype="bfloat16").resolve()
    assert trained is not None
    assert stored is not None
    assert stored.codebook == trained.codebook
    assert all(
        map(same_bits, [each.view(-1) for each in stored.encode(x)], [each.view(-1) for each in trained.encode(x)])
    )


def test_cpus_encode_into_memory_of_two_bytes_a_scale() -> None:
    codec, x = narrow_codec("log", 64, 5), torch.rand(1000).square()
    assert codec.kernel is not None
    data = torch.full((codec.encoded_bytes(1000),), 77, dtype=torch.uint8)
    parts = codec.layout.views(data, 1000)
    assert parts[1].dtype == torch.bfloat16
    assert cpu.encode_into(x, codec.kernel, parts)
    assert all(map(same_bits, codec.split(data, 1000), codec.encode(x)))
