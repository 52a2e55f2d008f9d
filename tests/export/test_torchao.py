"""torchao's tensors in an exported state dict dequantize to what the forward pass used, and run in the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import Conv1D, Net, saved
from torch import Tensor, nn

from q8lightning import WeightRule, export_quantized

torchao = pytest.importorskip("torchao.quantization")

OPTIONS: dict[str, Any] = {"prefix": "net.", "as_floats": ["*.embed.weight", "*.down.weight"]}
KINDS = [("int4", 32, "bfloat16"), ("int4", 64, "float32"), ("int8", "row", "float32"), ("int8", 32, "float16")]


@pytest.mark.parametrize("preset", ["resume", "compact", None])
@pytest.mark.parametrize(("codebook", "block_size", "scale_dtype"), KINDS)
def test_tensors_dequantize_to_what_the_forward_pass_used(
    codebook: Any, block_size: Any, scale_dtype: Any, preset: str | None, tmp_path: Path
) -> None:
    rule = WeightRule("*", codebook, block_size, axis=0, scale_dtype=scale_dtype)
    source = saved(tmp_path, WeightRule("*.down*", codebook, block_size, 1), rule, checkpoint=preset)
    transposed = {"transpose": "*.down.weight", "as_floats": "*.embed.weight", "prefix": "net."}
    export_quantized(source.path, tmp_path / "torchao.pt", "torchao", **transposed)  # type: ignore[arg-type]
    state = torch.load(tmp_path / "torchao.pt", weights_only=False)
    kind = torchao.Int8Tensor if codebook == "int8" else torchao.IntxUnpackedToInt8Tensor
    for name in ("up.weight", "down.weight"):
        assert isinstance(state[name], kind)
        expected: Tensor = source.weights[name]
        assert torch.equal(state[name].dequantize(), expected.t() if name == "down.weight" else expected)
    assert list(state) == list(source.net.state_dict())
    assert torch.equal(state["embed.weight"], source.weights["embed.weight"])
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


@pytest.mark.parametrize(("codebook", "block_size", "scale_dtype"), KINDS)
def test_a_model_that_loads_them_computes_as_in_training(
    codebook: Any, block_size: Any, scale_dtype: Any, tmp_path: Path
) -> None:
    source = saved(tmp_path, WeightRule("*", codebook, block_size, axis=0, scale_dtype=scale_dtype), checkpoint=None)
    export_quantized(source.path, tmp_path / "torchao.pt", "torchao", **OPTIONS)
    net = Net()
    net.load_state_dict(torch.load(tmp_path / "torchao.pt", weights_only=False), assign=True)
    assert isinstance(net.up, nn.Linear)
    assert isinstance(net.down, Conv1D)
    x = torch.randn(5, 96)
    expected = Net()
    expected.load_state_dict(source.weights)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected(x), rtol=1e-4, atol=1e-4)


def test_what_it_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = saved(tmp_path, WeightRule("*", "nf4", 64), checkpoint=None)
    with pytest.raises(ValueError, match=r"it holds the integers int2 to int8, not normal_float4.*block_size=128"):
        export_quantized(source.path, tmp_path / "torchao.pt", "torchao")
    assert not (tmp_path / "torchao.pt").exists()
