"""The page of ``inspect --html`` shows every tensor in proportion, is well-formed, and needs nothing else."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import q8lightning
from q8lightning.tools.html.treemap import Box, lay_out

Run = Callable[..., Any]


class Page(HTMLParser):
    """Reads a page: its tags with their attributes and texts. Every tag must be closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_has_a_box_for_every_tensor_with_its_error(run: Run, packed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("inspect", packed, "--html", page).out == f"{page}: open it in a browser\n"
    found, text = q8lightning.inspect(packed), page.read_text()
    read = Page(text)
    boxes = [each for tag, each in read.tags if tag == "rect" and "class" in each]
    shown = [each for each in found.tensors if each.bytes]
    assert len(boxes) == len(shown)
    assert {box["class"] for box in boxes} > {"raw"}, "what was measured has a colour"
    told = read.texts["title"]
    for each in shown:
        assert any(line.startswith(f"{each.name}\n") and f"{each.bytes:,} bytes" in line for line in told), each
    assert not re.search(r"https?:|src=|<link|@import|url\(", text), "it needs nothing else"
    assert f"{found.ratio:.2f} times smaller" in text
    done = run("inspect", packed, "--html", page)
    assert done.status == 1
    assert "exists; pass --force" in done.err
    assert run("inspect", packed, "--html", page, "--force").status == 0


def test_names_of_the_users_own_are_no_markup(run: Run, tmp_path: Path) -> None:
    q8lightning.save({"<b>&'\".weight": torch.randn(64, 128), "</svg>.weight": torch.randn(8)}, tmp_path / "<i>.ckpt")
    assert run("inspect", tmp_path / "<i>.ckpt", "--html", tmp_path / "page.html").status == 0
    read = Page((tmp_path / "page.html").read_text())
    assert "b" not in {tag for tag, _ in read.tags}
    assert any(line.startswith("<b>&'\".weight\n") for line in read.texts["title"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_boxes_fill_the_whole_in_proportion_and_do_not_overlap(sizes: list[int]) -> None:
    sizes.sort(reverse=True)
    boxes = lay_out(sizes, Box(10, 20, 300, 200))
    for size, box in zip(sizes, boxes, strict=True):
        assert box.width * box.height == pytest.approx(size / sum(sizes) * 60000, rel=1e-6)
        assert box.x >= 10 - 1e-6
        assert box.y >= 20 - 1e-6
        assert box.x + box.width <= 310 + 1e-6
        assert box.y + box.height <= 220 + 1e-6
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            wide = min(one.x + one.width, two.x + two.width) - max(one.x, two.x)
            high = min(one.y + one.height, two.y + two.height) - max(one.y, two.y)
            assert wide <= 1e-6 or high <= 1e-6
