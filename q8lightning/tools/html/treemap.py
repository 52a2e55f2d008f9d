"""Lay out boxes whose areas are given, as nearly square as rows allow: a squarified treemap.

After Bruls, Huizing and van Wijk, "Squarified treemaps" (2000).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle, in the units of the picture."""

    x: float
    y: float
    width: float
    height: float


def lay_out(sizes: Sequence[float], box: Box) -> list[Box]:
    """Return a box for each size, which fill the whole box in proportion to them.

    Args:
        sizes: Positive numbers, the largest first.
        box: The whole. If it has no area, neither has any part.
    """
    total = sum(sizes)
    scale = max(box.width, 0.0) * max(box.height, 0.0) / total if total else 0.0
    areas = [size * scale for size in sizes]
    boxes: list[Box] = []
    start = 0
    while start < len(areas):
        short = min(box.width, box.height)
        end = start + 1
        while end < len(areas) and _worst(areas[start : end + 1], short) <= _worst(areas[start:end], short):
            end += 1
        row, box = _row(areas[start:end], box)
        boxes += row
        start = end
    return boxes


def _worst(areas: Sequence[float], side: float) -> float:
    """Return the largest ratio of sides among boxes that fill a row along a side; areas fall."""
    total = sum(areas)
    if side <= 0 or total <= 0 or areas[-1] <= 0:
        return float("inf")
    return max(side * side * areas[0] / (total * total), total * total / (side * side * areas[-1]))


def _row(areas: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """Return boxes in a row along the shorter side, and the box that is left."""
    total = sum(areas)
    boxes = []
    if box.width >= box.height:
        width, y = (total / box.height if box.height > 0 else 0.0), box.y
        for area in areas:
            height = area / width if width > 0 else 0.0
            boxes.append(Box(box.x, y, width, height))
            y += height
        return boxes, Box(box.x + width, box.y, max(box.width - width, 0.0), box.height)
    height, x = (total / box.width if box.width > 0 else 0.0), box.x
    for area in areas:
        width = area / height if height > 0 else 0.0
        boxes.append(Box(x, box.y, width, height))
        x += width
    return boxes, Box(box.x, box.y + height, box.width, max(box.height - height, 0.0))
