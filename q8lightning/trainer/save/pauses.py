"""Count the moments of a fit between which training may change what was saved.

Nothing tells that a tensor was written to through ``Tensor.data`` or NumPy, as averages of weights are put in place. So
saves share a moment only where no code of the user's runs between them: if ModelCheckpoints made them in one hook.
"""

import inspect

from q8lightning.trainer.lightning_api.both_packages import is_from_lightning


class Moments:
    """Names the moments of a fit, between which other code may change the state; asked by the CheckpointIO."""

    def __init__(self) -> None:
        self._count = 0
        self._fitting = False

    def __call__(self) -> int | None:
        """Return the number of the moment; None outside of a fit, where no hook tells the end of a moment.

        Called in a save. A save that no ModelCheckpoint makes has a moment of its own.
        """
        if not self._fitting:
            return None
        if is_made_by_model_checkpoint():
            return self._count
        self.end_one()
        self.end_one()
        return self._count - 1

    def begin(self) -> None:
        """Begin a fit, whose hooks call :meth:`end_one`."""
        self._fitting = True

    def end_one(self) -> None:
        """End a moment."""
        self._count += 1

    def end(self) -> None:
        """End the fit: from now on the state may change without a hook."""
        self._fitting = False


def is_made_by_model_checkpoint() -> bool:
    """Whether this is called in a save that Lightning's ModelCheckpoint makes, in a hook that Lightning calls."""
    frame, is_in_callback = inspect.currentframe(), False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        is_callback = is_from_lightning(module) and module.endswith(".callbacks.model_checkpoint")
        if is_in_callback and not is_callback:
            return is_from_lightning(module)  # otherwise a subclass may do something between two saves
        is_in_callback, frame = is_callback, frame.f_back
    return False
