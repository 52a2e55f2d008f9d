"""The functions under the commands: what they return, that they print nothing, and that they need no extra."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.promises import load, payloads_of

from q8lightning import CheckpointPolicy, Rule, tools
from q8lightning.tools import Conversion, CorruptCheckpointError, ToolError, compare, compress, decompress

Run = Callable[..., Any]


@pytest.fixture
def small(plain: Path, tmp_path: Path) -> Path:
    compress(plain, tmp_path / "small.ckpt", "compact")
    return tmp_path / "small.ckpt"


def test_nothing_is_printed(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compress(plain, tmp_path / "a")
    decompress(tmp_path / "a", tmp_path / "b")
    tools.inspect(tmp_path / "a")
    tools.verify(tmp_path / "a")
    compare(plain, tmp_path / "a")
    assert capfd.readouterr() == ("", "")


def test_what_is_returned_does_not_change(plain: Path, small: Path) -> None:
    for found in (tools.inspect(small), tools.verify(small), compare(plain, small)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.path = Path("other")  # type: ignore[union-attr,misc]


def test_an_inspection_has_sizes_ratios_and_decibels(small: Path) -> None:
    found = tools.inspect(str(small))
    payloads = payloads_of(small)
    weights = [payload for path, payload in payloads.items() if path.startswith("state_dict")]
    assert found.path == small
    assert found.bytes == small.stat().st_size
    assert found.bytes + sum(each.decoded_bytes - each.bytes for each in found.tensors) == found.decoded_bytes
    assert found.ratio == found.decoded_bytes / found.bytes > 1.5
    raw = [each.bytes for each in found.tensors if each.kind == "weights" and each.codec is None]
    assert found.sizes["weights"].bytes == sum(each.nbytes for each in weights) + sum(raw)
    assert found.sizes["exp_avg"].ratio == found.sizes["exp_avg"].decoded_bytes / found.sizes["exp_avg"].bytes
    assert 40 < found.errors["weights"]["sqnr_db"] < 60
    assert 0 < (found.update_direction_error or 0) < 0.5  # what compact allows
    by_path = {each.path: each for each in found.tensors}
    said = load(small)["q8lightning"]["tensors"]
    assert {path: each.sqnr_db for path, each in by_path.items() if each.sqnr_db is not None} == {
        path: each["sqnr_db"] for path, each in said.items()
    }
    assert by_path["optimizer_states.0.state.4.exp_avg"].name == "decoder.weight: exp_avg"
    assert json.loads(json.dumps(found.as_primitives(), allow_nan=False)) == found.as_primitives()


def test_exceptions_say_what_was_done_instead(tmp_path: Path) -> None:
    weight = torch.randn(64, 128)
    weight[3, 17] = 300.0
    moments = {"exp_avg": torch.full((64, 64), math.nan), "exp_avg_sq": torch.ones(64, 64)}
    state = {"state": {0: {}, 1: moments}, "param_groups": [{"params": [0, 1]}]}
    content = {"state_dict": {"outlier": weight, "other": torch.randn(64, 64)}, "optimizer_states": [state]}
    torch.save(content, tmp_path / "plain")
    policy = CheckpointPolicy([Rule("state_dict.*", "linear", 4096), Rule("*.exp_avg", "softsign")])
    done = compress(tmp_path / "plain", tmp_path / "a", policy)
    first, second, third = tools.inspect(tmp_path / "a").exceptions
    assert (first.name, first.remedy) == ("state_dict.outlier", "residual")
    assert first.reason.endswith("dB under linear")
    assert dataclasses.astuple(second) == ("other: exp_avg", "it holds NaN or infinity", "raw")
    assert dataclasses.astuple(third) == ("other: exp_avg_sq", "no rule of the policy names it", "raw")
    assert any("other: exp_avg (it holds NaN or infinity)" in each for each in done.warnings)
    assert any("state_dict.outlier (" in each for each in done.warnings)


@pytest.mark.parametrize("policy", ["resume", "compact", CheckpointPolicy.of("compact"), {"rules": [{"pattern": "*"}]}])
def test_a_policy_is_given_by_its_name_itself_or_its_arguments(policy: Any, plain: Path, tmp_path: Path) -> None:
    if isinstance(policy, dict):
        policy["rules"] = [{"pattern": "state_dict.*", "codec": "softsign"}]
    done = compress(plain, tmp_path / "a", policy)
    assert done == Conversion(
        path=tmp_path / "a",
        bytes_before=plain.stat().st_size,
        bytes_after=(tmp_path / "a").stat().st_size,
        converted=len(payloads_of(tmp_path / "a")),
        kept=0,
        metrics=load(tmp_path / "a")["q8lightning"]["metrics"],
        warnings=(),
    )
    assert done.ratio == done.bytes_before / done.bytes_after > 1
    assert done.metrics["weights/sqnr_db"] == tools.inspect(tmp_path / "a").errors["weights"]["sqnr_db"]
    back = decompress(tmp_path / "a", tmp_path / "b")
    assert (back.converted, back.metrics) == (done.converted, {})
    assert back.ratio < 1


@pytest.mark.parametrize("policy", ["best", {"rules": []}, {"rules": 3}, {"rule": []}, {}])
def test_what_is_no_policy_is_a_value_error(policy: Any, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint must be a preset|rule|argument"):
        compress(plain, tmp_path / "a", policy)
    assert not (tmp_path / "a").exists()


def test_nothing_is_overwritten_unless_it_may_be(plain: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    for convert, source in ((compress, plain), (decompress, small)):
        with pytest.raises(ToolError, match="overwrite=True"):
            convert(source, tmp_path / "old")
        assert (tmp_path / "old").read_text() == "old"
        with pytest.raises(ToolError, match="is the file that is read"):
            convert(source, source, overwrite=True)
    assert compress(plain, tmp_path / "old", overwrite=True).path == tmp_path / "old"


def test_patterns_to_keep_are_kept_or_an_error(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"'nothing\.\*', to be kept as it is, matches no tensor"):
        compress(plain, tmp_path / "a", keep=["nothing.*"])
    compress(plain, tmp_path / "a", keep=["state_dict.*"])
    assert all(path.startswith("optimizer_states") for path in payloads_of(tmp_path / "a"))


def test_damage_is_returned_by_verify_and_raised_elsewhere(plain: Path, small: Path, tmp_path: Path) -> None:
    assert tools.verify(small).is_whole
    data = payloads_of(small)["optimizer_states.0.state.4.exp_avg"].data.numpy().tobytes()
    content = bytearray(small.read_bytes())
    content[content.find(data) + 9] ^= 1
    small.write_bytes(content)
    found = tools.verify(small)
    assert (found.is_whole, found.damage) == (False, ("the tensor decoder.weight: exp_avg",))
    assert (found.path, found.bytes, found.quantized) == (small, small.stat().st_size, len(payloads_of(small)))
    for call in (lambda: compare(plain, small), lambda: decompress(small, tmp_path / "out")):
        with pytest.raises(CorruptCheckpointError, match=r"the tensor decoder\.weight: exp_avg in .*small\.ckpt"):
            call()


def test_a_comparison_names_states_by_their_parameters(plain: Path, small: Path, run: Run) -> None:
    found = compare(plain, small)
    rows = {row.path: row for row in found.rows}
    assert rows["optimizer_states.0.state.4.exp_avg"].name == "decoder.weight: exp_avg"
    assert rows["optimizer_states.0.state.4"].name == "decoder.weight: update direction"
    assert rows["state_dict.decoder.weight"].name == "state_dict.decoder.weight"
    assert [row for row in found.rows if row.difference.error] == list(found.differing)
    assert found.by_kind()["weights"].sqnr_db == pytest.approx(
        -20 * math.log10(found.by_kind()["weights"].relative_error)
    )
    shown = run("compare", plain, small).out
    assert "decoder.weight: exp_avg_sq" in shown
    assert "optimizer_states" not in shown
    tree = run("inspect", small).out
    assert "4 decoder.weight" in tree


def test_names_of_either_file_count(tmp_path: Path) -> None:
    def save(name: str, **group: Any) -> Path:
        state = {0: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
        optimizer = {"state": state, "param_groups": [{"params": [0], **group}]}
        torch.save({"optimizer_states": [optimizer], name: torch.ones(2)}, tmp_path / name)
        return tmp_path / name

    without, with_names = save("a"), save("b", param_names=["layer"])
    for files in ((without, with_names), (with_names, without)):
        assert [row.name for row in compare(*files).rows] == [
            "layer: exp_avg",
            "layer: exp_avg_sq",
            "layer: update direction",
        ]


def test_names_that_a_summary_says_are_kept_and_known_to_rules(tmp_path: Path) -> None:
    """Two layers that are alike, of which nothing but the file says which is which."""
    weights = {name: torch.randn(64, 64) for name in ("a", "b")}
    state = {index: {"exp_avg": torch.randn(64, 64)} for index in range(2)}
    optimizer = {"state": state, "param_groups": [{"params": [0, 1]}]}
    said = {"format_version": 1, "parameters": [["b", "a"]]}
    torch.save({"state_dict": weights, "optimizer_states": [optimizer], "q8lightning": said}, tmp_path / "plain")
    policy = CheckpointPolicy([Rule("*.exp_avg", "softsign", parameter="b")])
    compress(tmp_path / "plain", tmp_path / "small", policy)
    assert list(payloads_of(tmp_path / "small")) == ["optimizer_states.0.state.0.exp_avg"]
    decompress(tmp_path / "small", tmp_path / "large")
    for name in ("plain", "small", "large"):
        names = [each.name for each in tools.inspect(tmp_path / name).tensors]
        assert names == ["state_dict.a", "state_dict.b", "b: exp_avg", "a: exp_avg"]


def test_the_tools_need_no_extra(plain: Path, tmp_path: Path) -> None:
    """Lightning itself imports rich where it is installed; the import contracts say that no tool does."""
    code = (
        "import sys\n"
        "sys.modules['jsonargparse'] = None\n"
        "from q8lightning.tools import compress, verify\n"
        "print(compress(*sys.argv[1:]).converted, verify(sys.argv[2]).is_whole)\n"
        "print([name for name in sys.modules if name.startswith('q8lightning.cli')])\n"
    )
    command = [sys.executable, "-c", code, str(plain), str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(len(payloads_of(tmp_path / "a"))), "True", "[]"]


def test_everything_that_is_public_is_documented() -> None:
    for name in tools.__all__:
        thing = getattr(tools, name)
        assert thing.__doc__, name
        if dataclasses.is_dataclass(thing):
            told = thing.__doc__
            assert all(f"{field.name}: " in told for field in dataclasses.fields(thing)), name
