"""Find the pairs of moments by which optimizers step, which are measured together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from q8lightning.checkpoint.encode.select.leaves import Leaf, is_encodable
from q8lightning.checkpoint.layout.optimizer_states import BASES, FIRST_OF_ADAM, SECONDS_OF_ADAM
from q8lightning.checkpoint.layout.sections import DEFAULT_EPS, is_in_state, is_state
from q8lightning.checkpoint.tree import Keys

_MOMENTS = (FIRST_OF_ADAM, *SECONDS_OF_ADAM)


class Pair(NamedTuple):
    """The moments of one parameter, of which at least one is selected and whose elements correspond.

    Attributes:
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        eps: The optimizer's.
        is_stepped_by: Whether the optimizer steps by these two. AMSGrad's first moment is in two pairs, one with each
            second moment, and the optimizer steps by the pair with the largest.
    """

    exp_avg: Leaf
    exp_avg_sq: Leaf
    eps: float
    is_stepped_by: bool


def pairs_of(leaves: Sequence[Leaf], encoded: set[int], epsilons: Mapping[Keys, float]) -> Iterator[Pair]:
    """Yield the pairs of moments.

    Args:
        leaves: All tensors of the checkpoint.
        encoded: The ids of those that are encoded.
        epsilons: The eps of each parameter's optimizer; see ``sections.epsilons_of``.
    """
    moments = {leaf.keys: leaf for leaf in leaves if is_state(leaf.place) and leaf.keys[-1] in _MOMENTS}
    rotated = {leaf.state for leaf in leaves if is_in_state(leaf.place) and leaf.place[4] in BASES}
    for keys, first in moments.items():
        if keys[-1] != FIRST_OF_ADAM or keys[:-1] in rotated:
            continue
        seconds = [moments[place] for key in SECONDS_OF_ADAM if (place := (*keys[:-1], key)) in moments]
        for second in seconds:
            if not encoded.isdisjoint((id(first.tensor), id(second.tensor))) and _correspond(first, second, encoded):
                yield Pair(first, second, epsilons.get(keys[:-1], DEFAULT_EPS), second is seconds[0])


def _correspond(first: Leaf, second: Leaf, encoded: set[int]) -> bool:
    """Whether elements at the same place in memory have the same index."""
    for leaf in (first, second):
        if id(leaf.tensor) not in encoded and not (leaf.storage and leaf.tensor.numel() and is_encodable(leaf.tensor)):
            return False
    one, two = first.tensor, second.tensor
    return one.shape == two.shape and one.stride() == two.stride() and one.device == two.device
