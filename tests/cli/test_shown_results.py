"""Results show in Python what the commands print, and are short where they stand in a list."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from q8lightning import compare, compress, inspect

Run = Callable[..., Any]


@pytest.fixture
def small(plain: Path, tmp_path: Path) -> Path:
    compress(plain, tmp_path / "small.ckpt")
    return tmp_path / "small.ckpt"


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def test_an_inspection_prints_what_the_command_prints(plain: Path, small: Path, run: Run) -> None:
    for path in (plain, small):
        assert lines_of(str(inspect(path))) == lines_of(run("inspect", path).out)


def test_a_comparison_prints_what_the_command_prints(plain: Path, small: Path, tmp_path: Path, run: Run) -> None:
    checkpoint = torch.load(plain)
    checkpoint["state_dict"] |= {"new": torch.ones(3), "decoder.bias": torch.ones(5)}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    for files in ((plain, small), (plain, plain), (plain, tmp_path / "other.ckpt")):
        assert lines_of(str(compare(*files))) == lines_of(run("compare", *files).out)
    assert "different shapes: state_dict.decoder.bias" in str(compare(plain, tmp_path / "other.ckpt"))


def test_names_are_shown_as_they_are(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "odd[bold].ckpt"
    torch.save({"state_dict": {"[red]<b>.weight": torch.ones(3), "a": torch.ones(1)}}, path)
    assert "[red]<b>" in str(inspect(path))
    assert lines_of(str(inspect(path))) == lines_of(run("inspect", path).out)
    assert "[red]&lt;b&gt;" in inspect(path)._repr_html_()


def test_a_result_is_short_in_a_list(plain: Path, small: Path) -> None:
    found = inspect(small)
    size = f"{small.stat().st_size:,} bytes, {found.ratio:.2f}x smaller, {len(found.tensors)} tensors"
    assert repr(found) == f"Inspection('small.ckpt', {size})"
    result = compare(plain, small)
    rows = [row for row in result.rows if row.kind != "update_direction"]
    differing = sum(row.difference.error != 0 for row in rows)
    assert 0 < differing < len(rows)
    assert repr(result) == f"Comparison({len(rows)} tensors, {differing} of them differ)"


@pytest.mark.parametrize("what", ["inspection", "comparison"])
def test_a_notebook_shows_every_cell(what: str, plain: Path, small: Path) -> None:
    found: Any = inspect(small) if what == "inspection" else compare(plain, small)
    page = found._repr_html_()
    words = html.unescape(re.sub("<[^>]*>", " ", page)).split()
    assert words.count("tensors") > 0
    missing = set(str(found).split()) - set(words)
    assert not missing
    for tag in ("table", "tr", "td", "th", "pre", "details"):
        assert page.count(f"<{tag}>") == page.count(f"</{tag}>")
