"""Draw modules and tensors as boxes in boxes, as large as their bytes, coloured by what was lost."""

import html
import math
from collections.abc import Iterator

from q8lightning.tools.entries import TensorEntry
from q8lightning.tools.html.modules import DEPTH, Module, place_of
from q8lightning.tools.html.treemap import Box, lay_out

WIDTH, HEIGHT = 1100.0, 560.0
"""The size of the picture in its own units."""

_HEADER = 16.0
"""The height of a module's title."""

_LETTER = 6.6
"""The width of a letter of a title, about."""

_STEPS = (
    (90, "e0", "90 dB and more"),
    (60, "e1", "60 to 90"),
    (40, "e2", "40 to 60"),
    (25, "e3", "25 to 40"),
    (10, "e4", "10 to 25"),
)
"""Classes of errors by the least ratio in dB, with their text in the legend."""


def draw(root: Module) -> str:
    """Return the picture of a checkpoint as SVG."""
    whole = Box(0.0, 0.0, WIDTH, HEIGHT)
    shapes = "".join(_shapes(root, whole, 0))
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="bytes of each tensor in the file">'
        f"{shapes}</svg>"
    )


def _shapes(module: Module, box: Box, depth: int) -> Iterator[str]:
    """Yield the shapes of a module: its frame and title, its parts, and its tensors."""
    inner = box
    if depth and box.width > 3 * _LETTER and box.height > 1.5 * _HEADER:
        inner = Box(box.x + 1, box.y + _HEADER, box.width - 2, box.height - _HEADER - 1)
        title = _short(module.name, box.width - 6)
        yield (
            f'<g class="module"><title>{_text_of_module(module)}</title>'
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"/>'
            f'<text x="{box.x + 3:.1f}" y="{box.y + 12:.1f}">{title}</text></g>'
        )
    parts: list[Module | TensorEntry] = (
        [*module.parts.values(), *module.entries] if depth < DEPTH else [*module.all_entries()]
    )
    shown = sorted((each for each in parts if each.bytes), key=lambda each: -each.bytes)
    for each, place in zip(shown, lay_out([each.bytes for each in shown], inner), strict=True):
        if isinstance(each, Module):
            yield from _shapes(each, place, depth + 1)
        else:
            yield _tensor(each, place)


def _tensor(entry: TensorEntry, box: Box) -> str:
    last = place_of(entry)[-1]
    label = ""
    if box.width > 2.5 * _LETTER and box.height > 13:
        label = f'<text x="{box.x + 3:.1f}" y="{box.y + 11:.1f}">{_short(last, box.width - 6)}</text>'
    return (
        f'<g class="tensor"><title>{_text_of(entry)}</title>'
        f'<rect class="{_class(entry)}" x="{box.x:.1f}" y="{box.y:.1f}" width="{max(box.width, 0.1):.1f}"'
        f' height="{max(box.height, 0.1):.1f}"/>{label}</g>'
    )


def _class(entry: TensorEntry) -> str:
    """Return the class that gives a tensor its colour."""
    if entry.codec is None:
        return "raw"
    if entry.sqnr_db is None:
        return "unknown"
    return next((name for least, name, _ in _STEPS if entry.sqnr_db >= least), "e5")


def legend() -> str:
    """Return what the colours mean."""
    entries = [
        ("raw", "as it is"),
        *((name, text) for _, name, text in _STEPS),
        ("e5", "below 10"),
        ("unknown", "not measured"),
    ]
    return "".join(f'<span><i class="{name}"></i>{text}</span>' for name, text in entries)


def _text_of_module(module: Module) -> str:
    worst = module.worst
    lost = "" if worst is None else f"\nworst: {worst.name}, {decibels(worst.sqnr_db)} dB"
    return html.escape(f"{module.path}\n{module.bytes:,} bytes of {module.decoded_bytes:,}{lost}")


def _text_of(entry: TensorEntry) -> str:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    lost = "" if entry.sqnr_db is None else f"\n{decibels(entry.sqnr_db)} dB"
    stored = f"{entry.bytes:,} bytes of {entry.decoded_bytes:,}"
    return html.escape(f"{entry.name}\n{shape} {entry.dtype}, {entry.codec or 'as it is'}\n{stored}{lost}")


def _short(text: str, width: float) -> str:
    """Return a text that fits a width, escaped."""
    room = int(width / _LETTER)
    return html.escape(text if len(text) <= room else f"{text[: max(room - 1, 0)]}\N{HORIZONTAL ELLIPSIS}")


def decibels(value: float | None) -> str:
    """Return a signal-to-noise ratio as text; empty if nothing was measured."""
    if value is None:
        return ""
    return f"{value:.1f}" if math.isfinite(value) else "nothing lost" if value > 0 else "-inf"
