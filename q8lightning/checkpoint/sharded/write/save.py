"""Write a checkpoint in shards: every process its own file, in a folder that gets its name when all are done."""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.file.temporaries import locked_folder, remove_leftovers
from q8lightning.checkpoint.file.write import announce, flush_directory, warn_not_flushed, write_checkpoint
from q8lightning.checkpoint.integrity import shard_name
from q8lightning.checkpoint.layout.places import place_of
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT, SUMMARY_KEY, name_of, parameter_of
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sharded.folder import META, METADATA, SHARDS_KEY
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.checkpoint.sharded.shard_file import Chunk, Item, write_shards
from q8lightning.checkpoint.sharded.write.local_shards import at
from q8lightning.checkpoint.sharded.write.merge_reports import merge_reports
from q8lightning.checkpoint.sharded.write.shard_codes import (
    CodesOfShards,
    codes_to_write,
    describe_codes_of,
    distinct,
    merge_codes,
)
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlan
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.checkpoint.tree import Keys
from q8lightning.system.exchange import put_in_place, remove
from q8lightning.system.private_names import resolve


class _Part(NamedTuple):
    """What one process has written.

    Attributes:
        file: The name of its file.
        nbytes: Its size.
        chunks: What is in it.
        report: What encoding lost.
        codes: What it says of weights that are trained quantized.
    """

    file: str
    nbytes: int
    chunks: list[tuple[MetadataIndex, Chunk]]
    report: SaveReport
    codes: CodesOfShards


class ShardedSave:
    """A checkpoint in shards on its way from the devices to a folder.

    Args:
        save: This process's part of it, encoded.
        plan: What this process writes.
        places: Where that stands in the part.
        ranks: All processes; used by no other thread while this is written.
        sharded: The sections that the plan covers; the rest goes into ``meta.pt``.
    """

    def __init__(
        self,
        save: Save,
        plan: ShardPlan,
        places: Mapping[MetadataIndex, Keys],
        ranks: Ranks,
        sharded: Sequence[str] = (STATE_DICT, OPTIMIZER_STATES),
    ) -> None:
        self.save = save
        self._plan = plan
        self._places = places
        self._ranks = ranks
        self._sharded = sharded

    def write(self, path: str, memory: HostMemory | None = None) -> SaveReport:
        """Write the folder, in all processes at once; return what the whole checkpoint lost and takes.

        Args:
            path: The folder. What is there is replaced.
            memory: Where copies go that are not needed afterwards.

        Raises:
            BaseException: In all processes, what happened in the first one that failed; what was at ``path`` stays.
        """
        ranks, target = self._ranks, Path(path)
        with ExitStack() as stack:
            folder, save_id = ranks.at_first(lambda: stack.enter_context(_folder_beside(target)))
            content: dict[str, Any] = {}

            def write_own() -> _Part:
                content.update(stack.enter_context(self.save.fetch(memory)))
                announce("fetched", path)
                return self._write_own(content, Path(folder), save_id)

            parts = ranks.share(write_own)
            announce("flushed", path)
            report = merge_reports([part.report for part in parts])
            ranks.at_first(lambda: self._finish(content, Path(folder), target, save_id, parts, report))
        return report

    def _write_own(self, content: Mapping[str, Any], folder: Path, save_id: str) -> _Part:
        name = shard_name(self._ranks.rank, save_id)
        items = [self._item(content, item.index) for item in self._plan.items]
        os.makedirs(folder, exist_ok=True)  # a network file system may not show it yet
        file = folder / name
        codes = codes_to_write(content, self._places)
        chunks = write_shards(os.fspath(file), save_id, self._ranks.rank, [*items, *distinct(codes)])
        indices = [item.index for item in self._plan.items]
        described = describe_codes_of(content, name, codes, chunks[len(items) :])
        known = list(zip(indices, chunks[: len(items)], strict=True))
        return _Part(name, file.stat().st_size, known, self.save.report, described)

    def _item(self, content: Mapping[str, Any], index: MetadataIndex) -> Item:
        keys = self._places[index]
        places = self.save.plan.names.places
        name = name_of(keys, parameter_of(place_of(keys, places), ()), places)
        return Item(name, tuple(index.offset or ()), at(content, keys))

    def _finish(
        self,
        content: dict[str, Any],
        folder: Path,
        target: Path,
        save_id: str,
        parts: Sequence[_Part],
        report: SaveReport,
    ) -> None:
        metadata = self._plan.metadata
        assert metadata is not None
        sum_of_metadata = _write_metadata(folder, metadata, parts, save_id)
        rest = {key: value for key, value in content.items() if key not in self._sharded}
        rest[SUMMARY_KEY] = {
            **rest.get(SUMMARY_KEY, {}),
            **report.summary(),
            **merge_codes([part.codes for part in parts]),
            SHARDS_KEY: {
                "save": save_id,
                "metadata": sum_of_metadata,
                "files": {part.file: part.nbytes for part in parts},
            },
        }
        write_checkpoint(rest, folder / META)
        flush_directory(folder)
        put_in_place(os.fspath(folder), os.fspath(target))
        announce("renamed", target)
        if not flush_directory(target.parent):
            warn_not_flushed(target.parent)
        announce("durable", target)


@contextmanager
def _folder_beside(target: Path) -> Iterator[tuple[str, str]]:
    """Make the folder in which a checkpoint is written, and an id of the save; remove what is left of it in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with locked_folder(target.parent) as folder:
        announce("opened", target)
        try:
            yield os.fspath(folder), secrets.token_hex(8)
        finally:
            if folder.exists():
                remove(os.fspath(folder))


def _write_metadata(folder: Path, metadata: Metadata, parts: Sequence[_Part], save_id: str) -> int:
    """Write the file by which DCP finds chunks; return its checksum."""
    info = resolve("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    results = [
        [WriteResult(index, chunk.nbytes, info(part.file, chunk.start, chunk.nbytes)) for index, chunk in part.chunks]
        for part in parts
    ]
    writer = FileSystemWriter(folder)
    writer.save_id = save_id
    writer.finish(metadata, results)
    return xxhash.xxh3_64_intdigest((folder / METADATA).read_bytes())
