"""The result of inspecting a checkpoint: what it is, its tensors, and how large it is beside a plain one."""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from q8lightning.checkpoint.policy import PRESETS
from q8lightning.tools.entries import Size, StoredOtherwise, TensorEntry
from q8lightning.tools.text import Column, Table
from q8lightning.tools.tree_of_tensors import ratio_of, tree_of


@dataclass(frozen=True, repr=False)
class Inspection:
    """What a checkpoint holds. ``print`` shows it as ``q8lightning inspect`` does, and so does a notebook.

    Attributes:
        path: The file.
        bytes: Its size.
        sections: The keys at the top of the checkpoint.
        training: How far the training was, such as ``{"epoch": 1, "global_step": 30}``.
        summary: The checkpoint's summary in primitives; None if it has none. A ratio that is not finite is None in it.
        was_decoded: Whether a quantized file was loaded and saved plain, so that the summary describes codes that are
            not in this file.
        sizes: The sizes of the kinds of tensors that occur.
        errors: What the save lost, by kind, as the summary has it, such as ``{"weights": {"sqnr_db": 95.3}}``.
        update_direction_error: Relative error of Adam's update direction; None if the summary does not have it.
        exceptions: Tensors that are not stored as their rules say.
        tensors: All tensors, in the order of the checkpoint.
    """

    path: Path
    bytes: int
    sections: tuple[str, ...]
    training: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    was_decoded: bool
    sizes: Mapping[str, Size]
    errors: Mapping[str, Mapping[str, float]]
    update_direction_error: float | None
    exceptions: tuple[StoredOtherwise, ...]
    tensors: tuple[TensorEntry, ...]

    @property
    def bytes_without_tensors(self) -> int:
        """Bytes of the file that belong to no tensor."""
        return max(self.bytes - sum(entry.bytes for entry in self.tensors), 0)

    @property
    def decoded_bytes(self) -> int:
        """About how many bytes the file would have if no tensor were encoded."""
        return sum(entry.decoded_bytes for entry in self.tensors) + self.bytes_without_tensors

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than with no tensor encoded."""
        return self.decoded_bytes / self.bytes

    def as_primitives(self) -> dict[str, Any]:
        """Return everything as JSON has it; a ratio that is not finite is None."""
        found = {
            "file": str(self.path),
            "bytes": self.bytes,
            "sections": list(self.sections),
            "training": dict(self.training),
            "summary": self.summary,
            "decoded": self.was_decoded,
            "sizes": {kind: asdict(size) for kind, size in self.sizes.items()},
            "exceptions": [asdict(each) for each in self.exceptions],
            "tensors": [asdict(entry) for entry in self.tensors],
        }
        result: dict[str, Any] = primitives_of(found)
        return result

    def __repr__(self) -> str:
        name = f"{self.path.name!r}, {self.bytes:,} bytes, {self.ratio:.2f}x smaller, {len(self.tensors):,} tensors"
        return f"{type(self).__name__}({name})"

    def __str__(self) -> str:
        tree = tree_of(self.path.name, self.tensors)
        return "\n".join([str(self.path), *lines_about(self), "", *sizes_in(self).lines(), "", *tree.lines()])

    def _repr_html_(self) -> str:
        tree = "\n".join(tree_of(self.path.name, self.tensors).lines())
        return (
            f"<b>{html.escape(str(self.path))}</b><pre>{html.escape(chr(10).join(lines_about(self)))}</pre>"
            f"{sizes_in(self).html()}<details><summary>tensors</summary><pre>{html.escape(tree)}</pre></details>"
        )


def lines_about(found: Inspection) -> list[str]:
    """Return the lines that say what a checkpoint is."""
    about = {"size": f"{found.bytes:,} bytes", "format": _format(found)}
    for key, name in (("pytorch-lightning_version", "lightning"), ("epoch", "epoch"), ("global_step", "global step")):
        if key in found.training:
            about[name] = str(found.training[key])
    if found.summary is not None and "restored" in found.summary:
        about["restored"] = f"{found.summary['restored']} times from a quantized checkpoint"
    if found.update_direction_error is not None:
        about["update"] = f"direction off by {found.update_direction_error:.2%}"
    lines = [f"  {name:12}{text}" for name, text in about.items()]
    return [*lines, *_policy(found.summary), *_exceptions(found)]


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
    for name, preset in PRESETS.items():
        if policy == preset.as_primitives():
            return [f"  {'policy':12}{name}"]
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


def sizes_in(found: Inspection) -> Table:
    """Return the table of the sizes and errors by kind."""
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
                ratio_of(size),
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
    return Table(columns, rows)


_ORDER = {"sqnr_db": 0, "relative_error": 5, "max_error": 6}
"""When figures of errors are left out; see :class:`Column`."""


def _measured(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def primitives_of(value: Any) -> Any:
    """Return what JSON keeps of a value; infinity becomes None, such as the SQNR of a tensor that lost nothing."""
    # Not by the walk of tree.py, which skips numbers: these are what must change.
    return json.loads(json.dumps(value, default=str, skipkeys=True), parse_constant=lambda _: None)
