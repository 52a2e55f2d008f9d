"""Read the codes of weights that were trained quantized from a checkpoint in shards, put together to whole weights."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.layout.sections import CODES_KEY, SUMMARY_KEY, summary_in
from q8lightning.checkpoint.qat_codes import Codes, read_codes
from q8lightning.checkpoint.sharded.folder import CHUNKS_KEY
from q8lightning.checkpoint.sharded.read.open_folder import OpenFolder, box_of
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.packed_bits import pack_bits
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
    return codes_in(OpenFolder(path), name)


def codes_in(folder: OpenFolder, name: str) -> Codes:
    """Return the codes of a weight in an open folder; see :func:`codes_of_shards`."""
    entry = dict(summary_in(folder.meta)[CODES_KEY][name])
    own = {tuple(offsets): (file, start, nbytes) for file, start, nbytes, offsets in entry.pop(CHUNKS_KEY, [])}
    known_as, weight = folder.find(name)
    codec = WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
    like = torch.empty(weight.size, dtype=weight.properties.dtype, device="meta")
    rows = codec.to_rows(like)
    codes = torch.zeros(weight.size, dtype=torch.uint8, device="cpu")
    scales = torch.zeros(_scales_of(codec, rows).numel(), dtype=torch.float32, device="cpu")
    for chunk, value in folder.shards(known_as, weight):
        there = own.get(tuple(chunk.offsets))
        stored = {} if there is None else folder.load_at(*there)
        _, of_shard, its_scales, shard = read_codes(value, {**entry, **stored})
        codes[box_of(chunk)] = codec.from_rows(of_shard, shard)
        portion = Portion(tuple(weight.size), tuple(chunk.offsets), tuple(chunk.sizes), ((),) * len(chunk.sizes))
        scales[portion.block_numbers(codec.block_size, codec.axis)] = its_scales.reshape(-1)
    return codec, codec.to_rows(codes).clone(), scales.view(rows.shape[0], -1), like


def with_codes(folder: OpenFolder, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a folder with its codes where a file has them, unread."""
    summary = summary_in(content)
    if CODES_KEY not in summary:
        return content
    entries = {name: _as_in_a_file(folder, name, entry) for name, entry in summary[CODES_KEY].items()}
    return {**content, SUMMARY_KEY: {**summary, CODES_KEY: entries}}


def _as_in_a_file(folder: OpenFolder, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in entry.items() if key != CHUNKS_KEY}
    if CHUNKS_KEY not in entry:
        return found
    codec = WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
    weight = folder.find(name)[1]
    rows = codec.to_rows(torch.empty(weight.size, dtype=weight.properties.dtype, device="meta"))

    def codes() -> Tensor:
        return pack_bits(codes_in(folder, name)[1], codec.bits)

    nbytes = -(-rows.numel() * codec.bits // 8)
    return {
        **found,
        "codes": UnreadTensor((nbytes,), torch.uint8, codes),
        "scales": UnreadTensor(tuple(_scales_of(codec, rows).shape), torch.float32, lambda: codes_in(folder, name)[2]),
    }


def _scales_of(codec: WeightCodec, rows: Tensor) -> Tensor:
    """Return a tensor with the shape of a weight's scales, without content."""
    return torch.empty(rows.shape[0], -(-rows.shape[1] // codec.block_size), dtype=torch.float32, device="meta")
