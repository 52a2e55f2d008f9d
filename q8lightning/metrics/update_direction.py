"""How far encoded moments turn Adam's steps."""

from typing import Any

from torch import Tensor

from q8lightning.metrics.base import SquaredErrorMetric
from q8lightning.metrics.functional.reconstruction import relative_error_compute
from q8lightning.metrics.functional.update_direction import (
    check_eps,
    update_direction_from_sums,
    update_direction_update,
)


class UpdateDirectionError(SquaredErrorMetric):
    r"""The error of Adam's update direction relative to its size: whether a resumed run steps the same way.

    .. math:: \sqrt{\frac{\sum (d' - d)^2}{\sum d^2}}, \qquad d = \frac{m}{\sqrt{v} + \epsilon}

    where m (``exp_avg``) and v (``exp_avg_sq``) are the moments, and d' is the direction of the decoded ones. The error
    of a small second moment counts here as much as it changes the step, while other metrics do not show it. Bias
    correction is left out, because it scales both directions alike, but for epsilon.

    ``forward`` and ``update`` take the moments and their decoded values, ``[*shape]`` floats each;
    :meth:`update_from_sums` takes sums. ``compute`` returns ``[]`` float64: 0 if nothing was lost, as before any
    update, and infinity if only the original direction is zero.

    Args:
        eps: The eps of the optimizer, finite and not negative.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``eps`` is negative or not finite.

    Example:
        >>> import torch
        >>> metric = UpdateDirectionError()
        >>> m, v = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 4.0])
        >>> metric(m, v, 1.5 * m, v)
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, eps: float = 1e-8, **kwargs: Any) -> None:
        check_eps(eps)
        super().__init__(f"update_direction_sums_{eps}", **kwargs)  # another eps makes another update
        self.eps = eps

    def update(self, exp_avg: Tensor, exp_avg_sq: Tensor, decoded_exp_avg: Tensor, decoded_exp_avg_sq: Tensor) -> None:
        """Add moments and their decoded values, ``[*shape]`` floats each. ValueError for other dtypes or shapes."""
        self._add(update_direction_update(exp_avg, exp_avg_sq, decoded_exp_avg, decoded_exp_avg_sq, self.eps))

    def update_from_sums(self, sums: Tensor) -> None:
        """Add sums of squared differences and of squared directions, ``[..., 2]`` float64 in this order.

        Raises:
            ValueError: For another dtype or shape.
        """
        self._count_as_update(self._add, update_direction_from_sums(sums))

    def compute(self) -> Tensor:
        """Return the ratio, ``[]`` float64."""
        return relative_error_compute(self.sums)
