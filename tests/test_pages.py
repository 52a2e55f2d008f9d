"""The pages: what they tell to type runs, what they link to is there, and all that is public is in the reference."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support import pages

import q8lightning
from q8lightning import keep_encoded, metrics, tools
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.metrics import functional

ROOT = Path(__file__).parent.parent
MARKDOWN = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
HOME = "https://github.com/q8lightning/q8lightning/blob/main/"


@pytest.mark.parametrize("name", ["../README", "codecs", "index", "quickstart", "policies", "resuming"])
def test_the_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages.run(ROOT / "docs" / f"{name}.md")
    for path in tmp_path.glob("last.ckpt"):
        with keep_encoded():
            state = torch.load(path, weights_only=True)["state_dict"]
        assert type(state["encoder.0.weight"]).__name__ == "QuantizedTensor"


def test_the_table_of_presets_says_what_they_are() -> None:
    page = (ROOT / "docs" / "policies.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)`, (.*?) bits \| `(\w+)`, (\d) bits \| `(\w+)`, (\d) bits", page, re.MULTILINE
    )
    kinds = "state_dict.a", "optimizer_states.0.state.0.exp_avg", "optimizer_states.0.state.0.exp_avg_sq"
    for preset, *said in rows:
        codecs = [PRESETS[preset].codec_for(kind) for kind in kinds]
        assert [codec.name for codec in codecs] == said[::2]
        stages = [[codec.bits, codec.residual_bits] for codec in codecs]
        assert [" + ".join(str(bits) for bits in stage if bits) for stage in stages] == said[1::2]
    assert {preset for preset, *_ in rows} == set(PRESETS)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if link.startswith("https://") and not link.startswith(HOME):
            continue
        there = ROOT / target.removeprefix(HOME) if link.startswith(HOME) else page.parent / target if target else page
        if page.parent.name == "docs" and there.name in ("changelog.md", "security.md", "contributing.md"):
            there = ROOT / there.name.replace(there.stem, there.stem.upper())  # the site shows them among its pages
        assert there.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {link}"


def test_everything_public_is_in_the_reference() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^ *\.\. auto(?:class|function|exception)::\s+(?:[\w.]+\.)?(\w+)", text, re.MULTILINE))
    wholly = set(re.findall(r"automodule:: ([\w.]+)\n   :members:", text))
    whole = [import_module(name) for name in wholly]
    elsewhere = [getattr(module, name) for module in whole for name in getattr(module, "__all__", ())]
    for module in (q8lightning, tools, metrics, functional):
        own = {
            name for name in module.__all__ if not any(getattr(module, name) is each for each in (*elsewhere, *whole))
        }
        missing = own - named
        assert not missing, f"docs/reference has no place for {', '.join(sorted(missing))} of {module.__name__}"


def test_every_page_of_the_site_is_short_enough_to_read() -> None:
    """Records are tables to look something up, and two pages are read by programs from their beginning to their end."""
    long = {"format.md", "cli.md"}
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in long or len(page.read_text().split()) < 2200, f"{page.name} is long; split it"
