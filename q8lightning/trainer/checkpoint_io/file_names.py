"""Know the files that the Trainer saves for itself, by how their names begin."""

import os

from q8lightning.system.paths import PathLike

_EXACT = (".lr_find_", ".scale_batch_size_", ".temp.ckpt")
"""Files of the tuner, and of processes that were spawned."""

_URGENT = ("hpc_ckpt_",)
"""Files that are saved when SLURM is about to end the process."""


def is_exact(path: PathLike) -> bool:
    """Whether a file must come back exactly, because the Trainer loads it again a moment later."""
    return os.path.basename(path).startswith(_EXACT)


def is_urgent(path: PathLike) -> bool:
    """Whether a file must be on the disk when the save returns, because the process may end then."""
    return os.path.basename(path).startswith(_URGENT)
