"""How far decoded tensors are from the originals."""

from typing import Any

import torch
from torch import Tensor

from q8lightning.metrics.base import QuantizationMetric, SquaredErrorMetric
from q8lightning.metrics.functional.reconstruction import (
    max_error_from_statistics,
    max_error_update,
    relative_error_compute,
    sqnr_compute,
    squared_error_from_statistics,
    squared_error_update,
)


class _SquaredReconstructionError(SquaredErrorMetric):
    is_differentiable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("reconstruction_sums", **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add decoded values and their originals, ``[*shape]`` floats each. ValueError for other dtypes or shapes."""
        self._add(squared_error_update(preds, target))

    def update_from_statistics(self, statistics: Tensor) -> None:
        """Add statistics of a codec, ``[..., 5]`` float64. ValueError for another dtype or shape.

        :mod:`q8lightning.metrics.functional.reconstruction` says what they are.
        """
        self._count_as_update(self._add, squared_error_from_statistics(statistics))


class ReconstructionSQNR(_SquaredReconstructionError):
    r"""The signal-to-quantization-noise ratio of decoded values, in dB.

    .. math:: 10 \log_{10} \frac{\sum x^2}{\sum (x' - x)^2}

    The sums are over all elements of all updates, in float64. ``forward`` and ``update`` take ``preds``, the decoded
    values, and ``target``, the originals, ``[*shape]`` floats each; :meth:`update_from_statistics` takes statistics of
    a codec. ``compute`` returns ``[]`` float64: infinity if nothing was lost, as before any update, and -infinity if
    only the original is zero.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ReconstructionSQNR()
        >>> metric(torch.tensor([1.0, -2.0, 2.1]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(29.5424, dtype=torch.float64)
        >>> metric.update_from_statistics(torch.tensor([0.99, 0.0, 0.5, 0.0, 0.0], dtype=torch.float64))
        >>> metric.compute()  # 10 log10(9 / 1)
        tensor(9.5424, dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the ratio in dB, ``[]`` float64."""
        return sqnr_compute(self.sums)


class RelativeReconstructionError(_SquaredReconstructionError):
    r"""The error of decoded values relative to their size.

    .. math:: \sqrt{\frac{\sum (x' - x)^2}{\sum x^2}}

    The sums are over all elements of all updates, in float64. ``forward`` and ``update`` take ``preds``, the decoded
    values, and ``target``, the originals, ``[*shape]`` floats each; :meth:`update_from_statistics` takes statistics of
    a codec. ``compute`` returns ``[]`` float64: 0 if nothing was lost, as before any update, and infinity if only the
    original is zero.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = RelativeReconstructionError()
        >>> metric(torch.tensor([1.0, -2.0, 2.1]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(0.0333, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """Return the ratio, ``[]`` float64."""
        return relative_error_compute(self.sums)


class MaxReconstructionError(QuantizationMetric):
    r"""The largest absolute error of any decoded value, in its own units.

    .. math:: \max |x' - x|

    ``forward`` and ``update`` take ``preds``, the decoded values, and ``target``, the originals, ``[*shape]`` floats
    each; :meth:`update_from_statistics` takes statistics of a codec. ``compute`` returns ``[]`` float64: 0 if nothing
    was lost, as before any update.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = MaxReconstructionError()
        >>> metric(torch.tensor([1.0, -2.0, 2.25]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    max_reconstruction_error: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_zeros("max_reconstruction_error", reduce="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Compare decoded values and originals, ``[*shape]`` floats each. ValueError for other dtypes or shapes."""
        self._raise_to(max_error_update(preds, target))

    def update_from_statistics(self, statistics: Tensor) -> None:
        """Take statistics of a codec, ``[..., 5]`` float64. ValueError for another dtype or shape.

        :mod:`q8lightning.metrics.functional.reconstruction` says what they are.
        """
        self._count_as_update(self._raise_to, max_error_from_statistics(statistics))

    def compute(self) -> Tensor:
        """Return the largest error, ``[]`` float64."""
        return self.max_reconstruction_error

    def _raise_to(self, error: Tensor) -> None:
        self.max_reconstruction_error = torch.maximum(self.max_reconstruction_error, error)
