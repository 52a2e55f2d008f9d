"""Save a checkpoint as it was at the call: run its plan, and copy all the rest."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from q8lightning.checkpoint.encode.checkpoint import replacements_for, summarize
from q8lightning.checkpoint.encode.outline import Outline
from q8lightning.checkpoint.encode.run import Run
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.load_locations import located
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.staging.copier import Copier, Copies
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.checkpoint.tree import rebuild
from q8lightning.quantization.many.buffer import split

Fetched = Callable[[Copies], Tensor]
"""Returns a tensor from what came to the host."""


class Save:
    """A checkpoint as it was when this was made, also if training has changed its tensors since.

    Args:
        run: Encodes the tensors that its plan knows. Saves of the same pause of training share it.
        checkpoint: What is saved; left as it is.
        tensors: Its tensors, as the plan's outline numbers them.
        names: What is known of the model.
        live: Training goes on before :meth:`fetch`, so that what it could change is copied now. Otherwise the content
            shares with the checkpoint what is not encoded.
        stand_ins: See :class:`~q8lightning.checkpoint.staging.copier.Copier`.

    Attributes:
        plan: The run's plan.
        next_plan: The plan for the next save of the same tensors; once fetched.
        report: What is lost; once fetched.
    """

    def __init__(
        self,
        run: Run,
        checkpoint: dict[str, Any],
        tensors: Sequence[Tensor],
        names: ModelNames,
        live: bool,
        stand_ins: bool = False,
    ) -> None:
        self.plan = self.next_plan = plan = run.plan
        self.report = run.report
        known = [*plan.places, *(i for group in plan.neighbours for i in group)]
        if live:
            known += [i for raw in plan.raws for i in raw.numbers]
        self._run: Run | None = run
        self._names = names
        self._live = live
        self._tensors = list(tensors)  # kept until they are replaced: ids stay unique as long
        self._copier = Copier(live, known=[tensors[i] for i in known], stand_ins=stand_ins)
        for number in known:
            if tensors[number].device.type != "cpu":
                self._copier.transfer_of(tensors[number].untyped_storage())
        self._content = self._copier.copy(checkpoint)
        self._copier.start()

    @contextmanager
    def fetch(self, memory: HostMemory | None = None) -> Iterator[Any]:
        """Settle the run, wait for the copies from devices and give the content; call it once.

        Within this context, ``torch.save`` writes the devices that tensors came from, so that they load to them.

        Args:
            memory: Where copies go that are not needed after this context; None for memory of their own.
        """
        with located(self._fill(memory)):
            yield self._content

    def _fill(self, memory: HostMemory | None) -> dict[int, str]:
        """Bring everything to the host and put it into the content; return locations by address for ``located``."""
        run, self._run = self._run, None
        assert run is not None
        run.settle()
        if not self._live:
            self._copier.start()  # again, to follow what settling has launched
        plan, self.next_plan = run.plan, run.next_plan
        report = self.report = replace(run.report)  # saves that share the run have files of their own
        buffers = [(self._bring(each.memory), each.cuts, each.members) for each in run.buffers]
        codes = {name: tuple(map(self._bring, each)) for name, each in run.codes.items()}
        own = {i: self._bring(each) for i, each in run.own.items()}
        raws = self._bring_raws(run)
        payloads = list(run.payloads)
        del run  # so that a device's memory is freed as soon as its copy is complete
        copies = self._copier.fetch(memory)
        stored: list[QuantizedTensor | None] = [None] * len(payloads)
        for buffer, cuts, members in buffers:
            for i, data in zip(members, split(buffer(copies), cuts), strict=True):
                payload = payloads[i]
                stored[i] = None if payload is None else payload.replace_data(data)
        payloads.clear()
        once: dict[int, Tensor] = {}  # tied tensors share a copy
        fetched = {i: once.setdefault(id(each), each(copies)) for i, each in own.items()}
        replacements = replacements_for(plan, self._tensors, stored, fetched)
        for number, tensor in raws(copies):
            replacements[id(self._tensors[number])] = tensor
        self._content = rebuild(
            self._content,
            lambda leaf: replacements.get(id(leaf), leaf),
            anew=not self._live,
            in_place=self._live,
        )
        self._tensors.clear()
        on_host = {name: (one(copies), two(copies)) for name, (one, two) in codes.items()}
        summarize(self._content, plan, report, self._names, on_host)
        return copies.tags

    def _bring(self, tensor: Tensor) -> Fetched:
        """Have a tensor copied to the host, which nothing changes meanwhile; return what gives the copy."""
        if tensor.device.type == "cpu":
            return lambda _: tensor
        storage = tensor.untyped_storage()
        self._copier.transfer_of(storage).add(storage, private=True)
        key, dtype = storage._cdata, tensor.dtype
        place = int(tensor.storage_offset()), tensor.shape, tensor.stride()
        return lambda copies: torch.empty(0, dtype=dtype, device="cpu").set_(copies.storages[key], *place)

    def _bring_raws(self, run: Run) -> Callable[[Copies], Iterator[tuple[int, Tensor]]]:
        """Have the plan's raws copied to the host; return what gives them, each with its number."""
        outline = run.plan.outline
        groups = [(raw, frozen) for raw, frozen in zip(run.plan.raws, run.frozen, strict=True) if frozen is not None]
        parameters = {i for raw, _ in groups for i in raw.numbers if type(self._tensors[i]) is nn.Parameter}
        on_host: list[tuple[tuple[int, ...], list[Tensor] | None]] = []
        for raw, frozen in groups:
            if frozen.device.type == "cpu":
                sizes = [outline.properties[i][0].numel() for i in raw.numbers]
                on_host.append((raw.numbers, list(torch.split(frozen.view(-1), sizes))))
            else:
                parts = [(_key(i), _nbytes(outline, i)) for i in raw.numbers]  # training may have changed them
                self._copier.transfer_of(frozen.untyped_storage()).add_frozen(frozen, parts)
                on_host.append((raw.numbers, None))

        def tensors(copies: Copies) -> Iterator[tuple[int, Tensor]]:
            for numbers, parts in on_host:
                for place, i in enumerate(numbers):
                    source = copies.storages[_key(i)] if parts is None else parts[place]
                    tensor = _restored(outline, i, source)
                    yield i, nn.Parameter(tensor, tensor.requires_grad) if i in parameters else tensor

        return tensors


def _key(number: int) -> int:
    """Return the key of a tensor's bytes among the copies. It is negative, unlike the addresses of storages."""
    return -1 - number


def _nbytes(outline: Outline, number: int) -> int:
    shape, dtype, _ = outline.properties[number]
    return int(shape.numel() * dtype.itemsize)


def _restored(outline: Outline, number: int, source: UntypedStorage | Tensor) -> Tensor:
    """Return a tensor as it was.

    Args:
        outline: What it looked like.
        number: Its number there.
        source: The storage with its bytes, or a part of a larger tensor, which is copied.
    """
    shape, dtype, requires_grad = outline.properties[number]
    if isinstance(source, Tensor):
        result = source.clone().as_strided(shape, outline.strides[number])
    else:
        result = torch.empty(0, dtype=dtype, device="cpu").set_(source, 0, shape, outline.strides[number])
    return result.requires_grad_(requires_grad)
