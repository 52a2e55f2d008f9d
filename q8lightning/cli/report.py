"""Tables and trees of what the commands found, for people."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from q8lightning.tools.compare import UPDATE_DIRECTION, Comparison, Difference, Row
from q8lightning.tools.inspect import Entry, entries_of, error_of, errors_by_kind, sizes_of, summary_of, was_decoded
from q8lightning.tools.source import Source
from q8lightning.tools.verify import Verification


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    return made


def ratio(decoded: int, encoded: int) -> str:
    """Return how many times smaller something became."""
    return f"{decoded / encoded:.2f}x" if encoded else ""


def number(value: float, digits: int = 2) -> str:
    """Return a small number in as few characters as it needs."""
    return "0" if value == 0 else f"{value:.{digits - 1}e}"


def decibels(value: float) -> str:
    """Return a ratio in dB."""
    return f"{value:.1f}" if math.isfinite(value) else "inf" if value > 0 else str(value)


def print_inspection(console: Console, source: Source, depth: int | None) -> None:
    """Print what a checkpoint is, its sizes by kind, and the tree of its tensors down to ``depth`` levels."""
    entries = entries_of(source)
    summary = summary_of(source)
    size = source.file.size
    console.print(f"[bold]{escape(str(source.path))}[/bold]", highlight=False, soft_wrap=True)
    content = source.content if isinstance(source.content, Mapping) else {}
    about = {"size": f"{size:,} bytes", "format": "plain" if summary is None else _format(summary, entries)}
    for key, name in (("pytorch-lightning_version", "lightning"), ("epoch", "epoch"), ("global_step", "global step")):
        if key in content:
            about[name] = str(content[key])
    if summary is not None and "restored" in summary:
        about["restored"] = f"{summary['restored']} times from a quantized checkpoint"
    direction = (source.summary.get("metrics") or {}).get("update_direction_error")
    if direction is not None:
        about["update"] = f"direction off by {direction:.2%}"
    for name, text in about.items():
        console.print(f"  {name:12}{text}", highlight=False, markup=False)
    for line in [*_policy(summary), *_exceptions(source.summary)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(_sizes(entries, size, errors_by_kind(source.summary)))
    console.print()
    console.print(_tree(entries, source.path.name, depth, source.summary))


def _format(summary: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    trained = summary.get("qat")
    suffix = f"; {len(trained)} weights trained quantized" if trained else ""
    if was_decoded(summary, entries):
        return f"plain: no tensor is encoded; policy and errors are of the quantized file that was loaded{suffix}"
    return f"q8lightning, version {summary.get('format_version', 'unknown')}{suffix}"


def _policy(summary: Mapping[str, Any] | None) -> list[str]:
    policy = (summary or {}).get("policy")
    if policy is None:
        return []
    if not isinstance(policy, Mapping) or "rules" not in policy:
        return [f"  {'policy':12}{policy}"]
    lines = [f"  {'policy':12}" + ", ".join(f"{key} {value}" for key, value in policy.items() if key != "rules")]
    for rule in policy["rules"]:
        if isinstance(rule, Mapping):
            told = {key: value for key, value in rule.items() if key != "pattern" and _DEFAULTS.get(key) != value}
            options = ", ".join(key if value is True else f"{key} {value}" for key, value in told.items())
            lines.append(f"  {'':12}{rule.get('pattern')}: {options if rule.get('codec') else 'as it is'}")
        else:
            lines.append(f"  {'':12}{rule}")
    return lines


_DEFAULTS = {"residual": False, "parameter": "*"}
"""Of a rule's arguments: those that say nothing."""


def _exceptions(summary: Mapping[str, Any]) -> list[str]:
    """Name tensors that are not stored as their rules say, because they would lose too much or no codec holds them."""
    guarded = summary.get("guarded") or {}
    lines = [f"{path}: {each['found']}; {_REMEDIES.get(each['remedy'], '')}" for path, each in guarded.items()]
    lines += [f"{text}; as it is" for text in summary.get("refused") or ()]
    more = [f"and {len(lines) - _SHOWN} more; --json has them all"] if len(lines) > _SHOWN else []
    return [f"  {'' if index else 'exceptions':12}{line}" for index, line in enumerate(lines[:_SHOWN] + more)]


_REMEDIES = {"residual": "with a residual stage", "raw": "as it is"}

_SHOWN = 5
"""Exceptions that are shown; every tensor of a model that diverged is one."""


def _sizes(entries: Sequence[Entry], file_size: int, metrics: Mapping[str, Mapping[str, float]]) -> Table:
    errors = sorted({name for values in metrics.values() for name in values})
    made = table("kind", "tensors", "bytes", "decoded", "smaller", "codecs", *errors)
    totals = [0, 0, 0]
    for kind, size in sizes_of(entries).items():
        codecs = sorted({entry.codec for entry in entries if entry.kind == kind and entry.codec})
        measured = metrics.get(kind, {})
        made.add_row(
            kind,
            f"{size.tensors:,}",
            f"{size.bytes:,}",
            f"{size.decoded_bytes:,}",
            ratio(size.decoded_bytes, size.bytes),
            ", ".join(codecs),
            *(_measured(measured.get(name)) for name in errors),
        )
        totals = [a + b for a, b in zip(totals, (size.tensors, size.bytes, size.decoded_bytes), strict=True)]
    rest = max(file_size - totals[1], 0)
    made.add_row("not tensors", "", f"{rest:,}", f"{rest:,}", "", "")
    made.add_row(
        "whole file", f"{totals[0]:,}", f"{file_size:,}", f"{totals[2] + rest:,}", ratio(totals[2] + rest, file_size)
    )
    return made


def _measured(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def _tree(entries: Sequence[Entry], name: str, depth: int | None, summary: Mapping[str, Any]) -> Tree:
    tree = Tree(escape(name), highlight=False)
    _grow(tree, [(entry.path.split("."), entry) for entry in entries], depth, summary)
    return tree


def _grow(
    tree: Tree, entries: Sequence[tuple[list[str], Entry]], depth: int | None, summary: Mapping[str, Any]
) -> None:
    branches: dict[str, list[tuple[list[str], Entry]]] = {}
    for (key, *keys), entry in entries:
        if keys:
            branches.setdefault(key, []).append((keys, entry))
        else:
            tree.add(_leaf(escape(key), entry, error_of(summary, entry.path)))
    for key, below in branches.items():
        if depth == 1:
            encoded, decoded = (sum(getattr(entry, name) for _, entry in below) for name in ("bytes", "decoded_bytes"))
            many = "s" if len(below) > 1 else ""
            text = f"{len(below):,} tensor{many}, {encoded:,} bytes {ratio(decoded, encoded)}"
            tree.add(f"{escape(key)}  [dim]{text}[/dim]")
        else:
            _grow(tree.add(escape(key)), below, None if depth is None else depth - 1, summary)


def _leaf(key: str, entry: Entry, sqnr: float | None) -> str:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    if entry.tied_to is not None:
        return f"{key}  {shape} {entry.dtype}  [dim]tied to {escape(entry.tied_to)}[/dim]"
    codec = "" if entry.codec is None else f"  [cyan]{entry.codec}[/cyan]  {ratio(entry.decoded_bytes, entry.bytes)}"
    lost = "" if sqnr is None else f"  {decibels(sqnr)} dB"
    return f"{key}  {shape} {entry.dtype}  {entry.bytes:,} bytes{codec}{lost}"


def print_verifications(console: Console, found: Mapping[Path, Verification | str]) -> None:
    """Print what was found in each file, or why it could not be looked at."""
    made = table("file", "bytes", "tensors", "quantized")
    made.add_column("result", overflow="fold")
    for path, result in found.items():
        if isinstance(result, str):
            made.add_row(escape(str(path)), "", "", "", "[red]cannot be read[/red]")
            continue
        if result.damage:
            text = f"[red]{len(result.damage)} damaged[/red]"
        else:
            text = "[green]whole[/green]" if result.has_sums else "[green]decodes[/green] (has no sums of its records)"
        counts = (result.bytes, result.tensors, result.payloads)
        made.add_row(escape(str(path)), *(f"{count:,}" for count in counts), text)
    console.print(made)


def print_comparison(console: Console, result: Comparison, top: int | None) -> None:
    """Print the differences by kind and of each tensor, largest first if there is to be only a number of them."""
    made = table("kind", *_ERRORS)
    for kind, difference in result.by_kind().items():
        made.add_row(kind, *_errors(difference))
    console.print(made)
    differing = [row for row in result.rows if row.difference.error != 0]
    shown = differing
    if top is not None:
        shown = sorted(differing, key=lambda row: -row.difference.relative_error)[:top]
    if shown:
        console.print()
        made = table("tensor", "first", "second", *_ERRORS)
        for row in shown:
            made.add_row(escape(_name(row)), row.first, row.second, *_errors(row.difference))
        console.print(made)
    console.print()
    tensors = [row.difference.error != 0 for row in result.rows if row.kind != UPDATE_DIRECTION]
    console.print(f"{sum(tensors)} of {len(tensors)} tensors differ, the others are the same", highlight=False)
    for where, paths in (("first", result.only_first), ("second", result.only_second)):
        for path in paths:
            console.print(f"only in the {where} file: {path}", highlight=False, markup=False, soft_wrap=True)
    for path, one, two in result.reshaped:
        console.print(f"different shapes: {path}: {one} and {two}", highlight=False, markup=False, soft_wrap=True)


_ERRORS = ("relative error", "SQNR dB", "max error")


def _errors(difference: Difference) -> tuple[str, str, str]:
    return (
        number(difference.relative_error),
        decibels(difference.sqnr_db),
        number(difference.max_error),
    )


def _name(row: Row) -> str:
    return f"{row.path} (update direction)" if row.kind == UPDATE_DIRECTION else row.path
