"""Tell in which pause of training a save is made, so that all saves of one pause are encoded once.

In a pause nothing changes the state. Nothing tells that a tensor was written to through ``Tensor.data`` or NumPy, as
averages of weights are put in place. So saves share a pause only where no code of the user's runs between them: if
ModelCheckpoints make them in one hook.
"""

import inspect
from collections.abc import Hashable

import lightning.pytorch as pl

from q8lightning.trainer.lightning_api.both_packages import is_from_lightning
from q8lightning.trainer.save.door import door_of


def pause_of(trainer: pl.Trainer) -> Hashable | None:
    """Return the pause of the save that this is called in; None where no hook tells when training goes on.

    A save that no ModelCheckpoint makes has a pause of its own.
    """
    door = door_of(trainer)
    if door is None or not door.training:
        return None
    hook = _hook_of_model_checkpoint()
    return object() if hook is None else (hook, trainer.current_epoch, trainer.fit_loop.total_batch_idx)


def _hook_of_model_checkpoint() -> str | None:
    """Return the hook in which Lightning's ModelCheckpoint saves, if Lightning itself has called that."""
    frame, hook = inspect.currentframe(), None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if is_from_lightning(module) and module.endswith(".callbacks.model_checkpoint"):
            hook = frame.f_code.co_name
        elif hook is not None:  # a subclass may do something between two saves
            return hook if is_from_lightning(module) else None
        frame = frame.f_back
    return None
