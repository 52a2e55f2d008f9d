"""Encode a checkpoint piece by piece, with the walk and the policy that encode whole ones.

A piece is what :func:`~q8lightning.checkpoint.state_dict.encode_and_report` must see together: tensors that share
memory, and the optimizer's state of one parameter.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.codes import CODES_KEY
from q8lightning.checkpoint.guard import warn_of_guarded
from q8lightning.checkpoint.leaves import ModelNames, names_from
from q8lightning.checkpoint.losses import SaveReport
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
from q8lightning.checkpoint.state_dict import SUMMARY_KEY, encode_and_report
from q8lightning.cli.source import Keys, Source, decoded_bytes, leaves, path_of
from q8lightning.cli.stream import Store, Stored
from q8lightning.quantization.weight_codec import WeightCodec

Progress = Callable[[int, int], None]
"""Told how many bytes of values have been converted, and of how many."""

_Leaf = tuple[Keys, Tensor | QuantizedTensor]


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


@dataclass(eq=False)
class _Piece:
    """Tensors that are encoded together.

    Attributes:
        leaves: They, and the keys that lead to them.
        results: What takes the place of each, by its id; None until the first of them is met.
    """

    leaves: list[_Leaf] = field(default_factory=list)
    results: dict[int, Any] | None = None


class Encoder(Work):
    """Replaces the tensors of a checkpoint by payloads when a stream meets them.

    Attributes:
        content: What the stream is to write: the checkpoint, and at its end the summary, to which all pieces add.
    """

    def __init__(self, source: Source, policy: CheckpointPolicy, progress: Progress) -> None:
        self.content = without_summary(source.content)
        found = [(keys, value) for keys, value in leaves(self.content) if _memory(value) is not None]
        super().__init__((value for _, value in found), progress)
        self._source = source
        self._policy = policy
        self._parameters = names_from(source.content).optimizer_parameters
        self._codes: Mapping[str, Mapping[str, Any]] = source.summary.get(CODES_KEY, {})
        self._pieces = _pieces(found)
        self._left = len({id(piece) for piece in self._pieces.values()})
        self._report = SaveReport()
        self._summary: dict[str, Any] = {"restored": source.summary["restored"]} if "restored" in source.summary else {}
        self._lost_before: Mapping[str, Any] = source.summary.get("tensors", {})
        self._kept: list[str] = []
        self.content[SUMMARY_KEY] = self._summary

    def __call__(self, value: Any, store: Store) -> Any:
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

    def _encode(self, piece: _Piece) -> dict[int, Any]:
        """Return what takes the place of each tensor of a piece, by its id."""
        results: dict[int, Any] = {id(value): value for _, value in piece.leaves}
        tensors: dict[int, Tensor] = {}
        for keys, value in piece.leaves:
            if isinstance(value, Tensor):
                tensors[id(value)] = value
            elif id(value) not in tensors and not self._is_as_wanted(keys, value):
                tensors[id(value)] = value.decode()
        wanted = [(keys, tensors[id(value)]) for keys, value in piece.leaves if id(value) in tensors]
        encoded = self._encode_part(_only(self.content, wanted)) if wanted else {}
        for keys, value in piece.leaves:
            if id(value) not in tensors:
                continue
            new = reduce(lambda item, key: item[key], keys, encoded)
            if isinstance(value, Tensor) or (isinstance(new, QuantizedTensor) and new.nbytes < value.nbytes):
                results[id(value)] = new
        self._kept += [path_of(keys) for keys, value in piece.leaves if results[id(value)] is value]
        for value in {id(value): value for _, value in piece.leaves}.values():
            self.advance(value)
        self._left -= 1
        if not self._left:
            self._finish_summary()
        return results

    def _finish_summary(self) -> None:
        """Say what all pieces lost; what was encoded before and stayed so lost what its file says."""
        with _caught(self.done.warnings):
            warn_of_guarded(self._report.guarded)
        said = self._report.summary()
        before = {path: self._lost_before[path] for path in self._kept if path in self._lost_before}
        self._summary |= said | {"tensors": {**before, **said["tensors"]}}

    def _is_as_wanted(self, keys: Keys, payload: QuantizedTensor) -> bool:
        """Whether encoding again would surely change nothing; rules about parameters are left to the walk."""
        rules = self._policy.rules
        named = any(isinstance(rule, Rule) and rule.parameter != "*" for rule in rules)
        return not named and self._policy.codec_for(path_of(keys)) == payload.codec

    def _encode_part(self, part: dict[str, Any]) -> dict[str, Any]:
        state = part.get("state_dict", {})
        codecs = {
            name: WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
            for name in state
            if (entry := self._codes.get(name)) is not None and "codes" not in entry
        }
        with _caught(self.done.warnings):
            encoded, report = encode_and_report(part, self._policy, ModelNames(frozenset(), self._parameters, codecs))
        self._report += report
        summary = encoded.pop(SUMMARY_KEY)
        self._summary.update({key: summary[key] for key in _OF_THE_WHOLE if key in summary})
        if self._codes:
            self._summary.setdefault(CODES_KEY, dict(self._codes)).update(summary.get(CODES_KEY, {}))
        return encoded


@contextmanager
def _caught(messages: list[str]) -> Iterator[None]:
    """Append the user warnings of the block to ``messages``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # whatever else happens meanwhile, in any thread
        warnings.simplefilter("always", UserWarning)
        yield
    messages += [str(warning.message) for warning in caught]


_OF_THE_WHOLE = ("format_version", "policy")
"""What a piece's summary says that is true of the whole checkpoint."""


def without_summary(content: Mapping[str, Any]) -> Any:
    """Return a shallow copy of a checkpoint, of the same class, that says nothing about how it was encoded."""
    without: Any = copy.copy(content)
    without.pop(SUMMARY_KEY, None)
    return without


def _memory(value: Tensor | QuantizedTensor) -> Any:
    """Return what tensors that share memory have in common, None for those that no policy ever encodes."""
    if isinstance(value, QuantizedTensor):
        return id(value)
    if value.layout != torch.strided or type(value) not in (Tensor, torch.nn.Parameter):
        return None
    return value.untyped_storage()._cdata


def _pieces(found: Sequence[_Leaf]) -> dict[int, _Piece]:
    """Return the piece that each tensor belongs to, by the tensor's id."""
    leader: dict[Any, Any] = {}  # of each mark, another one of the same piece; its own if it speaks for all

    def find(mark: Any) -> Any:
        while leader.setdefault(mark, mark) != mark:
            mark = leader[mark]
        return mark

    for keys, value in found:
        if keys[0] == "optimizer_states" and len(keys) == 5:
            leader[find(keys[:4])] = find(_memory(value))
    pieces: dict[Any, _Piece] = {}
    by_tensor: dict[int, _Piece] = {}
    for keys, value in found:
        piece = by_tensor[id(value)] = pieces.setdefault(find(_memory(value)), _Piece())
        piece.leaves.append((keys, value))
    return by_tensor


def _only(content: Any, wanted: Sequence[tuple[Keys, Tensor]]) -> Any:
    """Return the containers around the wanted tensors, with nothing else in them; indices stay what they are."""
    if not wanted[0][0]:
        return wanted[0][1]
    below: dict[Any, list[tuple[Keys, Tensor]]] = {}
    for (key, *keys), tensor in wanted:
        below.setdefault(key, []).append((tuple(keys), tensor))
    if isinstance(content, dict):
        part = {key: _only(content[key], items) for key, items in below.items()}
        if "param_groups" in content and "state" in part:  # whose options, such as eps, say what the states are for
            part["param_groups"] = _groups_of(content["param_groups"], part["state"])
        return part
    return [_only(content[index], below[index]) if index in below else {} for index in range(max(below) + 1)]


def _groups_of(groups: Any, parameters: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return the groups of an optimizer with only these of their parameters, and without tensors."""
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float | str)}
        | {"params": [key for key in group.get("params", ()) if key in parameters]}
        for group in groups
    ]
