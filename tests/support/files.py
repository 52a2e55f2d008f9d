"""Files of checkpoints: what is saved, what lies where in the file, and how to damage it."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def checkpoint(value: float = 1.0) -> dict[str, Any]:
    """Return a checkpoint of a weight and a bias that hold one value."""
    return {"state_dict": {"weight": torch.full((64, 64), value), "bias": torch.full((64,), value)}}


def written(save: Callable[[Any, IO[bytes]], None], content: Any) -> bytes:
    file = io.BytesIO()
    save(content, file)
    return file.getvalue()


def without_identity(archive: bytes) -> bytes:
    """Blank the one record that we make differently: a number by which torch tells files apart in its log."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        identity = opened.read("archive/.data/serialization_id")
    assert len(identity) == 40
    assert identity.isdigit()
    assert archive.count(identity) == 1
    blank = archive.replace(identity, b"-" * 40)
    crc = struct.pack("<I", zlib.crc32(identity))
    assert blank.count(crc) == 2, "behind the record, and in the table of contents"
    return blank.replace(crc, b"----")


def edit_pickle(path: Path, old: bytes, new: bytes, keep_sum: bool = False) -> None:
    """Replace bytes in the pickle of a file; with ``keep_sum``, leave the sum of it as it was."""
    with zipfile.ZipFile(path) as archive:
        records = [(each.filename, each.compress_type, archive.read(each)) for each in archive.infolist()]
    (pickled,) = (content for name, _, content in records if name.endswith("/data.pkl"))
    assert old in pickled
    edited = pickled.replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, method, content in records:
            archive.writestr(name, edited if content is pickled else content, method)
    if keep_sum:
        before, after = (struct.pack("<I", zlib.crc32(content)) for content in (pickled, edited))
        path.write_bytes(path.read_bytes().replace(after, before))


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def place_of(path: Path, content: Tensor) -> int:
    """Return a position in the middle of a tensor's bytes in a file."""
    wanted = content.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    start = path.read_bytes().find(wanted)
    assert start > 0
    return start + len(wanted) // 2


def position_of(path: Path, record: str) -> int:
    """Return where the content of a record starts in the file."""
    with zipfile.ZipFile(path) as archive:
        (start,) = (each.header_offset for each in archive.infolist() if each.filename.endswith(f"/{record}"))
    name_length, extra_length = struct.unpack("<HH", path.read_bytes()[start + 26 : start + 30])
    return start + 30 + name_length + extra_length
