"""``q8lightning export`` writes what ``export_quantized`` does, and says in one line what it cannot do."""

from pathlib import Path

import pytest
import torch
from support.exported import saved

from q8lightning import WeightRule, export_quantized
from q8lightning.cli.main import main


def run(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_it_writes_the_file_of_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, WeightRule("*", "int4", 64), checkpoint=None)
    out, expected = tmp_path / "out.pt", tmp_path / "expected.pt"
    options = ("--prefix", "net.", "--rename", "^up=layers.up", "--rename", "^down=layers.down")
    more = ("--transpose", "*.down.weight", "--dtype", "bfloat16", "--as_floats", "*.up.*", "--format", "codes")
    assert run(source.path, out, *options, *more) == 0
    assert capsys.readouterr().out.startswith(f"{out}: codes, {out.stat().st_size:,} bytes; ")
    export_quantized(
        source.path, expected, "codes", prefix="net.", rename={"^up": "layers.up", "^down": "layers.down"},
        transpose="*.down.weight", dtype=torch.bfloat16, as_floats="*.up.*",
    )  # fmt: skip
    found, other = (torch.load(each)["state_dict"] for each in (out, expected))
    assert list(found) == list(other)
    assert torch.equal(found["layers.up.weight"], source.weights["up.weight"])
    assert found["norm.weight"].dtype == torch.bfloat16
    assert isinstance(found["layers.down.weight"], dict)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--format", "gguf", "--prefix", "n."), 1, "no tensor's name begins with prefix='n.'"),
        (("--rename", "up"), 2, "--rename is OLD=NEW, got 'up'"),
        (("--config", "nowhere.json"), 1, "config='nowhere.json' cannot be read as JSON"),
        (("--force",), 0, ""),
        ((), 1, "exists; pass --force to overwrite it"),
    ],
)
def test_errors_are_one_line(
    options: tuple[str, ...], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path, WeightRule("*", "int4", 64), checkpoint=None)
    out = tmp_path / "out"
    if "exists" in message or not message:
        out.write_bytes(b"old")
    if "gguf" in options:
        pytest.importorskip("gguf")
    assert run(source.path, out, *options) == status
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == (status > 0)
    assert not out.exists() or out.read_bytes() == b"old" or status == 0


def test_a_library_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path, WeightRule("*", "int4", 64), checkpoint=None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert run(source.path, tmp_path / "out", "--format", "safetensors") == 1
    assert 'needs safetensors.torch; pip install "q8lightning[safetensors]"' in capsys.readouterr().err
