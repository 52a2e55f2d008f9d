"""Print the results of commands as tables and trees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from q8lightning.cli.tables import Column, decibels, number, print_table
from q8lightning.tools import Comparison, Difference, Inspection, Size, TensorEntry, Verification
from q8lightning.tools.comparison import UPDATE_DIRECTION


def print_inspection(console: Console, found: Inspection, depth: int | None) -> None:
    """Print what a checkpoint is, its sizes by kind, and the tree of its tensors down to ``depth`` levels."""
    console.print(f"[bold]{escape(str(found.path))}[/bold]", highlight=False, soft_wrap=True)
    about = {"size": f"{found.bytes:,} bytes", "format": _format(found)}
    for key, name in (("pytorch-lightning_version", "lightning"), ("epoch", "epoch"), ("global_step", "global step")):
        if key in found.training:
            about[name] = str(found.training[key])
    if found.summary is not None and "restored" in found.summary:
        about["restored"] = f"{found.summary['restored']} times from a quantized checkpoint"
    if found.update_direction_error is not None:
        about["update"] = f"direction off by {found.update_direction_error:.2%}"
    for name, text in about.items():
        console.print(f"  {name:12}{text}", highlight=False, markup=False)
    for line in [*_policy(found.summary), *_exceptions(found)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    print_table(console, *_sizes(found))
    console.print()
    console.print(_tree(found, depth))


def _format(found: Inspection) -> str:
    if found.summary is None:
        return "plain"
    trained = found.summary.get("qat")
    suffix = f"; {len(trained)} weights trained quantized" if trained else ""
    if found.was_decoded:
        return f"plain: no tensor is encoded; policy and errors are of the quantized file that was loaded{suffix}"
    return f"q8lightning, version {found.summary.get('format_version', 'unknown')}{suffix}"


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


_DEFAULTS = {"residual_bits": 0, "scale_dtype": "float32", "parameter": "*"}
"""Values of a rule's arguments that are not shown."""


def _exceptions(found: Inspection) -> list[str]:
    """Name tensors that are not stored as their rules say: they would lose too much, or no codec holds them."""
    lines = [f"{each.name} ({each.reason}); {_REMEDIES.get(each.remedy, '')}" for each in found.exceptions]
    more = [f"and {len(lines) - _SHOWN} more; --json has them all"] if len(lines) > _SHOWN else []
    return [f"  {'' if index else 'exceptions':12}{line}" for index, line in enumerate(lines[:_SHOWN] + more)]


_REMEDIES = {"residual": "in 16 bits", "raw": "as it is"}

_SHOWN = 5
"""How many exceptions are shown; every tensor of a diverged model is one."""


def _sizes(found: Inspection) -> tuple[list[Column], list[list[str]]]:
    """Return the columns and rows of the table of kinds."""
    errors = sorted({name for values in found.errors.values() for name in values})
    columns = [
        Column("kind"),
        Column("tensors", 3),
        Column("bytes"),
        Column("decoded", 2),
        Column("smaller"),
        Column("codecs", 1, is_text=True),
        *(Column(name, _ORDER.get(name, 4)) for name in errors),
    ]
    rows = []
    for kind, size in found.sizes.items():
        codecs = sorted({entry.codec for entry in found.tensors if entry.kind == kind and entry.codec})
        measured = found.errors.get(kind, {})
        rows.append(
            [
                kind,
                f"{size.tensors:,}",
                f"{size.bytes:,}",
                f"{size.decoded_bytes:,}",
                _ratio(size),
                ", ".join(codecs),
                *(_measured(measured.get(name)) for name in errors),
            ]
        )
    rest = f"{found.bytes_without_tensors:,}"
    rows.append(["not tensors", "", rest, rest])
    what = "whole folder" if found.path.is_dir() else "whole file"
    rows.append(
        [what, f"{len(found.tensors):,}", f"{found.bytes:,}", f"{found.decoded_bytes:,}", f"{found.ratio:.2f}x"]
    )
    return columns, rows


_ORDER = {"sqnr_db": 0, "relative_error": 5, "max_error": 6}
"""When figures of errors are left out; see :class:`Column`."""


def _ratio(size: Size | TensorEntry) -> str:
    """Return how many times smaller something became; empty for what takes no bytes."""
    return f"{size.decoded_bytes / size.bytes:.2f}x" if size.bytes else ""


def _measured(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def _tree(found: Inspection, depth: int | None) -> Tree:
    tree = Tree(escape(found.path.name), highlight=False)
    _grow(tree, [(entry.path.split("."), entry) for entry in found.tensors], depth)
    return tree


def _grow(tree: Tree, entries: Sequence[tuple[list[str], TensorEntry]], depth: int | None) -> None:
    branches: dict[str, list[tuple[list[str], TensorEntry]]] = {}
    for (key, *keys), entry in entries:
        if keys:
            branches.setdefault(key, []).append((keys, entry))
        else:
            tree.add(_leaf(escape(key), entry))
    for key, below in branches.items():
        named = escape(key) + _parameter(key, below)
        if depth == 1:
            size = Size(len(below), *(sum(getattr(e, name) for _, e in below) for name in ("bytes", "decoded_bytes")))
            many = "s" if size.tensors > 1 else ""
            tree.add(f"{named}  [dim]{size.tensors:,} tensor{many}, {size.bytes:,} bytes {_ratio(size)}[/dim]")
        else:
            _grow(tree.add(named), below, None if depth is None else depth - 1)


def _parameter(key: str, below: Sequence[tuple[list[str], TensorEntry]]) -> str:
    """Return the name of the parameter whose states a branch holds, to show beside its number; empty if none."""
    names = {entry.name.removesuffix(f": {keys[-1]}") for keys, entry in below if len(keys) == 1 and _is_named(entry)}
    return f" [dim]{escape(names.pop())}[/dim]" if len(names) == 1 and key.isdecimal() else ""


def _is_named(entry: TensorEntry) -> bool:
    return entry.name != entry.path


def _leaf(key: str, entry: TensorEntry) -> str:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    if entry.tied_to is not None:
        return f"{key}  {shape} {entry.dtype}  [dim]tied to {escape(entry.tied_to)}[/dim]"
    codec = "" if entry.codec is None else f"  [cyan]{entry.codec}[/cyan]  {_ratio(entry)}"
    lost = "" if entry.sqnr_db is None else f"  {decibels(entry.sqnr_db)} dB"
    return f"{key}  {shape} {entry.dtype}  {entry.bytes:,} bytes{codec}{lost}"


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
    sizes = result.first, result.second
    rows = [
        [kind, _from_to([each.kinds.get(kind) for each in sizes]), *_errors(difference)]
        for kind, difference in result.by_kind().items()
    ]
    if any(size.parameters for size in sizes):
        rows.append(["whole", _from_to([each.whole for each in sizes])])
    print_table(console, [Column("kind"), Column("bytes a parameter", 2), *_ERRORS], rows)
    shown = list(result.differing)
    if top is not None:
        shown = sorted(shown, key=lambda row: -row.difference.relative_error)[:top]
    if shown:
        console.print()
        columns = [Column("tensor", is_text=True), Column("first", 3), Column("second", 2), *_ERRORS]
        rows = [[escape(row.name), row.first, row.second, *_errors(row.difference)] for row in shown]
        print_table(console, columns, rows)
    console.print()
    tensors = [row.difference.error != 0 for row in result.rows if row.kind != UPDATE_DIRECTION]
    console.print(f"{sum(tensors)} of {len(tensors)} tensors differ, the others are the same", highlight=False)
    for where, names in (("first", result.only_first), ("second", result.only_second)):
        for name in names:
            console.print(f"only in the {where} file: {name}", highlight=False, markup=False, soft_wrap=True)
    for each in result.reshaped:
        shapes = f"{each.first} and {each.second}"
        console.print(f"different shapes: {each.name}: {shapes}", highlight=False, markup=False, soft_wrap=True)


def _from_to(values: Sequence[float | None]) -> str:
    """Return the number of each file; empty if neither has one."""
    said = ["none" if value is None else f"{value:.2f}" for value in values]
    return "" if set(said) == {"none"} else " -> ".join(said)


_ERRORS = (Column("relative error"), Column("SQNR dB", 1), Column("max error", 4))


def _errors(difference: Difference) -> tuple[str, str, str]:
    return (
        number(difference.relative_error),
        decibels(difference.sqnr_db),
        number(difference.max_error),
    )
