"""Tables and a plot of the records that resumes have left."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from resuming.variants import MOVED

Record = dict[str, Any]

PLAIN_AGAIN = "plain again (the floor)"

GROUPS = ("floor", "preset", "frontier", "warning", "part")
"""The groups of variants, in the order of tables."""

COLUMNS: dict[str, Callable[[Sequence[Record]], str]] = {
    "bytes a parameter": lambda rows: f"{median(row['bytes_a_parameter'] for row in rows):.2f}",
    "first batch": lambda rows: _number(median(abs(row["first_batch"]) for row in rows)),
    "mean": lambda rows: _number(median(row["mean"] for row in rows)),
    "RMS": lambda rows: _number(median(row["rms"] for row in rows)),
    "RMS, lowest to highest": lambda rows: f"{_number(lowest(rows))} to {_number(highest(rows))}",
    "to the floor": lambda rows: _times([row["to_floor"] for row in rows if row.get("to_floor")]),
    "direction": lambda rows: _percent([row["direction_error"] for row in rows if "direction_error" in row]),
    "resumes": lambda rows: str(len(rows)),
    "guarded": lambda rows: str(max(row["guarded"] for row in rows)),
}
"""The columns of a table, each from the records of one variant. ``to the floor`` is how many times as large the RMS gap
is as that of the plain resume from the same checkpoint; ``guarded`` how many tensors a save stored better than its
policy says, at most."""


def lowest(rows: Sequence[Record]) -> float:
    """Return the smallest RMS gap."""
    return min(row["rms"] for row in rows)


def highest(rows: Sequence[Record]) -> float:
    """Return the largest RMS gap."""
    return max(row["rms"] for row in rows)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _percent(values: Sequence[float]) -> str:
    return f"{median(values):.2%}" if values else ""


def _times(values: Sequence[float]) -> str:
    return f"{median(values):.2f}" if values else ""


def with_floors(records: Sequence[Record]) -> list[Record]:
    """Return records with the ratio of their RMS gap to that of the plain resumes from the same checkpoint."""

    def place(row: Record) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("scenario", "seed", "beta2", "checkpoint"))

    floors: dict[tuple[Any, ...], list[float]] = {}
    for row in records:
        if _named(row) == PLAIN_AGAIN:
            floors.setdefault(place(row), []).append(row["rms"])
    means = {where: sum(values) / len(values) for where, values in floors.items()}
    return [row | {"to_floor": row["rms"] / floor if (floor := means.get(place(row))) else None} for row in records]


def tables(records: Sequence[Record]) -> str:
    """Return Markdown: for each scenario tables of medians over all runs, and by beta2 and checkpoint."""
    parts = []
    for scenario, own in grouped(with_floors(records), "scenario").items():
        first = own[0]
        seeds, betas, steps = (sorted({row[key] for row in own}) for key in ("seed", "beta2", "checkpoint"))
        parts.append(
            f"### {scenario}: {first['parameters']:,} parameters\n\n{first['machine']}. {len(seeds)} seeds, beta2"
            f" {_listed(betas)}, checkpoints after {_listed(steps)} steps, {first['steps']} steps after each."
        )
        parts.append(_table("variant", variants_of(own)))
        often = {
            f"{_named(rows[0])}, restored {times} times": rows
            for times, some in grouped([row for row in own if row["restores"] > 1], "restores").items()
            for rows in grouped(some, "variant").values()
        }
        if often:
            parts.append(_table("variant", often))
        whole = [row for row in own if row["restores"] == 1 and row["group"] in ("floor", "preset", "frontier")]
        parts.append(_by_circumstances(whole))
    return "\n\n".join(parts)


def variants_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each variant that was restored once, by group and size.

    Plain resumes are one, except for those whose weights are a rounding off.
    """
    once = [row | {"variant": _named(row)} for row in records if row["restores"] == 1]
    once.sort(key=lambda row: (GROUPS.index(row["group"]), -row["bytes_a_parameter"]))
    return grouped(once, "variant")


def _named(row: Record) -> str:
    if row["group"] == "floor" and row["variant"] != MOVED.name:
        return PLAIN_AGAIN
    return f"`{row['variant']}`" if row["group"] == "preset" else str(row["variant"])


def _table(what: str, rows: dict[str, list[Record]]) -> str:
    lines = [[what, *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *(column(records) for column in COLUMNS.values())] for name, records in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_circumstances(records: Sequence[Record]) -> str:
    """Return a table of the median RMS gap by beta2 and by checkpoint."""
    columns: dict[str, list[Record]] = {}
    for key, name in (("beta2", "beta2"), ("checkpoint", "after step")):
        columns |= {f"{name} {value}": rows for value, rows in sorted(grouped(records, key).items())}
    lines = [["RMS", *columns], ["---"] * (1 + len(columns))]
    for variant in variants_of(records):
        cells = [variants_of(rows).get(variant, []) for rows in columns.values()]
        lines.append([variant, *(_number(median(row["rms"] for row in rows)) if rows else "" for rows in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    """Return the records by one of their values, in the order in which these occur."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def _listed(values: Sequence[Any]) -> str:
    return " and ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw bytes a parameter against the RMS gap: a panel for each scenario, the floor as a band."""
    from matplotlib.figure import Figure

    scenarios = grouped(records, "scenario")
    figure = Figure(figsize=(5.2 * len(scenarios), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(scenarios), squeeze=False)[0]
    for axes, (scenario, own) in zip(all_axes, scenarios.items(), strict=True):
        _draw(axes, own)
        axes.set_title(f"{scenario}: {own[0]['parameters'] / 1e6:.3g} million parameters", fontsize=9)
    figure.savefig(path, dpi=130)


def _draw(axes: Any, records: Sequence[Record]) -> None:
    """Draw one scenario; labels of presets stand on the left of their points, others on the right."""
    for name, rows in variants_of(records).items():
        group, middle = rows[0]["group"], median(row["rms"] for row in rows)
        is_the_floor = name == PLAIN_AGAIN or is_deterministic(records)
        if group == "floor" and is_the_floor and middle > 0:  # zero has no place on a logarithmic axis
            axes.axhspan(lowest(rows), highest(rows), color="0.88")
            axes.axhline(middle, color="0.5", linestyle="--", linewidth=1, label=name)
        if group not in ("preset", "frontier") and name != "bitsandbytes' maps":
            continue
        size, color = median(row["bytes_a_parameter"] for row in rows), COLORS[group]
        bars = [[middle - lowest(rows)], [highest(rows) - middle]]
        axes.errorbar(size, middle, yerr=bars, fmt="o", color=color, markersize=5, linewidth=1, capsize=2)
        where = {"xytext": (-6, -6), "ha": "right"} if group == "preset" else {"xytext": (5, 2), "rotation": 30}
        label = name.strip("`")
        axes.annotate(label, (size, middle), textcoords="offset points", fontsize=6, color=color, **where)
    axes.set_yscale("log")
    axes.set_xlim(1.9, 4.6)
    axes.grid(alpha=0.3)
    axes.set_xlabel("bytes a parameter (plain: 12)", fontsize=8)
    axes.set_ylabel("RMS gap of the loss to a plain resume", fontsize=8)
    axes.tick_params(labelsize=7)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def is_deterministic(records: Sequence[Record]) -> bool:
    """Whether all plain resumes are the same to the bit."""
    return all(row["rms"] == 0 for row in records if _named(row) == PLAIN_AGAIN)


COLORS = {"preset": "C3", "frontier": "C0", "warning": "0.5"}
