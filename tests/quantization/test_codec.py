"""A codec keeps its promises under every name, and is imported without Triton or Lightning."""

import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support import oracle
from support.schemes import every_dtype
from torch import Tensor

from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import MAKERS, CodecName, get_codec
from q8lightning.quantization.many.decode import EncodedItem, decode_alone
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import ALIASES, BUILTIN, Codebook

CUSTOM = Codebook("mine", (-0.5, -0.1, 0.0, 0.3, 1.0))
CODECS = [
    *map(get_codec, BUILTIN),
    get_codec(CUSTOM.spec, 64),
    get_codec("log"),
    get_codec("linear", 64, residual_bits=8),
    get_codec("linear", 64, residual_bits=4),
    get_codec("linear", 64, 5, residual_bits=3),
    get_codec("log", 128),
    *(get_codec("log", 128, bits) for bits in range(2, 8)),
    *(get_codec(name, scale_dtype="bfloat16") for name in ("linear", "softsign", "softsign5", "int4", "fp8_e4m3")),
    get_codec(CUSTOM.spec, 64, scale_dtype="bfloat16"),
    *(get_codec("log", 128, bits, scale_dtype="bfloat16") for bits in (8, 5, 2)),
]


def codec_id(codec: Codec) -> str:
    return f"{codec.label[:12]}-{codec.block_size}{'-narrow' * (codec.scale_dtype == 'bfloat16')}"


every_codec = pytest.mark.parametrize("codec", CODECS, ids=codec_id)


def admissible(codec: Codec, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.abs() if codec.unsigned else x


def worst_error(codec: Codec, x: Tensor) -> oracle.Array:
    """How far each element may be off: half a gap times the largest of its block, half a step, or its share of itself.

    Rounding to the dtype of ``x`` comes on top, 2**-21 for the float32 arithmetic, and the rounding of the scale.
    """
    value = abs(oracle.float64(x))
    largest = oracle.spread(oracle.block_scale(x, codec.block_size), codec.block_size, x)
    rounding = value * torch.finfo(x.dtype).eps + largest * 2.0**-21
    if codec.scale_dtype == "bfloat16":
        rounding += value * 2.0**-7 if codec.name == "log" else largest * 2.0**-8
    if codec.name == "log":
        with np.errstate(divide="ignore"):
            octaves = np.log2(largest / np.min(value[value > 0], initial=np.inf))
        # Half a step, at least one in 64 octaves, and a thousandth for the grid's margin and its approximations.
        return value * (np.exp2(np.maximum(octaves / (2**codec.bits - 2), 1 / 32) / 2 + 1e-3) - 1) + rounding
    if codec.residual_bits:
        return largest / oracle.residual_steps(codec.bits, codec.residual_bits) / 2 + rounding
    levels = CUSTOM.levels if codec.name == CUSTOM.spec else BUILTIN[codec.codebook.split(" with ")[0]].levels
    gaps = np.diff(levels)  # the largest element is exact; the one of the other sign is as far off as levels are short
    short_end = 2 - (levels[-1] - levels[0]) if levels[0] < 0 else 0.0
    share = 0.5 + (0.25 / (len(levels) // 2) if codec.name == "softsign" else 0.002)  # thresholds are not midpoints
    return largest * max(share * gaps.max(), short_end) + rounding


@every_codec
@every_dtype
def test_what_is_decoded_is_close_and_encodes_to_the_same_again(codec: Codec, dtype: torch.dtype) -> None:
    for shape in ((1000,), (3, 5, 70), (1,), (), (0, 3)):
        x = admissible(codec, *shape).to(dtype)
        parts = codec.encode(x)
        decoded = codec.decode(parts, dtype)
        assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
        assert parts[0].shape == x.shape
        for _ in range(3):
            assert all(map(oracle.same_bits, codec.encode(decoded), parts))
            decoded = codec.decode(parts, dtype)
        if x.numel():
            assert np.all(abs(oracle.float64(decoded) - oracle.float64(x)) <= worst_error(codec, x))


@every_codec
def test_the_parts_are_codes_scales_and_residual(codec: Codec) -> None:
    codes, scales, *residual = codec.encode(admissible(codec, 7, 100))
    blocks = -(-700 // codec.block_size)
    assert (codes.dtype, codes.shape) == (torch.uint8, (7, 100))
    assert (scales.dtype, scales.shape) == (torch.float32, (blocks, 2) if codec.name == "log" else (blocks,))
    assert [(part.dtype, part.shape) for part in residual] == [(torch.uint8, (7, 100))] * bool(codec.residual_bits)


@every_codec
def test_encoded_bytes_are_the_bytes_of_the_parts(codec: Codec) -> None:
    for numel in (0, 1, 31, 64, 65, 256, 257, 1000):
        codes, scales, *later = codec.encode(admissible(codec, numel))
        blocks = -(-numel // codec.block_size)
        expected = scales.numel() * (2 if codec.scale_dtype == "bfloat16" else 4)
        for part, bits in zip((codes, *later), (codec.bits, codec.residual_bits), strict=False):
            assert part.numel() == numel
            expected += numel if bits == 8 else blocks * codec.block_size * bits // 8
        assert codec.encoded_bytes(numel) == expected


@every_codec
def test_the_bytes_hold_the_parts(codec: Codec) -> None:
    for numel in (1, 31, 64, 65, 257, 1000):
        parts = codec.encode(admissible(codec, numel))
        data = torch.full((codec.encoded_bytes(numel),), 77, dtype=torch.uint8)
        codec.join(parts, out=data)
        assert all(map(oracle.same_bits, codec.split(data, numel), parts))
        values = codec.decode(parts, torch.float32)
        length = 2 * codec.block_size
        stretches = -(-numel // length)
        found = [codec.decode_stretches(data, numel, slice(i, i + 1), length, torch.float32) for i in range(stretches)]
        assert oracle.same_bits(torch.cat(found), values)


def test_the_presets_cost_what_the_design_says() -> None:
    numel = 2**20
    weight, moment = get_codec("linear", 256, residual_bits=8), get_codec("softsign", 128)
    second = get_codec("log", 128)
    precise = sum(codec.encoded_bytes(numel) for codec in (weight, moment, second)) / numel
    narrow: dict[str, Any] = {"scale_dtype": "bfloat16"}
    weight = get_codec("linear", 256, None, 4)
    moment, second = get_codec("softsign", 128, 6, **narrow), get_codec("log", 128, 5, **narrow)
    resume = sum(codec.encoded_bytes(numel) for codec in (weight, moment, second)) / numel
    weight = get_codec("softsign", 256)
    moment, second = get_codec("softsign", 128, 5, **narrow), get_codec("log", 128, 4, **narrow)
    compact = sum(codec.encoded_bytes(numel) for codec in (weight, moment, second)) / numel
    assert (round(resume, 2), round(compact, 2), round(precise, 2)) == (2.94, 2.19, 4.11)


@pytest.mark.parametrize(
    "name", ["dynamic", *(f"int{bits}" for bits in range(2, 9)), CUSTOM.spec], ids=lambda name: name[:9]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_codebook_with_one_end_gets_a_signed_scale(name: str, sign: int) -> None:
    x = sign * torch.tensor([2.0, -1.0, 0.5])
    codec = get_codec(name)
    parts = codec.encode(x)
    assert abs(parts[1].item()) == 2.0
    assert codec.decode(parts, torch.float32)[0] == x[0]


def test_a_codebook_with_both_ends_or_one_sign_keeps_a_plain_scale() -> None:
    for name in ("linear", "softsign", "normal_float4", "fp8_e4m3", "fp8_e5m2", "dynamic_unsigned"):
        assert get_codec(name).encode(torch.tensor([-2.0, 1.0]))[1].item() == 2.0


def test_unsigned_says_which_codecs_take_no_negative_values() -> None:
    assert {codec.name for codec in CODECS if codec.unsigned} == {"log", "dynamic_unsigned"}
    assert get_codec(Codebook("mine", (0.0, 1.0)).spec).unsigned


@every_codec
def test_scales_that_are_not_finite_say_which_block_cannot_be_encoded(codec: Codec) -> None:
    # A negative value too, under log; any other codec takes them, or says that it is unsigned.
    for poison in (torch.nan, torch.inf, -torch.inf, *[-1.0] * (codec.name == "log")):
        x = admissible(codec, 3 * codec.block_size).float()
        x[codec.block_size + 5] = poison
        parts = codec.encode(x)
        finite = parts[1].isfinite().view(3, -1)
        assert finite.any(dim=1).tolist() == finite.all(dim=1).tolist() == [True, False, True]
        decoded = codec.decode(parts, torch.float32).view(3, -1).isfinite()
        assert decoded.any(dim=1).tolist() == decoded.all(dim=1).tolist() == [True, False, True]


def test_the_parts_of_a_parameter_hold_no_graph() -> None:
    for codec in CODECS:
        parameter = torch.nn.Parameter(admissible(codec, 300))
        assert not any(part.requires_grad for part in codec.encode(parameter)), codec


def test_the_first_stage_of_a_residual_is_the_linear_codec() -> None:
    x = admissible(get_codec("linear"), 1000).float()
    codes, scales, _ = get_codec("linear", 256, residual_bits=8).encode(x)
    assert all(map(oracle.same_bits, (codes, scales), get_codec("linear", 256).encode(x)))


@pytest.mark.parametrize("name", ["", "int1", "linear ", "LOG", "float8"])
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown codec: for second moments there is 'log'; otherwise codebook is one of linear, .*"
    ) as error:
        get_codec(name)
    assert f"got {name!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        *(
            (name, bits, f"bits must be an integer from 2 to 8, got {bits}; try 6")
            for name in ("linear", "log")
            for bits in (1, 9, 0, True, 2.5)
        ),
        ("int4", 6, "the codes of int4 have 4 bits, got bits=6; leave bits out, or use linear or softsign"),
        ("softsign6", 5, "the codes of softsign6 have 6 bits, got bits=5"),
    ],
)
def test_bits_that_a_codec_cannot_have_are_refused(name: str, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_codec(name, 128, bits)
    if name == "linear":
        with pytest.raises(ValueError, match=f"residual_{message}" if bits else "residual_bits"):
            get_codec(name, 128, 8, bits or 1)


@pytest.mark.parametrize("name", ["softsign", "dynamic", "int8", "log", "int1"])
def test_a_residual_anywhere_but_on_linear_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"residual stage needs the codec linear, got '{name}'"):
        get_codec(name, residual_bits=8)


@pytest.mark.parametrize("levels", [(-0.5, 0.0, 0.5), (0.0, 0.999), (-0.999, 0.0)], ids=str)
def test_a_codebook_that_reaches_neither_end_is_refused(levels: tuple[float, ...]) -> None:
    received = f"got levels from {levels[0]:g} to {levels[-1]:g}"
    with pytest.raises(ValueError, match=f"holds 1 or -1, {received}; divide them by the largest magnitude"):
        get_codec(Codebook("mine", levels).spec)


@pytest.mark.parametrize("block_size", [100, 16, 8192, 0, -256, 2.0, True])
def test_a_block_size_that_is_none_is_refused(block_size: object) -> None:
    with pytest.raises(ValueError, match=f"block_size must be .*, got {block_size}"):
        get_codec("linear", block_size)  # type: ignore[arg-type]


def test_type_checkers_know_the_names_of_the_table() -> None:
    known = {name for literal in get_args(CodecName) for name in get_args(literal)}
    assert known == {*MAKERS, *BUILTIN, *ALIASES}


def test_what_files_say_of_a_codec_makes_it_again() -> None:
    for codec in CODECS:
        more = {"residual_bits": codec.residual_bits != 0, "scale_dtype": codec.scale_dtype != "float32"}
        assert [*codec.entry] == ["name", "bits", "block_size", *(key for key, is_said in more.items() if is_said)]
        name, *_ = codec.entry.values()
        assert get_codec(name, **{key: value for key, value in codec.entry.items() if key != "name"}) == codec


def test_a_codec_is_a_value() -> None:
    assert get_codec("linear") == get_codec("linear", 256, 8, 0)
    assert get_codec("softsign6", 128) == get_codec("softsign", 128, 6) != get_codec("softsign", 128, 5)
    assert (
        len(
            {
                get_codec("linear"),
                get_codec("linear", 256),
                get_codec("linear", 128),
                get_codec("linear", residual_bits=8),
            }
        )
        == 3
    )


def test_a_codec_decodes_as_the_reference() -> None:
    x = admissible(get_codec("log"), 300).float()
    assert oracle.same_bits(
        get_codec("log", 128).decode(get_codec("log", 128).encode(x), torch.float32),
        reference.dequantize_log(*reference.quantize_log(x, 128, 8), 128, 8, torch.float32),
    )


# What the import needs

ROUND_TRIP = """
import torch
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
x = torch.linspace(0, 1, 100)
for codec in (get_codec("linear"), get_codec("dynamic"), get_codec("linear", residual_bits=8), get_codec("log")):
    assert (codec.decode(codec.encode(x), x.dtype) - x).abs().max() < 0.05
"""

ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"triton", "lightning", "pytorch_lightning", "torchmetrics"} - {EXCEPT}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

ALONE = """  # without q8lightning/__init__.py, the door, which imports the callback and with it Lightning
import importlib.util, sys, types
door = types.ModuleType("q8lightning")
door.__path__ = importlib.util.find_spec("q8lightning").submodule_search_locations
sys.modules["q8lightning"] = door
"""

NOT_IMPORTED = """
import torch
before = set(sys.modules)
import q8lightning.quantization.codecs.table
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not {"triton", "lightning", "pytorch_lightning", "torchmetrics"} & new, new
"""  # only that: torch itself imports Triton, where it is installed, when an operator is called


@pytest.mark.parametrize(
    "script",
    [
        ABSENT.replace("{EXCEPT}", "{'lightning', 'torchmetrics'}") + ROUND_TRIP,
        ALONE + NOT_IMPORTED + ABSENT.replace("{EXCEPT}", "set()") + ROUND_TRIP,
    ],
    ids=["the package without Triton", "the quantization wing without Triton and Lightning"],
)
def test_what_can_be_imported_and_used(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_codec
@pytest.mark.parametrize("numel", [0, 1, 5000, 2**20 + 77, 3 * 2**19])
def test_threads_that_share_a_tensor_decode_what_one_does(codec: Codec, numel: int) -> None:
    x = torch.linspace(0, 1, numel, dtype=torch.float32) ** 3
    parts = codec.encode(x)
    data = torch.empty(codec.encoded_bytes(numel), dtype=torch.uint8)
    codec.join(parts, out=data)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = decode_alone(EncodedItem(data, codec, numel, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shared, codec.decode(parts, torch.float32))
