"""What the metrics share: their plot, and states that are float64 sums."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

Values = Tensor | dict[str, Tensor] | Sequence[Tensor] | Sequence[dict[str, Tensor]]
"""What a metric computed, once or several times."""


class QuantizationMetric(Metric):
    """A metric of what quantization costs or saves.

    States are float64 and are replaced, not added to in place: a state that ``.to(torch.bfloat16)`` of a surrounding
    module made a half one becomes float64 again with the first update.
    """

    full_state_update = False

    def plot(self, val: Values | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Plot one value, or several as they followed each other.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of that; the metric's present value if missing.
            ax: The matplotlib axes to draw into, if there are some already.

        Returns:
            The matplotlib figure (None if ``ax`` was given) and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)

    def _count_as_update(self, update: Callable[[Tensor], None], argument: Tensor) -> None:
        """Call ``update`` as torchmetrics calls the method of this name: no gradient, no result kept from before."""
        self._wrap_update(update)(argument)


class SquaredErrorMetric(QuantizationMetric):
    """A metric of the power of an error and of a signal, its state ``sums``, ``[2]`` float64 in this order."""

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", default=torch.zeros(2, dtype=torch.float64, device=self.device), dist_reduce_fx="sum")

    def _add(self, sums: Tensor) -> None:
        self.sums = self.sums + sums
