"""A process that is killed in a save leaves what was there before, whole and listed, and nothing that stays."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import forked, processes
from support.sharded_models import ShardedModel, samples, trainer_of
from support.sharded_scenarios import play, results

from q8lightning import QuantizationCallback
from q8lightning.checkpoint.sharded.check import check_shards, read_meta
from q8lightning.checkpoint.sharded.write import save as sharded_save

STEPS = ("frozen", "opened", "fetched", "flushed", "renamed", "durable", "removing", "removed")
"""What a save announces, in some process; what happens elsewhere comes between two of these."""


def fitted(folder: Path, steps: int, is_async: bool, **options: Any) -> None:
    torch.manual_seed(1)
    saves = ModelCheckpoint(folder, every_n_train_steps=1, **options)
    callbacks = [QuantizationCallback(async_save=is_async), saves]
    trainer_of(folder, max_steps=steps, callbacks=callbacks, enable_checkpointing=True).fit(ShardedModel(), samples())


def visible(folder: Path) -> dict[str, int]:
    """Return the step of each checkpoint that has its name, all of which are whole."""
    found = {}
    for path in folder.iterdir():
        if not path.name.startswith("."):
            assert check_shards(path)
            found[path.name] = read_meta(path)["global_step"]
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "other names": {"save_top_k": 1, "monitor": "step", "mode": "max"},
    "one name": {"filename": "a", "enable_version_counter": False},
}


def watched(folder: Path) -> Any:
    """Look at the folder at every step of every save, as a kill at this moment would leave it."""
    found: dict[str, list[tuple[str, dict[str, int]]]] = {"other names": [], "one name": []}
    seen: list[tuple[str, dict[str, int]]] = []
    own = folder / "other names"
    looking = False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal looking
        if event != "q8lightning.save" or looking or "meta.pt" in str(arguments[1]) or not own.is_dir():
            return
        first = os.environ["LOCAL_RANK"] == "0"
        if first or arguments[0] in ("frozen", "fetched"):  # the other process may rename after that
            looking = True
            try:
                seen.append((arguments[0], visible(own)))
            finally:
                looking = False

    sys.addaudithook(look)
    for name, options in OPTIONS.items():
        own = folder / name
        fitted(own, 3, True, **options)
        found[name] = list(seen)
        seen.clear()
    return found


def play_watched(rank: int, folder: Path) -> None:
    play(rank, [watched], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    forked.prepare()
    processes.run(play_watched, 2, folder)
    return folder


@pytest.mark.parametrize("way", ["other names", "one name"])
def test_there_is_a_whole_checkpoint_at_every_step_after_the_first(way: str, folder: Path) -> None:
    first, second = (each[way] for each in results(folder, "watched", 2))
    steps = [step for step, _ in first]
    assert set(steps) >= set(STEPS[:6]), steps
    for seen in (first, second):
        begun = next(index for index, (_, found) in enumerate(seen) if found)
        assert all(found for _, found in seen[begun:])
        newest = [max(found.values()) for _, found in seen[begun:]]
        assert newest == sorted(newest)
    assert first[-1] == (
        ("removed", {"epoch=0-step=3.ckpt": 3}) if way == "other names" else ("durable", {"a.ckpt": 3})
    )


def killed(rank: int, folder: Path, victim: int, moment: str) -> None:
    """Train; one process dies in the second save, at a step or in the middle of its file."""
    saves = 0

    def die_at(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal saves
        if event == "q8lightning.save" and "meta.pt" not in str(arguments[1]):
            saves += arguments[0] == "frozen"
            if saves >= 2 and arguments[0] == moment:
                processes.die()

    write = sharded_save.write_shards

    def write_half(path: str, save: str, own: int, items: Any) -> Any:
        if saves >= 2:
            write(path, save, own, items[: len(items) // 2])
            processes.die()
        return write(path, save, own, items)

    if rank == victim:
        sys.addaudithook(die_at)
        if moment == "half a file":
            sharded_save.write_shards = write_half
    fitted(folder, 3, True, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize(("victim", "moment"), [(1, "half a file"), (0, "flushed")])
def test_a_killed_process_leaves_what_was_there(victim: int, moment: str, tmp_path: Path) -> None:
    forked.prepare()
    ended = processes.run_to_the_end(killed, 2, tmp_path, victim, moment)
    assert ended[victim].exitcode == -9
    assert ended[1 - victim].exitcode == 1  # it does not wait for ever
    assert visible(tmp_path) == {"step=1.ckpt": 1}
    hidden = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(hidden) == (victim == 0)  # the first process, if it lives, removes what was being written
    assert [each.exitcode for each in processes.run_to_the_end(resumed, 1, tmp_path)] == [0]
    assert visible(tmp_path) == {"step=1.ckpt": 1, "step=2.ckpt": 2}
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def resumed(rank: int, folder: Path) -> None:
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = trainer_of(folder, max_steps=2, callbacks=[QuantizationCallback(), saves], enable_checkpointing=True)
    trainer.fit(ShardedModel(), samples(), ckpt_path=str(folder / "step=1.ckpt"))


def interrupted(rank: int, folder: Path) -> None:
    """Train; in the second save one process writes slowly, and the one that waits for it is interrupted."""
    saves, write = 0, sharded_save.write_shards

    def write_slowly(*arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == 2 and rank == 0:
            time.sleep(2)
        elif saves == 2:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return write(*arguments)

    sharded_save.write_shards = write_slowly
    fitted(folder, 3, False, save_top_k=-1, filename="{step}")


def test_an_interrupt_in_a_save_ends_all_processes(tmp_path: Path) -> None:
    """The interrupt arrives between two messages, so that nobody can be told of it but by the end of the process."""
    forked.prepare()
    ended = processes.run_to_the_end(interrupted, 2, tmp_path, limit=30)
    assert [each.exitcode for each in ended] == [1, 1]
    assert "KeyboardInterrupt" in ended[1].error
    assert visible(tmp_path) == {"step=1.ckpt": 1}
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
