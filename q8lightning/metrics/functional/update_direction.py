"""How far encoded moments turn Adam's steps."""

import math

from torch import Tensor

from q8lightning.metrics.functional.checks import check_floats, check_sums
from q8lightning.metrics.functional.reconstruction import relative_error_compute, squared_error_update
from q8lightning.system.ambient import neutral


def check_eps(eps: float) -> None:
    """Raise ValueError unless ``eps`` is finite and not negative."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0, got {eps!r}; pass the eps of the optimizer, such as 1e-8")


def update_direction(exp_avg: Tensor, exp_avg_sq: Tensor, eps: float) -> Tensor:
    """Return ``exp_avg / (sqrt(exp_avg_sq) + eps)`` in float64, ``[*shape]``, in units of the learning rate.

    NaN where ``exp_avg_sq`` is negative, or both moments and ``eps`` are 0, as in Adam's own step.
    """
    return exp_avg.double() / (exp_avg_sq.double().sqrt() + eps)


@neutral()
def update_direction_update(
    exp_avg: Tensor, exp_avg_sq: Tensor, decoded_exp_avg: Tensor, decoded_exp_avg_sq: Tensor, eps: float
) -> Tensor:
    """Reduce both moments and their decoded values, ``[*shape]`` floats each, to ``[2]`` float64.

    Returns:
        The sum of squared differences between both directions, and the sum of squares of the original; zeros for empty
        tensors.
    """
    check_floats(
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        decoded_exp_avg=decoded_exp_avg,
        decoded_exp_avg_sq=decoded_exp_avg_sq,
    )
    direction = update_direction(exp_avg, exp_avg_sq, eps)
    return squared_error_update(update_direction(decoded_exp_avg, decoded_exp_avg_sq, eps), direction)


def update_direction_from_sums(sums: Tensor) -> Tensor:
    """Add up sums of :func:`update_direction_update`, ``[..., 2]`` float64, over all rows to ``[2]``."""
    check_sums(sums, 2, "sums")
    return sums.reshape(-1, 2).sum(dim=0)


def update_direction_error(
    exp_avg: Tensor, exp_avg_sq: Tensor, decoded_exp_avg: Tensor, decoded_exp_avg_sq: Tensor, eps: float = 1e-8
) -> Tensor:
    """Return the relative error of ``d = exp_avg / (sqrt(exp_avg_sq) + eps)``, ``sqrt(sum (d' - d)² / sum d²)``.

    Args:
        exp_avg: ``[*shape]`` floats, Adam's first moment.
        exp_avg_sq: ``[*shape]`` floats, its second moment, never negative.
        decoded_exp_avg: ``[*shape]`` floats, the decoded first moment.
        decoded_exp_avg_sq: ``[*shape]`` floats, the decoded second moment.
        eps: The eps of the optimizer.

    Returns:
        ``[]`` float64, a ratio; 0 if nothing was lost, infinity if only the original direction is zero.

    Raises:
        ValueError: If the tensors are not real floats of one shape, or ``eps`` is negative or not finite.

    Example:
        >>> import torch
        >>> m, v = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 4.0])
        >>> update_direction_error(m, v, 1.5 * m, v)
        tensor(0.5000, dtype=torch.float64)
        >>> update_direction_error(m, v, m, torch.tensor([4.0, 0.0]))  # a second moment must never become zero
        tensor(1.7889e+08, dtype=torch.float64)
    """
    check_eps(eps)
    return relative_error_compute(
        update_direction_update(exp_avg, exp_avg_sq, decoded_exp_avg, decoded_exp_avg_sq, eps)
    )
