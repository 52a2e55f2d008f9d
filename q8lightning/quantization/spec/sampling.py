"""Which part of a large tensor is looked at where all of it would take too long: an eighth, in stretches, by a hash.

The same from save to save. Update directions of more than ``WHOLE`` elements are judged by it on every device; a CPU
judges them by it, and measures what encoding has lost, from ``WHOLE_ON_CPU`` on.
"""

from functools import lru_cache

import torch
from torch import Tensor

from q8lightning.quantization.spec.block_choice import mix
from q8lightning.system.ambient import lasting

STRETCH = 8192
"""Elements in a row that are taken or left together; a multiple of every block size."""

ONE_IN = 8
"""Of so many stretches in a row, one is taken."""

WHOLE = 2**20
"""Tensors of up to so many elements are looked at in whole."""

WHOLE_ON_CPU = 2**15
"""The same where a CPU measures; a sample has at least 16 stretches there, too."""


@lru_cache(maxsize=256)
@lasting()
def stretches_of(numel: int, stretch: int = STRETCH, whole: int | None = None) -> Tensor | None:
    """Return the numbers of the stretches that are taken of a tensor, None if it is looked at in whole.

    Of each ``ONE_IN`` stretches one is taken, not always the one at the same place: rows may be as long as all of them.
    The last elements, too few for ``ONE_IN`` stretches, are never taken.

    Args:
        numel: Elements of the tensor.
        stretch: Elements of a stretch.
        whole: Tensors of up to so many elements are looked at in whole, ``WHOLE`` unless it is given.

    Returns:
        ``[stretches]`` int64 on the CPU, in ascending order.
    """
    if numel <= (WHOLE if whole is None else whole):
        return None
    first = torch.arange(numel // (stretch * ONE_IN), dtype=torch.int64, device="cpu")
    return first * ONE_IN + mix(first) % ONE_IN


def weight_of(numel: int) -> float:
    """Return by how much a sum over the stretches of a tensor is to be multiplied to stand for all of it."""
    stretches = stretches_of(numel)
    return 1.0 if stretches is None else numel / (len(stretches) * STRETCH)


def stretches_on_cpu(numel: int, block_size: int) -> tuple[Tensor | None, int]:
    """Return which stretches a CPU takes of a tensor, None if it is looked at in whole, and how long each is.

    Args:
        numel: Elements of the tensor.
        block_size: What the length is a multiple of.
    """
    length = min(STRETCH, max(block_size, 1 << (numel // 128).bit_length() >> 1))
    return stretches_of(numel, length, max(WHOLE_ON_CPU, 128 * length - 1)), length
