"""Inspect what a checkpoint holds, without decoding any of it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from q8lightning.checkpoint.layout.parameter_names import identity_of
from q8lightning.checkpoint.layout.sections import CODES_KEY, path_of
from q8lightning.tools.entries import Size, StoredOtherwise, TensorEntry
from q8lightning.tools.inspection import Inspection, primitives_of
from q8lightning.tools.open_checkpoint import OpenCheckpoint, open_checkpoint
from q8lightning.tools.tensors import KINDS, codec_of, decoded_bytes, dtype_of, kind_of, stored_bytes, tensors_in


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
    """Return the tensors that would lose too much, those that no codec holds, and states that are kept as they are."""
    found = [(path, each["found"], each["remedy"]) for path, each in (opened.summary.get("guarded") or {}).items()]
    for text in opened.summary.get("refused") or ():
        path, _, reason = text.partition(" (")
        found.append((path, reason.removesuffix(")"), "raw"))
    named = [(opened.names.get(path, path), reason, remedy) for path, reason, remedy in found]
    for each in (opened.summary.get("kept") or {}).values():
        more = f" and {each['number'] - 1} more" if each["number"] > 1 else ""
        named.append((opened.names.get(each["name"], each["name"]) + more, each["why"], "raw"))
    return tuple(StoredOtherwise(*each) for each in named)


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
