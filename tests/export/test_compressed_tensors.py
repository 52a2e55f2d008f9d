"""What compressed-tensors and transformers make of an export is what the forward pass used, and answers the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import saved
from support.language_models import NO_LINEAR, distance, tiny_llama, trained
from torch import Tensor

from q8lightning import ActivationRule, QATConfig, WeightRule, export_quantized

compressed_tensors = pytest.importorskip("compressed_tensors")
safetensors = pytest.importorskip("safetensors.torch")

OPTIONS: dict[str, Any] = {"prefix": "net.", "transpose": "*.down.weight", "as_floats": "*.embed.weight"}


def rules(codebook: Any, block_size: Any, **options: Any) -> tuple[WeightRule, WeightRule]:
    down = WeightRule("*.down.weight", codebook, block_size, axis=1, **options)
    return down, WeightRule("*", codebook, block_size, axis=0, **options)


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the modules as the library's own decompressor decodes them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    state = safetensors.load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    found = {}
    for scheme in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for module in scheme.targets:
            own = {key.removeprefix(f"{module}."): each for key, each in state.items() if key.startswith(f"{module}.")}
            found[module] = compressor.decompress(own, scheme)["weight"]
    return found


@pytest.mark.parametrize("preset", ["resume", "compact", None])
@pytest.mark.parametrize(
    ("codebook", "block_size", "scale_dtype"),
    [("int4", 32, "float32"), ("int4", 64, "bfloat16"), ("int8", "row", "float32"), ("int8", "row", "float16"),
     ("int3", 32, "bfloat16"), ("int6", "row", "float32")],
)  # fmt: skip
def test_codes_decompress_to_what_the_forward_pass_used(
    codebook: Any, block_size: Any, scale_dtype: Any, preset: str | None, tmp_path: Path
) -> None:
    source = saved(tmp_path, *rules(codebook, block_size, scale_dtype=scale_dtype), checkpoint=preset)
    export_quantized(source.path, tmp_path / "out", "compressed-tensors", **OPTIONS)
    found = decompressed(tmp_path / "out")
    assert torch.equal(found["up"], source.weights["up.weight"])
    assert torch.equal(found["down"], source.weights["down.weight"].t())
    if scale_dtype != "float32":  # nothing is lost where a runtime keeps scales in the dtype
        scales = safetensors.load_file(tmp_path / "out" / "model.safetensors")["up.weight_scale"]
        assert torch.equal(scales.to(getattr(torch, scale_dtype)).float(), scales)


def test_several_rules_become_several_groups(tmp_path: Path) -> None:
    source = saved(tmp_path, rules("int8", "row")[0], WeightRule("*", "int4", 32, 0), checkpoint=None)
    export_quantized(source.path, tmp_path / "out", "compressed-tensors", config={"a": 1}, **OPTIONS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["a"] == 1
    config = config["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ["embed", "head"]
    groups = {tuple(each["targets"]): each["weights"] for each in config["config_groups"].values()}
    assert groups[("up",)]["group_size"] == 32
    assert groups[("down",)]["strategy"] == "channel"
    found = decompressed(tmp_path / "out")
    assert torch.equal(found["up"], source.weights["up.weight"])
    assert torch.equal(found["down"], source.weights["down.weight"].t())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            WeightRule("*", "nf4", 64),
            r"it holds the integers int2 to int8, not normal_float4.*\"int4\", block_size=1",
        ),
        (WeightRule("*", "int4", 256), r"its groups do not run along rows; axis=0 makes them"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_anything_is_written(
    rule: WeightRule, message: str, tmp_path: Path
) -> None:
    source = saved(tmp_path, rule, checkpoint=None)
    with pytest.raises(ValueError, match=message):
        export_quantized(source.path, tmp_path / "out", "compressed-tensors", prefix="net.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["resume", None])
@pytest.mark.parametrize(("codebook", "block_size"), [("int4", 32), ("int8", "row")])
def test_from_pretrained_answers_as_in_training(
    codebook: Any, block_size: Any, preset: str | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    qat = QATConfig([WeightRule("*.weight", codebook, block_size, 0)], exclude=NO_LINEAR[tiny_llama])
    source = trained(tmp_path, tiny_llama(), qat, preset)
    export_quantized(source.path, tmp_path / "out", "compressed-tensors", prefix="model.", config=source.config)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The preset keeps embeddings to 12 bits, and sums of products depend on the order.
    assert distance(loaded, source.logits) < (2e-3 if preset else 2e-6)


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_inputs_that_were_trained_quantized_go_along(per: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    qat = QATConfig(
        [WeightRule("*.weight", "int8", "row", axis=0)],
        exclude=NO_LINEAR[tiny_llama], activations=[ActivationRule("*_proj", "linear", per)],
    )  # fmt: skip
    source = trained(tmp_path, tiny_llama(), qat, None)
    export_quantized(source.path, tmp_path / "out", "compressed-tensors", prefix="model.", config=source.config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, per, True)
    assert config["format"] == "int-quantized"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # It divides the largest input by 127.5, and we by 127.
    assert distance(loaded, source.logits) < 0.02
