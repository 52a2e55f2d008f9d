"""A file of safetensors holds the very floats of the forward pass, under the names that the user asks for."""

from pathlib import Path

import pytest
import torch
from support.exported import Net, saved

from q8lightning import WeightRule, export_quantized

safetensors = pytest.importorskip("safetensors.torch")

INT4 = WeightRule("*", "int4", 64)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("preset", ["resume", "compact", None])
def test_the_librarys_own_reader_returns_what_the_forward_pass_used(
    preset: str | None, weights_only: bool, tmp_path: Path
) -> None:
    source = saved(tmp_path, INT4, checkpoint=preset, weights_only=weights_only)
    export_quantized(source.path, tmp_path / "model.safetensors", "safetensors", prefix="net.")
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert sorted(found) == sorted(set(source.weights) - {"head.weight"})
    for name, value in found.items():
        if value.ndim > 1 or preset is None:
            assert torch.equal(value, source.weights[name]), name
    assert not torch.equal(found["up.weight"], source.net.up.weight)


def test_tied_weights_are_tied_again_by_the_librarys_own_loader(tmp_path: Path) -> None:
    source = saved(tmp_path, INT4)
    export_quantized(source.path, tmp_path / "model.safetensors", "safetensors", prefix="net.", metadata={"by": "me"})
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight", "by": "me"}
    net = Net()
    safetensors.load_model(net, tmp_path / "model.safetensors")
    assert torch.equal(net.head.weight, source.weights["embed.weight"])
    assert net.head.weight is net.embed.weight


def test_names_transposes_and_dtypes_are_those_asked_for(tmp_path: Path) -> None:
    source = saved(tmp_path, WeightRule("net.up.weight", "int4", 64), checkpoint=None)
    out = tmp_path / "new" / "model.safetensors"
    names = {r"^(up|down)\.": r"layers.\1_proj.", "embed": "tokens"}
    options = {"prefix": "net.", "rename": names, "transpose": ["*.down.weight"], "dtype": torch.bfloat16}
    export_quantized(source.path, out, "safetensors", **options)  # type: ignore[arg-type]
    found = safetensors.load_file(out)
    assert sorted(found) == [
        "layers.down_proj.weight", "layers.up_proj.bias", "layers.up_proj.weight",
        "norm.bias", "norm.weight", "tokens.weight",
    ]  # fmt: skip
    assert torch.equal(found["layers.up_proj.weight"], source.weights["up.weight"])
    assert torch.equal(found["layers.down_proj.weight"], source.weights["down.weight"].t().bfloat16())
    assert {name for name, value in found.items() if value.dtype == torch.float32} == {"layers.up_proj.weight"}
    upper = {"prefix": "net.", "rename": str.upper}
    export_quantized(source.path, out, "safetensors", **upper)  # type: ignore[arg-type]
    assert "UP.BIAS" in safetensors.load_file(out)
    assert [each.name for each in out.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "nett."}, r"no tensor's name begins with prefix='nett\.'; the first one is 'net\.embed\.weight'"),
        ({"rename": lambda name: "a"}, r"rename gives net\.embed\.weight and net\.up\.weight the same name 'a'"),
        ({"transpose": ["*.dwon.*"]}, r"transpose='\*\.dwon\.\*' matches no tensor; names are such as 'net\.embed"),
        ({"transpose": ["*.bias"]}, r"transpose matches net\.up\.bias of shape \(128,\); only matrices"),
        ({"dtype": torch.int8}, r"dtype is a float dtype such as torch\.bfloat16, got torch\.int8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(options: object, message: str, tmp_path: Path) -> None:
    source = saved(tmp_path, INT4, checkpoint=None)
    with pytest.raises(ValueError, match=message):
        export_quantized(source.path, tmp_path / "out", "safetensors", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    source = saved(tmp_path, INT4, checkpoint=None)
    (tmp_path / "out").write_bytes(b"old")
    data = bytearray(source.path.read_bytes())
    position = data.find(source.net.norm.weight.detach().numpy().tobytes())
    data[position + 3] ^= 1
    source.path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"norm.* is damaged"):
        export_quantized(source.path, tmp_path / "out", "safetensors")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_file()) == ["out", "qat.ckpt"]
