"""Lay out tables and trees as text or HTML, and write numbers as people read them."""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: Its header.
        goes: When it is left out where the lines are too short for all: the largest first, 0 never.
        is_text: Whether it may be folded; figures never are.
    """

    name: str
    goes: int = 0
    is_text: bool = False


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        columns: Its columns; the first is aligned to the left, the others to the right unless the last is text.
        rows: Its cells. A row may be shorter than the columns.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    @property
    def filled(self) -> list[list[str]]:
        """The rows with an empty cell for each that is missing."""
        return [[*row, *[""] * (len(self.columns) - len(row))] for row in self.rows]

    def is_left(self, place: int) -> bool:
        """Whether the column at a place is aligned to the left."""
        return place == 0 or (self.columns[place].is_text and place == len(self.columns) - 1)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the whole table, as long as they need to be."""
        cells = [[column.name for column in self.columns], *self.filled]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = (
                cell.ljust(width) if self.is_left(i) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            yield (" " * GAP).join(padded).rstrip()

    def html(self) -> str:
        """Return the table as HTML."""
        head = "".join(f"<th>{html.escape(column.name)}</th>" for column in self.columns)
        body = (f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.filled)
        return f"<table><tr>{head}</tr>{''.join(body)}</table>"


GAP = 2
"""Spaces between columns."""


class Branch(NamedTuple):
    """A branch or leaf of a tree.

    Attributes:
        parts: Its text in parts, each with its style: ``"dim"``, ``"cyan"`` or none.
        below: What grows from it.
    """

    parts: Sequence[tuple[str, str]]
    below: "Sequence[Branch]" = ()

    def lines(self) -> Iterator[str]:
        """Yield its line, and those of what grows from it."""
        yield "".join(text for text, _ in self.parts)
        for index, branch in enumerate(self.below, 1):
            first, later = ("└── ", "    ") if index == len(self.below) else ("├── ", "│   ")
            for number, line in enumerate(branch.lines()):
                yield (later if number else first) + line


def number(value: float, digits: int = 2) -> str:
    """Return a number in scientific notation; 0 as it is."""
    return "0" if value == 0 else f"{value:.{digits - 1}e}"


def decibels(value: float) -> str:
    """Return a ratio in dB."""
    return f"{value:.1f}" if math.isfinite(value) else "inf" if value > 0 else str(value)
