"""Verify a checkpoint: compare all its sums, and decode everything once."""

import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from q8lightning.checkpoint.file.verify.archive import verified
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.tools.open_checkpoint import (
    OpenCheckpoint,
    Progress,
    open_file,
    open_folder,
    read_checkpoint,
    read_folder,
    silent,
)
from q8lightning.tools.tensors import is_encoded, tensors_in


@dataclass(frozen=True)
class Verification:
    """The result of verifying a checkpoint.

    Attributes:
        path: The file or folder.
        bytes: Its size.
        tensors: How many tensors could be read; tied ones count as often as they occur.
        quantized: How many of them are encoded; tied ones count once.
        has_sums: Whether the file has a CRC32 of each of its records; a folder has sums of each chunk.
        damage: What is damaged, such as ``the tensor state_dict.layer.weight``; empty if the file is whole.
    """

    path: Path
    bytes: int
    tensors: int = 0
    quantized: int = 0
    has_sums: bool = True
    damage: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def as_primitives(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        found = asdict(self)
        del found["path"]
        return {"file": str(self.path), "whole": self.is_whole, **found, "damage": list(self.damage)}


def verify(path: str | os.PathLike[str], *, trust: bool = False, progress: Progress = silent) -> Verification:
    """Compare the checksum of every payload and the CRC32 of everything else; decode every payload to finite values.

    Of a folder every file is read. Files that it lacks, or that are of another save, count as damage; those of plain
    Lightning do not tell of which save they are. Damage is returned, not raised.

    Args:
        path: The file or folder, quantized or not.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.
        progress: Called with the number of quantized tensors decoded so far, and of all.

    Raises:
        ToolError: If there is no such file, or it is no checkpoint at all.
        NewerFormatError: If the file was written in a later format than this version reads.

    Example:
        >>> from q8lightning.tools import verify
        >>> verify("last.ckpt").is_whole  # doctest: +SKIP
        True
    """
    if Path(path).is_dir():
        return _verify_folder(path, trust, progress)
    file = open_file(path)
    counts: dict[str, int] = {}
    damage: list[str] = []
    try:
        opened = read_checkpoint(file, trust)
        with verified(file):
            found = tensors_in(opened.content)
            payloads = {id(value): (keys, value) for keys, value in found if isinstance(value, QuantizedTensor)}
            counts = {"tensors": len(found), "quantized": len(payloads)}
            for index, (keys, payload) in enumerate(payloads.values()):
                damage += _damage(opened, opened.name(keys), payload)
                progress(index + 1, len(payloads))
    except CorruptCheckpointError as error:
        if not damage:  # the sums of the file locate damage less exactly
            damage.append(error.what)
    with file.reader() as reader:
        has_sums = zipfile.is_zipfile(reader)
    return Verification(Path(file.path), file.size, **counts, has_sums=has_sums, damage=tuple(damage))


def _verify_folder(path: str | os.PathLike[str], trust: bool, progress: Progress) -> Verification:
    try:
        folder = open_folder(path, trust)
    except CorruptCheckpointError as error:
        size = sum(each.stat().st_size for each in Path(path).iterdir())
        return Verification(Path(path), size, damage=(_located(error, path),))
    damage = [_located(error, path) for error in folder.damage()]
    tensors = quantized = 0
    try:
        opened = read_folder(folder)
        found = tensors_in(opened.content)
        encoded = [(keys, value) for keys, value in found if is_encoded(value)]
        tensors, quantized = len(found), len(encoded)
        for index, (keys, value) in enumerate(encoded if not damage else ()):
            damage += _damage(opened, opened.name(keys), value)
            progress(index + 1, len(encoded))
    except CorruptCheckpointError as error:
        if not damage:  # everything that was compared with its sum knows more
            damage.append(_located(error, path))
    return Verification(folder.path, folder.size, tensors, quantized, damage=tuple(damage))


def _located(error: CorruptCheckpointError, path: str | os.PathLike[str]) -> str:
    """Return what is damaged, with the file of a folder that it is in."""
    inside = error.file is not None and Path(error.file).parent == Path(path)
    return f"{error.what} in {Path(error.file).name}" if inside and error.file is not None else error.what


def _damage(opened: OpenCheckpoint, name: str, payload: QuantizedTensor | UnreadTensor) -> list[str]:
    """Return what is wrong with a payload; an empty list if nothing is."""
    try:
        if bool(opened.decode(payload).isfinite().all()):
            return []
        return [f"the tensor {name} (it decodes to values that are not finite)"]
    except CorruptCheckpointError as error:
        return [error.what]
    except Exception as error:  # a header whose sizes do not fit the data raises in many ways
        return [f"the tensor {name} (it cannot be decoded: {type(error).__name__})"]
