"""A checkpoint that exists is whole: written beside its name, flushed and renamed; a save that failed left no trace."""

import errno
import os
import resource
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import forked
from support.audit import listening
from support.disk import Disk
from support.files import names as names_in
from support.models import Autoencoder, quiet_trainer, train_and_save
from support.promises import load, payloads_of, same_bits
from support.steps import Steps

from q8lightning import QuantizationCallback, QuantizedCheckpointIO
from q8lightning.checkpoint.file.temporaries import TEMPORARY_SUFFIX
from q8lightning.checkpoint.file.write import STEPS, write_checkpoint

SAVE = "q8lightning.save"
CONTENT = {"weight": torch.arange(50_000.0)}


def assert_written(path: Path) -> None:
    assert same_bits(load(path)["weight"], CONTENT["weight"])
    assert names_in(path.parent) == [path.name]


# What a save that goes well does


def assert_durable(disk: Disk, target: Path) -> None:
    assert [name for name, _ in disk.calls] == ["flush file", "rename", "flush folder"]
    (inode, size), (source, renamed_to, *renamed), (folder_inode, _) = (value for _, value in disk.calls)
    assert renamed == [inode, size], "what was renamed is what was flushed, all of it"
    assert size == target.stat().st_size
    assert renamed_to.absolute() == target
    assert source.absolute().parent == target.parent, "a rename is atomic within a folder only"
    assert folder_inode == target.parent.stat().st_ino


def test_it_is_flushed_then_renamed_then_the_folder_is_flushed(disk: Disk, tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert_durable(disk, tmp_path / "a.ckpt")
    assert_written(tmp_path / "a.ckpt")


def test_every_save_of_a_trainer_is_durable(disk: Disk, preset: str, tmp_path: Path) -> None:
    train_and_save(tmp_path, Autoencoder(), QuantizationCallback(preset), max_steps=1)
    assert_durable(disk, tmp_path / "a.ckpt")
    assert payloads_of(tmp_path / "a.ckpt")


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    write_checkpoint({"weight": torch.zeros(100_000)}, tmp_path / "a.ckpt")
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert_written(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "name",
    ["with spaces.ckpt", "epoch=1-loss=0.1.ckpt", "Ünïcode ✓.ckpt", ".hidden", "a" * 255],
    ids=["spaces", "metrics", "unicode", "hidden", "as long as it gets"],
)
def test_every_name_that_the_file_system_takes_works(name: str, tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / name)
    assert_written(tmp_path / name)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "one" / "two with space" / "a.ckpt")
    assert_written(tmp_path / "one" / "two with space" / "a.ckpt")


@pytest.mark.parametrize("path", ["a.ckpt", "./a.ckpt", "folder/../a.ckpt"])
def test_relative_paths_work(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if ".." in path:
        (tmp_path / "folder").mkdir()
    write_checkpoint(CONTENT, path)
    assert same_bits(load(tmp_path / "a.ckpt")["weight"], CONTENT["weight"])


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_the_users_usual_ones(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.ckpt").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to nothing"])
def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(exists: bool, tmp_path: Path) -> None:
    other = tmp_path / "other" / "step=1.ckpt"
    other.parent.mkdir()
    if exists:
        write_checkpoint({"weight": torch.zeros(3)}, other)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "last.ckpt"
    link.symlink_to(os.path.relpath(other, link.parent))
    write_checkpoint(CONTENT, link)
    assert not link.is_symlink()
    assert_written(link)
    assert other.exists() == exists
    assert not exists or load(other)["weight"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("spelling", ["{}", "file://{}", "local://{}", "file:{}", "~/a.ckpt"])
def test_every_spelling_of_a_local_path_that_lightning_takes_works(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning reads and removes by these paths, so that they must mean the same to a save."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path, io = spelling.format(tmp_path / "a.ckpt"), QuantizedCheckpointIO()
    io.save_checkpoint({"state_dict": {"weight": torch.ones(64, 64)}}, path)
    assert payloads_of(tmp_path / "a.ckpt")
    assert names_in(tmp_path / "elsewhere") == []
    assert bool(io.load_checkpoint(path)["state_dict"]["weight"].eq(1).all())
    io.remove_checkpoint(path)
    assert names_in(tmp_path) == ["elsewhere"]


# What a save that fails leaves behind


class Unpicklable:
    """Raises in the middle of the pickling, after tensors were seen."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.fixture(params=[True, False], ids=["over an old file", "new"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A path to save to; after the test, its folder must be as it was before."""
    path = tmp_path / "a.ckpt"
    if request.param:
        write_checkpoint({"old": torch.ones(3)}, path)
    before = path.read_bytes() if request.param else None
    yield path
    assert names_in(tmp_path) == ([path.name] if request.param else [])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_a_failure_while_pickling_leaves_the_old_file_and_nothing_else(error: BaseException, target: Path) -> None:
    with pytest.raises(type(error)):
        write_checkpoint({**CONTENT, "last": Unpicklable(error)}, target)


@pytest.mark.parametrize("step", ["flush file", "rename"])
def test_a_failure_after_writing_leaves_the_old_file_and_nothing_else(step: str, target: Path, disk: Disk) -> None:
    disk.refuse(step, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(CONTENT, target)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    """A limit on the size of files stands in for the full disk: writes fail in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(CONTENT, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Folders that cannot be flushed: network file systems, FUSE, folders without the right to read


@pytest.mark.parametrize("call", ["flush folder", "open folder"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS])
def test_a_folder_that_cannot_be_flushed_has_whole_files_and_is_named_once(
    call: str, code: int, tmp_path: Path, disk: Disk, steps: Steps
) -> None:
    disk.refuse(call, code)
    names = ("one/a.ckpt", "one/b.ckpt", "two/a.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in names:
            write_checkpoint(CONTENT, tmp_path / name)
    assert all(same_bits(load(tmp_path / name)["weight"], CONTENT["weight"]) for name in names)
    told = [str(each.message).split(" cannot be flushed")[0] for each in caught]
    assert told == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert [step for step, _ in steps.seen].count("durable") == 3


@pytest.mark.filterwarnings("error:.*cannot be flushed")
def test_a_folder_that_cannot_be_flushed_is_no_failure_where_warnings_are_errors(
    tmp_path: Path, disk: Disk, steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    disk.refuse("flush folder", errno.EINVAL)
    for name in ("a.ckpt", "b.ckpt"):
        write_checkpoint(CONTENT, tmp_path / name)
    assert [step for step, _ in steps.seen].count("durable") == 2
    assert caplog.text.count("cannot be flushed") == 1


@pytest.mark.parametrize("async_save", [False, True])
def test_a_training_goes_on_where_folders_cannot_be_flushed(async_save: bool, tmp_path: Path, disk: Disk) -> None:
    disk.refuse("flush folder", errno.EINVAL)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1)
    callbacks = [saving, QuantizationCallback(async_save=async_save)]
    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, enable_checkpointing=True, callbacks=callbacks)
    with pytest.warns(UserWarning, match="cannot be flushed"):
        trainer.fit(Autoencoder())
    assert names_in(tmp_path) == ["step=3.ckpt"]
    assert payloads_of(tmp_path / "step=3.ckpt")


def test_a_disk_that_fails_while_a_folder_is_flushed_is_an_error(tmp_path: Path, disk: Disk) -> None:
    disk.refuse("flush folder", errno.EIO)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.ckpt'"):
        write_checkpoint(CONTENT, tmp_path / "a.ckpt")


@pytest.mark.parametrize("call", ["flush file", "rename", "make file"])
def test_errors_name_the_checkpoint(call: str, target: Path, disk: Disk) -> None:
    """Of the temporary file, nobody has heard."""
    disk.refuse(call, errno.EDQUOT)
    with pytest.raises(OSError, match="Disk quota exceeded") as error:
        write_checkpoint(CONTENT, target)
    assert str(target) in str(error.value)


def test_errors_of_what_is_saved_keep_their_own_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.csv"):
        write_checkpoint({"data": Unpicklable(FileNotFoundError(2, "No such file", "data.csv"))}, tmp_path / "a.ckpt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_keeps_what_it_has(tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_checkpoint({"weight": torch.zeros(3)}, tmp_path / "a.ckpt")
    finally:
        tmp_path.chmod(0o700)
    assert_written(tmp_path / "a.ckpt")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to(path.parent)])
def test_a_folder_is_no_place_for_a_file(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "a.ckpt")
    with pytest.raises(IsADirectoryError, match=r"a\.ckpt is a directory; choose another path"):
        write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert names_in(tmp_path) == ["a.ckpt"]


def test_a_save_of_a_trainer_that_fails_says_so_and_keeps_the_old_file(tmp_path: Path, disk: Disk) -> None:
    trainer = train_and_save(tmp_path, Autoencoder(), QuantizationCallback(), max_steps=1)
    before = (tmp_path / "a.ckpt").read_bytes()

    disk.refuse("flush file", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert names_in(tmp_path) == ["a.ckpt"]


# What a writer that was killed left behind


def write_until(path: Path, reached: Callable[[], object]) -> None:
    """Write a checkpoint; call ``reached`` when its content is there but not yet under its name."""
    sys.addaudithook(lambda event, args: reached() and None if event == SAVE and args[0] == "written" else None)
    write_checkpoint({"weight": torch.zeros(100_000)}, path)


def write_and_be_killed(path: Path) -> None:
    write_until(path, lambda: os.kill(os.getpid(), signal.SIGKILL))


def write_and_pause(path: Path, paused: Event, go_on: Event) -> None:
    write_until(path, lambda: (paused.set(), go_on.wait(60)))


def temporary(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.q8lightning.tmp"))


def test_the_next_save_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    write_checkpoint({"old": torch.ones(3)}, tmp_path / "a.ckpt")
    old = (tmp_path / "a.ckpt").read_bytes()
    assert forked.run(write_and_be_killed, tmp_path / "a.ckpt") == -signal.SIGKILL
    assert len(temporary(tmp_path)) == 1
    assert (tmp_path / "a.ckpt").read_bytes() == old
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert_written(tmp_path / "a.ckpt")


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    paused, go_on = forked.event(), forked.event()
    other = forked.start(write_and_pause, tmp_path / "other.ckpt", paused, go_on)
    assert paused.wait(60)
    assert len(temporary(tmp_path)) == 1
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert len(temporary(tmp_path)) == 1
    go_on.set()
    other.join(60)
    assert other.exitcode == 0
    assert names_in(tmp_path) == ["a.ckpt", "other.ckpt"]
    assert bool((load(tmp_path / "other.ckpt")["weight"] == 0).all())


@pytest.mark.parametrize(("age", "left"), [(60, True), (7200, False)], ids=["a minute", "two hours"])
def test_another_hosts_file_is_left_for_an_hour(age: float, left: bool, tmp_path: Path) -> None:
    """A lock may not be seen from another host."""
    theirs = tmp_path / f".{'f' * 24}{TEMPORARY_SUFFIX}"
    theirs.touch()
    os.utime(theirs, (time.time() - age,) * 2)
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert theirs.exists() == left


@pytest.mark.parametrize("name", ["mine.q8lightning.tmp", ".abc.q8lightning.tmp", f".{'f' * 24}.tmp", ".lightning.tmp"])
def test_files_that_no_writer_of_ours_named_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (0, 0))
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert (tmp_path / name).exists()


def test_a_new_file_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path) -> None:
    """In the moment between its making and its lock, another process may remove it."""
    removed = []

    def remove(event: str, _: tuple[Any, ...]) -> None:
        if event == "fcntl.flock" and not removed:
            (made,) = temporary(tmp_path)
            removed.append(os.unlink(made))

    with listening(remove):
        write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert removed
    assert_written(tmp_path / "a.ckpt")


def test_the_steps_are_announced_in_order(steps: Steps, tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert steps.seen == [(step, "a.ckpt") for step in ("opened", "written", "flushed", "renamed", "durable")]
    io = QuantizedCheckpointIO()
    steps.seen.clear()
    io.save_checkpoint({"state_dict": {}}, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "b.ckpt")
    assert tuple(step for step, _ in steps.seen) == STEPS
