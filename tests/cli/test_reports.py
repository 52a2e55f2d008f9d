"""``inspect``, ``verify`` and ``compare`` say what is in the files, checked against the files and NumPy."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.files import flip, place_of
from support.models import Autoencoder, TwoOptimizers, quiet_trainer
from support.promises import load, payloads_of, tensors
from torch import Tensor, nn

from q8lightning import QuantizationCallback, QuantizedCheckpointIO, tools
from q8lightning.tools.tensors import KINDS

Run = Callable[..., Any]
GOLDEN = Path(__file__).parent.parent / "golden"
CODECS = {
    "resume": {"weights": "linear8+3/256", "exp_avg": "softsign6/128", "exp_avg_sq": "log6/128"},
    "compact": {"weights": "softsign/256", "exp_avg": "softsign5/128", "exp_avg_sq": "log4/128"},
}
"""What is said of the codecs of each preset."""


def described(run: Run, path: Path) -> dict[str, Any]:
    done = run("inspect", path, "--json")
    assert done.status == 0
    result: dict[str, Any] = json.loads(done.out)
    return result


# inspect


def test_every_tensor_is_described(run: Run, by_callback: Path, preset: str) -> None:
    found = described(run, by_callback)
    decoded, encoded = dict(tensors(load(by_callback))), payloads_of(by_callback)
    assert [each["path"] for each in found["tensors"]] == [".".join(map(str, path)) for path in decoded]
    for each, value in zip(found["tensors"], decoded.values(), strict=True):
        payload = encoded.get(each["path"])
        assert tuple(each["shape"]) == tuple(value.shape)
        assert each["dtype"] == str(value.dtype).removeprefix("torch.")
        assert each["decoded_bytes"] == value.nbytes
        assert each["bytes"] == (value.nbytes if payload is None else payload.nbytes)
        if payload is None:
            assert each["codec"] is None
        else:
            assert each["codec"] == CODECS[preset][each["kind"]]
    assert found["summary"]["format_version"] == 1
    assert found["bytes"] == by_callback.stat().st_size
    assert found["training"]["global_step"] == 2


def test_a_file_that_was_loaded_and_saved_again_is_called_plain(
    run: Run, by_callback: Path, preset: str, tmp_path: Path
) -> None:
    again = tmp_path / "again.ckpt"
    torch.save(load(by_callback), again)
    assert described(run, by_callback)["decoded"] is False
    assert described(run, again)["decoded"] is True
    (line,) = (line for line in run("inspect", again).out.splitlines() if line.startswith("  format"))
    assert line.split(None, 1)[1].startswith("plain: no tensor is encoded; policy and errors are of the quantized file")
    assert "plain" not in run("inspect", by_callback).out.splitlines()[2]
    compared = json.loads(run("compare", by_callback, again, "--json").out)["tensors"]
    kinds = {each["path"]: (each["first"], each["second"]) for each in compared}
    assert kinds["state_dict.decoder.weight"][0] == CODECS[preset]["weights"]
    assert kinds["state_dict.decoder.weight"][1] == "float32"


def test_a_save_that_encoded_nothing_is_not_called_loaded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    QuantizedCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)
    assert described(run, path)["decoded"] is False
    assert "q8lightning, version 1" in run("inspect", path).out


def test_sizes_add_up_by_kind(run: Run, by_callback: Path) -> None:
    found = described(run, by_callback)
    assert set(found["sizes"]) == {each["kind"] for each in found["tensors"]} <= set(KINDS)
    for kind in found["sizes"]:
        of_kind = [each for each in found["tensors"] if each["kind"] == kind]
        assert found["sizes"][kind] == {
            "tensors": len(of_kind),
            "bytes": sum(each["bytes"] for each in of_kind),
            "decoded_bytes": sum(each["decoded_bytes"] for each in of_kind),
        }
    parameters = sum(value.numel() for value in Autoencoder().parameters())
    assert found["sizes"]["exp_avg"]["decoded_bytes"] == found["sizes"]["exp_avg_sq"]["decoded_bytes"]
    assert found["sizes"]["exp_avg"]["decoded_bytes"] == 4 * parameters
    kinds = {each["path"]: each["kind"] for each in found["tensors"]}
    assert kinds["state_dict.counts"] == kinds["optimizer_states.0.state.0.step"] == "other"
    assert kinds["state_dict.decoder.bias"] == "weights"


def test_a_plain_checkpoint_has_no_format_and_no_codecs(run: Run, plain: Path) -> None:
    found = described(run, plain)
    assert found["summary"] is None
    assert all(each["codec"] is None for each in found["tensors"])
    assert "plain" in run("inspect", plain).out


@pytest.mark.parametrize("name", ["resume_v1.ckpt", "compact_v1.ckpt", "precise_v1.ckpt", "codecs_v1.ckpt"])
def test_golden_files_are_described_and_verified(name: str, run: Run) -> None:
    assert described(run, GOLDEN / name)["summary"]["format_version"] == 1
    done = run("verify", GOLDEN / name)
    assert done.status == 0
    assert "whole" in done.out


def test_tied_tensors_are_counted_once(run: Run, tmp_path: Path) -> None:
    weight = torch.randn(100, 64)
    torch.save({"state_dict": {"a": weight, "b": weight.view(100, 64), "c": weight[:50]}}, tmp_path / "tied.ckpt")
    run("compress", tmp_path / "tied.ckpt", tmp_path / "kept.ckpt")  # c overlaps: nothing is quantized
    torch.save({"state_dict": {"a": weight, "b": weight.view(100, 64)}}, tmp_path / "tied.ckpt")
    run("compress", tmp_path / "tied.ckpt", tmp_path / "small.ckpt")
    for name in ("tied", "small"):
        found = described(run, tmp_path / f"{name}.ckpt")
        assert [each["tied_to"] for each in found["tensors"]] == [None, "state_dict.a"]
        assert found["sizes"]["weights"]["decoded_bytes"] == weight.nbytes
        encoded = payloads_of(tmp_path / f"{name}.ckpt")
        expected = encoded["state_dict.a"].nbytes if encoded else weight.nbytes
        assert found["sizes"]["weights"]["bytes"] == expected
        assert "tied to state_dict.a" in run("inspect", tmp_path / f"{name}.ckpt").out
    assert not (tmp_path / "kept.ckpt").exists()


@pytest.mark.parametrize("module", [Autoencoder, TwoOptimizers])
def test_what_a_trainer_lost_is_shown(module: type[Autoencoder], run: Run, preset: str, tmp_path: Path) -> None:
    for name, callbacks in (("plain", []), ("small", [QuantizationCallback(preset)])):
        torch.manual_seed(5)
        trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(module())
        trainer.save_checkpoint(tmp_path / name)
    one, two = (
        {".".join(map(str, path)): value for path, value in tensors(load(tmp_path / name))}
        for name in ("plain", "small")
    )
    text = run("inspect", tmp_path / "small").out
    found = described(run, tmp_path / "small")
    kinds = {each["path"]: each["kind"] for each in found["tensors"]}
    shown = iter(line for line in text.splitlines() if line.endswith(" dB"))
    encoded = payloads_of(tmp_path / "small")
    assert len(encoded) == (6 if module is Autoencoder else 5)
    for path in encoded:
        relative, sqnr, largest = numpy_errors(one[path], two[path])
        assert_close(found["summary"]["tensors"][path], (relative, sqnr, largest))
        line = next(shown)
        assert f" {path.rpartition('.')[2]}  64x64 float32" in line
        assert line.endswith(f"  {sqnr:.1f} dB")
    assert next(shown, None) is None
    header, *rows = (line.split() for line in text.splitlines() if line.startswith(("kind ", *KINDS)))
    assert header[-3:] == ["max_error", "relative_error", "sqnr_db"]
    expected = {"weights", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if module is TwoOptimizers else set())
    assert {row[0] for row in rows} == expected | {"other"}
    for kind, *_, largest, relative, sqnr in rows:
        if kind != "other":
            ours = [torch.cat([of[path].flatten() for path in encoded if kinds[path] == kind]) for of in (one, two)]
            errors = numpy_errors(*ours)
            assert_close(
                {"relative_error": float(relative), "sqnr_db": float(sqnr), "max_error": float(largest)}, errors, 0.005
            )
            for name, value in zip(("relative_error", "sqnr_db", "max_error"), errors, strict=True):
                assert found["summary"]["metrics"][f"{kind}/{name}"] == pytest.approx(value, rel=1e-6)
    first = [path for path in encoded if path.endswith(".exp_avg")]
    lost, of = 0.0, 0.0
    for path in first:
        d, e = (each[path].double() / (each[f"{path}_sq"].double().sqrt() + 1e-8) for each in (one, two))
        lost, of = lost + float((e - d).square().sum()), of + float(d.square().sum())
    off = math.sqrt(lost / of)
    assert f"  update      direction off by {off:.2%}" in text.splitlines()
    ratio = sum(value.nbytes for value in one.values()) / sum(each["bytes"] for each in found["tensors"])
    assert found["summary"]["metrics"]["compression_ratio"] == pytest.approx(ratio)
    weights = (
        "linear, block_size 256, bits 8, residual_bits 4" if preset == "resume" else "softsign, block_size 256, bits 8"
    )
    first, second = (6, 5) if preset == "resume" else (5, 4)
    for line in (f"state_dict.*: codec {weights}", f".exp_avg: codec softsign, block_size 128, bits {first}",
                 f".exp_avg_sq: codec log, block_size 128, bits {second}", *CODECS[preset].values(),
                 "*.running_mean: as it is", "min_numel 4096", "restored    0 times"):  # fmt: skip
        assert line in text


def test_a_tensor_that_lost_nothing_has_an_infinite_ratio(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(64, 64), "v": torch.randn(64, 64)}}, tmp_path / "plain")
    run("compress", tmp_path / "plain", tmp_path / "a", "--preset", "compact")
    (line,) = (line for line in run("inspect", tmp_path / "a").out.splitlines() if " w  64x64" in line)
    assert line.endswith("  inf dB")
    assert described(run, tmp_path / "a")["summary"]["tensors"]["state_dict.w"]["sqnr_db"] is None, "no JSON has it"


def test_only_some_of_many_exceptions_are_shown(run: Run, tmp_path: Path) -> None:
    state = {f"w{index}": torch.full((64, 64), torch.nan) for index in range(8)}
    torch.save({"state_dict": state | {"w": torch.randn(64, 64)}}, tmp_path / "plain.ckpt")
    run("compress", tmp_path / "plain.ckpt", tmp_path / "a.ckpt")
    lines = run("inspect", tmp_path / "a.ckpt").out.splitlines()
    at = lines.index("  exceptions  state_dict.w0 (it holds NaN or infinity); as it is")
    assert [line.split()[0] for line in lines[at + 1 : at + 5]] == [f"state_dict.w{index}" for index in range(1, 5)]
    assert lines[at + 5] == "              and 3 more; --json has them all"
    assert len(described(run, tmp_path / "a.ckpt")["summary"]["refused"]) == 8


def test_the_tree_shows_names_as_they_are_and_ends_where_it_is_told(run: Run, tmp_path: Path) -> None:
    state = {"blocks[0].weight": torch.ones(3), "[red]b.bias": torch.ones(5), "a": torch.ones(1), "a.b": torch.ones(2)}
    torch.save({"state_dict": state, "a": [torch.ones(7)]}, tmp_path / "odd[bold].ckpt")
    text = run("inspect", tmp_path / "odd[bold].ckpt").out
    for part in ("blocks[0]", "[red]b", "odd[bold].ckpt", "weight  3 float32  12 bytes", "a  1 float32  4 bytes"):
        assert part in text
    assert text.count("odd[bold].ckpt") == 2, "above, and at the root of the tree"
    short = run("inspect", tmp_path / "odd[bold].ckpt", "--depth", 1).out
    assert "state_dict  4 tensors, 44 bytes" in short
    assert "weight  3" not in short


def test_files_of_any_content_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    torch.save(torch.ones(3, 2), tmp_path / "tensor.pt")
    torch.save([1, {"x": torch.eye(3).to_sparse()}], tmp_path / "list.pt")
    torch.save({"a": torch.ones(4)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, path, size in (("tensor", "", 24), ("list", "1.x", 60), ("old", "a", 16)):
        (each,) = described(run, tmp_path / f"{name}.pt")["tensors"]
        assert (each["path"], each["bytes"]) == (path, size)
        assert run("inspect", tmp_path / f"{name}.pt").status == 0


# verify


def damaged(path: Path, target: Path, of: Tensor) -> Path:
    """Write a copy in which one bit of a tensor's bytes is another."""
    target.write_bytes(path.read_bytes())
    flip(target, place_of(target, of), bit=2)
    return target


def test_whole_files_are_whole(run: Run, plain: Path, by_callback: Path) -> None:
    done = run("verify", plain, by_callback)
    assert done.status == 0
    assert done.err == ""
    assert done.out.count("whole") == 2
    assert len(done.out.splitlines()) == 3


NAMES = {
    "state_dict.decoder.weight": "state_dict.decoder.weight",
    "optimizer_states.0.state.4.exp_avg_sq": "decoder.weight: exp_avg_sq",
}


@pytest.mark.parametrize("path", NAMES)
def test_a_damaged_payload_is_named(path: str, run: Run, by_callback: Path, tmp_path: Path) -> None:
    bad = damaged(by_callback, tmp_path / "bad.ckpt", payloads_of(by_callback)[path].data)
    done = run("verify", bad)
    assert done.status == 1
    assert done.err == f"q8lightning: error: {bad}: the tensor {NAMES[path]} is damaged\n"


def test_all_damaged_payloads_are_named(run: Run, by_callback: Path, tmp_path: Path) -> None:
    payloads = payloads_of(by_callback)
    bad = damaged(by_callback, tmp_path / "bad.ckpt", payloads["state_dict.decoder.weight"].data)
    bad = damaged(bad, bad, payloads["optimizer_states.0.state.0.exp_avg"].data)
    done = run("verify", bad)
    assert [line.partition(f"{bad}: ")[2] for line in done.err.splitlines()] == [
        "the tensor state_dict.decoder.weight is damaged",
        "the tensor encoder.0.weight: exp_avg is damaged",
    ]
    assert "2 damaged" in done.out


def test_a_damaged_raw_tensor_is_named(run: Run, plain: Path, by_callback: Path, tmp_path: Path) -> None:
    for index, path in enumerate((plain, by_callback)):
        bad = damaged(path, tmp_path / f"{index}.ckpt", load(path)["state_dict"]["counts"])
        done = run("verify", bad)
        assert done.status == 1
        assert f"{bad}: the tensor state_dict.counts is damaged" in done.err


def test_one_bad_file_does_not_hide_the_others(run: Run, plain: Path, by_callback: Path, tmp_path: Path) -> None:
    bad = tmp_path / "cut.ckpt"
    bad.write_bytes(plain.read_bytes()[:-3000])
    done = run("verify", bad, tmp_path / "missing", by_callback)
    assert done.status == 1
    assert len(done.err.splitlines()) == 2
    assert "whole" in done.out.splitlines()[-1]


def test_payloads_must_decode_to_finite_values(run: Run, tmp_path: Path) -> None:
    """Whatever wrote the file wrote right sums of it."""
    payload = payloads_of(GOLDEN / "compact_v1.ckpt")["state_dict.layer.weight"]
    data = payload.data.clone()
    data[:4] = torch.tensor([math.inf]).view(torch.uint8)
    whole = payload.replace_data(data)
    whole.checksum = None  # a new one is made
    torch.save({"state_dict": {"w": whole}}, tmp_path / "a.ckpt")
    done = run("verify", tmp_path / "a.ckpt")
    assert done.status == 1
    assert "the tensor state_dict.w (it decodes to values that are not finite) is damaged" in done.err


# compare


def numpy_errors(a: Tensor, b: Tensor) -> tuple[float, float | None, float]:
    """Return relative error, SQNR (None where it is infinite) and largest error, in float64."""
    one, two = (value.detach().double().numpy().ravel() for value in (a, b))
    lost, of = np.sum((two - one) ** 2), np.sum(one**2)
    if lost == 0:
        return 0.0, None, 0.0
    return float(np.sqrt(lost / of)), float(10 * np.log10(of / lost)), float(np.abs(two - one).max())


def compared(run: Run, *arguments: object) -> dict[str, Any]:
    done = run("compare", *arguments, "--json")
    assert done.status == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


def assert_close(found: dict[str, Any], expected: tuple[float, float | None, float], rel: float = 1e-6) -> None:
    for name, value in zip(("relative_error", "sqnr_db", "max_error"), expected, strict=True):
        assert found[name] == (value if value is None else pytest.approx(value, rel=rel)), name


@pytest.mark.parametrize("turned", [False, True], ids=["plain first", "quantized first"])
def test_differences_equal_numpys(turned: bool, run: Run, plain: Path, by_callback: Path) -> None:
    files = (by_callback, plain) if turned else (plain, by_callback)
    found = compared(run, *files)
    one, two = (dict(tensors(load(path))) for path in files)
    rows = {each["path"]: each for each in found["tensors"] if each["kind"] != "update_direction"}
    assert list(rows) == [".".join(map(str, path)) for path in one]
    for path, value in one.items():
        assert_close(rows[".".join(map(str, path))], numpy_errors(value, two[path]))
    assert found["only_first"] == found["only_second"] == found["different_shapes"] == []
    decoder = rows["state_dict.decoder.weight"]
    encoded = payloads_of(by_callback)["state_dict.decoder.weight"].codec
    assert decoder["second" if not turned else "first"].startswith(encoded.name)
    assert decoder["first" if not turned else "second"] == "float32"


def test_kinds_and_update_directions_equal_numpys(run: Run, plain: Path, by_callback: Path) -> None:
    found = compared(run, plain, by_callback)
    one, two = load(plain), load(by_callback)
    for kind, key in (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        flat = [
            torch.cat([state[key].flatten() for state in checkpoint["optimizer_states"][0]["state"].values()])
            for checkpoint in (one, two)
        ]
        assert_close(found["kinds"][kind], numpy_errors(*flat))

    def direction(checkpoint: dict[str, Any], index: int) -> Tensor:
        state = checkpoint["optimizer_states"][0]["state"][index]
        return state["exp_avg"].double() / (state["exp_avg_sq"].double().sqrt() + 1e-8)

    rows = [each for each in found["tensors"] if each["kind"] == "update_direction"]
    assert [row["path"] for row in rows] == [f"optimizer_states.0.state.{index}" for index in range(6)]
    for index, row in enumerate(rows):
        assert_close(row, numpy_errors(direction(one, index), direction(two, index)))
    whole = [torch.cat([direction(checkpoint, index).flatten() for index in range(6)]) for checkpoint in (one, two)]
    assert_close(found["kinds"]["update_direction"], numpy_errors(*whole))


def test_compare_tells_the_bytes_a_parameter(run: Run, plain: Path, by_callback: Path) -> None:
    content, payloads = load(plain), payloads_of(by_callback)
    floats = [each for each in content["state_dict"].values() if each.is_floating_point()]
    count = sum(each.numel() for each in floats)
    found = compared(run, plain, by_callback)["bytes_a_parameter"]
    assert found["first"]["parameters"] == found["second"]["parameters"] == count
    assert found["first"]["kinds"]["weights"] == pytest.approx(4.0)
    assert found["first"]["whole"] == pytest.approx(plain.stat().st_size / count)
    assert found["second"]["whole"] == pytest.approx(by_callback.stat().st_size / count)
    stored = sum(
        payloads[p].nbytes if (p := f"state_dict.{name}") in payloads else each.nbytes
        for name, each in content["state_dict"].items()
        if each.is_floating_point()
    )
    assert found["second"]["kinds"]["weights"] == pytest.approx(stored / count)
    lines = run("compare", plain, by_callback).out.splitlines()
    assert any(line.split()[:4] == ["weights", "4.00", "->", f"{stored / count:.2f}"] for line in lines)
    whole = [f"{path.stat().st_size / count:.2f}" for path in (plain, by_callback)]
    assert any(line.split() == ["whole", whole[0], "->", whole[1]] for line in lines)
    (direction,) = (line for line in lines if line.startswith("update_direction"))
    assert "->" not in direction


def test_bytes_of_tied_weights_count_once_and_without_weights_there_are_none(run: Run, tmp_path: Path) -> None:
    weight = torch.randn(50, 40)
    torch.save({"state_dict": {"a": weight, "b": weight, "n": torch.arange(9)}}, tmp_path / "tied")
    torch.save({"state_dict": {"a": weight, "n": torch.arange(9)}}, tmp_path / "one")
    torch.save({"a": weight}, tmp_path / "bare")
    found = compared(run, tmp_path / "tied", tmp_path / "one")["bytes_a_parameter"]
    assert found["first"]["parameters"] == found["second"]["parameters"] == 2000
    assert found["first"]["kinds"] == found["second"]["kinds"] == {"weights": 4.0, "other": 0.036}
    found = compared(run, tmp_path / "bare", tmp_path / "bare")["bytes_a_parameter"]
    assert found["first"] == {"parameters": 0, "kinds": {}, "whole": None}
    assert "whole" not in run("compare", tmp_path / "bare", tmp_path / "bare").out


def test_the_update_direction_has_the_optimizers_eps(run: Run, tmp_path: Path) -> None:
    m, v = torch.randn(50), torch.rand(50)
    for name, scale in (("a", 1.0), ("b", 1.5)):
        state = {"state": {"layer.weight": {"exp_avg": m, "exp_avg_sq": v * scale}}}
        group = {"params": ["layer.weight"], "eps": 0.5}
        torch.save({"optimizer_states": [state | {"param_groups": [group]}]}, tmp_path / name)
    found = compared(run, tmp_path / "a", tmp_path / "b")["kinds"]["update_direction"]
    first, second = (m.double() / ((v * scale).double().sqrt() + 0.5) for scale in (1.0, 1.5))
    assert_close(found, numpy_errors(first, second))


def test_what_only_one_has_and_what_has_another_shape_is_listed(run: Run, tmp_path: Path) -> None:
    same = torch.randn(4, 5)
    torch.save({"state_dict": {"same": same, "gone": same, "shape": same}}, tmp_path / "a")
    torch.save({"state_dict": {"same": same.double(), "shape": same.t(), "new": same}}, tmp_path / "b")
    found = compared(run, tmp_path / "a", tmp_path / "b")
    assert found["only_first"] == ["state_dict.gone"]
    assert found["only_second"] == ["state_dict.new"]
    assert found["different_shapes"] == [
        {"path": "state_dict.shape", "name": "state_dict.shape", "first": [4, 5], "second": [5, 4]}
    ]
    (row,) = found["tensors"]
    assert (row["path"], row["relative_error"], row["sqnr_db"]) == ("state_dict.same", 0.0, None)
    text = run("compare", tmp_path / "a", tmp_path / "b").out
    for part in ("only in the first file: state_dict.gone", "only in the second file: state_dict.new", "(4, 5)"):
        assert part in text


def test_odd_values_have_numbers_that_mean_something(run: Run, tmp_path: Path) -> None:
    inf, nan, zero = torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0]), torch.zeros(2)
    first = {"inf": inf, "nan": nan, "zero": zero, "from_zero": zero, "int": torch.tensor([5, 7]),
             "bool": torch.tensor([True, False]), "complex": torch.tensor([3 + 4j]),
             "empty": torch.ones(0)}  # fmt: skip
    second = dict(first, from_zero=torch.ones(2), int=torch.tensor([5, 8]), complex=torch.tensor([3 + 3j]))
    torch.save({"state_dict": first}, tmp_path / "a")
    torch.save({"state_dict": second}, tmp_path / "b")
    found = {row["path"].split(".")[1]: row for row in compared(run, tmp_path / "a", tmp_path / "b")["tensors"]}
    for name in ("inf", "zero", "bool", "empty"):
        assert (found[name]["relative_error"], found[name]["max_error"]) == (0.0, 0.0), name
    assert (found["nan"]["relative_error"], found["nan"]["max_error"]) == (None, None)
    assert (found["from_zero"]["relative_error"], found["from_zero"]["max_error"]) == (None, 1.0)
    assert found["int"]["max_error"] == 1.0
    assert found["complex"]["relative_error"] == pytest.approx(1 / 5)
    assert run("compare", tmp_path / "a", tmp_path / "b").status == 0


def test_the_table_shows_the_worst_first_if_it_is_to_be_short(run: Run, tmp_path: Path) -> None:
    weights = {f"w{index}": torch.ones(3) for index in range(5)}
    torch.save({"state_dict": weights}, tmp_path / "a")
    torch.save({"state_dict": {n: w * (1 + int(n[1]) / 100) for n, w in weights.items()}}, tmp_path / "b")
    text = run("compare", tmp_path / "a", tmp_path / "b", "--top", 2).out
    assert text.index("state_dict.w4") < text.index("state_dict.w3")
    assert "state_dict.w2" not in text
    assert "4.0e-02" in text
    assert "4 of 5 tensors differ" in text


def test_an_infinity_that_both_files_have_hides_no_difference(run: Run, tmp_path: Path) -> None:
    """As the best value of a ModelCheckpoint that monitors nothing."""
    states = [
        {"state_dict": {}, "callbacks": {"best": torch.tensor(torch.inf)}, "step": torch.tensor(at)}
        for at in (3.0, 4.0)
    ]
    for name, state in zip("ab", states, strict=True):
        torch.save(state, tmp_path / name)
    found = compared(run, tmp_path / "a", tmp_path / "b")
    assert_close(found["kinds"]["other"], numpy_errors(states[0]["step"], states[1]["step"]))


def test_large_tensors_are_compared_in_parts(run: Run, tmp_path: Path) -> None:
    a = torch.randn(700, 1000)
    b = a.clone()
    b[-1, -1] += 1
    torch.save({"state_dict": {"w": a}}, tmp_path / "a")
    torch.save({"state_dict": {"w": b.t().contiguous().t()}}, tmp_path / "b")
    (row,) = compared(run, tmp_path / "a", tmp_path / "b")["tensors"]
    assert_close(row, numpy_errors(a, b))


def test_a_plot_shows_every_tensor_that_differs(run: Run, plain: Path, by_callback: Path, tmp_path: Path) -> None:
    from q8lightning.cli.plot import draw_comparison

    picture, again = tmp_path / "plot.png", tmp_path / "again.png"
    assert run("compare", plain, by_callback, "--plot", picture).status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    figure = draw_comparison(tools.compare(plain, by_callback), f"{by_callback} against {plain}")
    figure.savefig(again, dpi=130)
    assert picture.read_bytes() == again.read_bytes(), "the file is this figure, which says what was drawn"
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["weights", "exp_avg", "exp_avg_sq", "update direction"]
    found = compared(run, plain, by_callback)["tensors"]
    for kind, axes in panels.items():
        errors = [row["relative_error"] for row in found if row["kind"] == kind.replace(" ", "_")]
        (line,) = axes.get_lines()
        assert list(line.get_xdata()) == [error for error in errors if error]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["encoder.0.weight", "decoder.weight"]
    for axes in panels.values():
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert len(boxes) >= 1
        assert all(one.x1 < two.x0 for one, two in pairwise(boxes)), "labels of ticks do not collide"


def test_a_plot_of_equal_files_says_so(run: Run, plain: Path, tmp_path: Path) -> None:
    assert run("compare", plain, plain, "--plot", tmp_path / "same.png").status == 0
    assert (tmp_path / "same.png").stat().st_size > 1000


def test_modules_of_the_user_are_no_checkpoint(run: Run, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3), tmp_path / "module.pt")
    done = run("inspect", tmp_path / "module.pt")
    assert done.status == 1
    assert "torch.nn.modules.linear.Linear" in done.err
