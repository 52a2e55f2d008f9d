"""Read the codes of weights that were trained quantized from a checkpoint in shards, put together to whole weights."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from q8lightning.checkpoint.loading import keep_encoded
from q8lightning.checkpoint.qat_codes import Codes, read_codes
from q8lightning.checkpoint.sections import CODES_KEY, STATE_DICT, summary_in
from q8lightning.checkpoint.sharded.check import read_meta
from q8lightning.checkpoint.sharded.shard_codes import SHARDS
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.portion import Portion


def codes_of_shards(path: str | os.PathLike[str], name: str) -> Codes:
    """Return the codes of a weight, as the forward pass used them.

    Args:
        path: The folder.
        name: Of the weight, in the model's state dict.

    Raises:
        KeyError: If the checkpoint does not say that the weight is quantized.
        CorruptCheckpointError: If what is stored is not what was saved.
        NewerFormatError: If the entry says more than this version knows.
    """
    folder = Path(path)
    entry = dict(summary_in(read_meta(folder))[CODES_KEY][name])
    own = {tuple(offsets): (file, start, nbytes) for file, start, nbytes, offsets in entry.pop(SHARDS, [])}
    metadata = FileSystemReader(folder).read_metadata()
    weight, index = _find(metadata, name)
    codec = WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
    like = torch.empty(weight.size, dtype=weight.properties.dtype, device="meta")
    rows = codec.to_rows(like)
    codes = torch.zeros(weight.size, dtype=torch.uint8, device="cpu")
    scales = torch.zeros(rows.shape[0] * -(-rows.shape[1] // codec.block_size), dtype=torch.float32, device="cpu")
    for chunk in weight.chunks:
        place = metadata.storage_data[MetadataIndex(index, chunk.offsets)]
        value = _load(folder, place.relative_path, place.offset, place.length)
        there = own.get(tuple(chunk.offsets))
        stored = {} if there is None else _load(folder, *there)
        _, of_shard, its_scales, shard = read_codes(value, {**entry, **stored})
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        codes[box] = codec.from_rows(of_shard, shard)
        portion = Portion(tuple(weight.size), tuple(chunk.offsets), tuple(chunk.sizes), ((),) * len(chunk.sizes))
        scales[portion.block_numbers(codec.block_size, codec.axis)] = its_scales.reshape(-1)
    return codec, codec.to_rows(codes).clone(), scales.view(rows.shape[0], -1), like


def _find(metadata: Metadata, name: str) -> tuple[TensorStorageMetadata, str]:
    """Return what is known of a weight, and by which name DCP knows it."""
    for prefix in (STATE_DICT, "model"):
        found = metadata.state_dict_metadata.get(f"{prefix}.{name}")
        if isinstance(found, TensorStorageMetadata):
            return found, f"{prefix}.{name}"
    raise KeyError(name)


def _load(folder: Path, file: str, start: int, nbytes: int) -> Any:
    with open(folder / file, "rb") as opened:
        opened.seek(start)
        data = opened.read(nbytes)
    with keep_encoded():
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
