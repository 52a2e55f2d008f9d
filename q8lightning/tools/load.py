"""Load a checkpoint, decoded and compared with its sums, without a Trainer."""

import os
from pathlib import Path
from typing import Any

import torch

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.file.read import read_checkpoint
from q8lightning.checkpoint.format import NewerFormatError, check_version
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.layout.sections import summary_in
from q8lightning.checkpoint.payload import register_functions
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.checkpoint.tree import rebuild
from q8lightning.system.arguments import check_bool
from q8lightning.tools.open_checkpoint import explain, open_checkpoint


def load(
    path: str | os.PathLike[str],
    map_location: str | torch.device | dict[str, str] | None = "cpu",
    *,
    verify: bool = True,
    trust: bool = False,
) -> Any:
    """Load a checkpoint with ordinary tensors, quantized or not, after everything was compared with its sums.

    ``torch.load(path, weights_only=True)`` returns the same, and compares what is quantized. A folder of a sharded
    training comes back as the file that it can be decompressed to. The key ``q8lightning`` has the summary of the save.

    Args:
        path: The file or folder.
        map_location: Where tensors go, as for ``torch.load``; for a folder the host.
        verify: Compare the file with its sums.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.

    Raises:
        ToolError: If there is no such file or it is no checkpoint.
        CorruptCheckpointError: If the content is not what was saved.
        NewerFormatError: If the file was written in a later format than this version reads.

    Example:
        >>> import q8lightning
        >>> checkpoint = q8lightning.load("last.ckpt")  # doctest: +SKIP
        >>> model.load_state_dict(checkpoint["model"])  # doctest: +SKIP
    """
    check_bool("verify", verify)
    check_bool("trust", trust)
    if Path(path).is_dir():
        opened = open_checkpoint(path, trust)
        return rebuild(opened.content, lambda leaf: leaf.read() if isinstance(leaf, UnreadTensor) else leaf)
    register_functions()  # torch's list may have been cleared
    try:
        with explained(path):
            content = read_checkpoint(
                path, lambda file: torch.load(file, map_location=map_location, weights_only=not trust), verify
            )
    except (CorruptCheckpointError, NewerFormatError):
        raise
    except Exception as error:
        raise explain(os.fspath(path), error) from error
    check_version(summary_in(content))
    return content
