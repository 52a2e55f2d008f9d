"""All payloads of a checkpoint at once: in several threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from q8lightning.checkpoint.integrity import checksum
from q8lightning.checkpoint.payload import CHECKSUMS, QuantizedTensor
from q8lightning.checkpoint.workers import Workers, count_workers

WORTH_THREADS = 2**22
"""Bytes of payloads from which on threads are started for them: they take as long as starting a few."""


def payloads_in(content: Any) -> list[QuantizedTensor]:
    """Return the payloads in the containers of a checkpoint, each once."""
    found: dict[int, QuantizedTensor] = {}
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, QuantizedTensor):
            found[id(value)] = value
        elif isinstance(value, dict):
            pending += reversed(value.values())
        elif isinstance(value, list | tuple):
            pending += reversed(value)
    return list(found.values())


@contextmanager
def checksums_ahead(content: Any) -> Iterator[None]:
    """Within this context, threads compute the checksums that the payloads of ``content`` are pickled with.

    The payloads must not change meanwhile.
    """
    payloads = [each for each in payloads_in(content) if each.checksum is None and each.data.device.type == "cpu"]
    if sum(payload.nbytes for payload in payloads) < WORTH_THREADS:
        yield
        return
    with Workers(count_workers(len(payloads))) as workers:
        sums = {id(payload): workers.submit(checksum, payload.header, payload.data) for payload in payloads}
        token = CHECKSUMS.set(sums)
        try:
            yield
        finally:
            CHECKSUMS.reset(token)
