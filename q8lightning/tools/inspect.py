"""Say what a checkpoint holds, without decoding any of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.qat_codes import CODES_KEY
from q8lightning.tools.source import KINDS, Keys, Source, decoded_bytes, kind_of, leaves, path_of


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint.

    Attributes:
        keys: Keys and indices that lead to it.
        kind: One of :data:`~q8lightning.tools.source.KINDS`.
        shape: Of its values.
        dtype: Of its values, without ``torch.``.
        codec: Codec, residual stage and block size, such as ``linear+residual/256``; None if it is not encoded.
        bytes: What it takes in the file; 0 if it is tied to an earlier one.
        decoded_bytes: What its values take; 0 if it is tied to an earlier one.
        tied_to: The path of the earlier tensor that it is one with.
    """

    keys: Keys
    kind: str
    shape: tuple[int, ...]
    dtype: str
    codec: str | None
    bytes: int
    decoded_bytes: int
    tied_to: str | None

    @property
    def path(self) -> str:
        """The path by which policies and messages name it."""
        return path_of(self.keys)


@dataclass
class Size:
    """Of several tensors: how many, their bytes in the file, and those of their values."""

    tensors: int = 0
    bytes: int = 0
    decoded_bytes: int = 0


def entries_of(source: Source) -> list[Entry]:
    """Return the tensors of a checkpoint, in its order."""
    first: dict[Any, str] = {}
    entries = []
    for keys, value in leaves(source.content):
        path = path_of(keys)
        tied_to = first.setdefault(_identity(value), path)
        tied = tied_to != path
        size = decoded_bytes(value)
        encoded = isinstance(value, QuantizedTensor)
        entries.append(
            Entry(
                keys,
                kind_of(keys, value),
                tuple(value.shape),
                str(value.dtype).removeprefix("torch."),
                label(value) if isinstance(value, QuantizedTensor) else None,
                0 if tied else value.nbytes if encoded else size,
                0 if tied else size,
                tied_to if tied else None,
            )
        )
    return entries


def label(payload: QuantizedTensor) -> str:
    """Return how a payload is encoded, such as ``linear+residual/256``."""
    return f"{payload.codec.label}/{payload.codec.block_size}"


def _identity(value: Tensor | QuantizedTensor) -> Any:
    """Return what is equal for tied tensors only."""
    if isinstance(value, QuantizedTensor) or not value.numel() or value.is_sparse:
        return id(value)
    return (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())


def sizes_of(entries: Sequence[Entry]) -> dict[str, Size]:
    """Return the sizes by kind, of the kinds that occur."""
    sizes: dict[str, Size] = {}
    for kind in KINDS:
        for entry in entries:
            if entry.kind == kind:
                size = sizes.setdefault(kind, Size())
                size.tensors += 1
                size.bytes += entry.bytes
                size.decoded_bytes += entry.decoded_bytes
    return sizes


def describe(source: Source) -> dict[str, Any]:
    """Return everything as JSON has it.

    ``file``, ``bytes``, ``sections``, ``training``, ``summary``, ``decoded`` (see :func:`was_decoded`), ``sizes`` and
    ``tensors``.
    """
    entries = entries_of(source)
    content = source.content
    summary = summary_of(source)
    return {
        "file": str(source.path),
        "bytes": source.file.size,
        "sections": [str(key) for key in content] if isinstance(content, Mapping) else [],
        "training": {key: content[key] for key in _PROGRESS if isinstance(content, Mapping) and key in content},
        "summary": summary,
        "decoded": summary is not None and was_decoded(summary, entries),
        "sizes": {kind: asdict(size) for kind, size in sizes_of(entries).items()},
        "tensors": [
            {"path": entry.path} | {key: value for key, value in asdict(entry).items() if key != "keys"}
            for entry in entries
        ],
    }


_PROGRESS = ("pytorch-lightning_version", "epoch", "global_step")


def summary_of(source: Source) -> dict[str, Any] | None:
    """Return what the checkpoint says about how it was quantized, in primitives, None if it says nothing."""
    if not source.summary:
        return None
    summary = {key: _primitive(value) for key, value in source.summary.items() if key != CODES_KEY}
    trained = source.summary.get(CODES_KEY)
    if isinstance(trained, Mapping):
        summary[CODES_KEY] = {
            name: {key: _primitive(value) for key, value in entry.items() if key not in ("codes", "scales")}
            for name, entry in trained.items()
        }
    return summary


def was_decoded(summary: Mapping[str, Any], entries: Sequence[Entry]) -> bool:
    """Whether a quantized file was loaded and saved again, so that its summary speaks of codes that are there no more.

    Args:
        summary: What the checkpoint says.
        entries: What it holds.
    """
    encoded_bytes = (summary.get("bytes") or {}).get("encoded_stored")
    return bool(encoded_bytes) and all(entry.codec is None for entry in entries)


def errors_by_kind(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return what the save lost by kind, as far as the summary says it, as ``{"weights": {"sqnr_db": ...}}``.

    The summary has it as ``weights/sqnr_db``; ``update_direction_error`` and other figures of the whole have no kind.
    """
    kinds: dict[str, dict[str, float]] = {}
    for name, value in (summary.get("metrics") or {}).items():
        kind, _, figure = name.rpartition("/")
        if kind:
            kinds.setdefault(kind, {})[figure] = value
    return kinds


def error_of(summary: Mapping[str, Any], path: str) -> float | None:
    """Return the SQNR of a tensor in dB, None if the summary does not say it."""
    found = (summary.get("tensors") or {}).get(path, {}).get("sqnr_db")
    return None if found is None else float(found)


def _primitive(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _primitive(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_primitive(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no infinity: the SQNR of a tensor that lost nothing
    return value if isinstance(value, str | int | float | bool | None) else str(value)
