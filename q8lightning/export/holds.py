"""Refuse what a target cannot hold: weights, with the rule that it could, and entries that are no tensors."""

from collections.abc import Callable

from q8lightning.export.errors import ExportError
from q8lightning.export.weights import Source, Weight

Reason = Callable[[Weight], str | None]
"""Returns why a target cannot hold a weight that was trained quantized; None if it can."""


def check_all(source: Source, format: str, reason: Reason, remedy: str) -> None:
    """Refuse weights that a target cannot hold, all of them at once.

    Args:
        source: The weights.
        format: The name of the format.
        reason: Why it cannot hold a weight.
        remedy: The rule that it could hold.

    Raises:
        ExportError: Naming some of the weights, their rules and the reasons.
    """
    wrong = [(weight, why) for weight in source.quantized if (why := reason(weight)) is not None]
    if not wrong:
        return
    lines = [f"{weight.original} ({weight.rule}; shape {tuple(weight.shape)}): {why}" for weight, why in wrong[:3]]
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise ExportError(
        f'format="{format}" cannot hold {len(wrong)} of {len(source.quantized)} quantized weights: {"; ".join(lines)}'
        f"{more}. Train them with {remedy}, or export to another format"
    )


def why_not_in_groups(weight: Weight) -> str | None:
    """Say why a format of integers in groups along rows cannot hold a weight; None if it can."""
    codec = weight.codec
    assert codec is not None
    if codec.book.scale_unit == 1.0:
        return f"it holds the integers int2 to int8, not {codec.book.name}"
    if len(weight.shape) != 2:
        return "it holds matrices only; exclude it, or pass as_floats=..."
    if weight.group is None:
        return "its groups do not run along rows; axis=0 makes them (for Conv1D axis=1, and export with transpose=...)"
    if weight.row % weight.group:
        return f"groups of {weight.group} do not divide its rows of {weight.row} elements"
    return None


def check_only_tensors(source: Source, format: str, remedy: str) -> None:
    """Refuse entries of the state dict that are no tensors.

    Args:
        source: The weights.
        format: The name of the format.
        remedy: What to do.

    Raises:
        ExportError: Naming the first of them.
    """
    if source.others:
        raise ExportError(f"{format} holds tensors only, and {next(iter(source.others))} is none; {remedy}")
