"""Convert a checkpoint tensor by tensor: what compressing and decompressing have in common."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from q8lightning.checkpoint.file.pack.small_tensors import SmallTensors
from q8lightning.checkpoint.file.write import write_durably
from q8lightning.system.arguments import check_bool
from q8lightning.tools.convert.write_tensor_by_tensor import Store, write_tensor_by_tensor
from q8lightning.tools.open_checkpoint import OpenCheckpoint, Progress, ToolError
from q8lightning.tools.tensors import Value, decoded_bytes


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        path: The file that was written.
        bytes_before: Size of the file or folder that was read.
        bytes_after: Size of the file that was written.
        converted: How many tensors were encoded, or decoded; tied ones count once.
        kept: How many tensors were encoded before and stayed as they were.
        metrics: What was lost, as the file's summary has it, such as ``{"weights/sqnr_db": 95.3,
            "update_direction_error": 0.011}``; empty if nothing was encoded.
        warnings: Warnings about single tensors.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    converted: int
    kept: int
    metrics: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file became; below 1 if it became larger."""
        return self.bytes_before / self.bytes_after


class Converter(ABC):
    """Replaces the tensors of a checkpoint while it is written, and counts them.

    Args:
        opened: The checkpoint.
        content: What is written, with the original tensors.
        values: The tensors to convert; one that occurs twice counts once.
        progress: Called with the bytes of values converted so far, and of all.

    Attributes:
        converted: How many tensors were encoded, or decoded.
        kept: How many tensors stay encoded as they were.
        warnings: Warnings about single tensors.
    """

    def __init__(self, opened: OpenCheckpoint, content: Any, values: Iterable[Value], progress: Progress) -> None:
        self.opened = opened
        self.content = content
        self.converted = 0
        self.kept = 0
        self.warnings: list[str] = []
        self._progress = progress
        self._bytes_done = 0
        self._bytes = sum(decoded_bytes(value) for value in {id(value): value for value in values}.values())

    def advance(self, value: Value) -> None:
        """Count a value as done."""
        self._bytes_done += decoded_bytes(value)
        self._progress(self._bytes_done, self._bytes)

    @abstractmethod
    def replace(self, value: Any, store: Store) -> Any:
        """Return what to write in place of an object; see :data:`Replace` of the writer."""

    @property
    def metrics(self) -> dict[str, float]:
        """What was lost; complete once everything is written."""
        return {}

    def write(
        self, target: Path, check: Callable[[], None] = lambda: None, small: SmallTensors | None = None
    ) -> Conversion:
        """Write the content and return the result.

        Args:
            target: The file.
            check: Called before the file takes its name; what it raises keeps the file from being written.
            small: Tensors to store together.

        Raises:
            CorruptCheckpointError: If the checkpoint is damaged; nothing is written then.
            OSError: If the target cannot be written.
        """
        locations = self.opened.locations

        def write(file: IO[bytes]) -> None:
            with self.opened.verified():  # otherwise damage would get a new sum and never be found
                write_tensor_by_tensor(
                    self.content, file, self.replace, lambda storage: locations.get(storage, "cpu"), small
                )
            check()

        try:
            write_durably(target, write)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error  # not every error knows the file
        return Conversion(
            path=target,
            bytes_before=self.opened.size,
            bytes_after=target.stat().st_size,
            converted=self.converted,
            kept=self.kept,
            metrics=self.metrics,
            warnings=tuple(self.warnings),
        )


def check_target(source: str | os.PathLike[str], target: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the file to write.

    Raises:
        ToolError: If it is the file that is read, it exists and may not be overwritten, or its folder does not exist.
    """
    path = Path(target)
    if path.exists() and os.path.exists(source) and os.path.samefile(source, path):
        raise ToolError(f"{path} is the file that is read; write to another one, and move it when it is there")
    check_not_there(path, overwrite)
    return path


def check_not_there(path: Path, overwrite: bool) -> None:
    """Raise ToolError for a file that must not be overwritten, or whose folder does not exist."""
    check_bool("overwrite", overwrite)
    if path.is_dir():
        raise ToolError(f"{path} is a directory; name the file to write")
    if path.exists() and not overwrite:
        raise ToolError(f"{path} exists; pass --force (from Python: overwrite=True) to overwrite it")
    if not path.parent.is_dir():
        raise ToolError(f"there is no folder {path.parent}; make it first")
