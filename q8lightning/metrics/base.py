"""The base of the metrics: states that are float64 sums, and their plot.

Metrics share a state's name only if they are updated alike. A MetricCollection takes metrics whose states have the same
names, and the same values after the first update, for one metric, and updates only the first from then on.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from q8lightning.metrics.readable_plot import make_readable

Values = Tensor | dict[str, Tensor] | Sequence[Tensor] | Sequence[dict[str, Tensor]]
"""One or several results of a metric."""


class QuantizationMetric(Metric):
    """A metric of what quantization costs or saves.

    An update replaces the states, which are float64, instead of adding in place. So a state becomes float64 again if
    ``.to(torch.bfloat16)`` of a surrounding module has converted it.
    """

    full_state_update = False

    def plot(self, val: Values | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Plot one value, or several values in their order.

        Args:
            val: A result of ``compute`` or ``forward``, or a list of results; the metric's present value if missing.
            ax: The matplotlib axes to draw into; new ones if missing.

        Returns:
            The matplotlib figure, None if ``ax`` was given, and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure, axes = self._plot(val, ax)
        make_readable(axes)
        return figure, axes

    def _add_zeros(self, state: str, *shape: int, reduce: Literal["sum", "max"] = "sum") -> None:
        """Add a state of float64 zeros on the metric's device."""
        zeros = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.add_state(state, default=zeros, dist_reduce_fx=reduce)

    def _count_as_update(self, update: Callable[[Tensor], None], argument: Tensor) -> None:
        """Call ``update`` as torchmetrics calls the method of this name: no gradients, no cached result."""
        self._wrap_update(update)(argument)


class SquaredErrorMetric(QuantizationMetric):
    """A metric of the power of an error and of a signal.

    Args:
        state: The name of its only state. Only metrics with the same ``update`` may share it.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, state: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums_name = state
        self._add_zeros(state, 2)

    @property
    def sums(self) -> Tensor:
        """The sums of squares of the error and of the signal, ``[2]`` float64."""
        sums: Tensor = getattr(self, self._sums_name)
        return sums

    def _add(self, sums: Tensor) -> None:
        setattr(self, self._sums_name, self.sums + sums)
