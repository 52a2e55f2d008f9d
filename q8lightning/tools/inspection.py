"""The result of inspecting a checkpoint: what it is, its tensors, and how large it is beside a plain one."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint.

    Attributes:
        path: Keys and indices that lead to it, joined by dots; policies match it.
        name: Its name for people: ``layer.weight: exp_avg`` for an optimizer's state whose parameter is known, or else
            the path.
        kind: ``weights``, a moment's key such as ``exp_avg``, or ``other``.
        shape: The shape of its values.
        dtype: The dtype of its values, without ``torch.``.
        codec: Codec, residual stage and block size, such as ``linear8+4/256``; None if it is not encoded.
        bytes: Bytes in the file; 0 if it is tied to an earlier tensor.
        decoded_bytes: Bytes of its values in memory; 0 if it is tied to an earlier tensor.
        tied_to: The name of the earlier tensor that it is tied to; None if there is none.
        sqnr_db: What its save lost, as a signal-to-noise ratio in dB, infinite for nothing; None if the summary does
            not have it.
    """

    path: str
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    codec: str | None
    bytes: int
    decoded_bytes: int
    tied_to: str | None
    sqnr_db: float | None


@dataclass(frozen=True)
class Size:
    """The size of all tensors of a kind.

    Attributes:
        tensors: How many there are; tied ones count as often as they occur.
        bytes: Bytes in the file.
        decoded_bytes: Bytes of their values in memory.
    """

    tensors: int
    bytes: int
    decoded_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller they are in the file; 1 for tensors without elements."""
        return self.decoded_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class StoredOtherwise:
    """A tensor that is not stored as its rule says.

    Attributes:
        name: Its name for people; see :class:`TensorEntry`.
        reason: What its rule's codec would have lost, or why it cannot hold the tensor.
        remedy: ``"residual"`` if it is stored in 16 bits instead, with a residual, ``"raw"`` if it is stored as it is.
    """

    name: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: The file.
        bytes: Its size.
        sections: The keys at the top of the checkpoint.
        training: How far the training was, such as ``{"epoch": 1, "global_step": 30}``.
        summary: The checkpoint's summary in primitives; None if it has none. A ratio that is not finite is None in it.
        was_decoded: Whether a quantized file was loaded and saved plain, so that the summary describes codes that are
            not in this file.
        sizes: The sizes of the kinds of tensors that occur.
        errors: What the save lost, by kind, as the summary has it, such as ``{"weights": {"sqnr_db": 95.3}}``.
        update_direction_error: Relative error of Adam's update direction; None if the summary does not have it.
        exceptions: Tensors that are not stored as their rules say.
        tensors: All tensors, in the order of the checkpoint.
    """

    path: Path
    bytes: int
    sections: tuple[str, ...]
    training: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    was_decoded: bool
    sizes: Mapping[str, Size]
    errors: Mapping[str, Mapping[str, float]]
    update_direction_error: float | None
    exceptions: tuple[StoredOtherwise, ...]
    tensors: tuple[TensorEntry, ...]

    @property
    def bytes_without_tensors(self) -> int:
        """Bytes of the file that belong to no tensor."""
        return max(self.bytes - sum(entry.bytes for entry in self.tensors), 0)

    @property
    def decoded_bytes(self) -> int:
        """About how many bytes the file would have if no tensor were encoded."""
        return sum(entry.decoded_bytes for entry in self.tensors) + self.bytes_without_tensors

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than with no tensor encoded."""
        return self.decoded_bytes / self.bytes

    def as_primitives(self) -> dict[str, Any]:
        """Return everything as JSON has it; a ratio that is not finite is None."""
        found = {
            "file": str(self.path),
            "bytes": self.bytes,
            "sections": list(self.sections),
            "training": dict(self.training),
            "summary": self.summary,
            "decoded": self.was_decoded,
            "sizes": {kind: asdict(size) for kind, size in self.sizes.items()},
            "exceptions": [asdict(each) for each in self.exceptions],
            "tensors": [asdict(entry) for entry in self.tensors],
        }
        result: dict[str, Any] = primitives_of(found)
        return result


def primitives_of(value: Any) -> Any:
    """Return what JSON keeps of a value; infinity becomes None, such as the SQNR of a tensor that lost nothing."""
    # Not by the walk of tree.py, which skips numbers: these are what must change.
    return json.loads(json.dumps(value, default=str, skipkeys=True), parse_constant=lambda _: None)
