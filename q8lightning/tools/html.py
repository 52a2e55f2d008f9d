"""Draw a checkpoint on one page for the browser: a treemap of its bytes, coloured by what was lost, and a table."""

import html
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from q8lightning.checkpoint.file.write import write_durably
from q8lightning.tools.inspect import Inspection, TensorEntry
from q8lightning.tools.treemap import Box, lay_out

WIDTH, HEIGHT = 1100.0, 560.0
"""The size of the treemap in its own units."""

_HEADER = 16.0
"""The height of a module's title."""

_DEPTH = 4
"""Levels of modules that have a frame of their own; tensors below stand in the last one."""

_LETTER = 6.6
"""The width of a letter of a title, about."""


@dataclass
class Module:
    """A module, or another part of a checkpoint, with everything in it.

    Attributes:
        name: The last part of its path.
        path: Its path.
        parts: The modules in it, by name.
        entries: The tensors that are directly in it.
    """

    name: str
    path: str
    parts: dict[str, "Module"] = field(default_factory=dict)
    entries: list[TensorEntry] = field(default_factory=list)

    def all_entries(self) -> Iterator[TensorEntry]:
        """Yield the tensors in it and in its parts."""
        yield from self.entries
        for part in self.parts.values():
            yield from part.all_entries()

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return sum(entry.bytes for entry in self.all_entries())

    @property
    def decoded_bytes(self) -> int:
        """Bytes in memory."""
        return sum(entry.decoded_bytes for entry in self.all_entries())

    @property
    def worst(self) -> TensorEntry | None:
        """The tensor with the smallest signal-to-noise ratio; None if nothing was measured."""
        measured = [each for each in self.all_entries() if each.sqnr_db is not None]
        return min(measured, key=lambda each: each.sqnr_db or math.inf, default=None)


def write_html(found: Inspection, path: str | os.PathLike[str]) -> None:
    """Write the page of a checkpoint: one file that needs nothing else, also without a network.

    Args:
        found: What ``q8lightning.inspect`` returned.
        path: The page; what is there is replaced.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import q8lightning
        >>> write_html(q8lightning.inspect("last.ckpt"), "report.html")  # doctest: +SKIP
    """
    page = page_of(found).encode()

    def write(file: IO[bytes]) -> None:
        file.write(page)

    write_durably(path, write)


def page_of(found: Inspection) -> str:
    """Return the page of a checkpoint."""
    root = _modules(found)
    title = html.escape(found.path.name)
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _facts(found))
    return _PAGE.format(
        title=title,
        facts=facts,
        legend=_legend(),
        treemap=_treemap(root),
        kinds=_kinds(found),
        modules=_table(root),
        style=_STYLE,
        script=_SCRIPT,
    )


def _modules(found: Inspection) -> Module:
    """Sort tensors into modules: an optimizer's state stands with the parameter that it belongs to."""
    root = Module("", "")
    for entry in found.tensors:
        *around, _ = _place(entry)
        here = root
        for depth, name in enumerate(around):
            here = here.parts.setdefault(name, Module(name, ".".join(around[: depth + 1])))
        here.entries.append(entry)
    return root


def _place(entry: TensorEntry) -> list[str]:
    name, _, state = entry.name.rpartition(": ")
    if name and entry.name != entry.path:  # an optimizer's state whose parameter is known
        return ["optimizer", *name.split("."), state]
    return entry.path.split(".")


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "size", f"{found.bytes:,} bytes, {found.ratio:.2f} times smaller than {found.decoded_bytes:,}"
    yield "tensors", f"{len(found.tensors):,}, {sum(each.codec is not None for each in found.tensors):,} quantized"
    for key, name in (("epoch", "epoch"), ("global_step", "step"), ("pytorch-lightning_version", "lightning")):
        if key in found.training:
            yield name, html.escape(str(found.training[key]))
    if found.update_direction_error is not None:
        yield "update direction", f"off by {found.update_direction_error:.2%}"
    for each in found.exceptions[:20]:
        yield "exception", html.escape(f"{each.name} ({each.reason})")


def _treemap(root: Module) -> str:
    whole = Box(0.0, 0.0, WIDTH, HEIGHT)
    shapes = "".join(_draw(root, whole, 0))
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="bytes of each tensor in the file">'
        f"{shapes}</svg>"
    )


def _draw(module: Module, box: Box, depth: int) -> Iterator[str]:
    """Yield the shapes of a module: its frame and title, its parts, and its tensors."""
    inner = box
    if depth and box.width > 3 * _LETTER and box.height > 1.5 * _HEADER:
        inner = Box(box.x + 1, box.y + _HEADER, box.width - 2, box.height - _HEADER - 1)
        title = _short(module.name, box.width - 6)
        yield (
            f'<g class="module"><title>{_told(module)}</title>'
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"/>'
            f'<text x="{box.x + 3:.1f}" y="{box.y + 12:.1f}">{title}</text></g>'
        )
    parts: list[Module | TensorEntry] = (
        [*module.parts.values(), *module.entries] if depth < _DEPTH else [*module.all_entries()]
    )
    shown = sorted((each for each in parts if each.bytes), key=lambda each: -each.bytes)
    for each, place in zip(shown, lay_out([each.bytes for each in shown], inner), strict=True):
        if isinstance(each, Module):
            yield from _draw(each, place, depth + 1)
        else:
            yield _tensor(each, place)


def _tensor(entry: TensorEntry, box: Box) -> str:
    last = _place(entry)[-1]
    label = ""
    if box.width > 2.5 * _LETTER and box.height > 13:
        label = f'<text x="{box.x + 3:.1f}" y="{box.y + 11:.1f}">{_short(last, box.width - 6)}</text>'
    return (
        f'<g class="tensor"><title>{_told_of(entry)}</title>'
        f'<rect class="{_class(entry)}" x="{box.x:.1f}" y="{box.y:.1f}" width="{max(box.width, 0.1):.1f}"'
        f' height="{max(box.height, 0.1):.1f}"/>{label}</g>'
    )


_STEPS = (
    (90, "e0", "90 dB and more"),
    (60, "e1", "60 to 90"),
    (40, "e2", "40 to 60"),
    (25, "e3", "25 to 40"),
    (10, "e4", "10 to 25"),
)
"""Classes of errors by the least ratio in dB, with their text in the legend."""


def _class(entry: TensorEntry) -> str:
    """Return the class that gives a tensor its colour."""
    if entry.codec is None:
        return "raw"
    if entry.sqnr_db is None:
        return "unknown"
    return next((name for least, name, _ in _STEPS if entry.sqnr_db >= least), "e5")


def _legend() -> str:
    entries = [
        ("raw", "as it is"),
        *((name, text) for _, name, text in _STEPS),
        ("e5", "below 10"),
        ("unknown", "not measured"),
    ]
    return "".join(f'<span><i class="{name}"></i>{text}</span>' for name, text in entries)


def _kinds(found: Inspection) -> str:
    rows = []
    for kind, size in found.sizes.items():
        lost = found.errors.get(kind, {}).get("sqnr_db")
        cells = (
            f"{size.tensors:,}",
            f"{size.bytes:,}",
            f"{size.decoded_bytes:,}",
            f"{size.ratio:.2f}x",
            _decibels(lost),
        )
        rows.append(f"<tr><td>{kind}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def _table(root: Module) -> str:
    """Return the rows of modules, down to those that have a frame."""
    return "".join(_rows(root, 0))


def _rows(module: Module, depth: int) -> Iterator[str]:
    for part in module.parts.values():
        worst = part.worst
        lost = ("", "") if worst is None else (_decibels(worst.sqnr_db), html.escape(worst.name))
        ratio = f"{part.decoded_bytes / part.bytes:.2f}x" if part.bytes else ""
        count = sum(1 for _ in part.all_entries())
        cells = (f"{count:,}", f"{part.bytes:,}", f"{part.decoded_bytes:,}", ratio, *lost)
        yield (
            f'<tr><td style="padding-left:{0.5 + 1.2 * depth:.1f}em">{html.escape(part.name)}</td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
        if depth + 1 < _DEPTH:
            yield from _rows(part, depth + 1)


def _told(module: Module) -> str:
    worst = module.worst
    lost = "" if worst is None else f"\nworst: {worst.name}, {_decibels(worst.sqnr_db)} dB"
    return html.escape(f"{module.path}\n{module.bytes:,} bytes of {module.decoded_bytes:,}{lost}")


def _told_of(entry: TensorEntry) -> str:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    lost = "" if entry.sqnr_db is None else f"\n{_decibels(entry.sqnr_db)} dB"
    stored = f"{entry.bytes:,} bytes of {entry.decoded_bytes:,}"
    return html.escape(f"{entry.name}\n{shape} {entry.dtype}, {entry.codec or 'as it is'}\n{stored}{lost}")


def _short(text: str, width: float) -> str:
    """Return a text that fits a width, escaped."""
    room = int(width / _LETTER)
    return html.escape(text if len(text) <= room else f"{text[: max(room - 1, 0)]}\N{HORIZONTAL ELLIPSIS}")


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if math.isfinite(value) else "nothing lost" if value > 0 else "-inf"


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --line: #8b949e; --frame: #eceff2 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --line: #6e7781; --frame: #22272d } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto;
  max-width: 1140px; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { opacity: .7 } dd { margin: 0 }
svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; pointer-events: none }
.module rect { fill: var(--frame); stroke: var(--line); stroke-width: .7 } .module text { fill: var(--ink) }
.tensor rect { stroke: var(--paper); stroke-width: .8 } .tensor text { fill: #10151b }
.tensor:hover rect { stroke: var(--ink); stroke-width: 2 }
.raw { fill: #c4cbd3; background: #c4cbd3 } .unknown { fill: #d9c8e8; background: #d9c8e8 }
.e0 { fill: #7ccba2; background: #7ccba2 } .e1 { fill: #b7e0a0; background: #b7e0a0 }
.e2 { fill: #e9ee9a; background: #e9ee9a } .e3 { fill: #fbdc8e; background: #fbdc8e }
.e4 { fill: #f7b980; background: #f7b980 } .e5 { fill: #ee7b6c; background: #ee7b6c }
.legend span { display: inline-block; margin-right: 1rem }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; vertical-align: -.1em }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid var(--frame); white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.modules td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 12em }
.modules td:last-child, .modules th:last-child { text-align: left }
#what { min-height: 3.2em; white-space: pre-line }
"""

_SCRIPT = """
const what = document.getElementById("what"), hint = what.textContent;
document.querySelectorAll("svg g").forEach(g => {
  g.addEventListener("mouseenter", () => what.textContent = g.querySelector("title").textContent);
  g.addEventListener("mouseleave", () => what.textContent = hint);
});
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - q8lightning</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<dl>{facts}</dl>
<h2>Bytes in the file</h2>
<p>Each box is a tensor, as large as its bytes in the file. Its colour says what the save lost, as a signal-to-noise
ratio in dB: 20 dB is an error of 10%, 40 dB of 1%, 60 dB of 0.1%. Moments may lose far more than weights: what counts
of them is the direction of the update, above.</p>
<p class="legend">{legend}</p>
{treemap}
<p id="what">Point at a box to read what it is.</p>
<h2>By kind</h2>
<div class="scroll"><table>
<tr><th>kind</th><th>tensors</th><th>bytes</th><th>in memory</th><th>smaller</th><th>SQNR dB</th></tr>
{kinds}
</table></div>
<h2>By module</h2>
<div class="scroll"><table class="modules">
<tr><th>module</th><th>tensors</th><th>bytes</th><th>in memory</th><th>smaller</th><th>worst dB</th>
<th>worst tensor</th></tr>
{modules}
</table></div>
<script>{script}</script>
</body>
</html>
"""
