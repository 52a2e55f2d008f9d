"""Tables of shards, and descriptions of trained codes, whose sums fit and whose fields do not."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor

from q8lightning import CheckpointPolicy, CorruptCheckpointError, NewerFormatError, keep_encoded
from q8lightning.checkpoint.encode.checkpoint import encode_checkpoint
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.format import check_version
from q8lightning.checkpoint.qat_codes import read_codes
from q8lightning.checkpoint.sharded.check import shards_in
from q8lightning.checkpoint.sharded.shard_file import MAGIC, Item, read_table, write_shards
from q8lightning.quantization.codecs.weight import WeightCodec

CHUNK = ["a", [0, 0], 0, 10, 7]
TABLES: dict[str, Any] = {
    "no object": [1, 2],
    "no chunks": {"save": "s", "rank": 0},
    "no save": {"rank": 0, "chunks": []},
    "a save of a number": {"save": 1, "rank": 0, "chunks": []},
    "a rank of text": {"save": "s", "rank": "0", "chunks": []},
    "chunks of text": {"save": "s", "rank": 0, "chunks": "abc"},
    "a short chunk": {"save": "s", "rank": 0, "chunks": [CHUNK[:4]]},
    "a long chunk": {"save": "s", "rank": 0, "chunks": [[*CHUNK, 1]]},
    "a name of a number": {"save": "s", "rank": 0, "chunks": [[1, *CHUNK[1:]]]},
    "offsets that are a number": {"save": "s", "rank": 0, "chunks": [["a", 0, *CHUNK[2:]]]},
    "offsets of text": {"save": "s", "rank": 0, "chunks": [["a", "00", *CHUNK[2:]]]},
    "a negative start": {"save": "s", "rank": 0, "chunks": [[*CHUNK[:2], -1, 10, 7]]},
    "more bytes than there are": {"save": "s", "rank": 0, "chunks": [[*CHUNK[:2], 0, 2**50, 7]]},
    "a sum of text": {"save": "s", "rank": 0, "chunks": [[*CHUNK[:4], "7"]]},
}


@pytest.mark.parametrize("name", TABLES)
def test_a_forged_table_of_a_shard_is_damage(name: str, tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    written = write_shards(str(path), "s", 0, [Item("a", (0, 0), torch.rand(4, 4))])
    assert read_table(path).chunks == written
    text = json.dumps(TABLES[name]).encode()
    end = struct.pack("<QQ8s", xxhash.xxh3_64_intdigest(text), len(text), MAGIC)
    path.write_bytes(path.read_bytes() + text + end)
    with pytest.raises(CorruptCheckpointError, match=r"the table at the end of the shard in .*__0_0"):
        read_table(path)


SHARDS: dict[str, Any] = {
    "no files": {"save": "s", "metadata": 7},
    "files that are a list": {"save": "s", "metadata": 7, "files": ["a"]},
    "a file elsewhere": {"save": "s", "metadata": 7, "files": {"../a": 7}},
    "bytes of text": {"save": "s", "metadata": 7, "files": {"a": "7"}},
    "no save": {"metadata": 7, "files": {"a": 7}},
    "a sum of text": {"save": "s", "metadata": "7", "files": {"a": 7}},
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_forged_list_of_shards_is_damage(name: str) -> None:
    whole = {"save": "s", "metadata": 7, "files": {"a": 7}}
    assert shards_in({"q8lightning": {"shards": whole}}) == whole
    with pytest.raises(CorruptCheckpointError, match=r"meta\.pt (says of its shards|lacks the sum)"):
        shards_in({"q8lightning": {"shards": SHARDS[name]}})


@pytest.mark.parametrize("version", ["2", None, [2], 1.5])
def test_a_version_that_is_no_number_is_none_of_ours(version: Any) -> None:
    check_version({"format_version": version})
    with pytest.raises(NewerFormatError, match="version 2"):
        check_version({"format_version": 2})


CODEC = WeightCodec("int4", 32, 0)
CODES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fewer codes": ({"codes": torch.zeros(100, dtype=torch.uint8)}, CorruptCheckpointError, "instead of 4096 bytes"),
    "more codes": ({"codes": torch.zeros(9999, dtype=torch.uint8)}, CorruptCheckpointError, "instead of 4096 bytes"),
    "codes of floats": (
        {"codes": torch.zeros(4096)},
        CorruptCheckpointError,
        r"whose codes are a tensor of torch\.float32",
    ),
    "codes that are a list": ({"codes": [1, 2]}, CorruptCheckpointError, "whose codes are of the type list"),
    "fewer scales": ({"scales": torch.zeros(64, 2)}, CorruptCheckpointError, "whose scales are 2 a row instead of 4"),
    "scales of other rows": ({"scales": torch.zeros(32, 8)}, CorruptCheckpointError, "instead of 64 rows"),
    "scales of bytes": ({"scales": torch.zeros(64, 4, dtype=torch.uint8)}, CorruptCheckpointError, "whose scales are"),
    "an axis that is not there": ({"axis": 2}, CorruptCheckpointError, "whose codes are of the axis 2 of 2"),
    "another axis": ({"axis": 1}, CorruptCheckpointError, "whose scales are"),
    "an axis of text": ({"axis": "0"}, NewerFormatError, "'axis': '0'"),
    "a block size of text": ({"block_size": "32"}, NewerFormatError, "'block_size': '32'"),
    "a block size of 3": ({"block_size": 3}, NewerFormatError, "'block_size': 3"),
    "an unknown codebook": ({"codebook": "int1"}, NewerFormatError, "'codebook': 'int1'"),
    "a codebook of levels": ({"codebook": [0.0, 1.0]}, NewerFormatError, "'codebook'"),
    "an unknown entry": ({"rotation": 1}, NewerFormatError, "rotation"),
}


@pytest.mark.parametrize("name", CODES)
def test_forged_codes_of_a_trained_weight_are_refused(name: str) -> None:
    change, kind, message = CODES[name]
    value, entry = described_weight()
    codec, codes, _, _ = read_codes(value, entry)
    assert (codec, codes.shape) == (CODEC, (64, 128))
    with pytest.raises(kind, match=message) as error:
        read_codes(value, {**entry, **change})
    if kind is CorruptCheckpointError:
        assert "the tensor state_dict.weight (" in str(error.value)


def described_weight() -> tuple[Any, dict[str, Tensor]]:
    names = ModelNames(parameters=frozenset(["weight"]), quantized={"weight": CODEC})
    with keep_encoded():
        content = encode_checkpoint(
            {"state_dict": {"weight": torch.randn(64, 128)}}, CheckpointPolicy.of("resume"), names
        )
    return content["state_dict"]["weight"], content["q8lightning"]["qat"]["weight"]
