"""What a compressed file says about itself: what the callback would have said; of what stayed as it was, as before."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import names
from support.models import Autoencoder, quiet_trainer
from support.promises import (
    assert_same,
    assert_same_content,
    assert_same_summary,
    load,
    payloads_of,
    same_parts,
    without_summary,
)
from torch import Tensor

from q8lightning import CheckpointPolicy, QATConfig, QuantizationCallback, QuantizedCheckpointIO, Rule, WeightRule

Run = Callable[..., Any]
FIRST, SECOND = (f"optimizer_states.0.state.0.{key}" for key in ("exp_avg", "exp_avg_sq"))


def summary_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = load(path)["q8lightning"]
    return found


def save(checkpoint: dict[str, Any], path: Path, policy: CheckpointPolicy | str) -> None:
    QuantizedCheckpointIO(checkpoint=policy).save_checkpoint(checkpoint, path)


def written(policy: CheckpointPolicy, path: Path) -> Path:
    """Write a policy as a file of YAML; JSON is YAML."""
    import json

    path.write_text(json.dumps(policy.as_primitives()))
    return path


# The guard


def hard_to_encode() -> dict[str, Any]:
    """Return a checkpoint whose tensors lose too much: two weights, and the moments of two of three parameters."""
    make = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(64, 128, generator=make)

    weights = {"easy": normal(), "outlier": normal(), "cubed": normal() ** 9}
    weights["outlier"][3, 17] = 300.0
    scale = 10.0 ** -(6 * torch.rand(64, 128, generator=make))
    states = {
        0: {"exp_avg": normal() * 1e-3, "exp_avg_sq": normal().square() * 1e-6},
        1: {"exp_avg": normal() * scale, "exp_avg_sq": scale.square()},
        2: {"exp_avg": normal(), "exp_avg_sq": torch.full((64, 128), 1e-4)},
    }
    states[2]["exp_avg_sq"][0, :2] = torch.tensor([1e-30, 1e9])
    group = {"params": [0, 1, 2], "eps": 1e-8}
    return {"state_dict": weights, "optimizer_states": [{"state": states, "param_groups": [group]}]}


def name_of(path: str) -> str:
    """Return what messages call a tensor of that checkpoint."""
    if path.startswith("state_dict."):
        return path
    *_, index, key = path.split(".")
    return f"{['easy', 'outlier', 'cubed'][int(index)]}: {key}"


@pytest.mark.parametrize("second", ["log", "dynamic_unsigned"])
def test_the_guard_decides_as_it_does_for_the_callback(second: str, run: Run, tmp_path: Path) -> None:
    policy = CheckpointPolicy(
        [
            Rule("state_dict.*", "linear", 4096),
            Rule("optimizer_states.*.exp_avg", "linear", 4096),
            Rule("optimizer_states.*.exp_avg_sq", second, 4096),
        ]
    )
    torch.save(hard_to_encode(), tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="would have lost more") as warned:
        save(load(tmp_path / "plain.ckpt"), tmp_path / "io.ckpt", policy)
    done = run("compress", tmp_path / "plain.ckpt", tmp_path / "a.ckpt", "--policy", written(policy, tmp_path / "yaml"))
    assert done.status == 0
    assert_same_content(tmp_path / "a.ckpt", tmp_path / "io.ckpt")
    made, expected = payloads_of(tmp_path / "a.ckpt"), payloads_of(tmp_path / "io.ckpt")
    assert made.keys() == expected.keys()
    assert all(same_parts(made[path], expected[path]) for path in expected)
    guarded = summary_of(tmp_path / "a.ckpt")["guarded"]
    assert {each["remedy"] for each in guarded.values()} == {"residual", "raw"}
    assert any(path.startswith("optimizer_states") for path in guarded)
    assert len([each for each in warned if "would have lost more" in str(each.message)]) == 1
    (line,) = done.err.splitlines()
    names = {path: name_of(path) for path in guarded}
    assert all(name in line for name in names.values())

    text = run("inspect", tmp_path / "a.ckpt").out
    path, first = next(iter(guarded.items()))
    assert f"exceptions  {names[path]} ({first['found']}); " in text
    assert ("; in 16 bits" in text) == any(each["remedy"] == "residual" for each in list(guarded.values())[:5])
    again = run("compress", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--policy", tmp_path / "yaml")
    assert again.status == 1, "what was stored better than by its rule is no reason to write the file again"
    assert "nothing to compress" in again.err


def test_a_policy_that_would_lose_too_much_everywhere_says_so(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.randn(64, 128).bfloat16()}}, tmp_path / "plain.ckpt")
    policy = written(CheckpointPolicy([Rule("state_dict.*", "int4", 4096)]), tmp_path / "yaml")
    done = run("compress", tmp_path / "plain.ckpt", tmp_path / "a.ckpt", "--policy", policy)
    assert done.status == 1
    assert "every tensor that the policy selects stays as it is" in done.err
    assert "state_dict.w (" in done.err
    assert names(tmp_path) == ["plain.ckpt", "yaml"]


# What was encoded before


def test_what_stays_as_it_was_lost_what_its_file_says(run: Run, plain: Path, tmp_path: Path) -> None:
    run("compress", plain, tmp_path / "resume.ckpt")
    rules = CheckpointPolicy.of("resume").rules
    smaller = CheckpointPolicy(
        [replace(rule, codec="softsign", residual_bits=0) if rule.codec == "linear" else rule for rule in rules]
    )  # weights in fewer bits, moments as they are
    policy = written(smaller, tmp_path / "yaml")
    run("compress", tmp_path / "resume.ckpt", tmp_path / "smaller.ckpt", "--policy", policy)
    before, after = summary_of(tmp_path / "resume.ckpt"), summary_of(tmp_path / "smaller.ckpt")
    save(load(tmp_path / "resume.ckpt"), tmp_path / "io.ckpt", smaller)
    expected = summary_of(tmp_path / "io.ckpt")  # of moments it says that saving them again lost nothing

    assert list(after) == list(expected)
    assert after["tensors"].keys() == expected["tensors"].keys()
    for path in after["tensors"]:
        source = expected if path.startswith("state_dict") else before
        assert_same_summary(after["tensors"][path], source["tensors"][path], path)
    assert after["metrics"].keys() == expected["metrics"].keys()
    for name in after["metrics"]:
        source = expected if name.startswith("weights/") or name == "compression_ratio" else before
        assert after["metrics"][name] == pytest.approx(source["metrics"][name], rel=1e-9), name
    assert after["metrics"]["update_direction_error"] > 0
    assert after["bytes"] == expected["bytes"]
    assert after["policy"] == expected["policy"]


def test_a_kept_moment_is_judged_beside_a_new_one(run: Run, plain: Path, tmp_path: Path) -> None:
    run("compress", plain, tmp_path / "a.ckpt")
    first = Rule("optimizer_states.*.exp_avg", "softsign", 128, bits=6)  # as it is
    policy = CheckpointPolicy([first, Rule("optimizer_states.*.exp_avg_sq", "log", 1024, bits=5)])
    run("compress", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--policy", written(policy, tmp_path / "yaml"))
    save(load(tmp_path / "a.ckpt"), tmp_path / "io.ckpt", policy)
    before, after, expected = (summary_of(tmp_path / f"{name}.ckpt")["tensors"] for name in ("a", "b", "io"))
    assert payloads_of(tmp_path / "b.ckpt")[SECOND].codec.block_size == 1024
    assert_same_summary(after[SECOND], expected[SECOND])
    assert after[FIRST]["update_direction_error"] == pytest.approx(expected[FIRST]["update_direction_error"], rel=1e-9)
    assert after[FIRST]["update_direction_error"] > 0
    assert after[FIRST]["sqnr_db"] == before[FIRST]["sqnr_db"] < math.inf
    assert expected[FIRST]["sqnr_db"] == math.inf, "the test itself: alone it would have lost nothing"


def test_what_was_tried_in_vain_says_what_it_said(run: Run, tmp_path: Path) -> None:
    """Neither what the guard would have done for it, nor that a codec cannot hold it, is true of the file."""
    make = torch.Generator().manual_seed(0)
    kept, new = (torch.randn(64, 64, generator=make) for _ in range(2))
    torch.save({"state_dict": {"kept": kept, "new": new.abs()}}, tmp_path / "plain")
    run("compress", tmp_path / "plain", tmp_path / "half", "--keep", "*.new")  # linear with a residual stage
    before = summary_of(tmp_path / "half")
    for name, rule, limit in (("log", Rule("state_dict.*", "log", 128), 30), ("linear", Rule("*", "linear", 256), 60)):
        policy = written(CheckpointPolicy([rule], min_sqnr_db=limit), tmp_path / "yaml")
        done = run("compress", tmp_path / "half", tmp_path / name, "--policy", policy)
        assert "1 tensors quantized, 1 as they were" in done.out
        after = summary_of(tmp_path / name)
        assert after["tensors"]["state_dict.kept"] == before["tensors"]["state_dict.kept"]
        assert after["refused"] == []
        assert list(after["guarded"]) == (["state_dict.new"] if name == "linear" else [])
        assert "state_dict.kept" not in done.err
        assert len(done.err.splitlines()) == len(after["guarded"])


def test_what_the_guard_did_for_a_tensor_that_stays_is_still_said(run: Run, tmp_path: Path) -> None:
    weights = {name: hard_to_encode()["state_dict"][name] for name in ("easy", "outlier")}
    torch.save({"state_dict": weights}, tmp_path / "plain")
    policy = written(CheckpointPolicy([Rule("state_dict.*", "linear", 4096)]), tmp_path / "yaml")
    run("compress", tmp_path / "plain", tmp_path / "half", "--policy", policy, "--keep", "*.easy")
    before = summary_of(tmp_path / "half")["guarded"]
    assert list(before) == ["state_dict.outlier"]
    done = run("compress", tmp_path / "half", tmp_path / "all", "--policy", policy, "--keep", "*.outlier")
    assert summary_of(tmp_path / "all")["guarded"] == before
    assert done.err == "", "it was said before"


def test_a_direction_of_kept_moments_stays_what_it_was(run: Run, tmp_path: Path) -> None:
    """Where another state of the same parameter is encoded again."""
    checkpoint = hard_to_encode()["optimizer_states"][0]
    state = checkpoint["state"][0]
    state["square_avg"] = 2 * state["exp_avg_sq"]
    torch.save({"optimizer_states": [{**checkpoint, "state": {0: state}}]}, tmp_path / "plain")
    run("compress", tmp_path / "plain", tmp_path / "a")
    policy = CheckpointPolicy([Rule("*.square_avg", "log", 1024, bits=5), *CheckpointPolicy.of("resume").rules])
    done = run("compress", tmp_path / "a", tmp_path / "b", "--policy", written(policy, tmp_path / "yaml"))
    assert "1 tensors quantized, 2 as they were" in done.out
    before, after = (summary_of(tmp_path / name) for name in ("a", "b"))
    assert after["tensors"][FIRST] == before["tensors"][FIRST]
    assert after["metrics"]["update_direction_error"] == before["metrics"]["update_direction_error"] > 0


def test_bytes_are_those_of_what_is_in_the_file(run: Run, plain: Path, tmp_path: Path) -> None:
    """Also where a tensor is encoded in vain, kept by a pattern, or never looked at."""
    run("compress", plain, tmp_path / "compact.ckpt", "--preset", "compact")
    run("compress", plain, tmp_path / "mixed.ckpt", "--keep", "state_dict.decoder.*")  # linear8+3
    done = run("compress", tmp_path / "mixed.ckpt", tmp_path / "again.ckpt", "--preset", "compact", "--keep", "*.table")
    assert done.status == 0
    for name in ("compact", "mixed", "again"):
        found = summary_of(tmp_path / f"{name}.ckpt")["bytes"]
        described = run("inspect", tmp_path / f"{name}.ckpt", "--json")
        import json

        tensors = json.loads(described.out)["tensors"]
        for of, column in (("original", "decoded_bytes"), ("stored", "bytes")):
            assert found[of] == sum(each[column] for each in tensors)
            assert found[f"encoded_{of}"] == sum(each[column] for each in tensors if each["codec"])


def test_decompressing_and_compressing_gives_the_same_codes_and_loses_nothing_more(
    run: Run, by_callback: Path, preset: str, tmp_path: Path
) -> None:
    run("decompress", by_callback, tmp_path / "large.ckpt")
    arguments = ("--preset", preset, "--keep", "state_dict.table")
    assert run("compress", tmp_path / "large.ckpt", tmp_path / "small.ckpt", *arguments).status == 0
    made, expected = payloads_of(tmp_path / "small.ckpt"), payloads_of(by_callback)
    assert list(made) == list(expected)
    assert all(same_parts(made[path], expected[path]) for path in expected)
    assert_same(without_summary(load(tmp_path / "small.ckpt")), without_summary(load(by_callback)))
    after, before = summary_of(tmp_path / "small.ckpt"), summary_of(by_callback)
    assert after["bytes"] == before["bytes"]
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(each["sqnr_db"] == math.inf and each["relative_error"] == 0 for each in after["tensors"].values())
    assert "inf dB" in run("inspect", tmp_path / "small.ckpt").out


# What a run has been through


def resumed(path: Path, folder: Path, *callbacks: Any) -> Path:
    trainer = quiet_trainer(folder, max_steps=4, limit_val_batches=0, callbacks=list(callbacks))
    trainer.fit(Autoencoder(), ckpt_path=path, weights_only=True)
    trainer.save_checkpoint(folder / "resumed.ckpt")
    return folder / "resumed.ckpt"


def test_how_often_a_run_was_restored_survives_every_conversion(run: Run, packed: Path, tmp_path: Path) -> None:
    file = resumed(packed, tmp_path, QuantizationCallback())
    assert summary_of(file)["restored"] == 1
    assert "restored    1 times" in run("inspect", file).out
    run("compress", file, tmp_path / "compact.ckpt", "--preset", "compact")
    run("decompress", tmp_path / "compact.ckpt", tmp_path / "large.ckpt")
    run("compress", tmp_path / "large.ckpt", tmp_path / "small.ckpt")
    for name in ("compact", "large", "small"):
        assert summary_of(tmp_path / f"{name}.ckpt")["restored"] == 1, name
    assert "policy" not in run("inspect", tmp_path / "large.ckpt").out
    again = resumed(tmp_path / "large.ckpt", tmp_path, QuantizationCallback())
    assert summary_of(again)["restored"] == 1, "a decompressed checkpoint is not quantized"


def test_codes_of_qat_are_counted_where_they_are_stored(run: Run, tmp_path: Path) -> None:
    """The codes of int4 do not follow from those of the master and are stored beside them."""
    qat = QATConfig([WeightRule("*.weight", codebook="int4", block_size=256)])
    torch.manual_seed(5)
    callback = QuantizationCallback(checkpoint="compact", qat=qat)
    trainer = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[callback])
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "io.ckpt")
    torch.manual_seed(5)
    trainer = quiet_trainer(
        tmp_path, max_steps=3, limit_val_batches=0, callbacks=[QuantizationCallback(checkpoint=None, qat=qat)]
    )
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    keep = ("--keep", "state_dict.table")
    run("compress", tmp_path / "plain.ckpt", tmp_path / "a.ckpt", "--preset", "compact", *keep)
    run("compress", tmp_path / "plain.ckpt", tmp_path / "resume.ckpt", *keep)
    run("compress", tmp_path / "resume.ckpt", tmp_path / "b.ckpt", "--preset", "compact", *keep)
    expected = summary_of(tmp_path / "io.ckpt")["bytes"]
    assert summary_of(tmp_path / "a.ckpt")["bytes"] == expected
    assert summary_of(tmp_path / "b.ckpt")["bytes"] == expected
