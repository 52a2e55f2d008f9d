"""Fabric's checkpoints are quantized by what stands under the user's keys, and come back through fabric.load."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy
from support.promises import payloads_of
from torch import nn

import q8lightning
from q8lightning import BackgroundSaveError, CheckpointPolicy, CorruptCheckpointError, QuantizedCheckpointIO, Rule


class Net(nn.Module):
    """Two layers of weights that are encoded, and a buffer that no save may change."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.register_buffer("table", torch.randn(64, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(x) + self.table[0])
        return result


def trained(*plugins: Any) -> tuple[Fabric, dict[str, Any]]:
    """Return a Fabric and a state after two steps of AdamW."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=list(plugins))
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-2))
    for _ in range(2):
        fabric.backward(model(torch.randn(8, 64)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return fabric, {"model": model, "optimizer": optimizer, "step": 2}


def moments_in(optimizer: Any) -> list[torch.Tensor]:
    return [state[key] for state in optimizer.state_dict()["state"].values() for key in ("exp_avg", "exp_avg_sq")]


WEIGHTS = {"model.up.weight", "model.down.weight"}
MOMENTS = {f"optimizer.state.{index}.{key}" for index in (0, 2) for key in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("preset", ["resume", "compact"])
def test_a_preset_quantizes_what_stands_under_the_users_keys(preset: Any, tmp_path: Path) -> None:
    fabric, state = trained(QuantizedCheckpointIO(checkpoint=preset))
    fabric.save(tmp_path / "a.ckpt", state)
    found = payloads_of(tmp_path / "a.ckpt")
    assert set(found) >= WEIGHTS | MOMENTS
    codecs = {path: payload.codec for path, payload in found.items()}
    policy = CheckpointPolicy.of(preset)
    assert codecs["model.up.weight"] == policy.codec_for("state_dict.up.weight")
    assert codecs["optimizer.state.0.exp_avg_sq"] == policy.codec_for("optimizer_states.0.state.0.exp_avg_sq")
    before = [each.clone() for each in (*state["model"].parameters(), *moments_in(state["optimizer"]))]
    other, again = trained(QuantizedCheckpointIO(checkpoint=preset))
    with torch.no_grad():
        for each in again["model"].parameters():
            each.zero_()
    again["step"] = 0
    assert set(other.load(tmp_path / "a.ckpt", again)) == {"q8lightning"}
    after = [*again["model"].parameters(), *moments_in(again["optimizer"])]
    assert again["step"] == 2
    for one, two in zip(before, after, strict=True):
        assert (one - two).norm() <= 0.2 * one.norm()


def test_saving_through_the_function_knows_buffers_and_names(tmp_path: Path) -> None:
    fabric, state = trained()
    q8lightning.fabric.save(fabric, tmp_path / "a.ckpt", state, "compact")
    assert set(payloads_of(tmp_path / "a.ckpt")) == WEIGHTS | MOMENTS
    found = q8lightning.inspect(tmp_path / "a.ckpt")
    names = {entry.path: entry.name for entry in found.tensors}
    assert names["optimizer.state.2.exp_avg"] == "down.weight: exp_avg"
    assert {entry.kind for entry in found.tensors} == {"weights", "exp_avg", "exp_avg_sq", "other"}
    assert found.update_direction_error is not None
    kinds = {entry.path: entry.codec for entry in found.tensors}
    assert kinds["model.table"] is None
    state["step"] = 0
    rest = q8lightning.fabric.load(fabric, tmp_path / "a.ckpt", state)
    assert (set(rest), state["step"]) == ({"q8lightning"}, 2)
    assert "save_checkpoint" not in vars(fabric.strategy), "Fabric itself saves as before"
    fabric.save(tmp_path / "plain.ckpt", state)
    assert not payloads_of(tmp_path / "plain.ckpt")


def test_a_file_of_fabric_is_one_for_every_tool(tmp_path: Path) -> None:
    fabric, state = trained()
    fabric.save(tmp_path / "plain.ckpt", state)
    done = q8lightning.compress(tmp_path / "plain.ckpt", tmp_path / "small.ckpt")
    assert done.converted == 7  # the buffer among them, which a file does not tell from a weight
    assert q8lightning.verify(tmp_path / "small.ckpt").is_whole
    kinds = q8lightning.compare(tmp_path / "plain.ckpt", tmp_path / "small.ckpt").by_kind()
    assert 0 < kinds["update_direction"].relative_error < 0.3
    assert kinds["weights"].sqnr_db > 55
    q8lightning.decompress(tmp_path / "small.ckpt", tmp_path / "large.ckpt")
    fabric.load(tmp_path / "large.ckpt", state)
    loaded = q8lightning.load(tmp_path / "small.ckpt")
    state["model"].load_state_dict(loaded["model"])
    state["optimizer"].load_state_dict(loaded["optimizer"])


def test_rules_for_the_users_own_paths_come_before_those_for_lightnings(tmp_path: Path) -> None:
    policy = CheckpointPolicy([Rule("model.up.*"), Rule("state_dict.*", "softsign", block_size=64)])
    fabric, state = trained()
    q8lightning.fabric.save(fabric, tmp_path / "a.ckpt", state, policy)
    found = payloads_of(tmp_path / "a.ckpt")
    assert set(found) == {"model.down.weight"}


def test_data_of_the_users_own_stays_as_it_is(tmp_path: Path) -> None:
    fabric, state = trained(QuantizedCheckpointIO())
    replay = {"observed": torch.randn(100, 100), "rewards": torch.randn(5000)}
    fabric.save(tmp_path / "a.ckpt", {**state, "replay": replay, "more": [torch.randn(5000)]})
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(loaded["replay"][key], value) for key, value in replay.items())
    assert set(payloads_of(tmp_path / "a.ckpt")) >= WEIGHTS


def test_a_bare_state_dict_gets_no_key_that_its_module_does_not_know(tmp_path: Path) -> None:
    fabric, state = trained(QuantizedCheckpointIO())
    fabric.save(tmp_path / "raw.ckpt", dict(state["model"].state_dict()))
    assert set(payloads_of(tmp_path / "raw.ckpt")) >= {"up.weight", "down.weight"}
    fabric.load_raw(tmp_path / "raw.ckpt", state["model"])


def test_that_nothing_was_quantized_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fabric, _ = trained(QuantizedCheckpointIO())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        q8lightning.fabric.save(fabric, tmp_path / "a.ckpt", {"model": nn.Linear(4, 4)})
        fabric.save(tmp_path / "b.ckpt", {"model": nn.Linear(4, 4)})
    (said,) = [each.message for each in caplog.records if "quantized nothing" in each.message]
    assert str(tmp_path / "a.ckpt") in said


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    fabric, state = trained(QuantizedCheckpointIO())
    with pytest.raises(ValueError, match="another policy"):
        q8lightning.fabric.save(fabric, tmp_path / "a.ckpt", state, "compact")
    strategy = object.__new__(DeepSpeedStrategy)
    fabric._strategy = strategy
    with pytest.raises(ValueError, match="DeepSpeedStrategy writes its checkpoints in a way of its own"):
        q8lightning.fabric.save(fabric, tmp_path / "a.ckpt", state)


def test_loading_verifies_all_of_a_file(tmp_path: Path) -> None:
    fabric, state = trained()
    q8lightning.fabric.save(fabric, tmp_path / "a.ckpt", state)
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    at = content.index(state["model"].table[:4].numpy().tobytes())
    content[at] ^= 1
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        q8lightning.fabric.load(fabric, tmp_path / "a.ckpt", state)
    assert isinstance(fabric.load(tmp_path / "a.ckpt"), dict)  # Fabric's own does not look at the buffer's sum


def test_saves_in_the_background_end_with_the_context(tmp_path: Path) -> None:
    with QuantizedCheckpointIO(async_save=True) as io:
        fabric, state = trained(io)
        fabric.save(tmp_path / "a.ckpt", state)
    assert set(payloads_of(tmp_path / "a.ckpt")) >= WEIGHTS | MOMENTS
    (tmp_path / "taken").mkdir()
    with pytest.raises(BackgroundSaveError, match="taken"), QuantizedCheckpointIO(async_save=True) as io:
        trained(io)[0].save(tmp_path / "taken", state)


def test_a_failed_save_does_not_hide_what_the_loop_died_of(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()

    def die() -> None:
        with QuantizedCheckpointIO(async_save=True) as io:
            trained(io)[0].save(tmp_path / "taken", {"model": nn.Linear(64, 64)})
            raise KeyError("of the loop")

    with pytest.warns(UserWarning, match="taken"), pytest.raises(KeyError):
        die()


def test_a_process_that_ends_writes_everything_and_says_what_failed(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    code = f"""
import torch
from q8lightning import QuantizedCheckpointIO
io = QuantizedCheckpointIO(async_save=True)
io.save_checkpoint({{"model": torch.nn.Linear(64, 64).state_dict()}}, {str(tmp_path / "a.ckpt")!r})
io.save_checkpoint({{"model": torch.nn.Linear(64, 64).state_dict()}}, {str(tmp_path / "taken")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "model.weight" in payloads_of(tmp_path / "a.ckpt")
    assert f"q8lightning: error: saving {tmp_path / 'taken'} in the background failed: IsADirectoryError" in done.stderr
