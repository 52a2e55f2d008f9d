"""The door that every save of a Trainer passes: encode what the policy selects, hand the rest of the work on."""

import os
import pickle
from collections.abc import Callable
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from q8lightning.checkpoint.payload import FORMAT_VERSION, NewerFormatError
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.state_dict import SUMMARY_KEY, ModelNames, encode_checkpoint
from q8lightning.checkpoint.writer import write_checkpoint

_TUNER_FILES = (".lr_find_", ".scale_batch_size_", ".temp.ckpt")
"""What the Trainer's tuner, or its launcher of processes, saves to restore live weights from a moment later; it must
come back exactly."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's default CheckpointIO, except that local files are flushed to the disk before they get their name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; see :func:`q8lightning.checkpoint.writer.write_checkpoint`."""
        filesystem, local_path = url_to_fs(str(path))
        if storage_options is None and isinstance(filesystem, LocalFileSystem):
            write_checkpoint(checkpoint, local_path)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[arg-type]


class QuantizedCheckpointIO(_WrappingCheckpointIO):
    """Saves checkpoints quantized, through whatever CheckpointIO it wraps; loading needs nothing special.

    The callback installs it; ``Trainer(plugins=[QuantizedCheckpointIO()])`` does the same, and its methods work without
    a Trainer. Passed by itself it does not know the model: buffers other than BatchNorm's running statistics are then
    told from weights by nothing but the policy's rules.

    Args:
        checkpoint_io: What writes, reads and removes files. Lightning's default is replaced by a durable version of it,
            also where another wrapper stands between.
        checkpoint: A preset, ``"resume"`` or ``"compact"``, or a policy.

    Raises:
        ValueError: If there is no such preset.
    """

    def __init__(
        self, checkpoint_io: CheckpointIO | None = None, checkpoint: str | CheckpointPolicy = "resume"
    ) -> None:
        super().__init__(checkpoint_io or DurableCheckpointIO())
        self.policy = CheckpointPolicy.of(checkpoint)
        self.describe_model: Callable[[], ModelNames] | None = None
        """Asked at each save for what only the model knows; set by the callback."""
        _make_durable(self)

    @property
    def base(self) -> CheckpointIO:
        """The wrapped CheckpointIO."""
        assert self.checkpoint_io is not None
        return self.checkpoint_io

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Encode a copy of ``checkpoint``, which is left as it is, and save it to ``path``."""
        if not os.path.basename(path).startswith(_TUNER_FILES):
            names = self.describe_model() if self.describe_model is not None else None
            checkpoint = encode_checkpoint(checkpoint, self.policy, names)
        self.base.save_checkpoint(checkpoint, path, storage_options=storage_options)  # type: ignore[arg-type]

    def load_checkpoint(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the checkpoint at ``path``, decoded; further arguments go to the wrapped CheckpointIO.

        Raises:
            NewerFormatError: If the file was written in a later format than this version reads.
        """
        try:
            checkpoint = self.base.load_checkpoint(path, *args, **kwargs)  # type: ignore[arg-type]
        except pickle.UnpicklingError as error:
            if "q8lightning.checkpoint.payload.rebuild_v" in str(error):
                raise NewerFormatError("later than 1") from error
            raise
        summary = checkpoint.get(SUMMARY_KEY)
        if isinstance(summary, dict) and summary.get("format_version", 0) > FORMAT_VERSION:
            raise NewerFormatError(summary["format_version"])
        return checkpoint

    def teardown(self) -> None:
        """Tear the wrapped CheckpointIO down."""
        self.base.teardown()


def find_quantized_io(checkpoint_io: CheckpointIO | None) -> QuantizedCheckpointIO | None:
    """Return the :class:`QuantizedCheckpointIO` in a chain of wrappers, if there is one."""
    while checkpoint_io is not None and not isinstance(checkpoint_io, QuantizedCheckpointIO):
        checkpoint_io = checkpoint_io.checkpoint_io if isinstance(checkpoint_io, _WrappingCheckpointIO) else None
    return checkpoint_io


def _make_durable(checkpoint_io: _WrappingCheckpointIO) -> None:
    """Replace Lightning's plain CheckpointIO at the end of a chain of wrappers; leave any other one alone."""
    base = checkpoint_io.checkpoint_io
    if isinstance(base, _WrappingCheckpointIO):
        _make_durable(base)
    elif base is None or type(base) is TorchCheckpointIO:
        checkpoint_io._checkpoint_io = DurableCheckpointIO()
        checkpoint_io._base_checkpoint_io_configured = True
