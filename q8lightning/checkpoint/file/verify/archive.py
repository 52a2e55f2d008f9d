"""Compare the records of a zip with their CRC32 while the file is being loaded.

``torch.save`` writes the CRC32 of each record, ``torch.load`` does not look at it: a flipped bit in a raw tensor, a
learning rate or a key of the state dict would load without a word.
"""

import os
import struct
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from q8lightning.checkpoint.file.load_errors import CONTENTS, damage_in
from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.file.verify.contents import describe_record, records_of_payloads
from q8lightning.checkpoint.file.verify.summed_file import LONG, SummedFile
from q8lightning.checkpoint.integrity import CorruptCheckpointError

CHUNK = 2**20
"""Bytes that are read at a time: few enough to stay in the cache until they are summed."""

THREADS = 4
"""At most. Reading and CRC32, about 2.4 GB a second a thread, release Python's lock."""


_HEADER, _NAME_LENGTH = 30, 26
"""Bytes of a record's header before its name, and where in it the lengths of name and extra fields begin."""

_FOLDER = 0x10
"""The attribute of a folder. Torch does not read such a record, and returns memory that nobody has written to."""


@contextmanager
def verified(file: OpenFile, through: SummedFile | None = None, payloads: bool = True) -> Iterator[None]:
    """Verify a file in other threads while the block loads it.

    A file that is no zip has nothing to verify. Nor has one that was written without sums
    (``set_crc32_options(False)``).

    Args:
        file: The file.
        through: What the block reads from, if it is known. Long records that were read there are not read again.
        payloads: Whether to sum the records of payloads. A block that decodes them compares each with a checksum of its
            own, which is several times as fast and knows the tensor.

    Raises:
        CorruptCheckpointError: If a record is not what was written. What the block raised is then its cause.
    """
    verification = _Verification(file, through, payloads)
    try:
        yield
    except CorruptCheckpointError:
        raise  # it knows the tensor
    except Exception as error:
        verification.check(cause=error)
        if (damage := damage_in(error)) is not None:  # torch reads the table of contents more strictly than Python
            raise CorruptCheckpointError(damage, file.path) from error
        raise
    else:
        verification.check()
    finally:
        verification.stop()


class _Verification:
    """Threads that share the records of a file; daemons, which do not keep the process alive."""

    def __init__(self, file: OpenFile, through: SummedFile | None, payloads: bool) -> None:
        self._stopped = False
        self._file = file
        self._through = through
        self._long: list[zipfile.ZipInfo] = []
        """Records that are summed where the block reads them."""
        self._elsewhere: set[str] = set()
        """Names of records whose content is verified when it is decoded."""
        self._damage: list[str] = []
        self._threads: list[threading.Thread] = []
        try:
            records, self._elsewhere = _records(file, payloads)
        except _DamagedArchive as error:
            self._damage.append(str(error))
            return
        if through is not None:
            through.leave_out({_start_of(file, record) for record in records if record.filename in self._elsewhere})
            self._long = [record for record in records if record.file_size >= LONG]
            records = [record for record in records if record.file_size < LONG]
        records.sort(key=lambda record: record.file_size, reverse=True)
        count = min(THREADS, max(1, (os.cpu_count() or 1) // 2), len(records))  # the rest of the cores decodes
        for start in range(count):
            thread = threading.Thread(target=self._verify, args=(records[start::count],), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _verify(self, records: list[zipfile.ZipInfo]) -> None:
        try:
            with self._file.reader() as reader, zipfile.ZipFile(reader) as archive:
                for record in records:
                    if not self._is_whole(archive, record):
                        self._damage.append(describe_record(archive, record))
                    if self._stopped or self._damage:
                        return
        except Exception as error:
            self._damage.append(f"{CONTENTS}: {error}")

    def _is_whole(self, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
        if record.external_attr & _FOLDER:
            return False
        try:
            with archive.open(record) as content:  # which compares the two headers of the record
                if record.filename in self._elsewhere:
                    return True
                found = self._sum_as_read(record)
                if found is not None:
                    return found == record.CRC
                while not self._stopped and content.read(CHUNK):
                    pass
        except Exception:  # a wrong sum, or any of the ways in which a damaged header surfaces
            return False
        return True

    def _sum_as_read(self, record: zipfile.ZipInfo) -> int | None:
        """Return the CRC32 of a record as the block read it; None if it did not read it in one go."""
        if self._through is None or record.compress_type != zipfile.ZIP_STORED:
            return None
        return self._through.sum_of(_start_of(self._file, record), record.file_size)

    def check(self, cause: Exception | None = None) -> None:
        """Wait for the threads; raise CorruptCheckpointError if the file is damaged."""
        for thread in self._threads:
            thread.join()
        if self._long and not self._damage:
            self._verify(self._long)
        if self._damage:
            raise CorruptCheckpointError(self._damage[0], self._file.path) from cause

    def stop(self) -> None:
        """End the threads without waiting for what they find."""
        self._stopped = True
        for thread in self._threads:
            thread.join()


class _DamagedArchive(Exception):
    """The list of records cannot be read."""


def _start_of(file: OpenFile, record: zipfile.ZipInfo) -> int:
    """Return the position at which torch reads the content of a record."""
    lengths = bytearray(4)
    file.read_at(record.header_offset + _NAME_LENGTH, memoryview(lengths))
    name, extra = struct.unpack("<2H", lengths)
    return record.header_offset + _HEADER + int(name) + int(extra)


def _records(file: OpenFile, payloads: bool) -> tuple[list[zipfile.ZipInfo], set[str]]:
    """Return the records that have a sum, and the names of those whose sum is not needed.

    A file that is no zip has no records. Sums are not needed of records that hold nothing but payloads, unless
    ``payloads`` says so.
    """
    with file.reader() as reader:
        beginning = reader.read(4)
        if len(beginning) < 4:
            raise _DamagedArchive(f"the file ({len(beginning)} bytes are left)")
        begins = beginning == b"PK\x03\x04"
        try:
            if not begins and not zipfile.is_zipfile(reader):
                return [], set()
            with zipfile.ZipFile(reader) as archive:
                records = archive.infolist()
                elsewhere = set[str]() if payloads else records_of_payloads(archive)
        except Exception:  # a damaged table of contents surfaces in many ways
            raise _DamagedArchive(CONTENTS) from None
    if not begins:
        raise _DamagedArchive("the beginning of the file")
    return (records, elsewhere) if any(record.CRC for record in records) else ([], set())
