"""Compare a file with all sums that it has, and decode everything once."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from q8lightning.checkpoint.file.archive import verified
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.tools.source import leaves, open_file, path_of, read_source


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        bytes: Size of the file.
        tensors: How many tensors it holds, as far as it could be read; tied ones count as often as they occur.
        payloads: How many of them are encoded.
        has_sums: Whether the file has a CRC32 of each of its records.
        damage: What is damaged; nothing if the file is whole.
    """

    bytes: int
    tensors: int = 0
    payloads: int = 0
    has_sums: bool = True
    damage: tuple[str, ...] = ()


def verify_file(path: Path, trust: bool = False, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check the checksum of every payload, that it decodes to finite values, and the CRC32 of everything else.

    Raises:
        CommandError: If there is no such file, or it is no checkpoint at all.
        NewerFormatError: If the file was written in a later format than this version reads.
    """
    file = open_file(path)
    counts: dict[str, int] = {}
    damage: list[str] = []
    try:
        source = read_source(file, trust)
        with verified(file):
            found = [(path_of(keys), value) for keys, value in leaves(source.content)]
            payloads = {id(value): (name, value) for name, value in found if isinstance(value, QuantizedTensor)}
            counts = {"tensors": len(found), "payloads": len(payloads)}
            for index, (name, payload) in enumerate(payloads.values()):
                damage += _damage(name, payload)
                if progress is not None:
                    progress(index + 1, len(payloads))
    except CorruptCheckpointError as error:
        if not damage:  # the sums of the file say less exactly where it is
            damage.append(error.what)
    with file.reader() as reader:
        return Verification(file.size, **counts, has_sums=zipfile.is_zipfile(reader), damage=tuple(damage))


def _damage(name: str, payload: QuantizedTensor) -> list[str]:
    """Return what is wrong with a payload, nothing if nothing is."""
    try:
        if bool(payload.decode().isfinite().all()):
            return []
        return [f"the tensor {name} (it decodes to values that are not finite)"]
    except CorruptCheckpointError as error:
        return [error.what]
    except Exception as error:  # a header whose sizes do not fit the data raises in many ways
        return [f"the tensor {name} (it cannot be decoded: {type(error).__name__})"]
