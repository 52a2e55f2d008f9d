"""Metrics draw what can be read: ticks, legends and words cover neither one another nor what is drawn."""

import math
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from q8lightning.metrics import CodebookUsage, CompressionRatio, ReconstructionSQNR, UpdateDirectionError

plt = pytest.importorskip("matplotlib.pyplot")


def wave(count: int, base: float = 40.0) -> list[Tensor]:
    return [torch.tensor(base * (1 + math.sin(step / 5) / 8), dtype=torch.float64) for step in range(count)]


def usage(count: int) -> list[dict[str, Tensor]]:
    return [{"share_in_use": value, "entropy_bits": 8 * value} for value in wave(count, 0.7)]


CASES: dict[str, tuple[Any, Any]] = {
    "many steps": (ReconstructionSQNR(), wave(300)),
    "many small errors": (UpdateDirectionError(), wave(75, 1e-4)),
    "errors from zero on": (UpdateDirectionError(), [torch.tensor(0.0), *wave(9, 1e-2)]),
    "two lines": (CodebookUsage(), usage(60)),
    "two values": (CodebookUsage(), usage(1)[0]),
    "one value": (UpdateDirectionError(), torch.tensor(1e-3)),
    "nothing lost": (UpdateDirectionError(), torch.tensor(0.0)),
    "one step": (CompressionRatio(), wave(1, 4.0)),
    "values that are infinite": (ReconstructionSQNR(), [torch.tensor(math.inf), *wave(5)]),
}


@pytest.mark.parametrize("size", [(6.4, 4.8), (3.4, 2.6)], ids=["a figure", "a small one"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_into_a_plot_can_be_read(case: str, size: tuple[float, float]) -> None:
    plt.switch_backend("Agg")
    metric, values = CASES[case]
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    assert metric.plot(values, ax=axes) == (None, axes)
    metric.plot(values, ax=axes)  # a second line, as for a second run
    axes.set_title(type(metric).__name__)
    figure.canvas.draw()
    left, right = axes.get_xlim()
    ticks = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
    ticks = ticks if axes.get_xaxis().get_visible() else []
    boxes = [label.get_window_extent() for label in ticks]
    assert all(one.x1 < two.x0 for one, two in pairwise(boxes)), "labels of steps do not collide"
    assert all(label.get_position()[0] % 1 == 0 for label in ticks), "steps are whole numbers"
    if isinstance(values, list) and len(values) > 1:
        assert len(ticks) >= 2
    others = [axes.title.get_window_extent(), *(text.get_window_extent() for text in axes.texts)]
    bottom, top = axes.get_ylim()
    others += [
        label.get_window_extent() for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top
    ]
    if axes.get_legend() is not None:
        others.append(axes.get_legend().get_window_extent())
        assert axes.bbox.y1 >= others[-1].y1, "the legend leaves the title its place"
    assert not any(one.overlaps(two) for one, two in combinations(others, 2))
    assert len(axes.texts) <= 1, "said once"
    points = [axes.transData.transform(point) for line in axes.get_lines() for point in line.get_xydata()]
    for x, y in points:
        assert not math.isfinite(y) or axes.bbox.y0 < y < axes.bbox.y1
        assert not any(text.get_window_extent().padded(1).contains(x, y - 4) for text in axes.texts)
    plt.close(figure)
