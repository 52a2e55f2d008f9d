"""Small tensors lie together in a file, and nobody who loads it can tell."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import without_identity, written
from support.promises import assert_same, load
from torch import nn

from q8lightning import QuantizedCheckpointIO
from q8lightning.checkpoint.file.pack import zip_writer
from q8lightning.checkpoint.file.pack.compact_pickle import WORTHWHILE
from q8lightning.checkpoint.file.pack.small_tensors import SMALL, SmallTensors
from q8lightning.checkpoint.file.read import read_checkpoint
from q8lightning.checkpoint.file.write import write_checkpoint
from q8lightning.checkpoint.load_locations import located
from q8lightning.checkpoint.memory import is_dense
from q8lightning.checkpoint.tree import leaves


class Holder:
    """Something that is no container."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def checkpoint() -> dict[str, Any]:
    """A weight to quantize and all sorts of small tensors."""
    torch.manual_seed(3)
    shared, tied = torch.randn(6), torch.randn(5)
    return {
        "state_dict": {
            "weight": torch.randn(64, 65),
            "bias": torch.randn(64),
            "transposed": torch.randn(3, 4).t(),
            "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "gaps": torch.randn(8)[::2],
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "parameter": nn.Parameter(torch.randn(4)),
            "graph leaf": torch.randn(4, requires_grad=True),
            "largest": torch.arange(SMALL // 8),
            "too large": torch.arange(SMALL // 8 + 1),
            "front": shared[:4],
            "back": shared[2:],
            "tied": tied,
            "with": tied.view(5),
            "twice": tied,
        },
        "lists": [(torch.arange(3), torch.arange(4)), [torch.tensor([True, False]), torch.ones(2, dtype=torch.bool)]],
        "halves": [torch.randn(3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.complex64) * 2],
    }


def save(content: dict[str, Any], path: Path) -> None:
    QuantizedCheckpointIO(checkpoint="compact").save_checkpoint(content, path)


def storages_in(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return sum("/data/" in name for name in archive.namelist())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(checkpoint(), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"weights_only": False}, {"map_location": "cpu"}], ids=str)
def test_what_is_loaded_is_what_was_saved(options: dict[str, Any], file: Path) -> None:
    found, expected = torch.load(file, **({"weights_only": True} | options)), checkpoint()
    for content in (found, expected):
        assert content["state_dict"].pop("weight").shape == (64, 65)
    found.pop("q8lightning")
    assert_same(found, expected)
    for name in ("bias", "transposed", "channels_last", "scalar", "largest"):
        tensor = found["state_dict"][name]
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert is_dense(tensor)
        assert tensor.stride() == expected["state_dict"][name].stride()


def test_every_dtype_has_one_storage(file: Path) -> None:
    # The payload; float32, int64, bool and three other dtypes; and the six that are left alone: gaps, empty, parameter,
    # graph leaf, too large, shared, tied.
    assert storages_in(file) == 1 + 6 + 7
    assert [len(view) for view in SmallTensors([leaf for _, leaf in leaves(checkpoint())]).tags.values()] == [3] * 6, (
        "cpu"
    )


@pytest.mark.parametrize("options", [{"weights_only": False}, {"weights_only": False, "mmap": True}], ids=str)
def test_memory_that_an_object_shares_stays_shared(options: dict[str, Any], tmp_path: Path) -> None:
    content = checkpoint()
    bias = content["state_dict"]["bias"]
    for name, held in (("tensor", bias), ("view", bias[3:]), ("storage", nn.Parameter(bias))):
        save(content | {"holder": Holder(held)}, tmp_path / name)
        found = torch.load(tmp_path / name, **options)
        one, other = found["holder"].tensor, found["state_dict"]["bias"]
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        assert_same(other, bias)
    # An object that has the very tensor needs nothing special.
    assert storages_in(tmp_path / "tensor") < storages_in(tmp_path / "view")


def test_one_that_is_changed_after_it_was_loaded_changes_alone(file: Path) -> None:
    found = load(file)
    found["state_dict"]["bias"].add_(1)
    assert_same(found["state_dict"]["scalar"], checkpoint()["state_dict"]["scalar"])
    assert_same(found["state_dict"]["largest"], checkpoint()["state_dict"]["largest"])


def test_locations_are_kept(tmp_path: Path) -> None:
    content = checkpoint()
    state = {"weight": content["state_dict"]["weight"], **{f"b{i}": torch.full((3,), float(i)) for i in range(6)}}
    io = QuantizedCheckpointIO(checkpoint="compact")
    with located({state[f"b{i}"].data_ptr(): "cuda:1" for i in (1, 2, 4)}):
        io.save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
    seen = []

    def map_location(storage: Any, location: str) -> Any:
        seen.append((location, storage.nbytes()))
        return storage

    found = load(tmp_path / "a.ckpt", map_location=map_location)
    assert {("cpu", 36), ("cuda:1", 36)} < set(seen)
    assert len(seen) == 3
    assert [found["state_dict"][f"b{i}"][0].item() for i in range(6)] == list(range(6))


def test_files_without_payloads_are_those_of_torch(tmp_path: Path) -> None:
    content = checkpoint()
    write_checkpoint(content, tmp_path / "a.ckpt")
    expected = written(torch.save, content)
    assert without_identity((tmp_path / "a.ckpt").read_bytes()) == without_identity(expected)


def test_where_torch_is_not_as_we_know_it_the_file_is_larger(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with a later torch.
    monkeypatch.setattr(zip_writer, "_knows_torch", lambda: False)
    save(checkpoint(), tmp_path / "torch.ckpt")
    one, two = load(file), load(tmp_path / "torch.ckpt")
    assert_same(one, two)
    assert storages_in(tmp_path / "torch.ckpt") > storages_in(file)


def test_only_short_pickles_are_compressed(file: Path, tmp_path: Path) -> None:
    save(checkpoint() | {"history": list(range(WORTHWHILE // 2))}, tmp_path / "long.ckpt")
    found = load(tmp_path / "long.ckpt")
    del found["history"]
    assert_same(found, load(file))
    methods = []
    for path in (file, tmp_path / "long.ckpt"):
        with zipfile.ZipFile(path) as archive:
            methods.append(archive.getinfo("archive/data.pkl").compress_type)
    assert methods == [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]


def test_the_fast_reader_reads_it_too(file: Path) -> None:
    found = read_checkpoint(file, lambda opened: torch.load(opened, weights_only=True))
    assert_same(found, load(file))


def test_compress_makes_the_same_of_a_plain_file(file: Path, tmp_path: Path) -> None:
    main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main
    torch.save(checkpoint(), tmp_path / "plain.ckpt")
    main(["compress", str(tmp_path / "plain.ckpt"), str(tmp_path / "b.ckpt"), "--preset", "compact"])
    assert_same(load(tmp_path / "b.ckpt"), load(file))
    assert storages_in(tmp_path / "b.ckpt") == storages_in(file)
    assert (tmp_path / "b.ckpt").stat().st_size < 1.05 * file.stat().st_size
    main(["decompress", str(file), str(tmp_path / "large.ckpt")])
    with zipfile.ZipFile(tmp_path / "large.ckpt") as archive:
        assert b"q8lightning" not in archive.read("archive/data.pkl")


def test_compress_keeps_memory_shared_that_an_object_shares(tmp_path: Path) -> None:
    content = checkpoint()
    content["holder"] = Holder(content["state_dict"]["bias"].view(64))
    main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main
    torch.save(content, tmp_path / "plain.ckpt")
    main(["compress", "--trust", str(tmp_path / "plain.ckpt"), str(tmp_path / "b.ckpt")])
    found = torch.load(tmp_path / "b.ckpt", weights_only=False)
    assert found["holder"].tensor.data_ptr() == found["state_dict"]["bias"].data_ptr()
