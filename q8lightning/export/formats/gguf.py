"""``gguf``: one file for llama.cpp and what is built on it, with codes of 4 bits (Q4_0) and of 8 (Q8_0).

Both types have blocks of 32 elements of a row, each with a step in float16. A value is its step times -8 to 7, or -128
to 127. They hold ``int2`` to ``int8``, whose step is the scale over a power of two, so that scales of float16 are
stored exactly. They hold ``linear`` codes, too, whose step is the scale over 127, which is rounded.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.export.errors import ExportError, library
from q8lightning.export.holds import check_all, check_only_tensors
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight
from q8lightning.export.whole_file import whole_file
from q8lightning.quantization.spec.codebook import Codebook, name_with_bits

BLOCK = 32
"""Elements that share a step."""


class _Type(NamedTuple):
    """How the codes of a codebook become those of a type.

    Attributes:
        name: The type's name.
        half: The code of zero.
        steps: The steps in a scale.
    """

    name: str
    half: int
    steps: float

    @property
    def is_exact(self) -> bool:
        """Whether the step of a scale of float16 is a float16."""
        return self.steps == self.half


_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(source: Source, path: Path, options: Options) -> None:
    """Write codes as Q4_0 and Q8_0, and all other tensors as F32, F16 or BF16."""
    gguf = library("gguf", "gguf")
    check_all(source, "gguf", lambda weight: _reason(weight, options.round_scales), _REMEDY)
    for weight in source:
        if weight.codec is None and source.kept_dtype(weight) not in _FLOATS:
            raise ExportError(
                f"gguf holds float32, float16 and bfloat16, and {weight.original} is {source.kept_dtype(weight)}; pass"
                " dtype=torch.float32 for floats, or leave it out by prefix"
            )
    check_only_tensors(source, "gguf", "leave it out")
    metadata = dict(options.metadata)
    with whole_file(path) as file, source.opened.verified():
        writer = gguf.GGUFWriter(str(file), str(metadata.pop("general.architecture", "q8lightning")))
        try:
            _describe(writer, gguf, source, metadata)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for weight in source:
                writer.write_tensor_data(_data(source, weight).numpy())
        finally:
            writer.close()


def _describe(writer: Any, gguf: Any, source: Source, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        writer.add_key_value(key, value, _kind_of(gguf, value))
    for name, first in source.ties.items():
        writer.add_string(f"q8lightning.tied.{name}", first)
    for weight in source:
        kind = None if weight.codec is None else _type_of(weight.codec.book)
        raw = gguf.GGMLQuantizationType[_FLOATS[source.kept_dtype(weight)] if kind is None else kind.name]
        block, size = gguf.GGML_QUANT_SIZES[raw]
        writer.add_tensor_info(weight.name, weight.shape, None, weight.numel // block * size, raw)


def _kind_of(gguf: Any, value: Any) -> Any:
    """Return the type of a value; integers are unsigned, as llama.cpp reads sizes."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32:
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def _data(source: Source, weight: Weight) -> Tensor:
    """Return the bytes of a tensor as the file has them."""
    if weight.codec is None:
        return source.kept(weight).reshape(-1).view(torch.uint8)
    assert weight.group is not None
    kind, (codes, scales) = _type_of(weight.codec.book), weight.rows()
    assert kind is not None
    blocks = codes.reshape(-1, BLOCK).to(torch.int16) - kind.half
    # Longer blocks are written as several with the same step.
    steps = (scales.repeat_interleave(weight.group // BLOCK, -1).reshape(-1, 1) / kind.steps).half()
    if kind.name == "Q4_0":
        nibbles = (blocks + 8).to(torch.uint8)
        packed = nibbles[:, : BLOCK // 2] | (nibbles[:, BLOCK // 2 :] << 4)
    else:
        packed = blocks.to(torch.int8).view(torch.uint8)
    return torch.cat([steps.view(torch.uint8), packed], dim=1).reshape(-1)


def _type_of(book: Codebook) -> _Type | None:
    """Return the type that holds codes of a codebook; None if none does."""
    half = 2 ** (book.bits - 1)
    name = "Q4_0" if book.bits <= 4 else "Q8_0"
    if book.scale_unit == half:
        return _Type(name, half, float(half))
    if book.name == name_with_bits("linear", book.bits):
        return _Type(name, half - 1, half - 1.0)
    return None


_REMEDY = 'WeightRule(..., "int4" or "int8", block_size=32, axis=0, scale_dtype="float16")'


def _reason(weight: Weight, round_scales: bool) -> str | None:
    codec = weight.codec
    assert codec is not None
    kind = _type_of(codec.book)
    if kind is None:
        return f"it holds integers and linear codes, not {codec.book.name}"
    if weight.row % BLOCK:
        return f"its rows have {weight.row} elements, which is no multiple of {BLOCK}; exclude it"
    if weight.group is None or weight.row % weight.group or weight.group % BLOCK:
        return "its blocks do not run along rows; axis=0 makes them (for Conv1D axis=1, and export with transpose=...)"
    if round_scales:
        return None
    if not kind.is_exact:
        return (
            f"the format stores float16 steps, and a scale divided by {kind.steps:g} is none; int8 is exact, or pass"
            " round_scales=True"
        )
    if codec.book.scale_dtype != "float16":
        return (
            f'the format stores float16 steps, yours are {codec.book.scale_dtype}; scale_dtype="float16" trains with'
            " such steps, or pass round_scales=True"
        )
    return None
