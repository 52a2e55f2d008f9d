"""Summarize a checkpoint that is encoded part by part."""

from collections.abc import Iterator, Mapping
from typing import Any

from q8lightning.checkpoint.layout.optimizer_states import moments_of
from q8lightning.checkpoint.layout.places import NOWHERE, Places, place_of
from q8lightning.checkpoint.layout.sections import kind_of, path_of
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.report import Guarded, Kept, SaveReport
from q8lightning.checkpoint.tree import Keys
from q8lightning.tools.tensors import decoded_bytes


class SummaryOfParts:
    """Adds up the reports of parts.

    For payloads that stay as they were, it takes what the summary of their file has.

    Args:
        before: The summary of the file that was read; empty if it has none.
        places: Those of the checkpoint.
    """

    def __init__(self, before: Mapping[str, Any], places: Places = NOWHERE) -> None:
        self._before = before
        self._places = places
        self._report = SaveReport()
        self._kept: dict[str, str] = {}
        """The kinds of payloads that stay as they were, by path."""
        self._kept_bytes: dict[int, tuple[int, int]] = {}
        """The bytes of their values and of their codes, by id, so that tied ones count once."""

    @property
    def guarded(self) -> list[Guarded]:
        """Tensors that would have lost more than the policy allows, without those that stay as they were."""
        return self._report.guarded

    @property
    def kept_states(self) -> list[Kept]:
        """States of optimizers that are kept as they are, and of which the user should hear, once for each key."""
        found: dict[str, Kept] = {}
        for each in self._report.kept:
            first = found.get(each.key, each)
            number = each.number if first is each else first.number + each.number
            found[each.key] = Kept(first.key, first.name, number, first.why)
        return list(found.values())

    def keep(self, keys: Keys, payload: QuantizedTensor, tried: int | None) -> None:
        """Count a payload that stays as it was.

        Args:
            keys: Keys that lead to it.
            payload: The payload.
            tried: Bytes that the report of its part has for it, if it was encoded again in vain; None if it was not.
        """
        self._kept[path_of(keys)] = kind_of(place_of(keys, self._places))
        if id(payload) not in self._kept_bytes:
            self._kept_bytes[id(payload)] = (decoded_bytes(payload), payload.nbytes)
            self._report.original_bytes += decoded_bytes(payload) if tried is None else 0
            self._report.stored_bytes += payload.nbytes - (tried or 0)

    def add(self, report: SaveReport) -> None:
        """Add the report of a part, without the payloads of it that were kept before."""
        report.tensors = [loss for loss in report.tensors if loss.path not in self._kept]
        encoded = {loss.path for loss in report.tensors}
        report.directions = [each for each in report.directions if not encoded.isdisjoint(moments_of(each.path))]
        report.guarded = [each for each in report.guarded if each.path not in self._kept]
        report.refused = [text for text in report.refused if text.split(" (")[0] not in self._kept]
        self._report += report

    def complete(self, summary: dict[str, Any], stored_beside: int) -> None:
        """Put everything into the summary of the checkpoint.

        Args:
            summary: Gets it.
            stored_beside: Bytes of tensors in the summary itself.
        """
        self._report.stored_bytes += stored_beside
        self._report.kept = self.kept_states
        said = self._report.summary()
        tensors = {path: dict(figures) for path, figures in self._entries("tensors")}
        said["metrics"] = {**dict(self._metrics(tensors)), **said["metrics"]}
        for path, figures in said["tensors"].items():
            tensors.setdefault(path, {}).update(figures)
        said["tensors"] = tensors
        for name, column in (("encoded_original", 0), ("encoded_stored", 1)):
            said["bytes"][name] += sum(each[column] for each in self._kept_bytes.values())
        said["guarded"] = {**dict(self._entries("guarded")), **said["guarded"]}
        summary.update(said)

    def _entries(self, section: str) -> Iterator[tuple[str, Any]]:
        """Yield the entries of the file's summary for the payloads that were kept."""
        said = self._before.get(section)
        if isinstance(said, Mapping):
            yield from ((path, said[path]) for path in self._kept if isinstance(said.get(path), Mapping))

    def _metrics(self, kept: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
        """Yield the figures of kinds of which every encoded tensor was kept.

        For other kinds the figures cover only what was encoded now, because figures of two saves do not add up.
        """
        kinds = set(self._kept.values()) - {loss.kind for loss in self._report.tensors}
        directions = not self._report.directions and any("update_direction_error" in each for each in kept.values())
        said = self._before.get("metrics")
        for name, value in said.items() if isinstance(said, Mapping) else ():
            if name.rpartition("/")[0] in kinds or (name == "update_direction_error" and directions):
                yield name, value
