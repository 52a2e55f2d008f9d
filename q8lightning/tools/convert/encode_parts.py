"""Encode a checkpoint part by part, with the code that encodes whole checkpoints."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.checkpoint import encode_and_report
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.encode.warn import warn_of_guarded, warn_of_kept, warn_of_refused
from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.layout.sections import (
    CODES_KEY,
    INPUTS_KEY,
    PARAMETERS_KEY,
    STATE_DICT,
    SUMMARY_KEY,
    parameter_names_in,
    path_of,
)
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.checkpoint.tree import Keys
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.tools.convert.conversion import Converter
from q8lightning.tools.convert.split import Part, containers_around, memory_of, parts_of
from q8lightning.tools.convert.summary_of_parts import SummaryOfParts
from q8lightning.tools.convert.write_tensor_by_tensor import Store, Stored
from q8lightning.tools.open_checkpoint import OpenCheckpoint, Progress
from q8lightning.tools.tensors import Value, tensors_in


class PartEncoder(Converter):
    """Replaces the tensors of a checkpoint by payloads while it is written.

    The summary is written last, when it is complete.

    Args:
        opened: The checkpoint.
        policy: Says what is encoded, and how.
        progress: Called with the bytes of values encoded so far, and of all.
    """

    def __init__(self, opened: OpenCheckpoint, policy: CheckpointPolicy, progress: Progress) -> None:
        content = without_summary(opened.content)
        found = [(keys, value) for keys, value in tensors_in(content) if memory_of(value) is not None]
        super().__init__(opened, content, (value for _, value in found), progress)
        self._policy = policy
        self._parameters = parameter_names_in(opened.content)
        self._parts = parts_of(found, opened.places)
        self._said = SummaryOfParts(opened.summary, opened.places)
        self._from_shards: set[str] = set()
        """Paths of payloads that were put together from shards."""
        self._codes: dict[str, Mapping[str, Any]] = dict(opened.summary.get(CODES_KEY, {}))
        self._summary: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "policy": policy.as_primitives(),
            "restored": opened.summary.get("restored", 0),
        }
        for key in (INPUTS_KEY, PARAMETERS_KEY):
            if key in opened.summary:
                self._summary[key] = opened.summary[key]
        if () not in opened.places:  # load_state_dict refuses keys that it does not know
            content[SUMMARY_KEY] = self._summary

    @property
    def metrics(self) -> dict[str, float]:
        """What was lost, as the summary has it; complete once everything is written."""
        if "metrics" not in self._summary:
            self._complete()  # a bare state has no summary
        return dict(self._summary["metrics"])

    def replace(self, value: Any, store: Store) -> Any:
        if value is self._summary:
            self._complete()
        part = self._parts.get(id(value))
        if part is None:
            return store(value.read(), "cpu") if isinstance(value, UnreadTensor) else value
        if part.results is None:
            part.results = self._encode(part)
        result = part.results[id(value)]
        if isinstance(result, Stored) or (result is value and isinstance(value, Tensor)):
            return result
        alone = result
        if isinstance(result, QuantizedTensor) and result.data.untyped_storage().nbytes() > result.nbytes:
            alone = result.replace_data(result.data.clone())  # a view is written with all of its memory
        stored = store(alone, self.opened.location(value))
        part.results = {key: stored if other is result else other for key, other in part.results.items()}
        return stored

    def _encode(self, part: Part) -> dict[int, Any]:
        """Return what replaces each tensor of a part, by the tensor's id."""
        known = {id(value): self._read(keys, value) for keys, value in part.leaves}
        results = self._encode_known(Part([(keys, known[id(value)]) for keys, value in part.leaves]))
        encoded = {id(new): (key, new) for key, new in results.items() if isinstance(new, QuantizedTensor)}
        self.kept += sum(key == id(new) for key, new in encoded.values())
        self.converted += sum(key != id(new) for key, new in encoded.values())
        for value in {id(value): value for _, value in part.leaves}.values():
            self.advance(value)
        return {key: results[id(value)] for key, value in known.items()}

    def _read(self, keys: Keys, value: Value) -> Tensor | QuantizedTensor:
        """Read a tensor of a folder: as one payload if that has the very codes of its shards, or else decoded."""
        if not isinstance(value, UnreadTensor):
            return value
        whole, codecs = value.read(), value.stored.codecs
        if len(codecs) > 1 or codecs[0] is None:
            return whole
        payload = QuantizedTensor.encode(whole, codecs[0], path_of(keys))
        if not torch.equal(payload.decode(), whole):
            return whole  # its blocks begin where shards begin
        self._from_shards.add(path_of(keys))
        return payload

    def _encode_known(self, part: Part) -> dict[int, Any]:
        results: dict[int, Any] = {id(value): value for _, value in part.leaves}
        tensors = self._to_encode(part)
        wanted = [(keys, tensors[id(value)]) for keys, value in part.leaves if id(value) in tensors]
        if wanted:
            self._encode_part(part, wanted, results)
        else:
            for keys, value in part.leaves:
                if isinstance(value, QuantizedTensor):
                    self._said.keep(keys, value, None)
        return results

    def _to_encode(self, part: Part) -> dict[int, Tensor]:
        """Return the tensors of a part to encode, decoded where they are payloads, by the id of the original.

        If any tensor of the part may change, its payloads are encoded again, because the guard judges moments together.
        """
        some_may_change = any(
            not self._is_as_wanted(keys, value)
            if isinstance(value, QuantizedTensor)
            else torch.Size(value.shape).numel() >= self._policy.min_numel
            for keys, value in part.leaves
        )
        tensors: dict[int, Tensor] = {}
        for _, value in part.leaves:
            if isinstance(value, Tensor):
                tensors[id(value)] = value
            elif some_may_change and id(value) not in tensors:
                tensors[id(value)] = self.opened.values(value)
        return tensors

    def _is_as_wanted(self, keys: Keys, payload: QuantizedTensor) -> bool:
        """Whether encoding again surely changes nothing; False if there are rules by parameter, which are not read.

        Blocks of a folder may be smaller than the policy's, so that they cross no row. They are not worth a loss.
        """
        rules = self._policy.rules
        named = any(isinstance(rule, Rule) and rule.parameter != "*" for rule in rules)
        codec = self._policy.codec_at(path_of(keys), path_of(self.opened.place(keys)))
        if codec is not None and path_of(keys) in self._from_shards:
            codec = replace(codec, block_size=min(codec.block_size, payload.codec.block_size))
        return not named and codec == payload.codec

    def _encode_part(self, part: Part, wanted: list[tuple[Keys, Tensor]], results: dict[int, Any]) -> None:
        """Encode the wanted tensors of a part; keep a payload that does not become smaller.

        Args:
            part: The part.
            wanted: The tensors, with the keys that lead to them.
            results: Gets what replaces each tensor, by the tensor's id.
        """
        around = containers_around(self.content, wanted)
        codecs = {
            name: WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
            for name in around.get(STATE_DICT, {})
            if (entry := self._codes.get(name)) is not None and "codes" not in entry
        }
        messages: list[str] = []
        with _caught(messages):
            names = ModelNames(frozenset(), self._parameters, codecs, places=self.opened.places)
            encoded, report = encode_and_report(around, self._policy, names)
            warn_of_refused([self._named(text) for text in report.refused])
        codes = encoded.pop(SUMMARY_KEY, {}).get(CODES_KEY, {})
        report.stored_bytes -= _bytes_in(codes)  # counted at the end, when all codes are known
        seen = {keys for keys, _ in wanted}
        for keys, value in part.leaves:
            new: Any = reduce(lambda item, key: item[key], keys, encoded) if keys in seen else None
            if isinstance(value, Tensor) or (isinstance(new, QuantizedTensor) and new.nbytes < value.nbytes):
                results[id(value)] = new
                if keys[0] == STATE_DICT and keys[-1] in codes:
                    self._codes[keys[-1]] = codes[keys[-1]]
            elif isinstance(value, QuantizedTensor):
                self._said.keep(keys, value, None if new is None else new.nbytes)
        was_refused = bool(report.refused)
        self._said.add(report)  # leaves out payloads that stay as they were
        if report.refused or not was_refused:
            self.warnings += messages

    def _named(self, text: str) -> str:
        """Replace the path that a text begins with by the tensor's name."""
        path, *rest = text.partition(" (")
        return "".join([self.opened.names.get(path, path), *rest])

    def _complete(self) -> None:
        said: list[str] = []
        with _caught(said):
            warn_of_guarded(each._replace(name=self._named(each.path)) for each in self._said.guarded)
            warn_of_kept(each._replace(name=self._named(each.name)) for each in self._said.kept_states)
        self.warnings[:0] = said
        self._said.complete(self._summary, _bytes_in(self._codes))
        if self._codes:
            self._summary[CODES_KEY] = self._codes


def _bytes_in(codes: Mapping[str, Any]) -> int:
    return sum(value.nbytes for _, value in tensors_in(codes))


@contextmanager
def _caught(messages: list[str]) -> Iterator[None]:
    """Append the user warnings of the block to ``messages``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # warnings of other threads are not ours to report
        warnings.simplefilter("always", UserWarning)
        yield
    messages += [str(warning.message) for warning in caught]


def without_summary(content: Mapping[str, Any]) -> Any:
    """Return a shallow copy of a checkpoint, of the same class, without its summary."""
    without: Any = copy.copy(content)
    without.pop(SUMMARY_KEY, None)
    return without
