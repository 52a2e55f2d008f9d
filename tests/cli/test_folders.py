"""The commands take folders of sharded trainings as they take files; one launch of two processes makes the folders."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from support import processes
from support.files import flip
from support.sharded_models import OldModel, OldStrategy, ShardedModel, samples, trainer_of
from support.sharded_scenarios import decoded, play, results, save_plain, shards_of, whole
from torch import nn
from torch.distributed.checkpoint import save as dcp_save

from q8lightning import CorruptCheckpointError, QuantizationCallback, without_verification
from q8lightning.checkpoint.sharded.shard_file import read_table
from q8lightning.tools import ToolError, compare, compress, decompress, inspect, verify

Run = Callable[..., Any]
UP = "net.blocks.0.up.weight"


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups whose parameters are not in the order of the model."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    weights = [name for name in reversed(trained) if name.endswith("weight")]
    others = [name for name in trained if name not in weights]
    return [
        {"params": [trained[name] for name in names], "weight_decay": decay}
        for names, decay in ((others, 0.0), (weights, 0.1))
    ]


class Grouped(ShardedModel):
    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        optimizer = torch.optim.AdamW(groups_of(self), lr=1e-2)
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return {**configured, "optimizer": optimizer}


class OldGrouped(Grouped, OldModel):
    configure_model = OldModel.configure_model


class OnOneDevice(Grouped):
    """The same, not sharded; keeps the optimizer's states that it begins with."""

    def configure_model(self) -> None:
        pass

    def on_train_start(self) -> None:
        state = self.trainer.optimizers[0].state
        self.began_with = {
            f"{name}: {key}": value.clone()
            for name, parameter in self.named_parameters()
            for key, value in state.get(parameter, {}).items()
        }


def resumed(path: Path, model: ShardedModel, strategy: Any = "auto") -> Any:
    trainer = trainer_of(path.parent, strategy, max_steps=8)
    trainer.fit(model, samples(), ckpt_path=str(path), weights_only=True)
    assert trainer.global_step == 8
    return model


def saved(folder: Path) -> Any:
    torch.manual_seed(1)
    trainer = trainer_of(folder, max_steps=4, callbacks=[QuantizationCallback()])
    trainer.fit(Grouped(), samples())
    for name in ("ours", "other"):
        trainer.save_checkpoint(folder / name)
    save_plain(trainer, folder / "plain")
    held = shards_of(trainer)
    if trainer.is_global_zero:
        decompress(folder / "ours", folder / "ours.one")
    trainer.strategy.barrier()
    losses = {name: resumed(folder / name, Grouped(), None).losses for name in ("ours", "plain", "ours.one")}
    return {"held": held, "losses": losses}


def saved_by_fsdp1(folder: Path) -> Any:
    torch.manual_seed(1)
    trainer = trainer_of(folder, OldStrategy(), max_steps=4, callbacks=[QuantizationCallback()])
    trainer.fit(OldGrouped(), samples())
    trainer.save_checkpoint(folder / "old")
    save_plain(trainer, folder / "old_plain")
    return shards_of(trainer)


def play_all(rank: int, folder: Path) -> None:
    play(rank, [saved, saved_by_fsdp1], folder)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    processes.run(play_all, 2, folder, limit=120)
    return folder


@pytest.fixture(scope="module")
def folder(launch: Path) -> Path:
    """Where ``ours``, ``other`` and ``plain`` are, and from FSDP ``old`` and ``old_plain``."""
    for each in ("old", "old_plain"):
        if not (launch / "saved" / each).exists():
            os.symlink(launch / "saved_by_fsdp1" / each, launch / "saved" / each)
    return launch / "saved"


def total(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.iterdir())


# inspect


@pytest.mark.parametrize("name", ["ours", "plain", "old", "old_plain"])
def test_a_folder_is_described_as_a_file_is(name: str, folder: Path) -> None:
    found = inspect(folder / name)
    model = OnOneDevice()
    entries = {each.path: each for each in found.tensors}
    weights = [each for each in entries if each.startswith("state_dict.")]
    assert weights == [f"state_dict.{key}" for key in model.state_dict()]
    trained = [key for key, each in model.named_parameters() if each.requires_grad]
    moments = {each.name for each in found.tensors if each.kind == "exp_avg"}
    assert moments == {f"{key}: exp_avg" for key in trained}
    assert entries[f"state_dict.{UP}"].shape == (96, 128)
    assert found.bytes == total(folder / name)
    assert found.training["global_step"] == 4
    is_encoded = "plain" not in name
    assert entries[f"state_dict.{UP}"].codec == ("linear8+3/128" if is_encoded else None)
    assert entries["state_dict.seen"].codec is None
    numel = 96 * 128
    assert entries[f"state_dict.{UP}"].decoded_bytes == 4 * numel
    scales = 4 * numel // 128  # one for each block, which both stages share
    assert entries[f"state_dict.{UP}"].bytes == (numel * (8 + 3) // 8 + scales if is_encoded else 4 * numel)
    if is_encoded:
        # The steps are 1/(127 * 15) of a scale. Values spread evenly between scales have 71.6 dB, normal ones fewer.
        assert 62 < (entries[f"state_dict.{UP}"].sqnr_db or 0) < 76
        assert found.errors["weights"]["sqnr_db"] > 62
        assert found.sizes["weights"].ratio > 2.2


def test_the_command_prints_a_folder(folder: Path, run: Run) -> None:
    done = run("inspect", folder / "ours")
    assert done.status == 0
    assert "whole folder" in done.out
    assert "linear8+3/128" in done.out
    said = json.loads(run("inspect", folder / "ours", "--json").out)
    assert said["summary"]["shards"]["files"].keys() == {each.name for each in (folder / "ours").glob("*.distcp")}


def test_a_folder_without_a_checkpoint_is_no_checkpoint(tmp_path: Path, run: Run) -> None:
    done = run("verify", tmp_path)
    assert done.status == 1
    assert "name a checkpoint file, or a folder with shards" in done.err


def test_a_folder_of_dcp_alone_has_the_users_keys(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(64, 64)}, "note": [1, {"a": "b"}]}
    dcp_save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert [each.path for each in inspect(tmp_path / "dcp").tensors] == ["model.w"]
    decompress(tmp_path / "dcp", tmp_path / "one")
    loaded = torch.load(tmp_path / "one", weights_only=True)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])  # type: ignore[call-overload, index]
    assert loaded["note"] == state["note"]


def test_code_in_a_folder_does_not_run(folder: Path, tmp_path: Path, run: Run) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    copy = shutil.copytree(folder / "plain", tmp_path / "copy")
    (copy / ".metadata").write_bytes(pickle.dumps(Runs()))
    done = run("inspect", copy)
    assert done.status == 1
    assert "--trust" in done.err
    assert not (tmp_path / "ran").exists()


# verify


def _shard(folder: Path, rank: int) -> Path:
    return next(folder.glob(f"__{rank}_0.*distcp"))


def _flip_in(folder: Path, name: str) -> None:
    for file in folder.glob("*.distcp"):
        for chunk in read_table(file).chunks:
            if chunk.name == name and (any(chunk.offsets) or name == "outside: step"):
                flip(file, chunk.start + chunk.nbytes // 2)


def _rename_into(copy: Path, other: Path) -> None:
    shutil.copy(_shard(other, 1), _shard(copy, 1))


def _replace_by(copy: Path, other: Path) -> None:
    _shard(copy, 1).unlink()
    shutil.copy(_shard(other, 1), copy)


def _flip_table(copy: Path, other: Path) -> None:
    flip(_shard(copy, 0), _shard(copy, 0).stat().st_size - 100)


def _truncate(copy: Path, other: Path) -> None:
    os.truncate(_shard(copy, 1), 5000)


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "an encoded weight": (
        lambda copy, other: _flip_in(copy, f"state_dict.{UP}"),
        f"the tensor state_dict.{UP} (the shard from [48, 0] on) in __1_0.",
    ),
    "a moment": (lambda copy, other: _flip_in(copy, f"{UP}: exp_avg"), f"the tensor {UP}: exp_avg (the shard from"),
    "a small tensor": (lambda copy, other: _flip_in(copy, "outside: step"), "the tensor outside: step in __"),
    "a shard is missing": (lambda copy, other: _shard(copy, 1).unlink(), "(it lacks the shard __1_0."),
    "a shard of another save": (_rename_into, "is of another save than meta.pt"),
    "files of two saves": (_replace_by, "of another save)"),
    "the table": (_flip_table, "the table at the end of the shard in __0_0."),
    "a short shard": (_truncate, "the table at the end of the shard in __1_0."),
    "meta.pt": (lambda copy, other: flip(copy / "meta.pt", 1000), "in meta.pt"),
    "meta.pt is missing": (lambda copy, other: (copy / "meta.pt").unlink(), "(it lacks meta.pt)"),
    "meta.pt of another save": (lambda copy, other: shutil.copy(other / "meta.pt", copy), ".metadata is not the one"),
    ".metadata": (lambda copy, other: flip(copy / ".metadata", 3000), ".metadata is not the one"),
    ".metadata is missing": (lambda copy, other: (copy / ".metadata").unlink(), "(it lacks .metadata)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_of_a_folder_is_named(what: str, folder: Path, tmp_path: Path, run: Run) -> None:
    copy = shutil.copytree(folder / "ours", tmp_path / "copy")
    damage, named = DAMAGE[what]
    damage(copy, folder / "other")
    done = run("verify", copy)
    assert done.status == 1
    assert f"{copy}: " in done.err
    assert named in done.err
    assert len(verify(copy).damage) == 1
    for command in ("decompress", "compress"):
        assert run(command, copy, tmp_path / "one").status == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy"]


def test_the_rest_of_a_damaged_folder_can_be_had(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "ours", tmp_path / "copy")
    _flip_in(copy, f"state_dict.{UP}")
    with without_verification():
        decompress(copy, tmp_path / "one")
    differing = [row.path for row in compare(folder / "ours", tmp_path / "one").differing]
    assert differing == [f"state_dict.{UP}"]


def test_all_damage_is_told(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "ours", tmp_path / "copy")
    for name in (f"state_dict.{UP}", "net.head.weight: exp_avg_sq"):
        _flip_in(copy, name)
    found = verify(copy)
    assert len(found.damage) == 2
    assert (found.tensors, found.quantized) == (71, len([e for e in inspect(copy).tensors if e.codec]))


@pytest.mark.parametrize("name", ["ours", "other", "plain", "old", "old_plain"])
def test_a_whole_folder_is_whole(name: str, folder: Path, run: Run) -> None:
    done = run("verify", folder / name)
    assert (done.status, done.err) == (0, "")
    found = verify(folder / name)
    assert found.is_whole
    assert found.bytes == total(folder / name)
    assert found.tensors == 71
    assert (found.quantized > 15) == ("plain" not in name)


@pytest.mark.parametrize("what", ["a weight", "missing", "short"])
def test_damage_of_a_plain_folder_is_named(what: str, folder: Path, tmp_path: Path, run: Run) -> None:
    copy = shutil.copytree(folder / "plain", tmp_path / "copy")
    file = _shard(copy, 1)
    if what == "a weight":
        wanted = next(iter(whole_of(folder, "state_dict.net.blocks.0.up.weight")[48:50].contiguous().view(1, -1)))
        flip(file, file.read_bytes().index(wanted.numpy().tobytes()) + 4)
    elif what == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1000)
    named = {"a weight": f"the tensor state_dict.{UP} (the shard from [48, 0] on) in __1_0.distcp"}
    done = run("verify", copy)
    assert done.status == 1
    assert named.get(what, "__1_0.distcp") in done.err
    with pytest.raises(CorruptCheckpointError, match=r"__1_0\.distcp"):
        compress(copy, tmp_path / "small")


def whole_of(folder: Path, name: str) -> torch.Tensor:
    parts = [each["held"] for each in results(folder.parent, "saved", 2)]
    return whole(parts, lambda _, shard: shard.tensor)[name]


# compare


def test_folders_are_compared_as_files_are(folder: Path, run: Run) -> None:
    found = compare(folder / "plain", folder / "ours")
    rows = {row.name: row for row in found.rows}
    exact = whole_of(folder, f"state_dict.{UP}")
    parts = [each["held"] for each in results(folder.parent, "saved", 2)]
    ours = whole(parts, lambda name, shard: decoded(name, shard))[f"state_dict.{UP}"]
    expected = float((ours - exact).double().norm() / exact.double().norm())
    assert rows[f"state_dict.{UP}"].difference.relative_error == pytest.approx(expected, rel=1e-6)
    assert rows[f"state_dict.{UP}"].first == "float32"
    assert rows[f"{UP}: exp_avg"].second == "softsign6/128"
    assert 0 < rows[f"{UP}: update direction"].difference.relative_error < 0.05
    assert found.only_first == found.only_second == found.reshaped == ()
    done = run("compare", folder / "plain", folder / "old", "--top", 40)  # all: second moments lose more than it
    assert done.status == 0
    assert "update direction" in done.out


# decompress


@pytest.mark.parametrize("name", ["ours", "plain", "old"])
def test_one_file_is_what_lightning_consolidates(name: str, folder: Path, tmp_path: Path, run: Run) -> None:
    done = run("decompress", folder / name, tmp_path / "one")
    assert done.status == 0
    loaded = torch.load(tmp_path / "one", weights_only=True)
    expected = _load_distributed_checkpoint(folder / name)
    weights = expected.get("state_dict") or expected["model"]
    assert list(loaded["state_dict"]) == list(OnOneDevice().state_dict())
    assert weights.keys() == loaded["state_dict"].keys()
    for key, value in weights.items():
        assert torch.equal(loaded["state_dict"][key], value)
    (states,) = loaded["optimizer_states"]
    assert states["param_groups"] == expected["optimizer_0"]["param_groups"]
    assert states["state"].keys() == expected["optimizer_0"]["state"].keys()
    for parameter, state in expected["optimizer_0"]["state"].items():
        assert state.keys() == states["state"][parameter].keys()
        assert all(torch.equal(states["state"][parameter][key], value) for key, value in state.items())
    assert {key: loaded[key] for key in ("epoch", "global_step", "loops", "lr_schedulers", "callbacks")} == {
        key: expected[key] for key in ("epoch", "global_step", "loops", "lr_schedulers", "callbacks")
    }
    assert compare(folder / name, tmp_path / "one").differing == ()
    with zipfile.ZipFile(tmp_path / "one") as archive:
        (pickled,) = (archive.read(each) for each in archive.namelist() if each.endswith("data.pkl"))
    assert b"rebuild_v1" not in pickled  # it loads without q8lightning


@pytest.mark.parametrize("name", ["ours", "old"])
@pytest.mark.parametrize("command", ["decompress", "compress"])
def test_a_trainer_on_one_device_resumes_from_one_file(command: str, name: str, folder: Path, tmp_path: Path) -> None:
    convert: Any = {"decompress": decompress, "compress": compress}[command]
    convert(folder / name, tmp_path / "one.ckpt")
    model = resumed(tmp_path / "one.ckpt", OnOneDevice())
    found = results(folder.parent, "saved" if name == "ours" else "saved_by_fsdp1", 2)
    parts = [each["held"] if name == "ours" else each for each in found]
    expected = whole(parts, lambda key, shard: decoded(key, shard, raw=("state_dict.seen",)))
    began_with = {
        f"optimizer_0.state.{key.replace(': ', '.')}": value
        for key, value in model.began_with.items()  # by the parameters of this model, whatever the file has
    }
    assert began_with.keys() == {key for key in expected if key.startswith("optimizer_0")}
    for key, value in began_with.items():
        error = (value - expected[key]).abs().max()
        if command == "decompress":
            assert error == 0, key
        else:  # vectors have other blocks in the whole than in shards
            assert error <= (0.02 * expected[key].abs().max() if "net.scale" in key else 0), key
    losses = results(folder.parent, "saved", 2)[0]["losses"]["plain"]
    assert model.losses == pytest.approx(losses, rel=1e-3)
    again = OnOneDevice.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert float(again.seen[0]) == 4


def test_a_sharded_trainer_resumes_from_one_file(folder: Path) -> None:
    for found in results(folder.parent, "saved", 2):
        assert found["losses"]["ours.one"] == found["losses"]["ours"]


# compress


def test_a_plain_folder_gets_the_codes_of_its_whole_tensors(folder: Path, tmp_path: Path, run: Run) -> None:
    done = run("compress", folder / "plain", tmp_path / "small")
    assert done.status == 0
    assert "tensors quantized" in done.out
    decompress(folder / "plain", tmp_path / "one")
    compress(tmp_path / "one", tmp_path / "also_small")
    assert compare(tmp_path / "small", tmp_path / "also_small").differing == ()
    sizes = [(tmp_path / name).stat().st_size for name in ("small", "also_small")]
    assert abs(sizes[0] - sizes[1]) < 500
    assert verify(tmp_path / "small").is_whole
    kept = compress(folder / "plain", tmp_path / "kept", keep=[f"state_dict.{UP}"])
    assert compare(folder / "plain", tmp_path / "kept").by_kind()["weights"].sqnr_db > 80
    assert kept.bytes_before == total(folder / "plain")
    assert f"state_dict.{UP}" not in {row.name for row in compare(folder / "plain", tmp_path / "kept").differing}
    with pytest.raises(ToolError, match="matches no tensor"):
        compress(folder / "plain", tmp_path / "never", keep=["nothing"])


def test_an_encoded_folder_keeps_its_codes_in_one_file(folder: Path, tmp_path: Path) -> None:
    done = compress(folder / "ours", tmp_path / "small")
    assert done.kept >= 15
    differing = {row.path for row in compare(folder / "ours", tmp_path / "small").differing if row.kind == "weights"}
    assert differing <= {"state_dict.net.scale", "state_dict.seen"}  # a vector, and a buffer that was not encoded
    was, said = inspect(folder / "ours"), inspect(tmp_path / "small")
    losses = {each.path: each.sqnr_db for each in was.tensors}
    for each in said.tensors:
        if each.path not in differing and each.kind == "weights" and each.path != "state_dict.seen":
            assert each.sqnr_db == losses[each.path]
    assert "shards" not in (said.summary or {})
    smaller = compress(folder / "ours", tmp_path / "smaller", "compact")
    assert smaller.bytes_after < 0.8 * done.bytes_after


def test_a_folder_is_no_target(folder: Path, tmp_path: Path, run: Run) -> None:
    done = run("compress", folder / "plain", folder / "ours", "--force")
    assert done.status == 1
    assert "is a directory; name the file to write" in done.err
