"""The moments of a fit between which training may change what a checkpoint was made of."""


class Moments:
    """Counts the hooks of a fit in which somebody else may run, for a CheckpointIO that asks which moment it is."""

    def __init__(self) -> None:
        self._count = 0
        self._fitting = False

    def __call__(self) -> int | None:
        """Return the number of the moment; None outside of a fit, where no hook says when it is over."""
        return self._count if self._fitting else None

    def begin(self) -> None:
        """A fit begins, whose hooks call :meth:`end_one`."""
        self._fitting = True

    def end_one(self) -> None:
        """A moment is over."""
        self._count += 1

    def end(self) -> None:
        """No more hooks follow before somebody else may change anything."""
        self._fitting = False
