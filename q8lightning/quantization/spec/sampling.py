"""Choose a sample of a large tensor, where measuring all of it would take too long.

A hash chooses one of every eight stretches, the same in every save. Every device samples update directions of more than
``WHOLE`` elements. A CPU samples them, and what encoding loses, from ``WHOLE_ON_CPU`` elements on.
"""

from functools import lru_cache

import torch
from torch import Tensor

from q8lightning.quantization.spec.block_choice import mix
from q8lightning.system.ambient import lasting

STRETCH = 8192
"""Elements of a stretch, a multiple of every block size."""

ONE_IN = 8
"""Of so many consecutive stretches, the sample has one."""

WHOLE = 2**20
"""The largest tensor, in elements, that is measured in whole."""

WHOLE_ON_CPU = 2**15
"""The largest tensor, in elements, that a CPU measures in whole. Its samples have 16 stretches or more."""


@lru_cache(maxsize=256)
@lasting()
def stretches_of(numel: int, stretch: int = STRETCH, whole: int | None = None) -> Tensor | None:
    """Return the numbers of the stretches in the sample of a tensor, None if it is measured in whole.

    The place of the chosen one among its ``ONE_IN`` stretches changes, since a row of the tensor may be as long as all
    of them. The last elements of a tensor, too few for ``ONE_IN`` stretches, are in no sample.

    Args:
        numel: Elements of the tensor.
        stretch: Elements of a stretch.
        whole: The largest tensor that is measured in whole; None for ``WHOLE``.

    Returns:
        ``[stretches]`` int64 on the CPU, in ascending order.
    """
    if numel <= (WHOLE if whole is None else whole):
        return None
    first = torch.arange(numel // (stretch * ONE_IN), dtype=torch.int64, device="cpu")
    return first * ONE_IN + mix(first) % ONE_IN


def weight_of(numel: int) -> float:
    """Return the factor by which a sum over the sample of a tensor stands for all of it."""
    stretches = stretches_of(numel)
    return 1.0 if stretches is None else numel / (len(stretches) * STRETCH)


def stretches_on_cpu(numel: int, block_size: int) -> tuple[Tensor | None, int]:
    """Return the sample of a tensor on a CPU as :func:`stretches_of` does, and the elements of a stretch.

    Args:
        numel: Elements of the tensor.
        block_size: Elements of a block. A stretch is a multiple of it.
    """
    length = min(STRETCH, max(block_size, 1 << (numel // 128).bit_length() >> 1))
    return stretches_of(numel, length, max(WHOLE_ON_CPU, 128 * length - 1)), length
