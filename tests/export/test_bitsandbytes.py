"""What bitsandbytes and transformers make of an export is what the forward pass used, and answers the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import saved
from support.language_models import CONV1D, NO_LINEAR, distance, tiny_gpt2, tiny_llama, trained
from torch import Tensor

from q8lightning import QATConfig, WeightRule, export_quantized

bitsandbytes = pytest.importorskip("bitsandbytes")
safetensors = pytest.importorskip("safetensors.torch")

OPTIONS: dict[str, Any] = {"prefix": "net.", "transpose": "*.down.weight", "as_floats": "*.embed.weight"}


def rules(codebook: Any, block_size: Any, axis: int | None) -> tuple[WeightRule, WeightRule]:
    return WeightRule("*.down.weight", codebook, block_size, 1), WeightRule("*", codebook, block_size, axis)


def dequantized(state: dict[str, Tensor], name: str) -> Tensor:
    of_weight = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    quant_state = bitsandbytes.functional.QuantState.from_dict(of_weight, device=torch.device("cpu"))
    values: Tensor = bitsandbytes.functional.dequantize_4bit(state[name], quant_state)
    return values


@pytest.mark.parametrize("preset", ["resume", "compact", None])
@pytest.mark.parametrize("block_size", [64, 32])
def test_nf4_is_what_the_forward_pass_used(block_size: int, preset: str | None, tmp_path: Path) -> None:
    source = saved(tmp_path, *rules("nf4", block_size, None), checkpoint=preset)
    export_quantized(source.path, tmp_path / "out", "bitsandbytes", **OPTIONS)
    state = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(dequantized(state, "up.weight"), source.weights["up.weight"])
    assert torch.equal(dequantized(state, "down.weight"), source.weights["down.weight"].t())
    assert torch.equal(state["embed.weight"], source.weights["embed.weight"])
    assert state["up.weight"].nbytes == source.net.up.weight.numel() // 2


@pytest.mark.parametrize("preset", ["resume", "compact", None])
def test_int8_is_what_the_forward_pass_used_up_to_the_roundings_of_its_arithmetic(
    preset: str | None, tmp_path: Path
) -> None:
    source = saved(tmp_path, *rules("linear", "row", 0), checkpoint=preset)
    export_quantized(source.path, tmp_path / "out", "bitsandbytes", **OPTIONS)
    state = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    for module in ("up", "down"):
        found = bitsandbytes.functional.int8_vectorwise_dequant(state[f"{module}.weight"], state[f"{module}.SCB"])
        expected = source.weights[f"{module}.weight"]
        expected = expected.t() if module == "down" else expected
        # Three roundings there, two here.
        assert bool(((found - expected).abs() <= 5 * 2**-24 * expected.abs()).all())
        assert state[f"{module}.weight"].dtype == torch.int8
        assert int(state[f"{module}.weight"].abs().max()) == 127


def test_the_configuration_is_the_models_own_with_what_was_done(tmp_path: Path) -> None:
    source = saved(tmp_path, *rules("nf4", 64, None), checkpoint=None)
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    for config in (tmp_path / "config.json", {"model_type": "tiny"}):
        export_quantized(source.path, tmp_path / "out", "bitsandbytes", config=config, dtype=torch.bfloat16, **OPTIONS)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["model_type"] == "tiny"
        assert written["quantization_config"] == {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["embed", "head"],
        }  # fmt: skip
    state = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert (state["norm.weight"].dtype, state["embed.weight"].dtype) == (torch.bfloat16, torch.float32)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([WeightRule("*", "int4", 64)], {}, r"it holds nf4 and linear, not int4.*Train them with WeightRule.*\"nf4\""),
        ([WeightRule("*", "linear", 32, 0)], {}, r'it has one scale for a row; block_size="row", axis=0 makes one'),
        ([WeightRule("*", "nf4", 64)], {"transpose": "*.down.weight"}, r"do not run along the flattened matrix; axis"),
        (
            [WeightRule("*.up.*", "nf4", 64), WeightRule("*", "linear", "row", axis=0)],
            {}, r"holds weights of one kind, and these are linear and normal_float4",
        ),
        ([WeightRule("*", "nf4", 64)], {"rename": {"weight": "w"}}, r"net\.embed\.weight becomes 'embed\.w'; ren"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused_before_anything_is_written(
    given: list[WeightRule], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = saved(tmp_path, *given, checkpoint=None)
    with pytest.raises(ValueError, match=message):
        export_quantized(source.path, tmp_path / "out", "bitsandbytes", prefix="net.", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["resume", None])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_from_pretrained_of_nf4_answers_as_in_training(make: Any, preset: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    weights = [WeightRule(pattern, "nf4", 64, 1) for pattern in CONV1D] if make is tiny_gpt2 else []
    qat = QATConfig([*weights, WeightRule("*.weight", "nf4", 64)], exclude=NO_LINEAR[make])
    source = trained(tmp_path, make(), qat, preset)
    transpose = CONV1D if make is tiny_gpt2 else ()
    export_quantized(
        source.path, tmp_path / "out", "bitsandbytes", prefix="model.", transpose=transpose, config=source.config
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [each for each in loaded.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == (8 if make is tiny_gpt2 else 14)
    # On CPUs with instructions for it, its fused kernel computes in bfloat16.
    assert distance(loaded, source.logits) < 2**-6
    # Decoded before its first use, which packs the codes anew, it computes in float32. The preset keeps embeddings to
    # 12 bits, and sums of products depend on the order.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    assert distance(loaded, source.logits) < (2e-3 if preset else 2e-6)


def test_from_pretrained_of_int8_answers_within_its_arithmetic(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    qat = QATConfig([WeightRule("*.weight", "linear", "row", 0)], exclude=NO_LINEAR[tiny_llama])
    source = trained(tmp_path, tiny_llama(), qat, None)
    export_quantized(source.path, tmp_path / "out", "bitsandbytes", prefix="model.", config=source.config)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(each, bitsandbytes.nn.Linear8bitLt) for each in loaded.modules()) == 14
    assert distance(loaded, source.logits) < 0.02  # it quantizes the inputs of its layers to 8 bits
