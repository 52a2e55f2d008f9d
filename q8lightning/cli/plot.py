"""Draw the differences of two checkpoints."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from q8lightning.tools import Comparison, Row
from q8lightning.tools.comparison import UPDATE_DIRECTION
from q8lightning.tools.tensors import KINDS

_LABELS = 60
"""How many names fit below each other. If there are more layers, only some are named."""

_LONGEST = 56
"""The most characters of a name. Of a longer one, the middle is left out."""


def plot_comparison(result: Comparison, path: Path, title: str) -> None:
    """Write the picture of a comparison to a file.

    Args:
        result: The comparison.
        path: The file; its ending decides its format.
        title: The title of the picture.

    Raises:
        ValueError: If matplotlib does not know the ending.
    """
    draw_comparison(result, title).savefig(path, dpi=130)


def draw_comparison(result: Comparison, title: str) -> Figure:
    """Draw the relative error of each tensor: a panel for each kind, a line for each layer, in the model's order.

    Tensors without a difference, or whose error is no number, are not drawn.
    """
    panels = {}
    for kind in (*KINDS, UPDATE_DIRECTION):
        rows = [(_layer(row), row.difference.relative_error) for row in result.rows if row.kind == kind]
        drawn = [(name, error) for name, error in rows if error > 0 and math.isfinite(error)]
        if drawn:
            panels[kind] = drawn
    names = list(dict.fromkeys(name for rows in panels.values() for name, _ in rows))
    places = {name: place for place, name in enumerate(names)}
    height = max(2.8, 1.3 + 0.19 * min(len(names), _LABELS))
    labels = shortened(names)
    longest = max(map(len, labels), default=0)
    width = max(4.5, 0.4 + 0.075 * longest + 2.6 * max(len(panels), 1))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_fitted(title, int(width / 0.09)), fontsize=10)
    all_axes = figure.subplots(1, max(len(panels), 1), sharex=True, sharey=True, squeeze=False)[0]
    for index, (axes, (kind, rows)) in enumerate(zip(all_axes, panels.items(), strict=False)):
        errors = [error for _, error in rows]
        axes.plot(errors, [places[name] for name, _ in rows], "o", markersize=4, color=f"C{index}")
        axes.set_title(kind.replace("_d", " d") if kind == UPDATE_DIRECTION else kind, fontsize=9)
        axes.set_xlabel("relative error", fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
    if panels:
        step = math.ceil(len(names) / _LABELS)
        all_axes[0].set_yticks(range(0, len(names), step), labels[::step], fontsize=8)
        all_axes[0].set_ylim(len(names) - 0.5, -0.5)
        _scale(all_axes[0], [error for rows in panels.values() for _, error in rows])
    else:
        all_axes[0].set_axis_off()
        all_axes[0].text(0.5, 0.5, "no tensor differs", ha="center", va="center")
    return figure


def _scale(axes: Axes, errors: Sequence[float]) -> None:
    """Give errors a logarithmic axis with at most four ticks, so that their labels have room."""
    low, high = min(errors) / 1.3, max(errors) * 1.3
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    within = [
        step * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for step in steps
        if low <= step * 10.0**power <= high
    ]
    every = math.ceil(len(within) / 4) or 1
    axes.set_xticks(within[::every], [f"{tick * 100:.6g}%" for tick in within[::every]])
    axes.minorticks_off()


def _layer(row: Row) -> str:
    """Return the name of a tensor in the panel of its kind, without the kind."""
    return row.name.removesuffix(f": {row.kind}").removesuffix(": update direction").removeprefix("state_dict.")


def shortened(names: Sequence[str]) -> list[str]:
    """Return names that are short enough for a picture, and as different as they were.

    What all begin with is left out if one is too long, and then the middle of those that still are.
    """
    if max(map(len, names), default=0) <= _LONGEST:
        return list(names)
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    rests = [".".join(part[common:]) for part in parts]
    tail = _LONGEST // 2
    short = [rest if len(rest) <= _LONGEST else f"{rest[: _LONGEST - tail - 3]}...{rest[-tail:]}" for rest in rests]
    return short if len(set(short)) == len(names) else list(names)


def _fitted(title: str, width: int) -> str:
    """Return a title whose lines have at most so many characters: a line for each file, the ends of long paths."""
    if len(title) <= width:
        return title
    lines = title.replace(" against ", " against\n", 1).split("\n")
    return "\n".join(line if len(line) <= width else f"...{line[-(width - 3) :]}" for line in lines)
