"""The codes of weights that are trained quantized, in a checkpoint in shards: each process writes those of its shards.

Where codes do not follow from what is stored of a shard (``qat_codes.py``), they are a chunk of their own in the file
of the process, which DCP does not know. ``meta.pt`` says where each is:

.. code-block:: text

    checkpoint["q8lightning"]["qat"][name] = {
        "codebook", "block_size", "axis",
        "shards": [(file, start, nbytes, offsets), ...],  # only if there are such chunks
    }
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import MetadataIndex

from q8lightning.checkpoint.layout.sections import CODES_KEY, STATE_DICT, summary_in
from q8lightning.checkpoint.sharded.folder import CHUNKS_KEY
from q8lightning.checkpoint.sharded.shard_file import Chunk, Item
from q8lightning.checkpoint.tree import Keys

_CODES = ("codes", "scales")


class CodesOfShards(NamedTuple):
    """What one process says of the weights that are trained quantized.

    Attributes:
        entries: How each is quantized, by name.
        chunks: For each weight where the codes of this process's shard are, as ``meta.pt`` has it.
    """

    entries: Mapping[str, Mapping[str, Any]]
    chunks: Mapping[str, tuple[str, int, int, tuple[int, ...]]]


def codes_to_write(content: Mapping[str, Any], places: Mapping[MetadataIndex, Keys]) -> dict[str, Item]:
    """Return the codes of this process's shards, by the names of the weights; tied ones share an item.

    Args:
        content: What the process writes, encoded, with its summary.
        places: Where what is written stands in it.
    """
    offsets = {keys[1]: tuple(index.offset or ()) for index, keys in places.items() if keys[:1] == (STATE_DICT,)}
    items: dict[int, Item] = {}
    found: dict[str, Item] = {}
    for name, entry in _entries(content):
        if _CODES[0] in entry and name in offsets:
            value = {key: entry[key] for key in _CODES}
            found[name] = items.setdefault(id(entry), Item(f"the codes of {name}", offsets[name], value))
    return found


def describe_codes_of(
    content: Mapping[str, Any], file: str, items: Mapping[str, Item], chunks: Sequence[Chunk]
) -> CodesOfShards:
    """Return what the process says of its shards.

    Args:
        content: What it wrote.
        file: The name of its file.
        items: What :func:`codes_to_write` returned.
        chunks: What became of the different ones among the items, in their order.
    """
    written = dict(zip(map(id, distinct(items)), chunks, strict=True))
    entries = {
        name: {key: value for key, value in entry.items() if key not in _CODES} for name, entry in _entries(content)
    }
    where = {name: written[id(item)] for name, item in items.items()}
    return CodesOfShards(
        entries, {name: (file, chunk.start, chunk.nbytes, chunk.offsets) for name, chunk in where.items()}
    )


def distinct(items: Mapping[str, Item]) -> list[Item]:
    """Return each item once."""
    return list({id(item): item for item in items.values()}.values())


def merge_codes(parts: Sequence[CodesOfShards]) -> dict[str, Any]:
    """Return what the summary of the whole checkpoint says of them; empty if nothing is trained quantized."""
    entries: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, entry in part.entries.items():
            entries.setdefault(name, dict(entry))
        for name, chunk in part.chunks.items():
            entries[name].setdefault(CHUNKS_KEY, []).append(chunk)
    return {CODES_KEY: entries} if entries else {}


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from summary_in(content).get(CODES_KEY, {}).items()
