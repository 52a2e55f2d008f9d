"""Find, verify and decode all payloads of a checkpoint together: in several threads, or in few launches."""

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.containers import is_unpickled_plainly
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.tree import leaves, rebuild
from q8lightning.quantization.many.decode import batches, bytes_to_decode_on, decode_on, decode_together
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import share_out


def payloads_in(content: Any) -> list[QuantizedTensor]:
    """Return the payloads in the containers of a checkpoint, each once."""
    found = {id(leaf): leaf for _, leaf in leaves(content) if isinstance(leaf, QuantizedTensor)}
    return list(found.values())


@neutral()
def decode_payloads(payloads: Sequence[QuantizedTensor], device: torch.device | None = None) -> dict[int, Tensor]:
    """Verify and decode loaded payloads.

    Args:
        payloads: Each once.
        device: A GPU to decode on, if they fit there; None to decode where they are.

    Returns:
        The tensors by the payloads' ids.

    Raises:
        CorruptCheckpointError: If a payload is not what was saved.
    """
    decoded: dict[int, Tensor] = {}
    if device is not None:
        share_out([partial(copy_context().run, each.verify) for each in payloads], [each.nbytes for each in payloads])
        decoded = _decode_on(device, payloads)
    left = [payload for payload in payloads if id(payload) not in decoded]
    jobs, sizes = [], []
    for batch in batches([payload.item for payload in left], torch.get_num_threads()):
        members = [left[index] for index in batch]
        jobs.append(partial(copy_context().run, _decode_together, members))
        sizes.append(sum(payload.nbytes for payload in members))
    for values in share_out(jobs, sizes):
        decoded |= values
    return decoded


def _decode_together(payloads: Sequence[QuantizedTensor]) -> dict[int, Tensor]:
    """Verify payloads and decode them in one go; return the tensors by the payloads' ids."""
    for payload in payloads:
        payload.verify()
    values = decode_together([payload.item for payload in payloads])
    return {id(payload): payload.as_decoded(each) for payload, each in zip(payloads, values, strict=True)}


def _decode_on(device: torch.device, payloads: Sequence[QuantizedTensor]) -> dict[int, Tensor]:
    """Decode on a GPU what its kernels know; nothing if it does not fit beside what training has there."""
    chosen = [payload for payload in payloads if payload.dtype != torch.float64]  # kernels do not know it
    items = [each.item for each in chosen]
    if not items or bytes_to_decode_on(items) > _free_bytes(device):
        return {}
    try:
        values = decode_on(device, items)
    except torch.OutOfMemoryError:  # another process was faster
        return {}
    return {id(payload): payload.as_decoded(each) for payload, each in zip(chosen, values, strict=True)}


def _free_bytes(device: torch.device) -> int:
    """Return how many bytes of a GPU may be used. A twentieth remains for training that goes on there."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - total // 20


class TensorsWantedError(Exception):
    """A container did something with its items while they were payloads and not yet tensors."""


def replace_payloads(content: Any, decoded: Mapping[int, Tensor]) -> Any:
    """Put tensors in the place of payloads; change containers in place where that is possible.

    Args:
        content: A checkpoint to which there is no other reference.
        decoded: The tensors by the payloads' ids.

    Raises:
        TensorsWantedError: If unpickling with the tensors could have given something else.
    """

    def check(container: Any, _: Any) -> None:
        if not is_unpickled_plainly(container):
            raise TensorsWantedError

    def change(leaf: Any) -> Any:
        return decoded[id(leaf)] if isinstance(leaf, QuantizedTensor) else leaf

    return rebuild(content, change, in_place=True, copied=check)
