"""FSDP2 in two processes: what is written, and what comes back through every door; one launch for all of it."""

import errno
import io
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import xxhash
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from support import forked, processes
from support.sharded_models import (
    ClippedModel,
    CompiledModel,
    MetaModel,
    OldModel,
    OldStrategy,
    ShardedModel,
    samples,
    trainer_of,
)
from support.sharded_scenarios import assert_same, decoded, loaded, play, results, save_plain, shards_of, whole
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from q8lightning import (
    BackgroundSaveError,
    CheckpointPolicy,
    CorruptCheckpointError,
    QuantizationCallback,
    Rule,
    without_verification,
)
from q8lightning.checkpoint.sharded.check import check_shards, read_meta
from q8lightning.checkpoint.sharded.shard_file import read_table
from q8lightning.checkpoint.sharded.write import save as sharded_save
from q8lightning.checkpoint.sharded.write.local_shards import local_shards
from q8lightning.trainer.checkpoint_io import durable
from q8lightning.trainer.checkpoint_io import shards as sharded

RAW = ("state_dict.seen",)
"""Buffers are stored as they are."""

LARGE = ("net.blocks.0.up.weight", "net.blocks.0.down.weight", "net.head.weight", "net.scale", "outside")


def fitted(folder: Path, *callbacks: Any, steps: int = 4, model: Any = None, **options: Any) -> pl.Trainer:
    torch.manual_seed(1)
    trainer = trainer_of(folder, callbacks=[*callbacks], **({"max_steps": steps} | options))
    trainer.fit(model or ShardedModel(), samples())
    return trainer


def resumed(folder: Path, path: Path, *callbacks: Any, steps: int = 24) -> dict[str, Any]:
    model = ShardedModel()
    trainer = trainer_of(folder, max_steps=steps, callbacks=[*callbacks])
    trainer.fit(model, samples(256), ckpt_path=str(path))
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    return {
        "losses": model.losses,
        "step": trainer.global_step,
        "lr": scheduler.get_last_lr(),
        "seen": float(model.seen[0]),
    }


def caught(call: Any, *arguments: Any, **options: Any) -> str:
    """Return what a call raises, in words."""
    try:
        call(*arguments, **options)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


# What the processes do


def saved(folder: Path) -> Any:
    callback = QuantizationCallback()
    trainer = fitted(folder, callback)
    before = shards_of(trainer)
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(folder / "ours.ckpt")
    held = shards_of(trainer)
    assert all(torch.equal(before[name].tensor, held[name].tensor) for name in held)
    save_plain(trainer, folder / "plain.ckpt")
    evaluated = trainer_of(folder).validate(ShardedModel(), samples(), ckpt_path=str(folder / "ours.ckpt"))
    return {
        "held": held,
        "ours": resumed(folder, folder / "ours.ckpt"),
        "with callback": resumed(folder, folder / "ours.ckpt", QuantizationCallback()),
        "plain": resumed(folder, folder / "plain.ckpt"),
        "plain with callback": resumed(folder, folder / "plain.ckpt", QuantizationCallback()),
        "evaluated": evaluated,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "totals": callback.recorder.totals,
    }


class Durable(pl.Callback):
    def __init__(self) -> None:
        self.paths: list[str] = []

    def on_checkpoint_durable(self, path: str) -> None:
        self.paths.append(os.path.basename(path))


class Remember(pl.Callback):
    """Keeps what each step left."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.held[trainer.global_step] = shards_of(trainer)


def saves(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, **({"save_top_k": -1} | options))


def in_the_background(folder: Path) -> Any:
    durable, remember = Durable(), Remember()
    fitted(
        folder,
        QuantizationCallback("compact", async_save=True),
        remember,
        saves(folder / "async", save_last=True),
        durable,
        enable_checkpointing=True,
    )
    return {"held": remember.held, "durable": durable.paths}


def top_k(folder: Path) -> Any:
    for name, is_async in (("async", True), ("sync", False)):
        keeps = saves(folder / name, save_top_k=2, monitor="step", mode="max", save_last="link")
        fitted(folder, QuantizationCallback(async_save=is_async), keeps, enable_checkpointing=True)
    keeps = saves(folder / "stock", save_top_k=2, monitor="step", mode="max", save_last="link")
    fitted(folder, keeps, enable_checkpointing=True)


class _FullDisk:
    """Lets one process fail at its second save."""

    def __init__(self, rank: int) -> None:
        self.rank, self.saves, self.write = rank, 0, sharded_save.write_shards

    def __call__(self, path: str, save: str, rank: int, items: Any) -> Any:
        self.saves += 1
        if self.saves == 2 and rank == self.rank:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return self.write(path, save, rank, items)


def failing(folder: Path) -> Any:
    found = {}
    for name, is_async in (("async", True), ("sync", False)):
        for rank in (0, 1):
            own = folder / f"{name}{rank}"
            with mock.patch.object(sharded_save, "write_shards", _FullDisk(rank)):
                callbacks = QuantizationCallback(async_save=is_async), saves(own)
                found[own.name] = caught(fitted, own, *callbacks, enable_checkpointing=True)
    return found


def failing_before_anything_is_written(folder: Path) -> Any:
    """One process cannot find out what it has to write."""
    found = {}
    for rank in (0, 1):
        calls = 0

        def fail(*arguments: Any, own: int = rank) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2 and os.environ["LOCAL_RANK"] == str(own):
                raise MemoryError("no memory left")
            return local_shards(*arguments)

        with mock.patch.object(sharded, "local_shards", fail):
            callbacks = QuantizationCallback(), saves(folder / str(rank))
            found[rank] = caught(fitted, folder, *callbacks, enable_checkpointing=True)
    return found


def failing_at_the_end(folder: Path) -> Any:
    with mock.patch.object(sharded_save, "write_shards", _FullDisk(1)):
        callbacks = QuantizationCallback(async_save=True), saves(folder / "a")
        return caught(fitted, folder, *callbacks, steps=2, enable_checkpointing=True)


class _Waits(pl.Callback):
    """Saves after each step and waits for it; keeps what that raises."""

    def __init__(self, folder: Path, callback: QuantizationCallback) -> None:
        self.folder, self.callback = folder, callback
        self.raised: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        self.raised.append(caught(trainer.save_checkpoint, path))
        self.raised.append(caught(self.callback.wait_until_durable, path))


def waiting_for_a_failure(folder: Path) -> Any:
    callback = QuantizationCallback(async_save=True)
    waits = _Waits(folder / "a", callback)
    with mock.patch.object(sharded_save, "write_shards", _FullDisk(1)):
        return caught(fitted, folder, callback, waits, steps=3), waits.raised


def removing_fails(folder: Path) -> Any:
    """Only the first process removes; all of them hear that it could not."""
    found = {}
    for name, steps in (("at the next save", 4), ("at the end", 2)):
        own = folder / name

        def cannot(path: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        with mock.patch.object(durable, "remove_folder", cannot):
            callbacks = QuantizationCallback(async_save=True), saves(own, save_top_k=1, monitor="step", mode="max")
            found[name] = caught(fitted, own, *callbacks, steps=steps, enable_checkpointing=True)
    return found


def overwritten(folder: Path) -> Any:
    """Save to one path three times: over nothing, over a folder, over a file."""
    trainer = fitted(folder, QuantizationCallback())
    target = folder / "a.ckpt"
    trainer.save_checkpoint(target)
    first = read_meta(target)["q8lightning"]["shards"]["save"]
    trainer.save_checkpoint(target)
    second = read_meta(target)["q8lightning"]["shards"]["save"]
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        shutil.rmtree(target)
        target.write_text("a file")
    trainer.strategy.barrier()
    trainer.save_checkpoint(target)
    return first, second, sorted(each.name for each in folder.iterdir())


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def broken_copies(folder: Path, whole: Path, other: Path) -> dict[str, Path]:
    """Return copies of a checkpoint, each with one thing wrong; ``other`` is another save of the same model."""
    shard = {rank: next(whole.glob(f"__{rank}_0.*.distcp")).name for rank in (0, 1)}
    others = next(other.glob("__1_0.*.distcp"))
    found = {}
    for name in ("encoded", "raw", "table", "missing", "mixed", "metadata", "old metadata", "meta", "short"):
        found[name] = shutil.copytree(whole, folder / f"{name}.ckpt")
    for name, large in (("encoded", True), ("raw", False)):
        file = found[name] / shard[1]
        chunk = next(
            each
            for each in read_table(file).chunks
            if (each.name == "state_dict.net.blocks.0.up.weight") is large
            and (large or each.name.endswith("norm.bias"))
        )
        flip(file, chunk.start + chunk.nbytes // 2 if large else _data_of(file, chunk))
    flip(found["table"] / shard[0], (found["table"] / shard[0]).stat().st_size - 100)
    (found["missing"] / shard[1]).unlink()
    shutil.copy(others, found["mixed"] / shard[1])
    flip(found["metadata"] / ".metadata", 3000)
    shutil.copy(other / ".metadata", found["old metadata"])
    flip(found["meta"] / "meta.pt", 1000)
    with open(found["short"] / shard[1], "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)
    return found


def _data_of(file: Path, chunk: Any) -> int:
    """Return where the bytes of a small tensor lie in the file."""
    content = file.read_bytes()[chunk.start : chunk.start + chunk.nbytes]
    return int(chunk.start + content.index(b"/data/0FB") + 100)


def damaged(folder: Path) -> Any:
    callback = QuantizationCallback()
    trainer = fitted(folder, callback)
    trainer.save_checkpoint(folder / "a.ckpt")
    trainer.save_checkpoint(folder / "b.ckpt")
    copies: dict[str, Path] = {}
    if trainer.is_global_zero:
        copies = broken_copies(folder, folder / "a.ckpt", folder / "b.ckpt")
    copies = trainer.strategy.broadcast(copies)

    def load(path: Path, *callbacks: Any) -> str:
        return caught(
            trainer_of(folder, callbacks=[*callbacks]).validate,
            ShardedModel(),
            samples(),
            ckpt_path=str(path),
            verbose=False,
        )

    def unverified(path: Path) -> str:
        with without_verification():
            return load(path, QuantizationCallback())

    return {
        "with": {name: load(path, QuantizationCallback()) for name, path in copies.items()},
        "without": {name: load(copies[name]) for name in NOTICED if name in copies},
        "off": unverified(copies["encoded"]),
    }


def guarded(folder: Path) -> Any:
    """A policy that one process's shard cannot be held to."""

    class Outlier(ShardedModel):
        def on_train_end(self) -> None:
            local = self.net.blocks[0].up.weight.to_local()
            if self.global_rank == 1:
                with torch.no_grad():
                    local.fill_(0.0038)[:, 0] = 1  # all but the first of a row round to 0

    policy = CheckpointPolicy([Rule("state_dict.*", "linear", block_size=128)])
    callback = QuantizationCallback(policy)
    trainer = fitted(folder, callback, model=Outlier())
    trainer.save_checkpoint(folder / "a.ckpt")
    return read_meta(folder / "a.ckpt")["q8lightning"]


WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "fsdp1": (OldModel, OldStrategy, {}),
    "compiled": (CompiledModel, None, {}),
    "meta": (MetaModel, None, {}),
    "accumulated": (ClippedModel, None, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
}
"""Models, strategies, and options of the Trainer."""


def named_policy(folder: Path) -> Any:
    """A policy that names a weight of a compiled block as a checkpoint does."""
    callback = QuantizationCallback(CheckpointPolicy([Rule("state_dict.net.blocks.0.up.weight", "linear")]))
    trainer = trainer_of(folder, max_steps=1, callbacks=[callback])
    trainer.fit(CompiledModel(), samples())
    trainer.save_checkpoint(folder / "a.ckpt")
    return list(read_meta(folder / "a.ckpt")["q8lightning"]["tensors"])


def otherwise(folder: Path) -> Any:
    found = {}
    for name, (make, strategy, options) in WAYS.items():
        torch.manual_seed(1)
        callback = QuantizationCallback(async_save=True)
        trainer = trainer_of(folder, strategy and strategy(), max_steps=4, callbacks=[callback], **options)
        trainer.fit(make(), samples())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        held = shards_of(trainer)
        # Lightning cannot load into what torch.compile has wrapped, but into a model that is compiled later.
        again = loaded(
            (ShardedModel if make is CompiledModel else make)(), folder / f"{name}.ckpt", strategy and strategy()
        )
        found[name] = held, again, callback.recorder.totals.worst
    return found


SCENARIOS = [
    saved,
    in_the_background,
    top_k,
    failing,
    failing_before_anything_is_written,
    failing_at_the_end,
    waiting_for_a_failure,
    removing_fails,
    overwritten,
    damaged,
    guarded,
    named_policy,
    otherwise,
]


def play_all(rank: int, folder: Path) -> None:
    play(rank, SCENARIOS, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    forked.prepare()
    processes.run(play_all, 2, folder, limit=150)
    return folder


# What a checkpoint is


def loaded_by_dcp(folder: Path, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by the names that DCP has for them, through ``dcp_to_torch_save``."""
    dcp_to_torch_save(path, folder / "one.pt")
    content = torch.load(folder / "one.pt", weights_only=False)
    found = {f"state_dict.{name}": tensor for name, tensor in content["state_dict"].items()}
    for name, state in content.get("optimizer_0", {"state": {}})["state"].items():
        found |= {f"optimizer_0.state.{name}.{key}": value for key, value in state.items()}
    return found


def test_what_comes_back_is_the_reference_decode_of_every_shard(folder: Path, tmp_path: Path) -> None:
    found = results(folder, "saved", 2)
    expected = whole([each["held"] for each in found], lambda name, shard: decoded(name, shard, raw=RAW))
    loaded = loaded_by_dcp(tmp_path, folder / "saved" / "ours.ckpt")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    exact = whole([each["held"] for each in found], lambda name, shard: shard.tensor)
    changed = {name for name in exact if not torch.equal(exact[name], loaded[name])}
    assert {f"state_dict.{name}" for name in LARGE} <= changed  # otherwise nothing was encoded


def test_weights_alone_come_back_the_same(folder: Path, tmp_path: Path) -> None:
    both = loaded_by_dcp(tmp_path, folder / "saved" / "ours.ckpt")
    alone = loaded_by_dcp(tmp_path, folder / "saved" / "weights.ckpt")
    assert alone.keys() == {name for name in both if name.startswith("state_dict.")}
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_lightning_consolidates_it(folder: Path, tmp_path: Path) -> None:
    content = _load_distributed_checkpoint(folder / "saved" / "ours.ckpt")
    loaded = loaded_by_dcp(tmp_path, folder / "saved" / "ours.ckpt")
    assert content["global_step"] == 4
    assert all(torch.equal(tensor, loaded[f"state_dict.{name}"]) for name, tensor in content["state_dict"].items())


def test_it_is_smaller_and_says_so(folder: Path) -> None:
    ours, plain = folder / "saved" / "ours.ckpt", folder / "saved" / "plain.ckpt"
    sizes = [sum(file.stat().st_size for file in each.glob("*.distcp")) for each in (ours, plain)]
    bytes_ = read_meta(ours)["q8lightning"]["bytes"]
    assert bytes_["original"] / bytes_["stored"] > 2.5
    assert sizes[1] - sizes[0] > 0.9 * (bytes_["original"] - bytes_["stored"])
    held = [each["held"].values() for each in results(folder, "saved", 2)]
    once = {name: shard for each in results(folder, "saved", 2) for name, shard in each["held"].items()}
    tensors = sum(torch.Size(shard.size).numel() * shard.tensor.itemsize for shard in once.values())
    assert tensors <= bytes_["original"] < tensors + 1000, held


def test_losses_after_a_resume_are_those_of_a_plain_one(folder: Path) -> None:
    for found in results(folder, "saved", 2):
        plain, ours = torch.tensor(found["plain"]["losses"]), torch.tensor(found["ours"]["losses"])
        assert len(ours) == 20
        assert (ours - plain).abs().max() < 2e-3 * plain.max()
        assert found["ours"]["losses"] == found["with callback"]["losses"]
        assert found["plain"] == found["plain with callback"]
        for key in ("step", "lr", "seen"):
            assert found["ours"][key] == found["plain"][key]


def test_values_are_of_the_whole_and_the_same_everywhere(folder: Path) -> None:
    found = results(folder, "saved", 2)
    one, two = (each["metrics"] for each in found)
    said = read_meta(folder / "saved" / "ours.ckpt")["q8lightning"]["metrics"]
    for name in ("weights/relative_error", "exp_avg_sq/sqnr_db", "update_direction_error", "compression_ratio"):
        assert one[f"q8/{name}"] == two[f"q8/{name}"] == pytest.approx(said[name], rel=1e-6)
    exact = whole([each["held"] for each in found], lambda _, shard: shard.tensor)
    ours = whole([each["held"] for each in found], lambda name, shard: decoded(name, shard, raw=RAW))
    names = [name for name in exact if name.startswith("state_dict.") and not torch.equal(exact[name], ours[name])]
    squares = sum(float(exact[name].double().square().sum()) for name in names)
    error = sum(float((exact[name].double() - ours[name].double()).square().sum()) for name in names)
    assert said["weights/relative_error"] == pytest.approx((error / squares) ** 0.5, rel=1e-3)
    assert [each["totals"].saves for each in found] == [2, 0]


def test_a_file_is_what_the_page_says(folder: Path, tmp_path: Path) -> None:
    """Read by docs/sharded_format.md alone: chunks of ``torch.save``, then a table in JSON."""
    loaded = loaded_by_dcp(tmp_path, folder / "saved" / "ours.ckpt")
    names = set()
    for file in (folder / "saved" / "ours.ckpt").glob("*.distcp"):
        content = file.read_bytes()
        checksum, length, magic = struct.unpack("<QQ8s", content[-24:])
        text = content[-24 - length : -24]
        assert magic == b"q8shards"
        assert xxhash.xxh3_64_intdigest(text) == checksum
        table = json.loads(text)
        assert file.name == f"__{table['rank']}_0.{table['save']}.distcp"
        end = 0
        for name, offsets, start, nbytes, sum_of_bytes in table["chunks"]:
            assert start == end
            end += nbytes
            chunk = content[start:end]
            assert xxhash.xxh3_64_intdigest(chunk) == sum_of_bytes
            value = torch.load(io.BytesIO(chunk), weights_only=False)
            if name.startswith("state_dict."):
                box = tuple(slice(first, first + size) for first, size in zip(offsets, value.shape, strict=True))
                assert torch.equal(loaded[name][box], value)
                names.add(name)
        assert end == len(content) - 24 - length
    assert names == {name for name in loaded if name.startswith("state_dict.")}


def test_a_tensor_is_encoded_by_the_size_of_the_whole(folder: Path) -> None:
    """``net.scale`` has 4288 elements, 2144 in each process."""
    summary = read_meta(folder / "saved" / "ours.ckpt")["q8lightning"]
    assert "state_dict.net.scale" in summary["tensors"]


def test_what_all_have_is_written_once(folder: Path) -> None:
    files = [read_table(file) for file in (folder / "saved" / "ours.ckpt").glob("*.distcp")]
    names = [(chunk.name, chunk.offsets) for table in files for chunk in table.chunks]
    assert len(names) == len(set(names))
    outside = [table.rank for table in files for chunk in table.chunks if chunk.name.startswith("outside: exp_avg")]
    assert len(outside) == 2
    assert len(set(outside)) == 1  # the moments of a parameter are judged by each other


def test_a_policy_names_compiled_weights_as_the_checkpoint_does(folder: Path) -> None:
    assert results(folder, "named_policy", 2) == [["state_dict.net.blocks.0.up.weight"]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_train_come_back_as_exactly(way: str, folder: Path) -> None:
    found = results(folder, "otherwise", 2)
    held = [each[way][0] for each in found]
    expected = whole(held, lambda name, shard: decoded(name, shard, raw=RAW))
    assert_same(whole([each[way][1] for each in found], lambda _, shard: shard.tensor), expected)
    exact = whole(held, lambda _, shard: shard.tensor)
    assert len([name for name in exact if not torch.equal(exact[name], expected[name])]) >= 15


# In the background


def test_a_save_in_the_background_is_the_state_at_the_call(folder: Path, tmp_path: Path) -> None:
    found = results(folder, "in_the_background", 2)
    for step in (1, 2, 3, 4):
        held = [each["held"][step] for each in found]
        expected = whole(held, lambda name, shard: decoded(name, shard, "compact", RAW))
        loaded = loaded_by_dcp(tmp_path, folder / "in_the_background" / "async" / f"step={step}.ckpt")
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), (step, name)
    assert (folder / "in_the_background" / "async" / "last.ckpt" / "meta.pt").is_file()


def test_callbacks_hear_of_it_in_the_process_that_gave_it_its_name(folder: Path) -> None:
    found = results(folder, "in_the_background", 2)
    assert [each for each in found[0]["durable"] if each != "last.ckpt"] == [
        f"step={step}.ckpt" for step in (1, 2, 3, 4)
    ]
    assert found[1]["durable"] == []


def test_the_same_checkpoints_are_left_as_without_the_callback(folder: Path) -> None:
    results(folder, "top_k", 2)
    left = {
        name: sorted(each.name for each in (folder / "top_k" / name).iterdir()) for name in ("async", "sync", "stock")
    }
    assert left["async"] == left["sync"] == left["stock"]
    for name in ("async", "sync"):
        assert os.readlink(folder / "top_k" / name / "last.ckpt") == os.readlink(folder / "top_k/stock/last.ckpt")
        for path in (folder / "top_k" / name).iterdir():
            assert check_shards(path)


# What goes wrong


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["async", "sync"])
def test_an_error_of_one_process_reaches_all(way: str, rank: int, folder: Path) -> None:
    expected = BackgroundSaveError.__name__ if way == "async" else "OSError"
    for found in results(folder, "failing", 2):
        assert found[f"{way}{rank}"].startswith(expected)
        assert "No space left on device" in found[f"{way}{rank}"]
    left = sorted(each.name for each in (folder / "failing" / f"{way}{rank}").iterdir())
    assert left == ["step=1.ckpt"]
    assert check_shards(folder / "failing" / f"{way}{rank}" / "step=1.ckpt")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_before_anything_is_written_reaches_all(rank: int, folder: Path) -> None:
    for found in results(folder, "failing_before_anything_is_written", 2):
        assert found[rank] == "MemoryError: no memory left"
    left = sorted(each.name for each in (folder / "failing_before_anything_is_written" / str(rank)).iterdir())
    assert left == ["step=1.ckpt"]


def test_an_error_of_the_last_save_reaches_all_at_the_end(folder: Path) -> None:
    for found in results(folder, "failing_at_the_end", 2):
        assert "No space left on device" in found
    assert sorted(each.name for each in (folder / "failing_at_the_end" / "a").iterdir()) == ["step=1.ckpt"]


def test_whoever_waits_hears_of_a_failure_once_and_saves_again(folder: Path) -> None:
    for raised_by_fit, raised in results(folder, "waiting_for_a_failure", 2):
        assert [bool(each) for each in raised] == [False, False, False, True, False, False]
        assert "No space left on device" in raised[3]
        assert raised_by_fit == ""
    assert sorted(each.name for each in (folder / "waiting_for_a_failure" / "a").iterdir()) == ["1.ckpt", "3.ckpt"]


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_a_removal_that_fails_in_the_first_process_is_raised_in_all(when: str, folder: Path) -> None:
    for found in results(folder, "removing_fails", 2):
        assert "Permission denied" in found[when]
    assert all(check_shards(path) for path in (folder / "removing_fails" / when).glob("*.ckpt"))


def test_a_save_replaces_whatever_has_its_name(folder: Path) -> None:
    for first, second, left in results(folder, "overwritten", 2):
        assert first != second
        assert left == ["a.ckpt"]
    assert check_shards(folder / "overwritten" / "a.ckpt")


NOTICED = {
    "encoded": "the tensor state_dict.net.blocks.0.up.weight",
    "raw": "the tensor state_dict.net.blocks.0.norm.bias",
    "missing": "__1_0.",
    "mixed": "of another save",
}
"""What is noticed by whoever loads a checkpoint, and how."""

DAMAGE = {
    "encoded": "the tensor state_dict.net.blocks.0.up.weight (the shard from [48, 0] on)",
    "raw": "the tensor state_dict.net.blocks.0.norm.bias",
    "table": "the table at the end of the shard in",
    "missing": "it lacks the shard __1_0.",
    "mixed": "is of another save than meta.pt",
    "metadata": ".metadata is not the one that was saved with meta.pt",
    "old metadata": ".metadata is not the one that was saved with meta.pt",
    "meta": "meta.pt",
    "short": "the table at the end of the shard in",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_never_loaded(what: str, folder: Path) -> None:
    for found in results(folder, "damaged", 2):
        assert found["with"][what].startswith(CorruptCheckpointError.__name__)
        assert DAMAGE[what] in found["with"][what]


def test_what_is_not_damaged_can_be_loaded(folder: Path) -> None:
    for found in results(folder, "damaged", 2):
        assert "without_verification" in found["with"]["encoded"]
        assert found["off"] == ""


@pytest.mark.parametrize("what", NOTICED)
def test_damage_is_noticed_without_the_callback(what: str, folder: Path) -> None:
    for found in results(folder, "damaged", 2):
        assert found["without"][what].startswith(CheckpointException.__name__)
        assert NOTICED[what] in found["without"][what]


def test_the_guard_decides_for_each_shard_and_says_so(folder: Path) -> None:
    for summary in results(folder, "guarded", 2):
        found = summary["guarded"]["state_dict.net.blocks.0.up.weight"]
        assert found["found"].endswith("in the shard of rank 1")
