"""A process that imports nothing of ours loads a quantized checkpoint through every door of torch and Lightning.

One process imports torch, Lightning and a model. Forks of it try a few doors each, one after the other; the first one
loads the first such file of its process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from support.files import edit_pickle
from support.models import Autoencoder, Diary, quiet_trainer, train_and_save
from support.promises import assert_same, load, payloads_of

import q8lightning_autoload
from q8lightning import NewerFormatError, QuantizationCallback, QuantizedCheckpointIO, export_quantized
from q8lightning.checkpoint import payload

main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main

installed = pytest.mark.skipif(
    not any(each.value == "q8lightning_autoload:register" for each in entry_points(group="torch.backends")),
    reason="q8lightning is not installed as this version says, so that torch does not call what registers it",
)

SCRIPT = r"""
import io, json, os, sys, threading, warnings

folder = sys.argv[1]
import torch
import lightning.pytorch as pl
from support.models import Autoencoder, Diary, quiet_trainer

assert not [name for name in sys.modules if name.startswith("q8lightning.") or name == "q8lightning"]
warnings.simplefilter("ignore")
file = f"{folder}/a.ckpt"
expected = torch.load(f"{folder}/plain.ckpt", weights_only=True)

def same(found, wanted):
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        return [same(found[key], wanted[key]) for key in wanted]
    if isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        return [same(*each) for each in zip(found, wanted)]
    if isinstance(wanted, torch.Tensor):
        assert type(found) is torch.Tensor and found.dtype == wanted.dtype and torch.equal(found, wanted)
    else:
        assert found == wanted

def model_from_it():
    model = Autoencoder.load_from_checkpoint(file, map_location="cpu")
    same(model.state_dict(), expected["state_dict"])

def trainer(stage, **options):
    model = Autoencoder()
    seen = {}
    class Watch(pl.Callback):
        def _watch(self, trainer, module):
            seen.update({name: each.clone() for name, each in module.state_dict().items()})
        on_train_start = on_validation_start = on_test_start = on_predict_start = _watch
    made = quiet_trainer(folder, callbacks=[Watch(), Diary()], limit_val_batches=1, limit_test_batches=1,
                         limit_predict_batches=1, max_steps=3)
    getattr(made, stage)(model, ckpt_path=file, **options)
    same(seen, expected["state_dict"])

def in_threads():
    errors = []
    def read():
        try: same(torch.load(file, weights_only=True), expected)
        except BaseException as error: errors.append(error)
    threads = [threading.Thread(target=read) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert not errors, errors

def imported():
    assert "q8lightning" in sys.modules
    import q8lightning
    same(torch.load(file, weights_only=True), expected)
    with q8lightning.keep_encoded():
        kept = torch.load(file, weights_only=True)["state_dict"]["decoder.weight"]
    assert type(kept) is q8lightning.QuantizedTensor
    same(q8lightning.QuantizedCheckpointIO().load_checkpoint(file), expected)

def in_a_context():
    with torch.device("meta"):
        found = torch.load(file, weights_only=True)
    same(found, expected)

def cleared():
    torch.serialization.clear_safe_globals()
    torch.load(file, weights_only=True)

forks = [
    {
        "torch.load": lambda: same(torch.load(file, weights_only=True), expected),
        "torch.load, by default": lambda: same(torch.load(file), expected),
        "torch.load, mapped": lambda: same(torch.load(file, weights_only=True, mmap=True), expected),
        "torch.load, everything": lambda: same(torch.load(file, weights_only=False), expected),
        "torch.load, of a buffer": lambda: same(torch.load(io.BytesIO(open(file, "rb").read())), expected),
        "damaged": lambda: torch.load(f"{folder}/damaged.ckpt", weights_only=True),
        "imported": imported,
        "cleared": cleared,
    },
    {
        "load_from_checkpoint": model_from_it,
        "damaged, load_from_checkpoint": lambda: Autoencoder.load_from_checkpoint(f"{folder}/damaged.ckpt"),
        "fit": lambda: trainer("fit"),
        "validate": lambda: trainer("validate", verbose=False),
        "predict": lambda: trainer("predict"),
    },
    {
        "torch.load, in a device context": in_a_context,
        "torch.load, in threads": in_threads,
        "test": lambda: trainer("test", verbose=False),
        "later format": lambda: torch.load(f"{folder}/later.ckpt", weights_only=True),
    },
]
children = []
for number, doors in enumerate(forks):
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
said = {}
for name, door in doors.items():
    try:
        door()
        said[name] = None
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
with open(f"{folder}/said.{number}", "w") as notes:
    json.dump(said, notes)
os._exit(0)
"""

DAMAGED = "CorruptCheckpointError: the tensor state_dict.decoder.weight in {folder}/damaged.ckpt is damaged"
DOORS = {
    "torch.load": None,
    "torch.load, by default": None,
    "torch.load, mapped": None,
    "torch.load, everything": None,
    "torch.load, of a buffer": None,
    "torch.load, in a device context": None,
    "torch.load, in threads": None,
    "load_from_checkpoint": None,
    "fit": None,
    "validate": None,
    "test": None,
    "predict": None,
    "imported": None,
    "later format": "NewerFormatError: this checkpoint has q8lightning format version 2",
    "damaged": DAMAGED,
    "damaged, load_from_checkpoint": DAMAGED,
    "cleared": "UnpicklingError: Weights only load failed",
}
"""What each door says; None if it gives what the file holds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint, what it loads as, one that names a function of a later format, and a damaged one."""
    folder = tmp_path_factory.mktemp("fresh")
    train_and_save(folder, Autoencoder(), QuantizationCallback(), Diary())
    torch.save(load(folder / "a.ckpt"), folder / "plain.ckpt")
    content = (folder / "a.ckpt").read_bytes()
    (folder / "later.ckpt").write_bytes(content)
    edit_pickle(folder / "later.ckpt", b"payload\nrebuild_v1\n", b"payload\nrebuild_v2\n")
    position = content.find(payloads_of(folder / "a.ckpt")["state_dict.decoder.weight"].data.numpy().tobytes()) + 9
    (folder / "damaged.ckpt").write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str | None]:
    tests = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True)
    return dict(each for path in folder.glob("said.*") for each in json.loads(path.read_text()).items())


@installed
@pytest.mark.parametrize("door", DOORS)
def test_every_door_of_a_fresh_process_loads_it_or_says_why_not(
    door: str, said: dict[str, str | None], folder: Path
) -> None:
    expected, found = DOORS[door], said[door]
    if expected is None:
        assert found is None
    else:
        assert (found or "").startswith(expected.format(folder=folder)), found


# What is registered


@pytest.fixture
def cleared() -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def names() -> list[str]:
    return sorted(each[1] for each in torch.serialization.get_safe_globals() if isinstance(each, tuple))


def test_the_stand_ins_are_for_the_function_of_this_format_and_for_later_ones(cleared: None) -> None:
    q8lightning_autoload.register()
    before = names()
    known = [name for name in vars(payload) if name.startswith("rebuild_v")]
    assert before == sorted(f"{payload.__name__}.{name}" for name in (*known, *payload.LATER))


def test_whatever_is_registered_first_stays(cleared: None, folder: Path) -> None:
    """A load that is going on knows the functions that it met."""
    for first, second in (
        (q8lightning_autoload.register, payload.register_functions),
        (payload.register_functions, payload.register_functions),
    ):
        torch.serialization.clear_safe_globals()
        first()
        before = set(torch.serialization.get_safe_globals())
        second()
        assert set(torch.serialization.get_safe_globals()) == before
        assert_same(load(folder / "a.ckpt"), load(folder / "plain.ckpt"))


def test_registering_never_raises(cleared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("torch has changed")

    # As with a later torch.
    monkeypatch.setattr(torch.serialization, "add_safe_globals", fail)
    q8lightning_autoload.register()
    monkeypatch.delattr(torch.serialization, "add_safe_globals")
    q8lightning_autoload.register()
    assert names() == []


def test_our_doors_load_after_the_list_was_cleared(
    cleared: None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear = torch.serialization.clear_safe_globals
    with pytest.raises(Exception, match=r"Unsupported global: GLOBAL q8lightning\.checkpoint\.payload"):
        load(folder / "a.ckpt")
    expected = torch.load(folder / "plain.ckpt", weights_only=True)
    assert_same(QuantizedCheckpointIO().load_checkpoint(folder / "a.ckpt", weights_only=True), expected)
    clear()
    trainer = quiet_trainer(tmp_path, callbacks=[QuantizationCallback()])
    trainer.validate(Autoencoder(), ckpt_path=folder / "a.ckpt", verbose=False, weights_only=True)
    for command in (["inspect", "a.ckpt"], ["verify", "a.ckpt"], ["decompress", "a.ckpt", f"{tmp_path}/b"]):
        clear()
        arguments = [str(folder / each) if each == "a.ckpt" else each for each in command]
        assert main(arguments) == 0, capsys.readouterr()
    clear()
    with pytest.raises(ValueError, match="says nothing of quantized weights"):  # it was read
        export_quantized(folder / "a.ckpt", tmp_path / "c")
    clear()
    with pytest.raises(NewerFormatError, match="format version 2"):
        QuantizedCheckpointIO().load_checkpoint(folder / "later.ckpt", weights_only=True)
