"""How many times smaller checkpoints are."""

from typing import Any

from torch import Tensor

from q8lightning.metrics.base import QuantizationMetric
from q8lightning.metrics.functional.compression import compression_ratio_compute, compression_ratio_update


class CompressionRatio(QuantizationMetric):
    r"""How many times smaller something is stored.

    .. math:: \frac{\sum \text{original bytes}}{\sum \text{stored bytes}}

    ``forward`` and ``update`` take two counts, ints or tensors of integers, whose elements are added up. They wait for
    tensors on a GPU. ``compute`` returns ``[]`` float64: 1 if both sums are zero, as before any update, and infinity if
    only the stored bytes are.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = CompressionRatio()
        >>> metric.update(original_bytes=4096, stored_bytes=1040)
        >>> metric.update(original_bytes=1024, stored_bytes=1024)
        >>> metric.compute()
        tensor(2.4806, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0

    byte_counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_zeros("byte_counts", 2)

    def update(self, original_bytes: int | Tensor, stored_bytes: int | Tensor) -> None:
        """Add counts of bytes. ValueError if one is negative or not whole."""
        self.byte_counts = self.byte_counts + compression_ratio_update(original_bytes, stored_bytes).to(
            self.byte_counts.device
        )

    def compute(self) -> Tensor:
        """Return the ratio, ``[]`` float64."""
        return compression_ratio_compute(self.byte_counts)
