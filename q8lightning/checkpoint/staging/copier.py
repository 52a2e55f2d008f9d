"""Copy a checkpoint as it is now; fetch what is on devices to the host later.

Tensors are copied storage by storage, as ``torch.save`` writes them, so that tied tensors stay tied and views stay
views.
"""

import copy
from collections import ChainMap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.storage import TypedStorage

from q8lightning.checkpoint.containers import ATOMS
from q8lightning.checkpoint.memory import is_ordinary
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.staging.stand_in import freeze
from q8lightning.checkpoint.staging.transfer import HostMemory, Transfer, take
from q8lightning.checkpoint.tree import rebuild

IMMUTABLE = ATOMS | {bytes, complex, torch.dtype, torch.device, torch.Size}
"""Types of objects that cannot be changed, so that they need no copy."""


_Place = tuple[int, torch.Size, tuple[int, ...]]
"""Offset, shape and strides of a tensor in its storage."""


class Copies(NamedTuple):
    """The copies of what was on devices.

    Attributes:
        storages: The copies, by the keys of the originals.
        tags: The locations of the originals, by the addresses of the copies.
    """

    storages: dict[int, UntypedStorage]
    tags: dict[int, str]


def _locate(tensor: Tensor) -> tuple[int, _Place]:
    """Return the key of a tensor's storage and where the tensor lies in it."""
    place = (int(tensor.storage_offset()), tensor.shape, tensor.stride())
    return tensor.untyped_storage()._cdata, place


class Copier:
    """Copies containers, tensors and other objects, each once, so that what was shared stays shared.

    Args:
        live: Copy all that training could change; otherwise only what is on a device.
        known: Tensors that are not copied, for the caller to replace.
        stand_ins: Replace objects by stand-ins that pickle as the objects do now. Only for content that is pickled and
            not used otherwise.
    """

    def __init__(self, live: bool, known: Iterable[Tensor] = (), stand_ins: bool = False) -> None:
        self._live = live
        self._known = set(map(id, known))
        self._stand_ins = stand_ins
        self._transfers: dict[torch.device, Transfer] = {}
        self._on_device: list[tuple[Tensor, int, _Place]] = []
        self._payloads: list[QuantizedTensor] = []
        self._clones: dict[int, UntypedStorage] = {}
        # The memo of copy.deepcopy, with torch's part of it, so that an object in the checkpoint shares the copies of
        # its tensors.
        self._memo: dict[Any, Any] = {"torch": self._clones}
        self._pending: list[tuple[Any, Callable[[Any], None]]] = []
        """What is still to be copied, with the function that takes the copy: attributes of containers, and the parts of
        objects."""
        self._alive: list[Any] = []
        """Objects that exist only while they are copied, kept so that nothing else gets their ids."""

    @torch.inference_mode(False)  # another thread fills the copies, and cannot change an inference tensor
    def copy(self, value: Any) -> Any:
        """Return a copy; :meth:`fetch` fills the copies of tensors on a device.

        Raises:
            Exception: If an object cannot be pickled, what pickling raises.
        """
        result = self._copy(value)
        known, self._known = self._known, set()  # the caller replaces items, not attributes and parts of objects
        while self._pending:
            pending, self._pending = self._pending, []
            parts = [part for part, _ in pending]
            self._alive.append(parts)
            for copied, (_, give) in zip(self._copy(parts), pending, strict=True):
                give(copied)
        self._known = known
        self._memo = {"torch": self._clones}
        self._alive.clear()
        return result

    def transfer_of(self, storage: UntypedStorage) -> Transfer:
        """Return the transfer to the host of a storage's device."""
        if storage.device not in self._transfers:
            self._transfers[storage.device] = Transfer(storage.device, torch.serialization.location_tag(storage))
        return self._transfers[storage.device]

    def start(self) -> None:
        """Freeze what is on devices."""
        for transfer in self._transfers.values():
            transfer.start()

    def fetch(self, memory: HostMemory | None) -> Copies:
        """Bring everything to the host and fill the copies."""
        for payload in self._payloads:
            storage = payload.data.untyped_storage()
            self._transfers[storage.device].add(storage, private=True)
        space = take(sum(transfer.nbytes for transfer in self._transfers.values()), memory)
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
        copied = self._copy_attributes if self._live else None
        return rebuild(value, self._change, everything=self._live, known=self._memo, copied=copied)

    def _copy_attributes(self, container: Any, copied: Any) -> None:
        attributes = getattr(container, "__dict__", None)
        if attributes:
            self._alive.append(attributes := dict(attributes))
            self._pending.append((attributes, vars(copied).update))

    def _change(self, value: Any) -> Any:
        """Return what replaces a leaf."""
        if type(value) in IMMUTABLE or id(value) in self._known:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, QuantizedTensor):
            result: Any = self._payload(value)
        elif isinstance(value, Tensor) and is_ordinary(value):
            result = self._tensor(value)
        else:
            result = self._object(value) if self._live else value
        self._memo[id(value)] = result
        return result

    def _object(self, value: Any) -> Any:
        if isinstance(value, TypedStorage):  # its own deep copy warns that it is deprecated
            untyped = copy.deepcopy(value._untyped_storage, self._memo)
            return TypedStorage(wrap_storage=untyped, dtype=value.dtype, _internal=True)  # type: ignore[no-untyped-call]
        if isinstance(value, bytearray | UntypedStorage):
            return copy.deepcopy(value, self._memo)
        if not self._stand_ins:
            attempt = ChainMap({}, self._memo)  # if it fails, its partial copies are thrown away
            try:
                result = copy.deepcopy(value, attempt)  # type: ignore[arg-type]
            except Exception:
                pass  # an object that cannot be copied may still be pickled
            else:
                self._alive.append(attempt.maps[0].pop(id(attempt), None))  # what deepcopy keeps alive
                self._memo.update(attempt.maps[0])
                return result
        frozen = freeze(value)
        if frozen is None:
            return value
        stand_in, parts = frozen
        self._alive.append(parts)
        self._pending.append((parts, stand_in.take))
        return stand_in

    def _payload(self, payload: QuantizedTensor) -> QuantizedTensor:
        if _on_host(payload.data):
            return payload
        payload = payload.replace_data(payload.data)  # fetched later, because nothing changes it
        self.transfer_of(payload.data.untyped_storage())
        self._payloads.append(payload)
        return payload

    def _tensor(self, tensor: Tensor) -> Tensor:
        on_host = _on_host(tensor)
        if on_host and not self._live:
            return tensor
        storage, (key, place) = tensor.untyped_storage(), _locate(tensor)
        if on_host and key not in self._clones and storage.nbytes() == tensor.nbytes and tensor.is_contiguous():
            result = tensor.detach().clone()  # the whole storage; this takes a third of the time of the other way
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
