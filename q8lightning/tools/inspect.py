"""Inspect what a checkpoint holds, without decoding any of it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from q8lightning.checkpoint.layout.parameter_names import identity_of
from q8lightning.checkpoint.layout.sections import CODES_KEY, path_of
from q8lightning.tools.open_checkpoint import OpenCheckpoint, open_checkpoint
from q8lightning.tools.tensors import KINDS, codec_of, decoded_bytes, dtype_of, kind_of, stored_bytes, tensors_in


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


def inspect(path: str | os.PathLike[str], *, trust: bool = False) -> Inspection:
    """Return what a checkpoint holds: format, policy, sizes and every tensor. Nothing is decoded.

    Args:
        path: The file or folder, quantized or not.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.

    Raises:
        ToolError: If there is no such file or it is no checkpoint.
        CorruptCheckpointError: If the damage keeps the file from being read.
        NewerFormatError: If the file was written in a later format than this version reads.

    Example:
        >>> from q8lightning.tools import inspect
        >>> found = inspect("last.ckpt")  # doctest: +SKIP
        >>> found.ratio, found.sizes["weights"].bytes, found.errors["weights"]["sqnr_db"]  # doctest: +SKIP
    """
    opened = open_checkpoint(path, trust)
    content = opened.content if isinstance(opened.content, Mapping) else {}
    entries = _entries(opened)
    metrics = opened.summary.get("metrics") or {}
    return Inspection(
        path=opened.path,
        bytes=opened.size,
        sections=tuple(map(str, content)),
        training={key: content[key] for key in _PROGRESS if key in content},
        summary=_summary(opened.summary) if opened.summary else None,
        was_decoded=_was_decoded(opened.summary, entries),
        sizes=_sizes(entries),
        errors=_errors_by_kind(metrics),
        update_direction_error=metrics.get("update_direction_error"),
        exceptions=_exceptions(opened),
        tensors=tuple(entries),
    )


_PROGRESS = ("pytorch-lightning_version", "epoch", "global_step")


def _entries(opened: OpenCheckpoint) -> list[TensorEntry]:
    """Return the tensors of a checkpoint, in its order."""
    first: dict[Any, tuple[str, str]] = {}
    said = opened.summary.get("tensors") or {}
    entries = []
    for keys, value in tensors_in(opened.content):
        path, name = path_of(keys), opened.name(keys)
        original, called = first.setdefault(identity_of(value), (path, name))
        tied = original != path
        size = decoded_bytes(value)
        sqnr = said.get(path, {}).get("sqnr_db")
        entries.append(
            TensorEntry(
                path=path,
                name=name,
                kind=kind_of(opened.place(keys), value),
                shape=tuple(value.shape),
                dtype=dtype_of(value),
                codec=codec_of(value),
                bytes=0 if tied else stored_bytes(value),
                decoded_bytes=0 if tied else size,
                tied_to=called if tied else None,
                sqnr_db=None if sqnr is None else float(sqnr),
            )
        )
    return entries


def _sizes(entries: Sequence[TensorEntry]) -> dict[str, Size]:
    """Return the sizes by kind, of the kinds that occur."""
    sizes: dict[str, Size] = {}
    for kind in KINDS:
        own = [entry for entry in entries if entry.kind == kind]
        if own:
            sizes[kind] = Size(len(own), sum(each.bytes for each in own), sum(each.decoded_bytes for each in own))
    return sizes


def _was_decoded(summary: Mapping[str, Any], entries: Sequence[TensorEntry]) -> bool:
    encoded_bytes = (summary.get("bytes") or {}).get("encoded_stored")
    return bool(encoded_bytes) and all(entry.codec is None for entry in entries)


def _errors_by_kind(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sort metrics such as ``weights/sqnr_db`` by kind; leave out those of the whole checkpoint."""
    kinds: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, figure = name.rpartition("/")
        if kind:
            kinds.setdefault(kind, {})[figure] = value
    return kinds


def _exceptions(opened: OpenCheckpoint) -> tuple[StoredOtherwise, ...]:
    """Return the tensors that would lose too much by their rules, and those that no codec holds."""
    found = [(path, each["found"], each["remedy"]) for path, each in (opened.summary.get("guarded") or {}).items()]
    for text in opened.summary.get("refused") or ():
        path, _, reason = text.partition(" (")
        found.append((path, reason.removesuffix(")"), "raw"))
    return tuple(StoredOtherwise(opened.names.get(path, path), reason, remedy) for path, reason, remedy in found)


def _summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of a checkpoint in primitives, without the codes of weights."""
    said = dict(summary)
    if isinstance(trained := said.get(CODES_KEY), Mapping):
        said[CODES_KEY] = {
            name: {key: value for key, value in entry.items() if key not in ("codes", "scales")}
            for name, entry in trained.items()
        }
    result: dict[str, Any] = primitives_of(said)
    return result


def primitives_of(value: Any) -> Any:
    """Return what JSON keeps of a value; infinity becomes None, such as the SQNR of a tensor that lost nothing."""
    # Not by the walk of tree.py, which skips numbers: these are what must change.
    return json.loads(json.dumps(value, default=str, skipkeys=True), parse_constant=lambda _: None)
