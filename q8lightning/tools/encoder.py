"""Encode a checkpoint piece by piece, with the walk and the policy that encode whole ones."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from torch import Tensor

from q8lightning.checkpoint.encode.guard import warn_of_guarded
from q8lightning.checkpoint.encode.leaves import ModelNames, names_from
from q8lightning.checkpoint.encode.state_dict import SUMMARY_KEY, encode_and_report, warn_of_refused
from q8lightning.checkpoint.payload import FORMAT_VERSION, QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
from q8lightning.checkpoint.qat_codes import CODES_KEY
from q8lightning.checkpoint.tree import tensors
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.tools.pieces import Piece, memory_of, part_of, pieces_of
from q8lightning.tools.source import Keys, Source, decoded_bytes, leaves, path_of
from q8lightning.tools.stream import Store, Stored
from q8lightning.tools.tally import Account

Progress = Callable[[int, int], None]
"""Told how many bytes of values have been converted, and of how many."""


@dataclass
class Conversion:
    """What was done.

    Attributes:
        converted: Tensors that were encoded, or decoded; tied ones count once.
        kept: Tensors that were encoded before and stayed as they were.
        warnings: What is to be said about single tensors.
    """

    converted: int = 0
    kept: int = 0
    warnings: list[str] = field(default_factory=list)


class Work:
    """Counts what has been done.

    Args:
        values: What is to be converted; a tensor that occurs twice counts once.
        progress: Who wants to know.
    """

    def __init__(self, values: Iterable[Tensor | QuantizedTensor], progress: Progress) -> None:
        self.done = Conversion()
        self._progress = progress
        self._bytes_done = 0
        self._bytes = sum(decoded_bytes(value) for value in {id(value): value for value in values}.values())

    def advance(self, value: Tensor | QuantizedTensor) -> None:
        """Count a value."""
        self._bytes_done += decoded_bytes(value)
        self._progress(self._bytes_done, self._bytes)


class Encoder(Work):
    """Replaces the tensors of a checkpoint by payloads when a stream meets them.

    Attributes:
        content: What the stream is to write: the checkpoint, and after everything else the summary, which is complete
            when the stream gets there.
    """

    def __init__(self, source: Source, policy: CheckpointPolicy, progress: Progress) -> None:
        self.content = without_summary(source.content)
        found = [(keys, value) for keys, value in leaves(self.content) if memory_of(value) is not None]
        super().__init__((value for _, value in found), progress)
        self._source = source
        self._policy = policy
        self._parameters = names_from(source.content).optimizer_parameters
        self._pieces = pieces_of(found)
        self._account = Account(source.summary)
        self._codes: dict[str, Mapping[str, Any]] = dict(source.summary.get(CODES_KEY, {}))
        self._summary = self.content[SUMMARY_KEY] = {
            "format_version": FORMAT_VERSION,
            "policy": policy.as_primitives(),
            "restored": source.summary.get("restored", 0),
        }

    def __call__(self, value: Any, store: Store) -> Any:
        if value is self._summary:
            self._complete()
        piece = self._pieces.get(id(value))
        if piece is None:
            return value
        if piece.results is None:
            piece.results = self._encode(piece)
        result = piece.results[id(value)]
        if isinstance(result, Stored) or (result is value and isinstance(value, Tensor)):
            return result
        alone = result
        if isinstance(result, QuantizedTensor):
            self.done.kept += result is value
            self.done.converted += result is not value
            if result.data.untyped_storage().nbytes() > result.nbytes:  # it would be written as a whole
                alone = result.replace_data(result.data.clone())
        stored = store(alone, self._source.location(value))
        piece.results = {key: stored if other is result else other for key, other in piece.results.items()}
        return stored

    def _encode(self, piece: Piece) -> dict[int, Any]:
        """Return what takes the place of each tensor of a piece, by its id."""
        results: dict[int, Any] = {id(value): value for _, value in piece.leaves}
        tensors = self._to_encode(piece)
        wanted = [(keys, tensors[id(value)]) for keys, value in piece.leaves if id(value) in tensors]
        if wanted:
            self._encode_part(piece, wanted, results)
        else:
            for keys, value in piece.leaves:
                if isinstance(value, QuantizedTensor):
                    self._account.keep(keys, value, None)
        for value in {id(value): value for _, value in piece.leaves}.values():
            self.advance(value)
        return results

    def _to_encode(self, piece: Piece) -> dict[int, Tensor]:
        """Return the tensors of a piece that the walk must see, decoded, by the id of what is in the checkpoint.

        If one may change, those that were encoded before are among them: the guard judges two moments together.
        """
        some_may_change = any(
            not self._is_as_wanted(keys, value)
            if isinstance(value, QuantizedTensor)
            else value.numel() >= self._policy.min_numel
            for keys, value in piece.leaves
        )
        tensors: dict[int, Tensor] = {}
        for _, value in piece.leaves:
            if isinstance(value, Tensor):
                tensors[id(value)] = value
            elif some_may_change and id(value) not in tensors:
                tensors[id(value)] = self._source.values(value)
        return tensors

    def _is_as_wanted(self, keys: Keys, payload: QuantizedTensor) -> bool:
        """Whether encoding again would surely change nothing; rules about parameters are left to the walk."""
        rules = self._policy.rules
        named = any(isinstance(rule, Rule) and rule.parameter != "*" for rule in rules)
        return not named and self._policy.codec_for(path_of(keys)) == payload.codec

    def _encode_part(self, piece: Piece, wanted: list[tuple[Keys, Tensor]], results: dict[int, Any]) -> None:
        """Encode the wanted tensors of a piece; set the results that are better than what is there."""
        part = part_of(self.content, wanted)
        codecs = {
            name: WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
            for name in part.get("state_dict", {})
            if (entry := self._codes.get(name)) is not None and "codes" not in entry
        }
        messages: list[str] = []
        with _caught(messages):
            encoded, report = encode_and_report(part, self._policy, ModelNames(frozenset(), self._parameters, codecs))
            warn_of_refused(report.refused)
        codes = encoded.pop(SUMMARY_KEY).get(CODES_KEY, {})
        report.stored_bytes -= _bytes_in(codes)  # counted in the end, when all are known
        seen = {keys for keys, _ in wanted}
        for keys, value in piece.leaves:
            new: Any = reduce(lambda item, key: item[key], keys, encoded) if keys in seen else None
            if isinstance(value, Tensor) or (isinstance(new, QuantizedTensor) and new.nbytes < value.nbytes):
                results[id(value)] = new
                if keys[0] == "state_dict" and keys[-1] in codes:
                    self._codes[keys[-1]] = codes[keys[-1]]
            else:
                self._account.keep(keys, value, None if new is None else new.nbytes)
        refused = bool(report.refused)
        self._account.add(report)
        if report.refused or not refused:  # not what was tried in vain, and is no worse for it
            self.done.warnings += messages

    def _complete(self) -> None:
        said: list[str] = []
        with _caught(said):
            warn_of_guarded(self._account.guarded)
        self.done.warnings[:0] = said
        self._account.complete(self._summary, _bytes_in(self._codes))
        if self._codes:
            self._summary[CODES_KEY] = self._codes


def _bytes_in(codes: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for _, tensor in tensors(codes))


@contextmanager
def _caught(messages: list[str]) -> Iterator[None]:
    """Append the user warnings of the block to ``messages``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # whatever else happens meanwhile, in any thread
        warnings.simplefilter("always", UserWarning)
        yield
    messages += [str(warning.message) for warning in caught]


def without_summary(content: Mapping[str, Any]) -> Any:
    """Return a shallow copy of a checkpoint, of the same class, that says nothing about how it was encoded."""
    without: Any = copy.copy(content)
    without.pop(SUMMARY_KEY, None)
    return without
