"""Compare a checkpoint in shards with what was written, before it is loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import xxhash

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.file.read import read_checkpoint
from q8lightning.checkpoint.integrity import CorruptCheckpointError, is_verifying
from q8lightning.checkpoint.layout.sections import summary_in
from q8lightning.checkpoint.sharded.folder import META, METADATA, SHARDS_KEY
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.checkpoint.sharded.shard_file import Chunk, Table, damaged_chunks, read_table


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether there is a checkpoint in shards, as Lightning knows one."""
    return os.path.isfile(os.path.join(path, META))


def read_meta(path: str | os.PathLike[str], weights_only: bool | None = True) -> dict[str, Any]:
    """Return what of a checkpoint in shards is neither of the model nor of the optimizers, compared with its sums.

    Args:
        path: The folder.
        weights_only: As ``torch.load`` has it.

    Raises:
        CorruptCheckpointError: If it is not what was saved.
    """
    file = os.path.join(path, META)
    with explained(file):
        found = read_checkpoint(file, lambda opened: torch.load(opened, map_location="cpu", weights_only=weights_only))
    return cast("dict[str, Any]", found)


def check_shards(path: str | os.PathLike[str], ranks: Ranks | None = None, weights_only: bool | None = True) -> bool:
    """Compare every file of a checkpoint in shards with its sums; each process reads a part of them.

    Args:
        path: The folder.
        ranks: The processes, all of which call this; None for this one alone.
        weights_only: How ``meta.pt`` is loaded, as ``torch.load`` has it.

    Returns:
        Whether anything was compared: not in what plain Lightning wrote, nor when the first process calls this inside
        :func:`~q8lightning.checkpoint.integrity.without_verification`.

    Raises:
        CorruptCheckpointError: In all processes, if a file is missing, of another save, or not what was written; it
            names the tensor.
        FileNotFoundError: If there is no such checkpoint.
    """
    ranks, folder = ranks or Ranks(), Path(path)
    shards = ranks.at_first(lambda: _contents(folder, weights_only) if is_verifying() else None)
    if shards is None:
        return False

    def check_some() -> None:
        for number, name in enumerate(shards["files"]):
            if number % ranks.size == ranks.rank:
                _check_file(folder / name, shards)

    ranks.share(check_some)
    return True


def shards_in(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what the content of ``meta.pt`` says of the files of a checkpoint; None if the checkpoint does not say.

    Raises:
        CorruptCheckpointError: If it says something else than is ever written.
    """
    shards = summary_in(meta).get(SHARDS_KEY)
    if not isinstance(shards, Mapping):
        return None
    files = shards.get("files")
    if not isinstance(files, Mapping) or not all(
        isinstance(name, str) and name == os.path.basename(name) and type(nbytes) is int
        for name, nbytes in files.items()
    ):
        raise CorruptCheckpointError(f"the checkpoint ({META} says of its shards {files!r:.200})")
    if not isinstance(shards.get("save"), str) or type(shards.get("metadata")) is not int:
        raise CorruptCheckpointError(f"the checkpoint ({META} lacks the sum of {METADATA} or the save)")
    return shards


def check_metadata(folder: Path, shards: Mapping[str, Any] | None) -> bytes:
    """Return the content of ``.metadata``, compared with its sum if that is known.

    Raises:
        CorruptCheckpointError: If it is not what was saved, or not there.
    """
    metadata = folder / METADATA
    if not metadata.is_file():
        raise _damage(folder, f"it lacks {METADATA}")
    data = metadata.read_bytes()
    if shards is not None and xxhash.xxh3_64_intdigest(data) != shards["metadata"]:
        raise _damage(folder, f"{METADATA} is not the one that was saved with {META}")
    return data


def checked_table(file: Path, shards: Mapping[str, Any]) -> Table:
    """Return the table of a file, if the file belongs to the checkpoint and is as long as it was.

    Raises:
        CorruptCheckpointError: If it is not.
        FileNotFoundError: If it is not there.
    """
    table = read_table(file)
    if table.save != shards["save"]:
        raise _damage(file.parent, f"the shard {file.name} is of another save than {META}")
    nbytes, found = shards["files"].get(file.name), file.stat().st_size
    if nbytes not in (None, found):
        raise _damage(file.parent, f"the shard {file.name} has {found} bytes instead of {nbytes}")
    return table


def _contents(folder: Path, weights_only: bool | None) -> Mapping[str, Any] | None:
    """Return which files belong to a checkpoint; None if the checkpoint does not say."""
    shards = shards_in(read_meta(folder, weights_only))
    if shards is None:
        return None
    check_metadata(folder, shards)
    for name in shards["files"]:
        if not (folder / name).is_file():
            raise _damage(folder, f"it lacks the shard {name}")
    return shards


def _check_file(file: Path, shards: Mapping[str, Any]) -> None:
    for chunk in damaged_chunks(file, checked_table(file, shards)):
        raise CorruptCheckpointError(describe_chunk(chunk), file)


def describe_chunk(chunk: Chunk) -> str:
    """Return how messages name a chunk: by its tensor, and where in it the shard begins."""
    where = f" (the shard from {list(chunk.offsets)} on)" if any(chunk.offsets) else ""
    return f"the tensor {chunk.name}{where}"


def _damage(folder: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the checkpoint ({what})", folder)
