"""Damage is noticed: through every door a tensor's payload is what was saved, through the Trainer the whole file is."""

import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import edit_pickle, flip, position_of
from support.models import Autoencoder, Diary, quiet_trainer, train_and_save
from support.promises import assert_same, load, payloads_of, same_bits

from q8lightning import (
    CorruptCheckpointError,
    QuantizationCallback,
    QuantizedCheckpointIO,
    QuantizedTensor,
    keep_encoded,
    without_verification,
)
from q8lightning.checkpoint.file.verify.summed_file import LONG

WEIGHT = "state_dict.decoder.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a real training."""
    return short_records(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def file(whole: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    path.write_bytes(whole)
    return path


def position_in_payload(path: Path, name: str, offset: int) -> int:
    """Return where a byte of a payload's data is in the file."""
    data = payloads_of(path)[name].data
    position = path.read_bytes().find(data.numpy().tobytes())
    assert position > 0
    return position + offset


# Payloads, through every door


DOORS: dict[str, Callable[[Path], Any]] = {
    "torch.load": lambda path: torch.load(path, weights_only=True),
    "torch.load, everything": lambda path: torch.load(path, weights_only=False),
    "torch.load, mapped": lambda path: torch.load(path, weights_only=True, mmap=True),
    "load_from_checkpoint": lambda path: Autoencoder.load_from_checkpoint(path, map_location="cpu"),
    "Trainer": lambda path: quiet_trainer(path.parent).validate(Autoencoder(), ckpt_path=path, verbose=False),
    "Trainer, with the callback": lambda path: quiet_trainer(path.parent, callbacks=[QuantizationCallback()]).test(
        Autoencoder(), ckpt_path=path, verbose=False
    ),
    "the IO": lambda path: QuantizedCheckpointIO().load_checkpoint(path),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("offset", [0, 100, 64 * 64 + 64, -1], ids=["scale", "code", "residual", "last"])
def test_a_flipped_bit_in_a_payload_is_reported_by_name(door: Callable[[Path], Any], offset: int, file: Path) -> None:
    door(file)
    offset %= payloads_of(file)[WEIGHT].nbytes
    flip(file, position_in_payload(file, WEIGHT, offset), bit=3)
    with pytest.raises(CorruptCheckpointError, match=r"the tensor state_dict\.decoder\.weight .*Load another") as error:
        door(file)
    assert WEIGHT in error.value.what


@pytest.mark.parametrize("door", ["the IO", "Trainer, with the callback"])
def test_the_error_names_the_file_where_it_is_known(door: str, file: Path) -> None:
    flip(file, position_in_payload(file, WEIGHT, 5))
    with pytest.raises(CorruptCheckpointError) as error:
        DOORS[door](file)
    assert str(file) in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # as it travels between processes
    assert (str(again), again.what, again.file) == (str(error.value), error.value.what, error.value.file)


def test_the_codes_alone_are_not_what_is_covered(file: Path) -> None:
    """A payload under another header would decode to other values."""
    with keep_encoded():
        payload = load(file)["state_dict"]["decoder.weight"]
    for change in ({"shape": (32, 128)}, {"stride": (1, 64)}, {"dtype": torch.bfloat16}, {"name": "other"}):
        values = {name: getattr(payload, name) for name in ("codec", "data", "shape", "stride", "dtype", "name")}
        with pytest.raises(CorruptCheckpointError):
            QuantizedTensor(**(values | change), checksum=payload.checksum).decode()
    QuantizedTensor(**values, checksum=payload.checksum).decode()


def test_what_stays_encoded_is_verified_when_it_is_decoded(file: Path) -> None:
    flip(file, position_in_payload(file, WEIGHT, 5))
    with keep_encoded():
        state = torch.load(file, weights_only=True, mmap=True)["state_dict"]
    state["encoder.0.weight"].decode()
    with pytest.raises(CorruptCheckpointError, match=r"state_dict\.decoder\.weight"):
        state["decoder.weight"].decode()


def test_saving_a_damaged_payload_again_does_not_make_it_whole(file: Path, tmp_path: Path) -> None:
    flip(file, position_in_payload(file, WEIGHT, 5))
    with keep_encoded():
        torch.save(load(file), tmp_path / "again.ckpt")
    with pytest.raises(CorruptCheckpointError, match=r"state_dict\.decoder\.weight"):
        load(tmp_path / "again.ckpt")


# The rest of the file, through the Trainer


def test_a_flipped_bit_in_a_raw_tensor_is_reported_by_name(file: Path) -> None:
    whole = load(file)["state_dict"]["table"]
    position = file.read_bytes().find(whole.numpy().tobytes())
    flip(file, position + 77, bit=6)
    assert not same_bits(load(file)["state_dict"]["table"], whole), "torch.load alone would have noticed"
    with pytest.raises(CorruptCheckpointError, match=r"the tensor state_dict\.table in .*a\.ckpt is damaged"):
        QuantizedCheckpointIO().load_checkpoint(file)


def test_a_record_that_torch_would_not_read_at_all_is_reported(file: Path) -> None:
    """One bit in the table of contents makes it a folder; torch then returns whatever was in the memory."""
    table = load(file)["state_dict"]["table"]
    with zipfile.ZipFile(file) as archive:
        (name,) = (record.filename for record in archive.infolist() if record.file_size == table.nbytes)
    entry = file.read_bytes().rfind(name.encode()) - 46
    assert file.read_bytes()[entry : entry + 4] == b"PK\x01\x02"
    flip(file, entry + 38, bit=4)
    with pytest.raises(CorruptCheckpointError):
        QuantizedCheckpointIO().load_checkpoint(file)


def test_a_changed_number_outside_of_tensors_is_reported(file: Path) -> None:
    edit_pickle(file, b"something_extra", b"something_extrb", keep_sum=True)
    assert "something_extrb" in load(file)
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl in .*a\.ckpt is damaged"):
        QuantizedCheckpointIO().load_checkpoint(file)


def test_verification_can_be_switched_off(file: Path) -> None:
    flip(file, position_in_payload(file, WEIGHT, 5))
    flip(file, position_of(file, ".data/serialization_id"))
    trainer = quiet_trainer(file.parent, callbacks=[QuantizationCallback(verify=False)])
    trainer.validate(Autoencoder(), ckpt_path=file, verbose=False)
    QuantizedCheckpointIO(verify=False).load_checkpoint(file)
    with without_verification():
        load(file)
    with pytest.raises(CorruptCheckpointError):
        load(file)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_what_the_error_says_to_do_works_at_every_door(door: Callable[[Path], Any], file: Path) -> None:
    flip(file, position_in_payload(file, WEIGHT, 5))
    flip(file, position_of(file, ".data/serialization_id"))
    with pytest.raises(CorruptCheckpointError, match="without_verification"):
        door(file)
    with without_verification():
        door(file)


def test_a_file_without_sums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"x": torch.arange(9)}}, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert QuantizedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["x"].tolist() == list(range(9))


def test_a_file_of_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.ones(9)}}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    assert QuantizedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["x"].tolist() == [1] * 9


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1, -30, -1000], ids=str)
def test_a_file_that_was_cut_off_is_reported(size: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CorruptCheckpointError, match=r"a\.ckpt is damaged"):
        QuantizedCheckpointIO().load_checkpoint(file)
    with pytest.raises(Exception):  # noqa: B017, PT011 (torch's choice)
        load(file)


def test_what_is_no_damage_is_not_called_damage(file: Path, tmp_path: Path) -> None:
    checkpoint = {"state_dict": {}, "object": Autoencoder()}
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        QuantizedCheckpointIO().load_checkpoint(tmp_path / "b.ckpt", weights_only=True)
    with pytest.raises(FileNotFoundError):
        QuantizedCheckpointIO().load_checkpoint(tmp_path / "c.ckpt")


def short_records(folder: Path) -> bytes:
    """The checkpoint of a training, whose records are read one after the other."""
    train_and_save(folder, Autoencoder(), QuantizationCallback(), Diary())
    return (folder / "a.ckpt").read_bytes()


def a_long_record(folder: Path) -> bytes:
    """A checkpoint with a record that threads read in parts."""
    state = {"weight": torch.randn(64, 64), "raw": torch.arange(LONG // 8 + 77), "bias": torch.randn(64)}
    QuantizedCheckpointIO().save_checkpoint({"state_dict": state}, folder / "a.ckpt")
    return (folder / "a.ckpt").read_bytes()


@pytest.mark.parametrize(("make", "attempts"), [(short_records, 500), (a_long_record, 150)])
def test_no_damage_is_silent(make: Callable[[Path], bytes], attempts: int, tmp_path: Path) -> None:
    """Bits flipped anywhere, more of them where there is structure, and truncations: the same values, or an error."""
    whole, file = make(tmp_path), tmp_path / "a.ckpt"
    expected = load(file)
    io, chance, noticed = QuantizedCheckpointIO(), random.Random(0), 0
    data = position_of(file, "data/0")
    structure = [*range(data), *range(position_of(file, "version") - 100, len(whole))]
    for attempt in range(attempts):
        content = bytearray(whole)
        if attempt % 10 == 0:
            del content[chance.randrange(len(content)) :]
        else:
            position = chance.choice(structure) if attempt % 3 == 0 else chance.randrange(len(content))
            content[position] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        try:
            found = io.load_checkpoint(file)
        except CorruptCheckpointError:
            noticed += 1
        else:
            assert_same(found, expected)
    assert 0.7 * attempts < noticed < attempts, "either nothing was damaged or everything was"
