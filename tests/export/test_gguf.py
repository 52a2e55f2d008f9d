"""A GGUF file, read and dequantized by the library of its authors, holds what the forward pass used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import saved
from torch import Tensor

from q8lightning import WeightRule, export_quantized

gguf = pytest.importorskip("gguf")

TRANSPOSED: dict[str, Any] = {"prefix": "net.", "transpose": ["*.down.weight"]}


def rules(codebook: Any, block_size: int = 32, **options: Any) -> tuple[WeightRule, WeightRule]:
    down = WeightRule("*.down.weight", codebook, block_size, axis=1, **options)
    return down, WeightRule("*", codebook, block_size, axis=0, **options)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the dequantized tensors and the names of their types."""
    tensors = gguf.GGUFReader(path).tensors
    values = {
        each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy()).view(
            *reversed(each.shape.tolist())
        )
        for each in tensors
    }
    return values, {each.name: each.tensor_type.name for each in tensors}


@pytest.mark.parametrize("preset", ["resume", "compact", None])
@pytest.mark.parametrize(("codebook", "kind"), [("int4", "Q4_0"), ("int8", "Q8_0"), ("int3", "Q4_0"), ("int6", "Q8_0")])
def test_integers_with_float16_scales_are_what_the_forward_pass_used(
    codebook: str, kind: str, preset: str | None, tmp_path: Path
) -> None:
    source = saved(tmp_path, *rules(codebook, scale_dtype="float16"), checkpoint=preset)
    export_quantized(source.path, tmp_path / "model.gguf", "gguf", **TRANSPOSED)
    found, kinds = read(tmp_path / "model.gguf")
    assert {name for name, each in kinds.items() if each == kind} == {"embed.weight", "up.weight", "down.weight"}
    assert set(kinds.values()) == {kind, "F32"}
    for name, value in found.items():
        expected = source.weights[name].t() if name == "down.weight" else source.weights[name]
        if name in ("norm.weight", "norm.bias", "up.bias") and preset is not None:
            continue  # the presets' own
        assert torch.equal(value, expected), name


def test_blocks_of_several_times_32_are_written_as_several(tmp_path: Path) -> None:
    source = saved(tmp_path, *rules("int4", 64, scale_dtype="float16"), checkpoint=None)
    export_quantized(source.path, tmp_path / "model.gguf", "gguf", **TRANSPOSED)
    assert torch.equal(read(tmp_path / "model.gguf")[0]["up.weight"], source.weights["up.weight"])


@pytest.mark.parametrize(("codebook", "most"), [("int4", 2**-11), ("linear", 2**-11), ("linear4", 2**-11)])
def test_other_scales_are_rounded_if_the_user_says_so(codebook: str, most: float, tmp_path: Path) -> None:
    source = saved(tmp_path, *rules(codebook), checkpoint=None)
    why = r"yours are float32|and a scale divided by (127|7) is none"
    with pytest.raises(ValueError, match=rf"stores float16 steps, ({why}).*pass round_scales=True"):
        export_quantized(source.path, tmp_path / "model.gguf", "gguf", **TRANSPOSED)
    assert not (tmp_path / "model.gguf").exists()
    export_quantized(source.path, tmp_path / "model.gguf", "gguf", round_scales=True, **TRANSPOSED)
    found, expected = read(tmp_path / "model.gguf")[0]["up.weight"], source.weights["up.weight"]
    error = (found - expected).abs()
    assert bool((error <= expected.abs() * most * 1.001).all())
    assert bool((error > 0).any())


def test_names_values_and_dtypes_are_those_asked_for(tmp_path: Path) -> None:
    source = saved(tmp_path, *rules("int4", scale_dtype="float16"), checkpoint=None)
    metadata = {"general.architecture": "tiny", "tiny.block_count": 1, "tiny.eps": 0.5, "tiny.names": ["a", "b"]}
    names = {"embed": "token_embd"}
    export_quantized(
        source.path, tmp_path / "model.gguf", "gguf",
        metadata=metadata, rename=names, dtype=torch.float16, **TRANSPOSED,
    )  # fmt: skip
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {key: fields[key] for key in metadata} == metadata
    assert fields["q8lightning.tied.head.weight"] == "token_embd.weight"
    assert reader.fields["tiny.block_count"].types == [gguf.GGUFValueType.UINT32]
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    assert kinds == {
        "token_embd.weight": "Q4_0", "up.weight": "Q4_0", "up.bias": "F16", "down.weight": "Q4_0",
        "norm.weight": "F16", "norm.bias": "F16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (WeightRule("*", "nf4", 64), {}, r"it holds integers and linear codes, not normal_float4"),
        (
            WeightRule("*", "int4", 256),
            {},
            r"net\.embed\.weight \(int4, block_size=256; shape \(96, 64\)\): its bl",
        ),
        (WeightRule("*", "int4", 32), {}, r'yours are float32; scale_dtype="float16" trains with such steps'),
        (WeightRule("*", "int4", 32, axis=1, scale_dtype="float16"), TRANSPOSED, r"cannot hold 2 of 3 quantized"),
        (
            WeightRule("*", "int4", 32),
            {},
            r'Train them with WeightRule.*"int4" or "int8", block_size=32, axis=0, s',
        ),
    ],
)
def test_a_rule_that_it_cannot_hold_is_refused_with_one_that_it_can(
    rule: WeightRule, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = saved(tmp_path, rule, checkpoint=None)
    with pytest.raises(ValueError, match=message):
        export_quantized(source.path, tmp_path / "model.gguf", "gguf", **options)
    assert not (tmp_path / "model.gguf").exists()


def test_a_row_that_is_no_multiple_of_32_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, WeightRule("net.head*"), *rules("int4", scale_dtype="float16"), checkpoint=None)
    options = {"prefix": "net.", "rename": {}, "transpose": []}
    with pytest.raises(ValueError, match=r"net\.down\.weight \(int4, block_size=32, axis=1.*for Conv1D axis=1"):
        export_quantized(source.path, tmp_path / "model.gguf", "gguf", **options)  # type: ignore[arg-type]
