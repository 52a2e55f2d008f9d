"""docs/format.md says every byte: what is read by it, without torch and q8lightning, is what ``torch.load`` returns."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from support.models import Autoencoder, Diary, TwoOptimizers, train_and_save
from support.promises import load, same_bits, tensors
from torch import Tensor, nn

from q8lightning import QuantizationCallback, export_quantized, keep_encoded
from q8lightning.quantization.spec.codebook import BUILTIN, FAMILY_OF, get_codebook
from q8lightning.quantization.spec.packing import pack
from q8lightning.quantization.spec.reference import dequantize_log
from q8lightning.tools import compress

sys.path.append(str(Path(__file__).parents[2] / "golden"))

from make import POLICY, QAT, EveryCodec
from support import by_hand

GOLDEN = Path(__file__).parents[2] / "golden"


def trained(folder: Path, model: Any, callback: QuantizationCallback) -> Path:
    train_and_save(folder, model, callback, Diary())
    return folder / "a.ckpt"


def encoded_again(folder: Path) -> Path:
    """A file of ``torch.save``, whose records lie in a folder of its own name, and none together."""
    with keep_encoded():
        torch.save(load(GOLDEN / "resume_v1.ckpt"), folder / "named.ckpt")
    return folder / "named.ckpt"


def compressed(folder: Path) -> Path:
    """What the command line writes, record by record."""
    torch.save(load(GOLDEN / "codecs_v1.ckpt"), folder / "plain.ckpt")
    compress(folder / "plain.ckpt", folder / "a.ckpt", POLICY)
    return folder / "a.ckpt"


FILES: dict[str, Callable[[Path], Path]] = {
    "golden resume": lambda folder: GOLDEN / "resume_v1.ckpt",
    "golden compact": lambda folder: GOLDEN / "compact_v1.ckpt",
    "golden precise": lambda folder: GOLDEN / "precise_v1.ckpt",
    "golden codecs": lambda folder: GOLDEN / "codecs_v1.ckpt",
    "resume": lambda folder: trained(folder, Autoencoder(), QuantizationCallback()),
    "compact": lambda folder: trained(folder, TwoOptimizers(), QuantizationCallback("compact")),
    "every codec, trained quantized": lambda folder: trained(
        folder, EveryCodec(), QuantizationCallback(POLICY, qat=QAT)
    ),
    "torch.save": encoded_again,
    "compress": compressed,
}


@pytest.fixture(params=FILES, scope="module")
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FILES[request.param](tmp_path_factory.mktemp("file"))


@pytest.fixture(scope="module")
def read(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a process without torch and q8lightning finds in a file: what it says, and the arrays."""
    target = tmp_path_factory.mktemp("read") / "arrays.npz"
    done = subprocess.run(
        [sys.executable, "-I", by_hand.__file__, str(file), str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    arrays = dict(np.load(target))
    return json.loads(arrays.pop("about").tobytes()), arrays


Read = tuple[dict[str, Any], dict[str, np.ndarray]]


def as_tensor(array: np.ndarray, dtype: str) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found


def test_every_tensor_is_what_torch_load_returns(file: Path, read: Read) -> None:
    about, arrays = read
    expected = {".".join(map(str, path)): tensor for path, tensor in tensors(load(file))}
    assert list(about["tensors"]) == list(expected)
    assert about["payloads"], "nothing is encoded"
    for name, tensor in expected.items():
        dtype, strides = about["tensors"][name]
        assert f"torch.{dtype}" == str(tensor.dtype), name
        assert same_bits(as_tensor(arrays[name], dtype), tensor), name
        if name in about["payloads"]:
            header, *_ = about["payloads"][name]
            assert tuple(strides) == tensor.stride() or 1 in tensor.shape, name
            assert header.get("requires_grad", False) == tensor.requires_grad
            assert header.get("parameter", False) == (type(tensor) is nn.Parameter)


def test_the_checksum_is_of_what_the_page_says(read: Read) -> None:
    about, arrays = read
    for name, (_, text, checksum) in about["payloads"].items():
        seed = xxhash.xxh3_64_intdigest(text.encode())
        assert xxhash.xxh3_64_intdigest(arrays[f"data of {name}"].tobytes(), seed=seed) == checksum


def test_the_codes_of_trained_weights_are_those_that_are_exported(file: Path, read: Read, tmp_path: Path) -> None:
    about, arrays = read
    described = load(file)["q8lightning"].get("qat", {})
    assert about["qat"] == list(described)
    if not described:
        return
    export_quantized(file, tmp_path / "codes.pt", format="codes")
    exported = torch.load(tmp_path / "codes.pt", weights_only=True)["state_dict"]
    for name in about["qat"]:
        codes, scales, levels = (arrays[f"{what} of {name}"] for what in ("codes", "scales", "levels"))
        assert torch.equal(exported[name]["scales"], torch.from_numpy(scales))
        assert torch.equal(exported[name]["levels"], torch.from_numpy(levels))
        width = exported[name]["bits"]
        bits = np.unpackbits(exported[name]["codes"].numpy(), bitorder="little")[: codes.size * width]
        assert np.array_equal((bits.reshape(-1, width) << np.arange(width)).sum(axis=1), codes.ravel())


@pytest.mark.parametrize("name", [*BUILTIN, get_codebook([-1.0, -0.3, 0.0, 0.2]).spec])
def test_the_levels_are_those_of_the_page(name: str) -> None:
    ways = [(name,)]
    if name in FAMILY_OF:
        ways.append((FAMILY_OF[name], get_codebook(name).bits))
    for way in ways:
        found = by_hand.PAGE["levels_of"](*way)
        assert found.dtype == np.float32
        assert same_bits(torch.from_numpy(found.copy()), get_codebook(name).tensor())


@pytest.mark.parametrize("count", [0, 1, 64, 100])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_bits_unpack_alike(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
    packed = pack(codes, bits, 32).numpy()
    assert len(packed) == by_hand.PAGE["packed_bytes"](count, bits, 32)
    found = by_hand.PAGE["unpack"](packed, bits, 32, count)
    assert found.dtype == np.uint8
    assert found.tolist() == codes.tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_log_codes_decode_alike_at_every_magnitude(bits: int) -> None:
    """From the smallest float to the largest, narrow blocks and wide ones, every code of each."""
    bounds = torch.tensor(
        [[0.0, 0.0], [1e-45, 1e-45], [1e-45, 3e38], [1e-40, 2e-38], [0.5, 0.5], [0.5, 0.5001], [1.0, 1.5], [1e-12, 7.0]]
    )
    codes = (torch.arange(256) % 2**bits).to(torch.uint8).repeat(len(bounds))
    low, high = (bounds[:, side].repeat_interleave(256).numpy() for side in (0, 1))
    found = by_hand.PAGE["decode_log"](codes.numpy(), low, high, bits)
    assert same_bits(torch.from_numpy(found), dequantize_log(codes, bounds, 256, bits, torch.float32))


@pytest.mark.parametrize("preset", ["resume", "compact", "precise"])
def test_the_example_of_the_page_reads_a_tensor(preset: str) -> None:
    path = GOLDEN / f"{preset}_v1.ckpt"
    found = by_hand.PAGE["read_tensor"](path, "state_dict", "layer.weight")
    assert same_bits(torch.from_numpy(np.array(found)), load(path)["state_dict"]["layer.weight"])
