"""Name what lies in a folder of shards: its files, and the states that DCP saves.

.. code-block:: text

    step=100.ckpt/
      __0_0.<save>.distcp   what the first process wrote; see ``shard_file.py``
      __1_0.<save>.distcp
      .metadata             DCP's: which tensors there are, and in which file each chunk is
      meta.pt               Lightning's: everything that is no state of a model or an optimizer, and our summary
"""

import os

META = "meta.pt"
METADATA = ".metadata"
"""What Lightning and DCP call their files."""

SHARDS_KEY = "shards"
"""Where the summary in ``meta.pt`` says which files belong to the checkpoint."""

CHUNKS_KEY = "shards"
"""Where the entry of a weight that is trained quantized says which chunks have its codes."""

OPTIMIZER = "optimizer_"
"""What the state of each optimizer is called, before its number."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint in shards, or what is left of one."""
    names = os.listdir(path) if os.path.isdir(path) else ()
    return any(name in (META, METADATA) or name.endswith(".distcp") for name in names)
