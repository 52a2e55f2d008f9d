"""Engage and release the selected weights of a model in groups of one codec and device."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from q8lightning.qat.engage.fingerprints import Fingerprints
from q8lightning.qat.select.selected import SelectedWeight
from q8lightning.qat.select.shards import add_up
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.system.shards import local_of

Place = tuple[FakeQuantizeGroup, int]
"""A group, and the index of one of its tensors."""


class WeightGroups:
    """Groups of weights, each of which is quantized in one launch for each dtype.

    Args:
        weights: The selected weights.
    """

    def __init__(self, weights: Sequence[SelectedWeight]) -> None:
        together: dict[tuple[WeightCodec, torch.device], list[SelectedWeight]] = {}
        for weight in weights:
            together.setdefault((weight.codec, local_of(weight.parameter).device), []).append(weight)
        self._groups = [_group(codec, members) for (codec, _), members in together.items()]
        self._names = {id(weight.parameter): weight.names[0] for weight in weights}
        self._parameters = {weight.names[0]: weight.parameter for weight in weights}
        self.places: dict[int, Place] = {
            id(tensor): (group, i) for group in self._groups for i, tensor in enumerate(group.tensors)
        }
        """The place of each weight, by its identity."""
        self.fingerprints = Fingerprints(self.places)

    @property
    def devices(self) -> set[torch.device]:
        """The devices of the weights."""
        return {group.device for group in self._groups}

    def names(self, parameters: Iterable[int]) -> list[str]:
        """Return the first names of weights that are given by their identity."""
        return [self._names[each] for each in parameters]

    def engage(self, share: float, seed: int, measure: bool) -> dict[str, ErrorStatistics]:
        """Let the weights show their quantized values.

        Returns:
            What each weight lost, by its first name; of a distributed weight, what the part here lost. Empty if not
            measured.
        """
        measured = [group.engage(share, seed, measure) for group in self._groups]
        self.fingerprints.record(self.places if self.fingerprints.compare_all else ())
        if not measure:
            return {}
        rows = [row for of_group in measured if of_group is not None for row in of_group]
        names = self.names(id(tensor) for group in self._groups for tensor in group.tensors)
        return {name: ErrorStatistics(*row.unbind()) for name, row in zip(names, rows, strict=True)}

    def release(self) -> None:
        """Let the weights show their masters."""
        for group in self._groups:
            group.release()
        self.fingerprints.clear()

    def lost(self) -> list[int]:
        """Return the weights, by their identity, whose quantized values were written to."""
        lost = [id(group.tensors[index]) for group in self._groups for index in group.lost()]
        return lost or self.fingerprints.changed()

    @property
    def is_stale(self) -> bool:
        """Whether a master was written to since it was quantized."""
        return any(group.written for group in self._groups)

    def requantize(self, share: float, seed: int) -> None:
        """Quantize those masters again that were written to; ``share`` and ``seed`` as for :meth:`engage`."""
        weights = [weight for weight, (group, index) in self.places.items() if index in group.written]
        for group in self._groups:
            group.settle(share, seed)
        self.fingerprints.record(weight for weight in weights if weight in self.fingerprints)

    def note_write(self, parameter: int) -> None:
        """Note that the master of a weight, given by its identity, was written to."""
        group, index = self.places[parameter]
        group.wrote(index)

    def master(self, parameter: Tensor) -> Tensor | None:
        """Return the master of an engaged weight, None for any other tensor."""
        if id(parameter) not in self.places:
            return None
        group, index = self.places[id(parameter)]
        return group.master(index)

    def of_whole_weights(self, statistics: Mapping[str, ErrorStatistics]) -> dict[str, ErrorStatistics]:
        """Return what whole weights lost, from what the parts of all processes lost; all of them call this at once."""
        rows = torch.stack([torch.stack(tuple(each)) for each in statistics.values()])
        whole = add_up(rows, [self._parameters[name] for name in statistics])
        return {name: ErrorStatistics(*row.unbind()) for name, row in zip(statistics, whole, strict=True)}


def _group(codec: WeightCodec, members: Sequence[SelectedWeight]) -> FakeQuantizeGroup:
    tensors, portions = [each.parameter for each in members], [each.portion for each in members]
    return FakeQuantizeGroup(tensors, codec.book, codec.block_size, codec.axis, portions)
