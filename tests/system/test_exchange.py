"""Folders take the place of others, in one step where the system can, and without a loss where it cannot."""

import os
import sys
from pathlib import Path

import pytest

from q8lightning.checkpoint.file.temporaries import locked_folder, remove_leftovers, temporary_name
from q8lightning.system import exchange
from q8lightning.system.exchange import put_in_place


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a").write_text(content)
    return path


@pytest.fixture(params=["the system's", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to exchange folders in turn."""
    name: str = request.param
    if name == "two steps":
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    return name


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file", "a link"])
def test_the_new_folder_takes_the_place_of(there: str, way: str, tmp_path: Path) -> None:
    new, target = folder(tmp_path / "new", "new"), tmp_path / "target"
    if there == "a folder":
        folder(target, "old")
    elif there == "a file":
        target.write_text("old")
    elif there == "a link":
        target.symlink_to(folder(tmp_path / "elsewhere", "old"))
    put_in_place(os.fspath(new), os.fspath(target))
    assert not target.is_symlink()
    assert (target / "a").read_text() == "new"
    left = {each.name for each in tmp_path.iterdir()}
    assert left == ({"target", "elsewhere"} if there == "a link" else {"target"})
    assert there != "a link" or (tmp_path / "elsewhere" / "a").read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take two steps")
def test_linux_exchanges_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = folder(tmp_path / "new", "new"), folder(tmp_path / "target", "old")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("it was renamed, and there was nothing in between"))
    put_in_place(os.fspath(new), os.fspath(target))
    assert (target / "a").read_text() == "new"


def test_what_was_there_stays_if_the_second_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = folder(tmp_path / "new", "new"), folder(tmp_path / "target", "old")
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    rename = os.rename

    def fails(one: str, two: str) -> None:
        if one == os.fspath(new):
            raise OSError("no")
        rename(one, two)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        put_in_place(os.fspath(new), os.fspath(target))
    assert (target / "a").read_text() == "old"
    assert (new / "a").read_text() == "new"


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_the_next_save_finishes_what_a_killed_process_began(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is never without a name for longer than that, and nothing else is left."""
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    new, target = folder(tmp_path / temporary_name(), "new"), folder(tmp_path / "target", "old")
    rename = os.rename

    def is_killed(one: str, two: str) -> None:
        if moment == "before" or (moment == "between" and one == os.fspath(new)):
            os._exit(0)
        rename(one, two)
        if moment == "after" and two == os.fspath(target):
            os._exit(0)

    child = os.fork()
    if not child:
        os.rename = is_killed
        put_in_place(os.fspath(new), os.fspath(target))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert target.exists() is (moment != "between")
    remove_leftovers(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["target"]
    assert (target / "a").read_text() == ("old" if moment == "before" else "new")


def test_what_a_living_process_does_is_left_alone(tmp_path: Path) -> None:
    with locked_folder(tmp_path) as new:
        aside = new.with_name(f"{new.name}{exchange.ASIDE}")
        aside.mkdir()
        folder(aside / "target", "old")
        remove_leftovers(tmp_path)
        assert {each.name for each in tmp_path.iterdir()} == {new.name, aside.name}
