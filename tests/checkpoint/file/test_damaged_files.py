"""A file that is cut off, empty or none of torch's says so in the same words at every door of ours, and is named.

Doors (rows) and files (columns), each with each:

- the CheckpointIO, verifying or not, of a file of this machine or of another file system, and around somebody else's
- a Trainer with the callback: fit, validate, test, predict
- ``export_quantized``
- the command line: inspect, verify, compress, decompress, compare

times: empty, two bytes, cut off, all zeros (a crash without a flush), a web page, a pointer of Git LFS.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from support.models import Autoencoder, quiet_trainer
from support.promises import load, payloads_of

from q8lightning import (
    CorruptCheckpointError,
    QuantizationCallback,
    QuantizedCheckpointIO,
    export_quantized,
    keep_encoded,
)
from q8lightning.checkpoint.file.load_errors import damage_in

main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main

Door = Callable[[Path], Any]


class SaveAtEnd(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "a.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a training with quantized weights."""
    folder = tmp_path_factory.mktemp("whole")
    callbacks = [SaveAtEnd(), QuantizationCallback(qat={})]
    quiet_trainer(folder, max_steps=1, limit_val_batches=0, callbacks=callbacks).fit(Autoencoder())
    return (folder / "a.ckpt").read_bytes()


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "two bytes": lambda whole: whole[:2],
    "cut off": lambda whole: whole[:-3000],
    "zeros": lambda whole: bytes(len(whole)),
    "a web page": lambda whole: b"<!DOCTYPE html><html><body>404</body></html>" * 9,
    "a pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
}


class Theirs(TorchCheckpointIO):
    """A CheckpointIO that we know nothing of."""


def of_another_file_system(path: Path) -> Any:
    remote = f"memory://{path}"
    with fsspec.open(remote, "wb") as file:
        file.write(path.read_bytes())
    return QuantizedCheckpointIO().load_checkpoint(remote)


def trainer(stage: str) -> Door:
    def run(path: Path) -> Any:
        made = quiet_trainer(path.parent, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback()])
        getattr(made, stage)(Autoencoder(), ckpt_path=path)

    return run


DOORS: dict[str, Door] = {
    "the IO": lambda path: QuantizedCheckpointIO().load_checkpoint(path),
    "the IO, restricted": lambda path: QuantizedCheckpointIO().load_checkpoint(path, weights_only=True),
    "the IO, unrestricted": lambda path: QuantizedCheckpointIO().load_checkpoint(path, weights_only=False),
    "the IO, not verifying": lambda path: QuantizedCheckpointIO(verify=False).load_checkpoint(path),
    "the IO around another": lambda path: QuantizedCheckpointIO(Theirs()).load_checkpoint(path),
    "the IO, of another file system": of_another_file_system,
    **{stage: trainer(stage) for stage in ("fit", "validate", "test", "predict")},
    "export_quantized": lambda path: export_quantized(path, path.with_suffix(".out")),
}


@pytest.mark.parametrize("content", FILES)
@pytest.mark.parametrize("door", DOORS)
def test_it_is_said_in_the_same_words(door: str, content: str, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(FILES[content](whole))
    with pytest.raises(CorruptCheckpointError, match=r"file.* is damaged: .* Load another checkpoint") as error:
        DOORS[door](path)
    assert f" in {'memory://' if 'another file system' in door else ''}{path} is damaged" in str(error.value)
    assert not path.with_suffix(".out").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("rest", [b"ello\n" * 99, bytes(99), bytes(range(255, 0, -1))], ids=["text", "zeros", "bytes"])
def test_a_file_of_another_kind_is_told_by_its_beginning(rest: bytes, weights_only: bool, tmp_path: Path) -> None:
    """A pickle has many instructions, which torch takes for such; each fails in a way of its own."""
    path = tmp_path / "a.ckpt"
    for first in range(256):
        path.write_bytes(bytes([first]) + rest)
        with pytest.raises(CorruptCheckpointError, match=r"none of torch.save.* in .*a\.ckpt is damaged"):
            QuantizedCheckpointIO().load_checkpoint(path, weights_only=weights_only)


def test_errors_of_a_checkpoint_io_with_files_of_its_own_kind_are_left_alone(tmp_path: Path) -> None:
    class Json(TorchCheckpointIO):
        def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
            raise KeyError(Path(path).read_text())

    (tmp_path / "a.json").write_text('{"state_dict": {}}')
    with pytest.raises(KeyError):
        QuantizedCheckpointIO(Json()).load_checkpoint(tmp_path / "a.json")


COMMANDS = ("inspect {0}", "verify {0}", "compress {0} {1}", "decompress {0} {1}", "compare {0} {0}")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", FILES)
def test_commands_say_so_in_one_line(
    command: str, content: str, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "a.ckpt", tmp_path / "out.ckpt"
    path.write_bytes(FILES[content](whole))
    assert main(command.format(path, out).split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "is damaged" in line or (
        f"{path} is not a checkpoint that torch.load can read" in line
        and content in ("zeros", "a web page", "a pointer")
    )
    assert not out.exists()


@pytest.mark.parametrize("command", ["compare {0} {1}", "compare {1} {0}", "decompress {0} {2}", "verify {0}"])
@pytest.mark.parametrize("what", ["state_dict.decoder.weight", "state_dict.table"])
def test_commands_name_the_file_of_a_damaged_tensor(
    command: str, what: str, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "a.ckpt", tmp_path / "whole.ckpt"
    other.write_bytes(whole)
    data = payloads_of(other)[what].data if "weight" in what else load(other)["state_dict"]["table"]
    position = whole.find(data.numpy().tobytes()) + 7
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    assert main(command.format(path, other, tmp_path / "out").split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the tensor {what}" in line
    assert str(path) in line
    assert str(other) not in line


@pytest.mark.parametrize("sums", [True, False], ids=["the file's sum tells", "only the payload's tells"])
def test_an_export_of_a_damaged_tensor_is_refused(sums: bool, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(whole)
    if sums:
        position = whole.find(payloads_of(path)["state_dict.decoder.weight"].data.numpy().tobytes()) + 7
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    else:
        with keep_encoded():
            content = load(path)
            content["state_dict"]["decoder.weight"].data[7] ^= 1
            torch.save(content, path)
    with pytest.raises(CorruptCheckpointError, match=r"the tensor .*decoder\.weight.* in .*a\.ckpt is damaged"):
        export_quantized(path, tmp_path / "out", "codes")
    assert not (tmp_path / "out").exists()


def test_torch_load_names_the_file_too(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(whole)
    position = whole.find(payloads_of(path)["state_dict.decoder.weight"].data.numpy().tobytes()) + 7
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    says = r"the tensor state_dict\.decoder\.weight in .*a\.ckpt is damaged"
    with pytest.raises(CorruptCheckpointError, match=says):
        torch.load(path, weights_only=True)
    with pytest.raises(CorruptCheckpointError, match=says):
        torch.load(f=str(path), weights_only=False)
    with pytest.raises(CorruptCheckpointError, match=says), open(path, "rb") as file:
        torch.load(file, weights_only=True)
    with pytest.raises(CorruptCheckpointError, match=says):
        Autoencoder.load_from_checkpoint(path)


def test_what_is_whole_is_not_called_damaged(tmp_path: Path) -> None:
    """A pickle of a later protocol has instructions that the restricted unpickler does not know."""
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"x": torch.ones(3)}}, path, pickle_protocol=4)
    with pytest.raises(Exception, match="Unsupported operand 149"):
        QuantizedCheckpointIO().load_checkpoint(path, weights_only=True)
    assert QuantizedCheckpointIO().load_checkpoint(path, weights_only=False)["state_dict"]["x"].tolist() == [1, 1, 1]
    assert damage_in(RuntimeError("CUDA error: out of memory")) is None
