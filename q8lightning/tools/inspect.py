"""Say what a checkpoint holds, without decoding any of it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from q8lightning.checkpoint.parameter_names import identity_of
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sections import CODES_KEY, path_of
from q8lightning.tools.open_checkpoint import OpenCheckpoint, open_checkpoint
from q8lightning.tools.tensors import KINDS, codec_of, decoded_bytes, dtype_of, kind_of, tensors_in


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint.

    Attributes:
        path: Keys and indices that lead to it, joined by dots; what policies match.
        name: What people call it: ``layer.weight: exp_avg`` for an optimizer's state whose parameter is known, or else
            the path.
        kind: ``weights``, a moment's key such as ``exp_avg``, or ``other``.
        shape: Of its values.
        dtype: Of its values, without ``torch.``.
        codec: Codec, residual stage and block size, such as ``linear+residual/256``; None if it is not encoded.
        bytes: What it takes in the file; 0 if it is tied to an earlier one.
        decoded_bytes: What its values take in memory; 0 if it is tied to an earlier one.
        tied_to: The name of the earlier tensor that it is one with.
        sqnr_db: What its save lost, as a signal-to-noise ratio in dB, infinite for nothing; None if the file does not
            say it.
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
    """What the tensors of a kind take together.

    Attributes:
        tensors: How many there are; tied ones count as often as they occur.
        bytes: What they take in the file.
        decoded_bytes: What their values take in memory.
    """

    tensors: int
    bytes: int
    decoded_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller they are in the file; 1 for nothing."""
        return self.decoded_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class StoredOtherwise:
    """A tensor that is not stored as its rule says.

    Attributes:
        name: What people call it; see :class:`TensorEntry`.
        reason: What its rule's codec would have lost, or why it cannot hold the tensor.
        remedy: ``"residual"`` if it has a residual stage instead, ``"raw"`` if it is stored as it is.
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
        training: What it says of the training, such as ``{"epoch": 1, "global_step": 30}``.
        summary: What it says about how it was quantized, in primitives; None if it says nothing. A ratio that is no
            finite number is None in it.
        was_decoded: Whether a quantized file was loaded and saved again, so that the summary speaks of codes that are
            there no more.
        sizes: What the tensors take, by kind; kinds that do not occur are not there.
        errors: What the save lost, by kind, such as ``{"weights": {"sqnr_db": 95.3}}``; as the file says it.
        update_direction_error: How far the direction of Adam's update is off, relative; None if the file does not say.
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
        """Bytes of the file that are no tensor's."""
        return max(self.bytes - sum(entry.bytes for entry in self.tensors), 0)

    @property
    def decoded_bytes(self) -> int:
        """Bytes that the file would have if no tensor of it were encoded, about."""
        return sum(entry.decoded_bytes for entry in self.tensors) + self.bytes_without_tensors

    @property
    def ratio(self) -> float:
        """How many times larger that is than the file."""
        return self.decoded_bytes / self.bytes

    def as_primitives(self) -> dict[str, Any]:
        """Return everything as JSON has it; a ratio that is no finite number is None."""
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
    """Say what a checkpoint holds: format, policy, sizes and every tensor. Nothing is decoded.

    Args:
        path: The file, quantized or not.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.

    Raises:
        ToolError: If there is no such file or it is no checkpoint.
        CorruptCheckpointError: If it is damaged in a way that keeps it from being read.
        NewerFormatError: If it was written in a later format than this version reads.

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
        bytes=opened.file.size,
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
                kind=kind_of(keys, value),
                shape=tuple(value.shape),
                dtype=dtype_of(value),
                codec=codec_of(value),
                bytes=0 if tied else value.nbytes if isinstance(value, QuantizedTensor) else size,
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
    """Sort metrics such as ``weights/sqnr_db`` by what they are of; those of the whole have no kind."""
    kinds: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, figure = name.rpartition("/")
        if kind:
            kinds.setdefault(kind, {})[figure] = value
    return kinds


def _exceptions(opened: OpenCheckpoint) -> tuple[StoredOtherwise, ...]:
    """Return the tensors that would lose too much under their rules, and those that no codec holds."""
    found = [(path, each["found"], each["remedy"]) for path, each in (opened.summary.get("guarded") or {}).items()]
    for text in opened.summary.get("refused") or ():
        path, _, reason = text.partition(" (")
        found.append((path, reason.removesuffix(")"), "raw"))
    return tuple(StoredOtherwise(opened.names.get(path, path), reason, remedy) for path, reason, remedy in found)


def _summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says about itself in primitives, without the codes of weights."""
    said = dict(summary)
    if isinstance(trained := said.get(CODES_KEY), Mapping):
        said[CODES_KEY] = {
            name: {key: value for key, value in entry.items() if key not in ("codes", "scales")}
            for name, entry in trained.items()
        }
    result: dict[str, Any] = primitives_of(said)
    return result


def primitives_of(value: Any) -> Any:
    """Return what JSON keeps of a value; it has no infinity, such as the SQNR of a tensor that lost nothing."""
    # No walk of tree.py's: it passes numbers by, and these are what must change.
    return json.loads(json.dumps(value, default=str, skipkeys=True), parse_constant=lambda _: None)
