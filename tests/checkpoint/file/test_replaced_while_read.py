"""A checkpoint that is replaced while it is read is one of the two, and never called damaged, at every door of ours.

The doors: the CheckpointIO (by itself, around one of somebody else's, around Lightning's asynchronous one), a Trainer
with the callback, ``export_quantized``, and each command of the command line. Before every opening of the name by
Python another file takes it; a thread replaces it all the time as well, for what opens it elsewhere.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO
from support.models import Autoencoder, quiet_trainer
from support.promises import assert_same, load

from q8lightning import CorruptCheckpointError, QuantizationCallback, QuantizedCheckpointIO, export_quantized
from q8lightning.checkpoint.file.open_file import OpenFile

main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main


class Theirs(TorchCheckpointIO):
    """A CheckpointIO that we know nothing of."""


class SaveEachStep(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one training, which have everything at the same places."""
    folder = tmp_path_factory.mktemp("two")
    callbacks = [SaveEachStep(), QuantizationCallback(qat={})]
    quiet_trainer(folder, max_steps=2, limit_val_batches=0, callbacks=callbacks).fit(Autoencoder())
    return folder / "1.ckpt", folder / "2.ckpt"


class Replaced:
    """A name that is another file's before each opening, and now and then."""

    def __init__(self, path: Path, two: tuple[Path, Path]) -> None:
        self.path = path
        self.times = 0
        self._two = two
        self._turn = threading.Lock()
        self._ended = threading.Event()

    def replace(self) -> None:
        with self._turn:
            copy = self.path.with_suffix(".copy")
            shutil.copyfile(self._two[self.times % 2], copy)
            os.replace(copy, self.path)
            self.times += 1

    def __enter__(self) -> "Replaced":
        _install()
        _REPLACED.append(self)
        self.replace()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()
        return self

    def _go_on(self) -> None:
        while not self._ended.wait(0.0005):
            self.replace()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        _REPLACED.remove(self)


_REPLACED: list[Replaced] = []


def _replace(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for each in _REPLACED:
            if arguments[0] == str(each.path):
                each.replace()


@cache
def _install() -> None:
    sys.addaudithook(_replace)  # for good: hooks cannot be removed


@pytest.fixture
def replaced(two: tuple[Path, Path], tmp_path: Path) -> Iterator[Replaced]:
    with Replaced(tmp_path / "last.ckpt", two) as each:
        yield each


def validate(path: Path) -> Any:
    model = Autoencoder()
    trainer = quiet_trainer(path.parent, limit_val_batches=1, callbacks=[QuantizationCallback()])
    trainer.validate(model, ckpt_path=path, verbose=False)
    return {"state_dict": model.state_dict()}


def export(path: Path) -> Any:
    export_quantized(path, path.with_suffix(".exported"))
    return None


def command(name: str, *arguments: str) -> Callable[[Path], Any]:
    def run(path: Path) -> Any:
        done = path.with_suffix(".done")
        assert main([each.format(path=path, done=done) for each in (name, *arguments)]) == 0
        return load(done) if name == "decompress" else None

    return run


DOORS: dict[str, Callable[[Path], Any]] = {
    "the IO": lambda path: QuantizedCheckpointIO().load_checkpoint(path, weights_only=True),
    "the IO around another": lambda path: QuantizedCheckpointIO(Theirs()).load_checkpoint(path, weights_only=True),
    "the IO around an asynchronous one": lambda path: QuantizedCheckpointIO(AsyncCheckpointIO()).load_checkpoint(path),
    "Trainer": validate,
    "export_quantized": export,
    "inspect": command("inspect", "{path}"),
    "compress": command("compress", "{path}", "{done}", "--force", "--preset", "compact"),
    "decompress": command("decompress", "{path}", "{done}", "--force"),
    "verify": command("verify", "{path}"),
    "compare": command("compare", "{path}", "{path}"),
}


@pytest.mark.filterwarnings("ignore:.*was replaced each of the 5 times")
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_whole_content_is_never_called_damaged(
    door: Callable[[Path], Any], replaced: Replaced, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [load(path)["state_dict"] for path in two]
    end, reads = time.monotonic() + 0.25, 0
    while time.monotonic() < end or reads < 3:
        found, reads = door(replaced.path), reads + 1
        if found is not None:
            state, name = found["state_dict"], "decoder.weight"
            assert_same(state, expected[not torch.equal(state[name], expected[0][name])])
    assert replaced.times > reads, capsys.readouterr()


def test_what_is_damaged_is_called_so_all_the_same(replaced: Replaced, two: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    content = bytearray(two[0].read_bytes())
    content[content.find(load(two[0])["state_dict"]["table"].numpy().tobytes()) + 5] ^= 1
    damaged.write_bytes(content)
    replaced._two = (damaged, damaged)
    replaced.replace()
    for name in ("the IO", "export_quantized"):
        with pytest.raises(CorruptCheckpointError, match=r"state_dict\.table in .*last\.ckpt is damaged"):
            DOORS[name](replaced.path)
    with pytest.warns(UserWarning, match=r"last\.ckpt was replaced each of the 5 times .* only quantized tensors"):
        DOORS["the IO around another"](replaced.path)
    with pytest.raises(CorruptCheckpointError, match=r"state_dict\.table in .*damaged is damaged"):
        DOORS["the IO around another"](damaged)


@pytest.mark.parametrize("in_parallel", [True, False])
def test_an_open_file_is_that_file_whatever_takes_its_name(
    in_parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_parallel:
        monkeypatch.delattr(os, "preadv")
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    with OpenFile(path) as file, file.reader() as one, file.reader() as other:
        (tmp_path / "b").write_bytes(b"abc")
        assert file.has_its_name()
        os.replace(tmp_path / "b", path)
        assert not file.has_its_name()
        assert one.read(4) == b"0123"
        assert other.read() == b"0123456789"
        assert one.read() == b"456789"
        with open(file.address, "rb") as mapped:
            assert mapped.read() == b"0123456789"
        path.unlink()
        assert not file.has_its_name()
        assert Path(file.address).read_bytes() == b"0123456789"
        with pytest.raises(OSError, match="Invalid argument"):
            one.seek(-11, os.SEEK_END)
    with pytest.raises(ValueError, match="closed file"):
        file.read_at(0, memoryview(bytearray(1)))


def test_where_no_path_leads_to_an_open_file_its_name_must_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.touch()
    with OpenFile(path) as file:
        # As on Windows.
        monkeypatch.setattr(os.path, "exists", lambda path: False)
        assert file.address == str(path)


def test_an_open_file_is_closed_with_the_last_reference(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    file = OpenFile(tmp_path / "a")
    raw = file._file
    assert not raw.closed
    del file
    assert raw.closed
