"""Print tables that fit the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from q8lightning.tools.text import GAP, Column

_NARROW = 44
"""Characters that a column of names has at least before others are left out for it."""


def print_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns; where the lines are too short, leave columns out and say which.

    Args:
        console: Knows how long lines are.
        columns: The columns; the first is aligned to the left, the others to the right unless they are text.
        rows: Texts with rich's markup; a row may be shorter than the columns.
    """
    full = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    widths = [
        max(cell_len(column.name), *(cell_len(Text.from_markup(row[i]).plain) for row in full), 0)
        for i, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))

    def needed() -> int:
        least = (min(widths[i], _NARROW) if columns[i].is_text else widths[i] for i in shown)
        return sum(least) + GAP * (len(shown) - 1)

    while needed() > console.width and any(columns[i].goes for i in shown):
        shown.remove(max(shown, key=lambda i: columns[i].goes))
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for place, i in enumerate(shown):
        column = columns[i]
        justify: Any = "left" if place == 0 or (column.is_text and i == len(columns) - 1) else "right"
        made.add_column(column.name, justify=justify, overflow="fold", no_wrap=not column.is_text)
    for row in full:
        made.add_row(*(row[i] for i in shown))
    console.print(made)
    left_out = [column.name for i, column in enumerate(columns) if i not in shown]
    if left_out:
        console.print(f"[dim](without {', '.join(left_out)}: the lines are too short)[/dim]", highlight=False)
