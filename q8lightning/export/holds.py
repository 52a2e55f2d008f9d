"""Find the weights that a target cannot hold, and say which rule it could."""

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
