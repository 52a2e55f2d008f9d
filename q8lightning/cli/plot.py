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
    longest = max(map(len, names), default=0)
    figure = Figure(figsize=(0.4 + 0.075 * longest + 2.6 * max(len(panels), 1), height), layout="constrained")
    figure.suptitle(title, fontsize=10)
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
        all_axes[0].set_yticks(range(0, len(names), step), names[::step], fontsize=8)
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
    name = row.name.removesuffix(f": {row.kind}").removesuffix(": update direction").removeprefix("state_dict.")
    return name if len(name) <= 48 else f"...{name[-45:]}"
