"""``bitsandbytes``: a folder whose linear layers transformers loads as ``Linear4bit`` (NF4) or ``Linear8bitLt``.

NF4 has flat blocks with an absmax in float32, the first of two codes in the high bits of a byte. LLM.int8() has one
float32 a row, ``SCB``, and a value is ``code * SCB / 127``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q8lightning.export.errors import ExportError, library
from q8lightning.export.formats.folder import module_of, unquantized_modules, write_folder
from q8lightning.export.formats.safetensors import Part, values
from q8lightning.export.holds import check_all
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight

_NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_REMEDY = 'WeightRule(..., "nf4", block_size=64), or all with WeightRule(..., "linear", block_size="row", axis=0)'


def write(source: Source, path: Path, options: Options) -> None:
    """Write codes for all weights that have some, and the rest as floats."""
    functional = library("bitsandbytes.functional", "bitsandbytes")
    check_all(source, "bitsandbytes", _reason, _REMEDY)
    kinds = {weight.codec.book.name for weight in source if weight.codec is not None}
    if len(kinds) > 1:
        raise ExportError(
            f'format="bitsandbytes" holds weights of one kind, and these are {" and ".join(sorted(kinds))}; write those'
            " of one kind as floats (as_floats=...), or export to another format"
        )
    is_nf4 = kinds == {"normal_float4"}
    parts: list[Part] = []
    for weight in source:
        if weight.codec is None:
            parts.append(values(source, weight))
        else:
            module_of(weight)
            parts += _nf4(weight, functional) if is_nf4 else _int8(weight)
    skipped = unquantized_modules(source)
    quantization: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": is_nf4,
        "load_in_8bit": not is_nf4,
        "llm_int8_skip_modules": skipped or None,
    }
    if is_nf4:
        quantization |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": _name(source.dtype or source.quantized[0].dtype),
        }
    write_folder(source, path, parts, options, quantization)


def _reason(weight: Weight) -> str | None:
    codec = weight.codec
    assert codec is not None
    if len(weight.shape) != 2:
        return "it holds matrices only; exclude it, or pass as_floats=..."
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it holds float32, float16 and bfloat16, not {_name(weight.dtype)}"
    if codec.book.name == "normal_float4":
        if weight.flat_block not in _NF4_BLOCKS:
            return (
                "its blocks do not run along the flattened matrix; axis=None makes them, and axis=0 where rows are"
                " whole blocks (for Conv1D axis=1, and export with transpose=...)"
            )
        return None
    if codec.book.name != "linear":
        return f"it holds nf4 and linear, not {codec.book.name}"
    if weight.group != weight.row:
        return 'it has one scale for a row; block_size="row", axis=0 makes one (for Conv1D axis=1, and transpose=...)'
    return None


def _nf4(weight: Weight, functional: Any) -> Sequence[Part]:
    codes_of = functional.get_4bit_type("nf4", device="cpu")
    block = weight.flat_block
    assert block is not None
    state = functional.QuantState(
        absmax=torch.empty(-(-weight.numel // block), dtype=torch.float32, device="cpu"),
        shape=torch.Size(weight.shape), code=codes_of, blocksize=block, quant_type="nf4", dtype=weight.dtype,
    )  # fmt: skip
    described: dict[str, Tensor] = state.as_dict(packed=True)

    def packed() -> Tensor:
        codes, _ = weight.flat()
        padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
        return ((padded[0::2] << 4) | padded[1::2])[:, None]

    parts = [Part(weight.name, torch.uint8, (-(-weight.numel // 2), 1), packed)]
    for key, value in described.items():
        if key == "absmax":
            parts.append(Part(f"{weight.name}.absmax", torch.float32, tuple(value.shape), lambda: weight.flat()[1]))
        else:
            parts.append(Part(f"{weight.name}.{key}", value.dtype, tuple(value.shape), lambda value=value: value))  # type: ignore[misc]
    return parts


def _int8(weight: Weight) -> Sequence[Part]:
    module = module_of(weight)
    prefix = f"{module}." if module else ""

    def codes() -> Tensor:
        return (weight.rows()[0].to(torch.int16) - 127).to(torch.int8)

    return [
        Part(weight.name, torch.int8, weight.shape, codes),
        Part(f"{prefix}SCB", torch.float32, weight.shape[:1], lambda: weight.rows()[1].reshape(-1)),
        Part(f"{prefix}weight_format", torch.uint8, (), lambda: torch.tensor(0, dtype=torch.uint8, device="cpu")),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
