"""Files of format version 1 are read for ever, and written to the bit alike for as long as there is no other version.

The files come from ``tests/golden/make.py``. If a test here fails, then the package is wrong, not the file.
"""

import hashlib
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.promises import load, payloads_of, same_bits, tensors
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizedCheckpointIO, export_quantized, keep_encoded
from q8lightning.checkpoint.payload import rebuild_v1

GOLDEN = Path(__file__).parents[2] / "golden"
EXPECTED: dict[str, dict[str, dict[str, Any]]] = json.loads((GOLDEN / "expected_v1.json").read_text())
REBUILD = "q8lightning.checkpoint.payload rebuild_v1"
CHECKSUMS = {
    "resume": 14540554226492412232,
    "compact": 2178339410458747234,
    "precise": 1879797028596675038,
}
"""Of ``state_dict.layer.weight``."""
WEIGHTS = {"resume": ("linear", 256, 8, 3), "compact": ("softsign", 256, 8, 0), "precise": ("linear", 256, 8, 8)}
MOMENTS = {"resume": (6, 6, "bfloat16"), "compact": (5, 4, "bfloat16"), "precise": (8, 8, "float32")}
"""Codec, block size, bits and bits of the residual of weights, and the bits of both moments and their scales' dtype."""

every_file = pytest.mark.parametrize("name", EXPECTED)


@pytest.fixture(params=WEIGHTS)
def preset(request: pytest.FixtureRequest) -> str:
    """The name of each preset in turn."""
    name: str = request.param
    return name


@pytest.fixture
def golden(preset: str) -> Path:
    """The file of a preset."""
    return GOLDEN / f"{preset}_v1.ckpt"


def flat(checkpoint: Any) -> dict[str, Tensor]:
    return {".".join(map(str, path)): tensor for path, tensor in tensors(checkpoint)}


def sha256(tensor: Tensor) -> str:
    content = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256((content.view(torch.uint8) if content.numel() else content).numpy().tobytes()).hexdigest()


@every_file
@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"map_location": "cpu"}], ids=str)
def test_the_values_are_the_same_to_the_bit(options: dict[str, Any], name: str) -> None:
    found = flat(load(GOLDEN / f"{name}_v1.ckpt", **options))
    assert list(found) == list(EXPECTED[name])
    for path, expected in EXPECTED[name].items():
        tensor = found[path]
        assert str(tensor.dtype) == f"torch.{expected['dtype']}", path
        assert list(tensor.shape) == expected["shape"], path
        assert tensor.flatten()[:3].tolist() == expected["first"], path
        assert sha256(tensor) == expected["sha256"], path


def test_the_values_are_what_a_person_would_expect(golden: Path) -> None:
    found = flat(load(golden))
    assert found["state_dict.table"][[0, -1]].tolist() == [-1.0, 1.0]
    assert found["optimizer_states.0.state.0.step"].item() == 2.0
    own = flat(load(GOLDEN / "codecs_v1.ckpt"))["state_dict.every.own"]
    assert own.view(-1)[64:128].tolist() == [0.0] * 64


def test_the_tied_pair_is_tied(golden: Path) -> None:
    state = load(golden)["state_dict"]
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert state["half.weight"].dtype == torch.bfloat16
    assert list(state) == ["table", "layer.weight", "layer.bias", "embedding.weight", "head.weight", "half.weight"]


def test_parameters_are_parameters_and_strides_are_kept() -> None:
    checkpoint = load(GOLDEN / "codecs_v1.ckpt")
    assert type(checkpoint["parameter"]) is nn.Parameter
    assert type(checkpoint["wants_grad"]) is Tensor
    assert checkpoint["parameter"].requires_grad
    assert checkpoint["wants_grad"].requires_grad
    assert not any(each.requires_grad for each in checkpoint["state_dict"].values())
    assert checkpoint["state_dict"]["every.columns"].stride() == (1, 13)


def test_the_codecs_are_those_that_the_presets_had(preset: str, golden: Path) -> None:
    found = {name: payload.codec for name, payload in payloads_of(golden).items()}
    weights, (first, second, scales) = (*WEIGHTS[preset], "float32"), MOMENTS[preset]
    expected = {
        "state_dict.layer.weight": weights,
        "state_dict.embedding.weight": weights,
        "state_dict.head.weight": weights,
        "optimizer_states.0.state.0.exp_avg": ("softsign", 128, first, 0, scales),
        "optimizer_states.0.state.0.exp_avg_sq": ("log", 128, second, 0, scales),
    }
    if preset != "precise":  # in bfloat16: 12 bits and 8 bits are fewer than its 16
        expected["state_dict.half.weight"] = weights
    codecs = {
        name: (codec.name, codec.block_size, codec.bits, codec.residual_bits, codec.scale_dtype)
        for name, codec in found.items()
    }
    assert codecs == expected


def test_there_is_a_file_with_every_codec() -> None:
    codecs = [payload.codec for payload in payloads_of(GOLDEN / "codecs_v1.ckpt").values()]
    narrow = {codec.label for codec in codecs if codec.scale_dtype == "bfloat16"}
    assert narrow == {"linear", "softsign6", "log5", "int4"}
    assert {codec.label for codec in codecs if codec.scale_dtype == "float32"} == {
        *("linear", "linear8+8", "linear8+4", "linear5+7", "linear3", "softsign", "softsign6", "softsign5"),
        *("log", "log5", "log4", "dynamic", "dynamic_unsigned", "normal_float4", "int2"),
        *("int8", "fp8_e4m3", "fp8_e5m2", "custom"),
    }


def calls_of(path: Path) -> list[str]:
    """Return the functions and classes of q8lightning that a file names."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        names = [argument for _, argument, _ in pickletools.genops(archive.read(name)) if isinstance(argument, str)]
    return sorted({name for name in names if name.startswith("q8lightning.")})


@every_file
def test_saving_them_again_writes_the_same_payloads(name: str, tmp_path: Path) -> None:
    golden = GOLDEN / f"{name}_v1.ckpt"
    checkpoint = load(golden)
    policy = name if name in WEIGHTS else CheckpointPolicy(**checkpoint["q8lightning"]["policy"])
    QuantizedCheckpointIO(checkpoint=policy).save_checkpoint(checkpoint, tmp_path / "again.ckpt")
    old, new = (payloads_of(path) for path in (golden, tmp_path / "again.ckpt"))
    assert list(old) == list(new)
    for path, payload in old.items():
        (old_call, old_arguments), (new_call, new_arguments) = payload.__reduce__(), new[path].__reduce__()
        assert old_call is new_call is rebuild_v1
        (*old_words, old_data, _, old_nbytes), (*new_words, new_data, _, new_nbytes) = old_arguments, new_arguments
        assert old_nbytes == new_nbytes == len(old_data), path
        assert old_words == new_words, path
        assert same_bits(old_data, new_data), path
    assert calls_of(tmp_path / "again.ckpt") == [REBUILD]


@every_file
def test_a_file_names_no_more_of_the_package_than_is_promised(name: str) -> None:
    assert calls_of(GOLDEN / f"{name}_v1.ckpt") == [REBUILD]


def test_small_tensors_have_memory_of_their_own(golden: Path) -> None:
    found = flat(load(golden))
    small = {name: tensor for name, tensor in found.items() if tensor.numel() < 4096}
    assert len(small) == 6
    for name, tensor in small.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert len({tensor.data_ptr() for tensor in small.values()}) == 6


@every_file
def test_the_summary_is_the_last_entry(name: str) -> None:
    checkpoint = load(GOLDEN / f"{name}_v1.ckpt")
    assert list(checkpoint)[-1] == "q8lightning"
    assert checkpoint["q8lightning"]["format_version"] == 1


def test_the_codes_of_weights_that_were_trained_quantized_are_exported(tmp_path: Path) -> None:
    """One of the two layers has them in the summary, the other one in its payload."""
    export_quantized(GOLDEN / "codecs_v1.ckpt", tmp_path / "codes.pt", format="codes")
    assert (tmp_path / "codes.pt").stat().st_size > 0
    described = load(GOLDEN / "codecs_v1.ckpt")["q8lightning"]["qat"]
    assert list(described["flat.weight"]) == ["codebook", "block_size", "axis"]
    assert list(described["rows.weight"]) == ["codebook", "block_size", "axis", "codes", "scales"]


def test_the_header_of_a_payload_is_one_string(preset: str, golden: Path) -> None:
    with keep_encoded():
        payload = load(golden)["state_dict"]["layer.weight"]
    assert payload.checksum == CHECKSUMS[preset]
    _, (what, header, checksum, data, start, nbytes) = payload.__reduce__()
    codec, block_size, bits, residual = WEIGHTS[preset]
    assert what == "tensor"
    assert header == json.dumps(
        {
            "codec": {"name": codec, "bits": bits, "block_size": block_size}
            | ({"residual_bits": residual} if residual else {}),
            "shape": (64, 64),
            "stride": (64, 1),
            "dtype": "float32",
            "name": "state_dict.layer.weight",
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    assert checksum == CHECKSUMS[preset]
    assert (data.dtype, data.ndim, start, nbytes) == (torch.uint8, 1, 0, payload.nbytes)
