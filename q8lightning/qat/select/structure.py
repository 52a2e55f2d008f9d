"""Tell in every step, fast, whether a parameter or a module was added, removed or replaced."""

from itertools import chain
from operator import is_

from torch import nn

_END = (object(),)
"""An object behind the last part: a model with one part more or less has another object in its place."""


class Structure:
    """The parameters and modules that a model had when this was made. They are kept alive, so identities stay true.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        # Views of dictionaries show what is in them now, and comparing them runs no line of Python for each part. It
        # takes 0.03 ms for 240 modules with 290 parameters, a tenth of what named_parameters() takes.
        dictionaries = (each for owner in module.modules() for each in (owner._parameters, owner._modules))
        self._views = [*(each.values() for each in dictionaries), _END]
        self._parts = [*chain.from_iterable(self._views)]
        self._gathered: list[object] = []

    def unchanged(self) -> bool:
        """Tell whether the model still has the same parts at the same places, or what stands in for them."""
        if all(map(is_, chain.from_iterable(self._views), self._parts)):
            return True
        now = self.now() if self._gathered else []
        each = zip(now, self._parts, self._gathered, strict=False)
        return len(now) == len(self._parts) and all(one is part or one is other for one, part, other in each)

    def now(self) -> list[object]:
        """Return the parts that the model has now, for :meth:`allow`."""
        return [*chain.from_iterable(self._views)]

    def allow(self, parts: list[object]) -> None:
        """Let these stand in for the parts: what sharded parameters are gathered into is at their places for a while.

        Args:
            parts: As many as the model has.
        """
        known = self._gathered or self._parts
        each = zip(parts, self._parts, known, strict=True)
        self._gathered = [other if one is part else one for one, part, other in each]
