"""Let what torchmetrics has drawn be read: ticks that do not collide, a legend beside the title, words beside points.

torchmetrics gives every step a tick, puts the legend where a title belongs, and writes "Optimal value" over the axis.
"""

import math
from typing import Any

_OPTIMAL = "optimal value"

_MANY = 20
"""So many points in a line get smaller markers, or they would hide each other."""


def make_readable(axes: Any) -> None:
    """Change the axes of a metric that has been drawn into them, once or several times.

    Args:
        axes: Those of matplotlib. Values, colors and labels stay.
    """
    from matplotlib.ticker import MaxNLocator

    if axes.get_xaxis().get_visible():
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    for line in axes.get_lines():
        if len(line.get_xdata()) > _MANY:
            line.set_markersize(3)
    _leave_room(axes)
    _place_words(axes)
    if axes.get_legend() is not None:
        axes.legend(loc="best", fontsize="small")


def _leave_room(axes: Any) -> None:
    """Let no marker lie on the edge: torchmetrics adds a tenth of the values' range, or of their distance from 0."""
    drawn = [float(y) for line in axes.get_lines() for y in line.get_ydata() if math.isfinite(y)]
    bottom, top = axes.get_ylim()
    if drawn and max(drawn) > bottom:
        axes.set_ylim(top=max(top, bottom + (max(drawn) - bottom) * 1.1))


def _place_words(axes: Any) -> None:
    """Write where the optimal value is below its line, where no value can be, once for all calls."""
    words = [
        text for text in axes.texts if text.get_text().split() == ["Optimal", "value"] or text.get_gid() == _OPTIMAL
    ]
    if not words:
        return
    at = float(words[0].get_position()[1])
    for text in words:
        text.remove()
    _, top = axes.get_ylim()
    axes.set_ylim(bottom=at - 0.14 * (top - at))
    axes.annotate(
        _OPTIMAL, xy=(0.01, at), xycoords=("axes fraction", "data"), xytext=(0, -7), textcoords="offset points",
        ha="left", va="top", fontsize="x-small", gid=_OPTIMAL,
    )  # fmt: skip
