"""Print the results of commands as tables and trees."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from q8lightning.cli.tables import print_table
from q8lightning.tools import Comparison, Inspection, Verification, comparison, inspection
from q8lightning.tools.text import Branch, Column, Table
from q8lightning.tools.tree_of_tensors import tree_of


def print_inspection(console: Console, found: Inspection, depth: int | None) -> None:
    """Print what a checkpoint is, its sizes by kind, and the tree of its tensors down to ``depth`` levels."""
    console.print(f"[bold]{escape(str(found.path))}[/bold]", highlight=False, soft_wrap=True)
    _print_lines(console, inspection.lines_about(found))
    console.print()
    _print_plain(console, inspection.sizes_in(found))
    console.print()
    console.print(_drawn(tree_of(found.path.name, found.tensors, depth)))


def _print_lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_plain(console: Console, table: Table) -> None:
    """Print a table whose cells have no markup."""
    print_table(console, table.columns, [[escape(cell) for cell in row] for row in table.rows])


def _drawn(branch: Branch) -> Tree:
    tree = Tree(Text.assemble(*branch.parts), highlight=False)
    tree.children = [_drawn(each) for each in branch.below]
    return tree


def print_verifications(console: Console, found: Mapping[Path, Verification | str]) -> None:
    """Print the result for each file, or that it cannot be read."""
    columns = [Column("file", is_text=True), Column("bytes", 1), Column("tensors", 2), Column("quantized", 3)]
    rows = []
    for path, result in found.items():
        if isinstance(result, str):
            rows.append([escape(str(path)), "", "", "", "[red]cannot be read[/red]"])
            continue
        if not result.is_whole:
            text = f"[red]{len(result.damage)} damaged[/red]"
        else:
            text = "[green]whole[/green]" if result.has_sums else "[green]decodes[/green] (has no sums of its records)"
        counts = (result.bytes, result.tensors, result.quantized)
        rows.append([escape(str(path)), *(f"{count:,}" for count in counts), text])
    print_table(console, [*columns, Column("result", is_text=True)], rows)


def print_comparison(console: Console, result: Comparison, top: int | None) -> None:
    """Print the differences by kind and by tensor; with ``top`` only so many tensors, the largest errors first."""
    for table in comparison.tables_of(result, top):
        _print_plain(console, table)
        console.print()
    _print_lines(console, comparison.lines_about(result))
