"""Write a checkpoint with ordinary tensors, which loads without q8lightning."""

import os
from typing import Any

from torch import Tensor

from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.layout.sections import CODES_KEY, INPUTS_KEY, PARAMETERS_KEY, SUMMARY_KEY
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.tools.convert.conversion import Conversion, Converter, check_target
from q8lightning.tools.convert.encode_parts import without_summary
from q8lightning.tools.convert.write_tensor_by_tensor import Store, Stored
from q8lightning.tools.open_checkpoint import OpenCheckpoint, Progress, ToolError, open_checkpoint, silent
from q8lightning.tools.tensors import is_encoded, tensors_in


def decompress(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    trust: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write a checkpoint with ordinary tensors, which ``torch.load`` reads without q8lightning.

    A folder becomes one file, as Lightning's own consolidation makes it, also if nothing in it is encoded. A Trainer on
    one device resumes from it. One tensor at a time is in memory. Of the summary only what stays true is kept: how
    weights were trained quantized, the names of optimizers' parameters, and how often the run was restored from a
    quantized checkpoint.

    Args:
        source: The file or folder to read.
        target: The file to write.
        overwrite: Overwrite the target if it exists.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.
        progress: Called with the bytes of values decoded so far, and of all.

    Raises:
        ToolError: If nothing in the source, a file, is encoded, it cannot be read, or the target must not be written.
        CorruptCheckpointError: If the source is damaged; nothing is written then.
        NewerFormatError: If the source was written in a later format than this version reads.
        OSError: If the target cannot be written.

    Example:
        >>> from q8lightning.tools import decompress
        >>> decompress("small.ckpt", "large.ckpt").converted  # doctest: +SKIP
    """
    path = check_target(source, target, overwrite)
    opened = open_checkpoint(source, trust)
    if not opened.in_shards and not any(is_encoded(value) for _, value in tensors_in(opened.content)):
        raise ToolError(f"{opened.path} holds no quantized tensor; it loads without q8lightning as it is")
    return _Decoder(opened, progress).write(path)


class _Decoder(Converter):
    """Replaces payloads, and tensors that have not been read, by their values."""

    def __init__(self, opened: OpenCheckpoint, progress: Progress) -> None:
        payloads = [value for _, value in tensors_in(opened.content) if not isinstance(value, Tensor)]
        super().__init__(opened, _content(opened), payloads, progress)
        self._stored: dict[int, Stored] = {}

    def replace(self, value: Any, store: Store) -> Any:
        if not isinstance(value, QuantizedTensor | UnreadTensor):
            return value
        if id(value) not in self._stored:
            self._stored[id(value)] = store(self.opened.values(value), self.opened.location(value))
            self.converted += is_encoded(value)
            self.advance(value)
        return self._stored[id(value)]


def _content(opened: OpenCheckpoint) -> Any:
    """Return the checkpoint with the part of its summary that stays true."""
    if not opened.summary:
        return opened.content
    content = without_summary(opened.content)
    kept = ("restored", CODES_KEY, INPUTS_KEY, PARAMETERS_KEY)
    left = {key: opened.summary[key] for key in kept if opened.summary.get(key)}
    if left:
        content[SUMMARY_KEY] = {"format_version": FORMAT_VERSION, "policy": None, "restored": 0, **left}
    return content
