"""Read checkpoints by docs/format.md alone: ``zipfile``, ``pickletools`` and NumPy, neither torch nor q8lightning.

    python tests/support/by_hand.py FILE NPZ

What a file's tensors are goes to ``NPZ``: arrays, and a record named ``about`` with JSON of everything that an array
does not say. The code of the page's own blocks is run as it stands there.
"""

import json
import re
import struct
import sys
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

PAGE: dict[str, Any] = {}
"""What the page defines: ``unpickle``, ``packed_bytes``, ``unpack``, ``levels_of``, ``decode_log``, ``read_tensor``."""
for block in re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "format.md").read_text(), re.S):
    exec(block, PAGE)

REBUILD, VIEW = "q8lightning.checkpoint.payload rebuild_v1", "torch._utils _rebuild_tensor_v2"
STORAGES = {
    **{"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": "<u2", "Bool": "?"},
    **{"Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1"},
}
NAMES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64"} | {
    **{"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
}
HEADER = {"codec", "dtype", "name", "shape", "stride"}


def check_zip(path: str) -> None:
    """Check what the page says of records."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        assert archive.testzip() is None
        for record in archive.infolist():
            if record.filename.endswith("/data.pkl") and record.compress_type == zipfile.ZIP_DEFLATED:
                assert record.file_size <= 2**20
                continue
            assert record.compress_type == zipfile.ZIP_STORED
            file.seek(record.header_offset + 26)
            name, extra = struct.unpack("<2H", file.read(4))
            assert (record.header_offset + 30 + name + extra) % 64 == 0


class File:
    """A checkpoint.

    Attributes:
        content: Its pickle as plain data.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        (self._folder,) = {name.partition("/")[0] for name in archive.namelist()}
        assert archive.read(f"{self._folder}/byteorder") == b"little"
        self.content = PAGE["unpickle"](archive.read(f"{self._folder}/data.pkl"))

    def tensor(self, arguments: tuple[Any, ...]) -> tuple[np.ndarray, str]:
        """Return a tensor that is stored as it is, and the name of its dtype; bfloat16 as its bits."""
        (word, kind, number, _, _), offset, shape, strides, _, _ = arguments
        kind = kind.removeprefix("torch ").removesuffix("Storage")
        assert word == "storage"
        storage = np.frombuffer(self._archive.read(f"{self._folder}/data/{number}"), STORAGES[kind])
        steps = [storage.itemsize * step for step in strides]
        return as_strided(storage[offset:], shape, steps), NAMES[kind]

    def payload(self, text: str, checksum: int, *place: Any) -> tuple[np.ndarray, dict[str, Any], bytes]:
        """Return an encoded tensor, what its header says, and its bytes."""
        assert 0 <= checksum < 2**64
        header, data = json.loads(text), self.data(*place)
        assert header.keys() - {"requires_grad", "parameter"} == HEADER
        codec, count = header["codec"], prod(header["shape"])
        assert codec.keys() - {"residual_bits", "scale_dtype"} == {"name", "bits", "block_size"}
        assert 1 <= codec["bits"] <= 8
        assert 2 <= codec.get("residual_bits", 8) <= 8
        values, _ = parts_of(data, codec, count)
        values = as_dtype(values, header["dtype"])
        return as_strided(values, header["shape"], [values.itemsize * step for step in header["stride"]]), header, data

    def data(self, buffer: Any, start: int, nbytes: int) -> bytes:
        """Return the bytes of a payload."""
        function, arguments = buffer
        assert function == VIEW
        found, dtype = self.tensor(arguments)
        assert dtype == "uint8"
        assert found.ndim == 1
        assert 0 <= start <= start + nbytes <= len(found)
        return found[start : start + nbytes].tobytes()


def parts_of(data: bytes, codec: dict[str, Any], count: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return the values, float32, in the order of memory; and codes and scales of the first stage."""
    size, bits, is_log, twice = codec["block_size"], codec["bits"], codec["name"] == "log", codec.get("residual_bits")
    blocks, dtype = -(-count // size), codec.get("scale_dtype")
    width = PAGE["scale_size"](dtype) * (2 if is_log else 1)
    cuts = np.cumsum([width * blocks, PAGE["packed_bytes"](count, bits, size)])
    head, first, second = np.split(np.frombuffer(data, "u1"), cuts)
    assert len(second) == (PAGE["packed_bytes"](count, twice, size) if twice else 0)
    scales, codes = PAGE["read_scales"](head.tobytes(), dtype), unpacked(first, bits, size, count)
    if is_log:
        low, high = (scales[side::2].repeat(size)[:count] for side in (0, 1))
        return PAGE["decode_log"](codes, low, high, bits), (codes, scales)
    levels, each = PAGE["levels_of"](codec["name"], bits), scales.repeat(size)[:count]
    assert levels.dtype == np.float32
    assert (len(levels) - 1).bit_length() == bits
    values = levels[codes] * each
    if twice:
        assert codec["name"] == "linear"
        assert dtype is None
        zero, steps = 2 ** (twice - 1) - 1, (2 ** (bits - 1) - 1) * (2**twice - 1)
        later = unpacked(second, twice, size, count).astype(np.float32) - np.float32(zero)
        values = values + later * (each / np.float32(steps))
    return values, (codes, scales)


def unpacked(packed: np.ndarray, bits: int, size: int, count: int) -> np.ndarray:
    """Return codes, and check that there are no others behind those of a short last block."""
    if bits < 8:
        assert not PAGE["unpack"](packed, bits, size, -(-count // size) * size)[count:].any()
    codes: np.ndarray = PAGE["unpack"](packed, bits, size, count)
    assert codes.dtype == np.uint8
    return codes


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round or widen float32; bfloat16 to its bits, to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def tensors_in(file: File, value: Any, path: tuple[str, ...] = ()) -> Any:
    """Yield path, array, name of the dtype, and of a payload header, its text, checksum and bytes, of every tensor."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(file, item, (*path, str(key)))
    elif isinstance(value, tuple) and len(value) == 2 and value[0] in (VIEW, REBUILD):
        function, arguments = value
        if function == VIEW:
            yield ".".join(path), *file.tensor(arguments), None
        elif arguments[0] == "tensor":
            text, checksum, *_ = arguments[1:]
            array, header, data = file.payload(*arguments[1:])
            yield ".".join(path), array, header["dtype"], (header, text, checksum, data)
        else:
            yield ".".join(path), *item_of(file, arguments), None
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from tensors_in(file, item, (*path, str(index)))


def item_of(file: File, arguments: tuple[Any, ...]) -> tuple[np.ndarray, str]:
    """Return one of the tensors that are stored together."""
    word, (function, (what, (view, flat), shapes, strides)), number = arguments
    assert (word, function, what, view) == ("item", REBUILD, "tensors", VIEW)
    together, dtype = file.tensor(flat)
    start = sum(prod(shape) for shape in shapes[:number])
    alone = together[start : start + prod(shapes[number])]
    if strides[number] is None:
        return alone.reshape(shapes[number]), dtype
    return as_strided(alone, shapes[number], [alone.itemsize * step for step in strides[number]]), dtype


def trained_weights(file: File) -> Any:
    """Yield name, codes, scales and levels of weights that were trained quantized, as far as the file has codes."""
    for name, entry in file.content["q8lightning"].get("qat", {}).items():
        levels = PAGE["levels_of"](entry["codebook"])
        function, (what, text, _, *place) = file.content["state_dict"][name]
        header = json.loads(text)
        shape, axis = header["shape"], entry["axis"]
        assert (function, what) == (REBUILD, "tensor")
        if "codes" not in entry:
            codec = header["codec"]
            book, _, scales = entry["codebook"].partition(" with ")
            dtype = scales.removesuffix(" scales") or None
            said = codec["name"], codec["block_size"], codec.get("scale_dtype")
            assert said == (
                book.rstrip("234567") if codec["name"] in ("linear", "softsign") else book,
                entry["block_size"],
                dtype,
            )
            _, (codes, scales) = parts_of(file.data(*place), header["codec"], prod(shape))
            yield name, codes[None], scales[None], levels
            continue
        rows = 1 if axis is None else shape[axis]
        scales, stream = (file_tensor(file, entry[key]) for key in ("scales", "codes"))
        width = (len(levels) - 1).bit_length()
        bits = np.unpackbits(stream, bitorder="little")
        assert not bits[prod(shape) * width :].any()
        codes = (bits[: prod(shape) * width].reshape(-1, width) << np.arange(width)).sum(axis=1, dtype=np.uint8)
        yield name, codes.reshape(rows, -1), scales, levels


def file_tensor(file: File, value: Any) -> np.ndarray:
    """Return a tensor that is stored as it is, alone or with others."""
    function, arguments = value
    return (file.tensor(arguments) if function == VIEW else item_of(file, arguments))[0]


def main(path: str, target: str) -> None:
    check_zip(path)
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"tensors": {}, "payloads": {}, "qat": []}
    with zipfile.ZipFile(path) as archive:
        file = File(archive)
        for name, array, dtype, encoded in tensors_in(file, file.content):
            arrays[name] = array
            about["tensors"][name] = [dtype, [step // array.itemsize for step in array.strides]]
            if encoded is not None:
                *said, data = encoded
                arrays[f"data of {name}"] = np.frombuffer(data, np.uint8)
                about["payloads"][name] = said
        for name, codes, scales, levels in trained_weights(file):
            arrays |= {f"codes of {name}": codes, f"scales of {name}": scales, f"levels of {name}": levels}
            about["qat"].append(name)
    assert not {"torch", "q8lightning", "xxhash"} & set(sys.modules)
    np.savez(target, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
