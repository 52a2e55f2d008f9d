"""Checkpoints in shards hold the masters and the codes that the forward pass used, whatever the number of processes."""

import textwrap
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from support import processes
from support.models import quiet_trainer
from support.sharded_training import fully, whole
from support.straight_through import Trained, quantized
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import q8lightning.export.quantized
from q8lightning import CorruptCheckpointError, QATConfig, QuantizationCallback, WeightRule, export_quantized
from q8lightning.checkpoint.sharded.check import check_shards
from q8lightning.checkpoint.sharded.read.read_codes import codes_of_shards
from q8lightning.tools import compress, decompress

POLICIES = (None, "resume", "compact")
CONFIGS = {
    "int4": QATConfig([WeightRule(codebook="int4", block_size=64, axis=0)]),
    "linear": QATConfig([WeightRule("*3.weight", "linear", 64)]),
}
BATCH = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 129), nn.Tanh(), nn.Linear(129, 64), nn.Linear(64, 64))


class Model(Trained):
    def configure_model(self) -> None:
        if not hasattr(self, "is_sharded"):
            self.is_sharded = True
            fully(self.net, self.device_mesh["data_parallel"])  # type: ignore[index]

    def on_train_start(self) -> None:
        self.began_with = masters_of(self.net)


def masters_of(net: nn.Module) -> dict[str, Any]:
    return {name: whole(each).numpy() for name, each in net.named_parameters()}


def fit(
    count: int, folder: Path, policy: Any, config: str, steps: int, ckpt: Path | None = None, in_shards: bool = True
) -> Any:
    torch.manual_seed(0)
    model = Model(net(), BATCH)
    trainer = quiet_trainer(
        folder,
        max_steps=steps,
        max_epochs=-1,
        devices=count,
        strategy=ModelParallelStrategy(count, 1, in_shards, process_group_backend="gloo"),
        use_distributed_sampler=False,
        callbacks=[QuantizationCallback(policy, qat=CONFIGS[config])],
    )
    trainer.fit(model, ckpt_path=ckpt)
    return trainer, model


def save_all(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": fit(2, folder, None, "int4", 6)[1].losses}
    trainer, model = fit(2, folder, "resume", "int4", 3, in_shards=False)
    trainer.save_checkpoint(folder / "whole.ckpt")
    found["whole"] = masters_of(model.net)
    for config in CONFIGS:
        for policy in POLICIES:
            trainer, model = fit(2, folder, policy, config, 3)
            trainer.save_checkpoint(folder / f"{config}-{policy}")
            found[f"{config}-{policy}"] = masters_of(model.net)
    return found


def resume_all(rank: int, count: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for policy in POLICIES:
        _, model = fit(count, folder, policy, "int4", 6, folder / f"int4-{policy}")
        found[str(policy)] = model.began_with, model.losses
    return found


@cache
def saved() -> tuple[Path, dict[str, Any]]:
    folder = Path(mkdtemp())
    return folder, processes.run(save_all, 2, folder, limit=200)[0]


@cache
def resumed(count: int) -> list[dict[str, Any]]:
    return processes.run(resume_all, count, count, saved()[0], limit=200)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_checkpoint_holds_the_codes_that_the_forward_pass_used(config: str, policy: Any) -> None:
    folder, found = saved()
    named = f"{config}-{policy}"
    for name in ("0.weight", "2.weight", "3.weight") if config == "int4" else ("3.weight",):
        master = torch.from_numpy(found[named][name])
        codec, codes, scales, like = codes_of_shards(folder / named, f"net.{name}")
        if config == "int4":
            expected = torch.stack([quantized(row, "int4", 64) for row in master])
        else:
            expected = quantized(master, "linear", 64)
        assert torch.equal(codec.decode(codes, scales, torch.empty_like(like, device="cpu")), expected)


def test_a_whole_checkpoint_of_sharded_weights_is_exported_as_they_were_used(tmp_path: Path) -> None:
    folder, found = saved()
    export_quantized(folder / "whole.ckpt", tmp_path / "float.pt", format="float")
    state = torch.load(tmp_path / "float.pt", weights_only=True)["state_dict"]
    for name, master in found["whole"].items():
        if master.ndim == 2:
            expected = torch.stack([quantized(torch.from_numpy(row), "int4", 64) for row in master])
            assert torch.equal(state[f"net.{name}"], expected), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_and_the_files_made_of_it_are_exported_as_they_were_used(
    config: str, policy: Any, tmp_path: Path
) -> None:
    """With codes beside encoded masters, with codes that are their first stage, and with codes that follow."""
    folder, found = saved()
    named = f"{config}-{policy}"
    decompress(folder / named, tmp_path / "one.ckpt")
    compress(folder / named, tmp_path / "small.ckpt", "compact")
    for source in (folder / named, tmp_path / "one.ckpt", tmp_path / "small.ckpt"):
        export_quantized(source, tmp_path / "float.pt", format="float")
        export_quantized(source, tmp_path / "codes.pt", format="codes")
        content = torch.load(tmp_path / "float.pt", weights_only=True)
        assert "optimizer_states" not in content
        assert content["global_step"] == 3
        by_codes = codes_read_back(tmp_path / "codes.pt")
        for name, master in found[named].items():
            value, key = torch.from_numpy(master), f"net.{name}"
            if config == "int4" and value.ndim == 2:
                value = torch.stack([quantized(row, "int4", 64) for row in value])
            elif name == "3.weight":
                value = quantized(value, "linear", 64)
            elif source.name == "small.ckpt" or policy is not None:
                assert torch.allclose(content["state_dict"][key], value, atol=0.02), (source, name)
                continue
            assert torch.equal(content["state_dict"][key], value), (source, name)
            assert torch.equal(by_codes[key], value), (source, name)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_folder_is_exported_to_formats_of_others(policy: Any, tmp_path: Path) -> None:
    safetensors, torchao = pytest.importorskip("safetensors.torch"), pytest.importorskip("torchao.quantization")
    folder, found = saved()
    export_quantized(folder / f"int4-{policy}", tmp_path / "floats", "safetensors", prefix="net.")
    export_quantized(
        folder / f"int4-{policy}", tmp_path / "torchao.pt", "torchao", prefix="net.", as_floats="net.2.weight"
    )
    floats = safetensors.load_file(tmp_path / "floats")
    tensors = torch.load(tmp_path / "torchao.pt", weights_only=False)
    for name, master in found[f"int4-{policy}"].items():
        if master.ndim == 2:
            expected = torch.stack([quantized(torch.from_numpy(row), "int4", 64) for row in master])
            assert torch.equal(floats[name], expected), name
            assert isinstance(tensors[name], torchao.IntxUnpackedToInt8Tensor) == (name != "2.weight")
            decoded = tensors[name] if name == "2.weight" else tensors[name].dequantize()
            assert torch.equal(decoded, expected), name


def codes_read_back(path: Path) -> dict[str, Tensor]:
    """Read exported codes as the head of the module says that one can."""
    namespace: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(q8lightning.export.quantized.__doc__.split("::\n\n", 1)[1]), namespace)
    state: dict[str, Tensor] = namespace["load_codes"](path)
    return state


def test_codes_are_stored_only_where_they_do_not_follow() -> None:
    folder, _ = saved()
    for name, chunks in (("int4-None", 0), ("int4-resume", 2), ("int4-compact", 2), ("linear-resume", 0)):
        entries = torch.load(folder / name / "meta.pt", weights_only=True)["q8lightning"]["qat"]
        assert all(len(entry.get("shards", ())) == chunks for entry in entries.values()), name


@pytest.mark.parametrize("count", [1, 2, 4])
def test_masters_that_are_stored_as_they_are_come_back_exactly_and_training_goes_on_as_if_nothing_had_been(
    count: int,
) -> None:
    _, found = saved()
    for each in resumed(count):
        began_with, losses = each["None"]
        assert all(np.array_equal(began_with[name], value) for name, value in found["int4-None"].items())
        assert losses == found["losses"][3:]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_encoded_masters_come_back_alike_in_any_number_of_processes(count: int) -> None:
    _, found = saved()
    half_a_step = 1 / (2 * 127 * 7)  # of the residual of 3 bits
    for policy, error in (("resume", 1.01 * half_a_step), ("compact", 2e-2)):
        expected = resumed(2)[0][policy][0]
        for each in resumed(count):
            began_with, losses = each[policy]
            for name, value in found[f"int4-{policy}"].items():
                assert np.array_equal(began_with[name], expected[name])
                assert np.abs(began_with[name] - value).max() <= error * np.abs(value).max()
            assert losses == pytest.approx(found["losses"][3:], rel=0.05)


def test_a_damaged_code_is_reported_with_the_name_of_its_weight(tmp_path: Path) -> None:
    folder, _ = saved()
    entry = torch.load(folder / "int4-resume" / "meta.pt", weights_only=True)["q8lightning"]["qat"]["net.2.weight"]
    file, start, nbytes, _ = entry["shards"][1]
    copy = tmp_path / "copy"
    copy.mkdir()
    for each in (folder / "int4-resume").iterdir():
        data = bytearray(each.read_bytes())
        if each.name == file:
            data[start + nbytes // 2] ^= 1
        (copy / each.name).write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"codes of net\.2\.weight"):
        check_shards(copy)


def test_others_find_the_weights_under_the_names_that_they_had(tmp_path: Path) -> None:
    folder, found = saved()
    dcp_to_torch_save(folder / "int4-resume", tmp_path / "whole.pt")
    state: dict[str, Tensor] = torch.load(tmp_path / "whole.pt", weights_only=True)["state_dict"]
    assert sorted(state) == sorted(f"net.{name}" for name in found["int4-resume"])
