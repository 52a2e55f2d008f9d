"""Files of format 1 are read for ever, and written to the bit alike for as long as there is no other format.

The files come from ``tests/golden/make.py``. If a test here fails, then the package is wrong, not the file.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.promises import load, payloads_of, same_bits, tensors
from torch import Tensor

from q8lightning import QuantizedCheckpointIO, keep_encoded
from q8lightning.checkpoint.payload import rebuild_v1

GOLDEN = Path(__file__).parents[2] / "golden"

FIRST_VALUES: dict[str, dict[str, list[float]]] = {
    "resume": {
        "state_dict.layer.weight": [0.030894916504621506, 0.09247824549674988, 0.12107142060995102],
        "state_dict.embedding.weight": [0.6827864050865173, 2.037729263305664, 0.05186647176742554],
        "state_dict.half.weight": [-0.02685546875, -0.007568359375, -0.042724609375],
        "optimizer_states.0.state.0.exp_avg": [0.006616688799113035, 0.027230586856603622, 0.00217055412940681],
        "optimizer_states.0.state.0.exp_avg_sq": [
            2.021179534494877e-05,
            0.0002866388240363449,
            0.00011951076157856733,
        ],
    },
    "compact": {
        "state_dict.layer.weight": [0.030571788549423218, 0.09276474267244339, 0.12185393273830414],
        "state_dict.embedding.weight": [0.6860702037811279, 2.041440010070801, 0.04711015522480011],
        "state_dict.half.weight": [-0.0267333984375, -0.007781982421875, -0.042724609375],
        "optimizer_states.0.state.0.exp_avg": [0.006616688799113035, 0.027230586856603622, 0.00217055412940681],
        "optimizer_states.0.state.0.exp_avg_sq": [
            2.021179534494877e-05,
            0.0002866388240363449,
            0.00011951076157856733,
        ],
    },
}
CHECKSUMS = {"resume": 13621835731285095455, "compact": 2877949218341502240}
"""Of ``state_dict.layer.weight``."""
REBUILD = "q8lightning.checkpoint.payload rebuild_v1"
CALLS = {
    "v1": [REBUILD],
    "v1_checksums": [REBUILD],
    "v1_small": [REBUILD, f"{REBUILD}_apart"],
    "v1_pooled": [REBUILD, f"{REBUILD}_item", f"{REBUILD}_small"],
}
"""What each file calls: as it was first, since payloads have checksums, since small tensors lie together, and since the
pickle has only a number for each of these."""
WEIGHTS = {"resume": ("linear", 256, True), "compact": ("softsign", 256, False)}


@pytest.fixture(params=list(CALLS))
def golden(preset: str, request: pytest.FixtureRequest) -> Path:
    """A file of a preset."""
    return GOLDEN / f"{preset}_{request.param}.ckpt"


def flat(checkpoint: Any) -> dict[str, Tensor]:
    return {".".join(map(str, path)): tensor for path, tensor in tensors(checkpoint)}


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"map_location": "cpu"}], ids=str)
def test_the_values_are_the_same_to_the_bit(options: dict[str, Any], preset: str, golden: Path) -> None:
    found = flat(load(golden, **options))
    expected = load(GOLDEN / "expected_v1.pt")[preset]
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


def test_the_values_are_these(preset: str, golden: Path) -> None:
    found = flat(load(golden))
    for name, values in FIRST_VALUES[preset].items():
        assert found[name].flatten()[:3].tolist() == values, name
    assert found["state_dict.table"][[0, -1]].tolist() == [-1.0, 1.0]
    assert found["optimizer_states.0.state.0.step"].item() == 2.0


def test_the_tied_pair_is_tied(golden: Path) -> None:
    state = load(golden)["state_dict"]
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert state["half.weight"].dtype == torch.bfloat16
    assert list(state) == ["table", "layer.weight", "layer.bias", "embedding.weight", "head.weight", "half.weight"]


def test_the_codecs_are_those_that_the_presets_had(preset: str, golden: Path) -> None:
    found = {name: payload.codec for name, payload in payloads_of(golden).items()}
    expected = {
        "state_dict.layer.weight": WEIGHTS[preset],
        "state_dict.embedding.weight": WEIGHTS[preset],
        "state_dict.head.weight": WEIGHTS[preset],
        "optimizer_states.0.state.0.exp_avg": ("softsign", 128, False),
        "optimizer_states.0.state.0.exp_avg_sq": ("log", 128, False),
    }
    if preset == "compact":
        expected["state_dict.half.weight"] = WEIGHTS[preset]
    assert {name: (codec.name, codec.block_size, codec.residual) for name, codec in found.items()} == expected


def calls_of(path: Path) -> list[str]:
    """Return the functions and classes of q8lightning that a file names."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        names = [argument for _, argument, _ in pickletools.genops(archive.read(name)) if isinstance(argument, str)]
    return sorted({name for name in names if name.startswith("q8lightning.")})


def test_saving_them_again_writes_the_same_payloads(preset: str, tmp_path: Path, golden: Path) -> None:
    QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(load(golden), tmp_path / "again.ckpt")
    old, new = (payloads_of(path) for path in (golden, tmp_path / "again.ckpt"))
    assert list(old) == list(new)
    for name, payload in old.items():
        (old_call, old_arguments), (new_call, new_arguments) = payload.__reduce__(), new[name].__reduce__()
        assert old_call is new_call is rebuild_v1
        (old_header, *old_data), (new_header, *new_data) = old_arguments, new_arguments
        assert old_header == new_header, name
        assert all(same_bits(*pair) for pair in zip(old_data, new_data, strict=True)), name
    assert calls_of(tmp_path / "again.ckpt") == CALLS["v1_pooled"]


def test_a_file_names_no_more_of_the_package_than_is_promised(golden: Path) -> None:
    assert calls_of(golden) == CALLS[golden.stem.partition("_")[2]]


def test_small_tensors_have_memory_of_their_own(golden: Path) -> None:
    found = flat(load(golden))
    small = {name: tensor for name, tensor in found.items() if tensor.numel() < 4096}
    assert len(small) == 6
    for name, tensor in small.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert len({tensor.data_ptr() for tensor in small.values()}) == 6


def test_the_summary_is_the_last_entry(golden: Path) -> None:
    checkpoint = load(golden)
    assert list(checkpoint)[-1] == "q8lightning"
    summary = checkpoint["q8lightning"]
    assert summary["format_version"] == 1
    assert golden.stem.endswith(("small", "pooled")) or list(summary) == ["format_version"]


def test_the_header_of_a_payload_is_primitives(preset: str, golden: Path) -> None:
    with keep_encoded():
        payload = load(golden)["state_dict"]["layer.weight"]
    assert payload.checksum == (None if golden.stem.endswith("v1") else CHECKSUMS[preset])
    _, (header, *data) = payload.__reduce__()
    codec, block_size, residual = WEIGHTS[preset]
    assert header == {
        "format_version": 1,
        "codec": codec,
        "block_size": block_size,
        "residual": residual,
        "shape": (64, 64),
        "stride": (64, 1),
        "dtype": "float32",
        "name": "state_dict.layer.weight",
        "xxh3_64": CHECKSUMS[preset],
    }
    assert [type(header[key]) for key in ("shape", "stride")] == [tuple, tuple]
    assert [(each.dtype, each.ndim) for each in data] == [(torch.uint8, 1)]
