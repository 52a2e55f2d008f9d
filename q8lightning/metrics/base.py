"""What the metrics share: their plot, and states that are float64 sums.

States have names that no metric has whose updates are others: a MetricCollection takes metrics with the same names and,
after the first update, the same values for one metric, and updates only the first of them from then on.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

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

    def _add_zeros(self, state: str, *shape: int, reduce: Literal["sum", "max"] = "sum") -> None:
        """Add a state of float64 zeros, where torchmetrics says that the metric is."""
        zeros = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.add_state(state, default=zeros, dist_reduce_fx=reduce)

    def _count_as_update(self, update: Callable[[Tensor], None], argument: Tensor) -> None:
        """Call ``update`` as torchmetrics calls the method of this name: no gradient, no result kept from before."""
        self._wrap_update(update)(argument)


class SquaredErrorMetric(QuantizationMetric):
    """A metric of the power of an error and of a signal.

    Args:
        state: The name of its only state, which only metrics with the same ``update`` may share.
        kwargs: Those of :class:`torchmetrics.Metric`.
    """

    def __init__(self, state: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums_name = state
        self._add_zeros(state, 2)

    @property
    def sums(self) -> Tensor:
        """The two sums, ``[2]`` float64: of the squares of the error, and of the signal."""
        sums: Tensor = getattr(self, self._sums_name)
        return sums

    def _add(self, sums: Tensor) -> None:
        setattr(self, self._sums_name, self.sums + sums)
