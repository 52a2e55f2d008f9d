"""Draw the differences of two checkpoints."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from q8lightning.tools import Comparison, Row
from q8lightning.tools.compare import UPDATE_DIRECTION
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
    longest = max((len(rows) for rows in panels.values()), default=1)
    height = max(2.8, 1.2 + 0.17 * min(longest, _LABELS))
    figure = Figure(figsize=(3.8 * max(len(panels), 1), height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    all_axes = figure.subplots(1, max(len(panels), 1), sharex=True, squeeze=False)[0]
    for index, (axes, (kind, rows)) in enumerate(zip(all_axes, panels.items(), strict=False)):
        names, errors = zip(*rows, strict=True)
        axes.plot(errors, range(len(rows)), "o", markersize=4, color=f"C{index}")
        step = math.ceil(len(rows) / _LABELS)
        axes.set_yticks(range(0, len(rows), step), names[::step], fontsize=7)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.set_title(kind.replace("_d", " d") if kind == UPDATE_DIRECTION else kind, fontsize=9)
        axes.set_xlabel("relative error", fontsize=8)
        axes.tick_params(axis="x", which="both", labelsize=7)
    if not panels:
        all_axes[0].set_axis_off()
        all_axes[0].text(0.5, 0.5, "no tensor differs", ha="center", va="center")
    return figure


def _layer(row: Row) -> str:
    """Return the name of a tensor in the panel of its kind, without the kind."""
    name = row.name.removesuffix(f": {row.kind}").removesuffix(": update direction").removeprefix("state_dict.")
    return name if len(name) <= 48 else f"...{name[-45:]}"
