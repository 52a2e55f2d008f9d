"""A checkpoint as it is at this moment, however training goes on, in host memory once it is fetched.

Tensors are copied storage by storage, as ``torch.save`` writes them, so that tied tensors and views stay what they are.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn

from q8lightning.checkpoint.host_memory import PinnedMemory, Transfer
from q8lightning.checkpoint.locations import located
from q8lightning.checkpoint.payload import QuantizedTensor

_IMMUTABLE = frozenset((int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size))


_Place = tuple[int, torch.Size, tuple[int, ...]]
"""Offset, shape and strides of a tensor in its storage."""


class Snapshot:
    """A checkpoint that nobody changes any more.

    Args:
        checkpoint: What :func:`~q8lightning.checkpoint.state_dict.encode_checkpoint` returned; left as it is. The
            bytes of its payloads belong to it alone and are not copied on the host.
        live: Training goes on before :meth:`fetch`: what it could change is copied now. Otherwise the snapshot shares
            everything with the checkpoint but what is on a device.
    """

    def __init__(self, checkpoint: Any, live: bool) -> None:
        self._copier = Copier(live)
        self._content = self._copier.copy(checkpoint)
        self._copier.start()

    @contextmanager
    def fetch(self, memory: PinnedMemory | None = None) -> Iterator[Any]:
        """Wait for the copies from devices and give the content; once.

        Saved within this context, tensors get the location that they had, so that they load to where they were.

        Args:
            memory: Where copies go that are not needed after this context; None for memory of their own.
        """
        # In a function of its own: no variable keeps the device's memory alive while the file is written.
        with located(self._copier.fetch(memory).tags):
            yield self._content


class Copies(NamedTuple):
    """What came from devices.

    Attributes:
        storages: The copies, by the keys of what they are copies of.
        tags: Where that was, by the copies' addresses.
    """

    storages: dict[int, UntypedStorage]
    tags: dict[int, str]


def _space(nbytes: int, memory: PinnedMemory | None) -> Tensor:
    return (
        torch.empty(nbytes, dtype=torch.uint8, device="cpu") if memory is None or nbytes == 0 else memory.take(nbytes)
    )


def _locate(tensor: Tensor) -> tuple[int, _Place]:
    """Return the key of a tensor's storage and where the tensor lies in it."""
    place = (int(tensor.storage_offset()), tensor.shape, tensor.stride())
    return tensor.untyped_storage()._cdata, place


class Copier:
    """Copies containers, tensors and anything else, each object once, so that what was shared stays shared.

    Args:
        live: Copy what training could change; otherwise only what is on a device.
        known: Tensors that are not copied but stay where they are, for the caller to replace.
    """

    def __init__(self, live: bool, known: Iterable[Tensor] = ()) -> None:
        self._live = live
        self._known = set(map(id, known))
        self._transfers: dict[torch.device, Transfer] = {}
        self._on_device: list[tuple[Tensor, int, _Place]] = []
        self._payloads: list[QuantizedTensor] = []
        self._clones: dict[int, UntypedStorage] = {}
        # What copy.deepcopy knows about, with torch's corner of it: a module in the checkpoint then shares the
        # copies of its tensors.
        self._memo: dict[Any, Any] = {"torch": self._clones}

    def copy(self, value: Any) -> Any:
        """Return a copy; of tensors on a device, one that :meth:`fetch` fills."""
        if type(value) in _IMMUTABLE or id(value) in self._known:
            return value
        if id(value) not in self._memo:
            self._memo[id(value)] = self._copy(value)
        return self._memo[id(value)]

    def transfer_of(self, storage: UntypedStorage) -> Transfer:
        """Return what takes the memory of a storage's device to the host."""
        if storage.device not in self._transfers:
            self._transfers[storage.device] = Transfer(storage.device, torch.serialization.location_tag(storage))
        return self._transfers[storage.device]

    def start(self) -> None:
        """Freeze what is on devices."""
        for transfer in self._transfers.values():
            transfer.start()

    def fetch(self, memory: PinnedMemory | None) -> Copies:
        """Put everything on the host and let the copies show it."""
        for payload in self._payloads:
            storage = payload.data.untyped_storage()
            self._transfers[storage.device].add(storage, private=True)
        space = _space(sum(transfer.nbytes for transfer in self._transfers.values()), memory)
        copies = Copies({}, {})
        for transfer in self._transfers.values():
            nbytes = transfer.nbytes
            for key, copied in transfer.finish(space[:nbytes]).items():
                copies.storages[key] = copied
                copies.tags[copied.data_ptr()] = transfer.location
            space = space[nbytes:]
        for tensor, key, place in self._on_device:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(copies.storages[key], *place)
        for payload in self._payloads:
            key, place = _locate(payload.data)
            payload.data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(copies.storages[key], *place)
        return copies

    def _copy(self, value: Any) -> Any:
        if isinstance(value, dict):
            known = self._known
            copies = {
                key: item if type(item) in _IMMUTABLE or id(item) in known else self.copy(item)
                for key, item in value.items()
            }
            return self._dict(value, copies) if self._is_changed(value.values(), copies.values()) else value
        if isinstance(value, QuantizedTensor):
            return self._payload(value)
        if isinstance(value, Tensor):
            return self._tensor(value) if is_plain(value) else self._other(value)
        if type(value) in (list, tuple):
            items = [item if type(item) in _IMMUTABLE else self.copy(item) for item in value]
            return type(value)(items) if self._is_changed(value, items) else value
        return self._other(value)

    def _is_changed(self, before: Iterable[Any], after: Iterable[Any]) -> bool:
        return self._live or any(new is not old for new, old in zip(after, before, strict=True))

    def _dict(self, value: dict[Any, Any], copies: dict[Any, Any]) -> dict[Any, Any]:
        if type(value) is dict:
            return copies
        result = copy.copy(value)  # keeps the subclass and its attributes, such as _metadata
        dict.update(result, copies)  # a Counter's own would add them up
        known, self._known = self._known, set()  # whoever replaces those looks at items, not at attributes
        for name, attribute in getattr(result, "__dict__", {}).items():
            # The versions of a model's modules: a dict that copy.deepcopy would take milliseconds for.
            setattr(result, name, self.copy(attribute) if isinstance(attribute, dict) else self._other(attribute))
        self._known = known
        return result

    def _other(self, value: Any) -> Any:
        if not self._live:
            return value
        try:
            return copy.deepcopy(value, self._memo)
        except (NotImplementedError, RuntimeError):
            if isinstance(value, Tensor):  # some sparse and nested ones, and those with a history
                return value.detach().clone()
            raise

    def _payload(self, payload: QuantizedTensor) -> QuantizedTensor:
        if _on_host(payload.data):
            return payload
        payload = payload.replace_data(payload.data)  # the rest is done when it is fetched: nobody changes it
        self.transfer_of(payload.data.untyped_storage())
        self._payloads.append(payload)
        return payload

    def _tensor(self, tensor: Tensor) -> Tensor:
        on_host = _on_host(tensor)
        if on_host and not self._live:
            return tensor
        storage, (key, place) = tensor.untyped_storage(), _locate(tensor)
        if on_host and key not in self._clones and storage.nbytes() == tensor.nbytes and tensor.is_contiguous():
            result = tensor.detach().clone()  # the whole storage, which takes a third of the time of the other way
            self._clones[key] = result.untyped_storage()
        else:
            result = torch.empty(0, dtype=tensor.dtype, device="cpu")
            if on_host:
                if key not in self._clones:
                    self._clones[key] = storage.clone()  # type: ignore[no-untyped-call]
                result.set_(self._clones[key], *place)
        if tensor.requires_grad:
            result.requires_grad_()
        if type(tensor) is nn.Parameter:
            result = nn.Parameter(result, tensor.requires_grad)
        if not on_host:
            self.transfer_of(storage).add(storage, private=not self._live)
            self._on_device.append((result, key, place))
        return result


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but a view of a storage."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_neg() or tensor.is_conj())
        and not tensor.__dict__
    )
