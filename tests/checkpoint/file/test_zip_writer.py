"""Our zip writer against torch's: the same bytes, whatever is saved; and what happens when something goes wrong."""

import errno
import io
import itertools
import mmap
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from support.files import without_identity, written
from support.odd_checkpoints import ODD
from support.promises import assert_same, same_bits
from support.steps import our_threads

from q8lightning import QuantizedCheckpointIO, QuantizedTensor
from q8lightning.checkpoint.encode.judge.encode_tensors import encode_tensors
from q8lightning.checkpoint.file import write as writer
from q8lightning.checkpoint.file import write_behind
from q8lightning.checkpoint.file.crc32 import combine
from q8lightning.checkpoint.file.pack import zip_writer
from q8lightning.checkpoint.file.pack.parts import Parts
from q8lightning.checkpoint.file.pack.zip_writer import ALONE, CHUNK, ZipWriter
from q8lightning.checkpoint.file.payloads import payloads_in
from q8lightning.checkpoint.file.write_behind import WriteBehind
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.system.workers import Workers


def everything() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.randn(3 * CHUNK // 4 + 77)  # more than two chunks, and a short one
    return {
        "large": shared,
        "view": shared[5:9],
        "parameter": torch.nn.Parameter(torch.randn(3, 4)),
        "dtypes": [torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.complex64)],
        "empty": torch.empty(0),
        "scalars": [1, 2.5, "word", None, b"bytes", {1, 2}],
        "payload": QuantizedTensor.encode(torch.randn(64, 65), get_codec("log"), "x"),
        "exactly one chunk": torch.zeros(CHUNK, dtype=torch.uint8),
        "one byte more": torch.zeros(CHUNK + 1, dtype=torch.uint8),
        "summed alone": torch.ones(ALONE, dtype=torch.uint8),
        "not alone": torch.ones(ALONE + 1, dtype=torch.uint8),
        "storage": torch.arange(5.0).untyped_storage(),
    }


# The same bytes


@pytest.mark.parametrize("content", [everything(), [], {"weight": torch.arange(9.0)}], ids=["all", "nothing", "one"])
def test_the_file_is_the_one_that_torch_writes(content: Any) -> None:
    assert without_identity(written(zip_writer.save, content)) == without_identity(written(torch.save, content))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_whatever_torch_can_save_is_saved_alike(make: Callable[[], Any]) -> None:
    content = make()
    assert without_identity(written(zip_writer.save, content)) == without_identity(written(torch.save, content))


@pytest.mark.parametrize("alignment", [64, 4096])
def test_the_alignment_that_torch_is_set_to_is_kept(alignment: int) -> None:
    config = pytest.importorskip("torch.utils.serialization").config
    if not hasattr(config.save, "storage_alignment"):
        pytest.skip("this version of torch has no such option")
    content = everything()
    with config.patch({"save.storage_alignment": alignment}):
        archive, expected = written(zip_writer.save, content), written(torch.save, content)
    assert without_identity(archive) == without_identity(expected)
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        for record in opened.infolist():
            name, extra = struct.unpack("<HH", archive[record.header_offset + 26 : record.header_offset + 30])
            assert (record.header_offset + 30 + name + extra) % alignment == 0


def test_the_identity_tells_contents_apart_and_nothing_else() -> None:
    one, same, other = (written(zip_writer.save, {"x": torch.full((9,), value)}) for value in (1.0, 1.0, 2.0))
    assert one == same
    identities = {zipfile.ZipFile(io.BytesIO(each)).read("archive/.data/serialization_id") for each in (one, other)}
    assert len(identities) == 2


@pytest.mark.parametrize("options", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {}], ids=str)
def test_every_reader_reads_it(options: dict[str, Any], tmp_path: Path) -> None:
    content = everything() | {"payload": None}
    del content["storage"], content["scalars"][5]
    with open(tmp_path / "a.ckpt", "wb") as file:
        zip_writer.save(content, file)
    assert_same(torch.load(tmp_path / "a.ckpt", **({"weights_only": False} | options)), content)
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None


class Sink(io.RawIOBase):
    """A file that forgets long stretches of zeros, so that one of 4 GiB takes neither disk nor memory."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, data: Any) -> int:
        nbytes = len(data)
        if nbytes < 2**20:
            self.kept.append(bytes(data))
        self.position += nbytes
        return nbytes


def test_beyond_4_gib_sizes_and_offsets_are_what_torch_writes() -> None:
    zeros = torch.frombuffer(mmap.mmap(-1, 2**32), dtype=torch.uint8)  # never touched: no memory
    content = {"before": torch.arange(10.0), "large": zeros, "after": torch.arange(20.0)}
    ours, theirs = Sink(), Sink()
    zip_writer.save(content, ours)  # type: ignore[arg-type]
    torch.save(content, theirs)
    assert ours.position == theirs.position > 2**32
    one, other = (re.sub(rb"\d{40}", b"-" * 40, b"".join(sink.kept)) for sink in (ours, theirs))
    different = [index for index, (here, there) in enumerate(zip(one, other, strict=True)) if here != there]
    # The CRC of the identity, behind its record and in the directory.
    identity = one.index(b"-" * 40) + 40
    assert one[identity : identity + 4] == b"PK\x07\x08"
    entry = one.rindex(b"PK\x01\x02")
    assert set(different) <= {*range(identity + 4, identity + 8), *range(entry + 16, entry + 20)}


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    with open(tmp_path / "a.ckpt", "wb") as file, ZipWriter(file) as archive:
        for number in range(2**16 + 3):
            archive.write_record(f"data/{number}", b"x", 1)
    with zipfile.ZipFile(tmp_path / "a.ckpt") as opened:
        assert len(opened.infolist()) == 2**16 + 5
    ending = struct.unpack("<4s4H2IH", (tmp_path / "a.ckpt").read_bytes()[-22:])
    assert ending[3:5] == (0xFFFF, 0xFFFF), "which says that the count is elsewhere"


# Where torch is not as we know it


def test_without_the_functions_that_this_needs_torch_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    content = everything()
    expected = written(torch.save, content)
    real = torch.serialization._save
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "_save", lambda obj, zip_file, *rest, another: real(obj, zip_file, *rest))
        assert not zip_writer._knows_torch()
    for name in ("get_crc32_options", "_get_storage_alignment", "_serialization_tls"):
        with monkeypatch.context() as patch:
            patch.delattr(torch.serialization, name)
            assert not zip_writer._knows_torch(), name
    # As with a later torch.
    monkeypatch.setattr(zip_writer, "_knows_torch", lambda: False)
    assert written(zip_writer.save, content) == expected, "with torch's identity"


def test_when_torch_asks_for_what_this_does_not_have_torch_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.serialization._save

    def later(
        obj: Any, zip_file: Any, pickle_module: Any, pickle_protocol: Any, _disable_byteorder_record: Any
    ) -> None:
        zip_file.write_record("news", "x", 1)
        zip_file.write_something_new()
        real(obj, zip_file, pickle_module, pickle_protocol, _disable_byteorder_record)

    content, file = everything(), io.BytesIO(b"before")
    file.seek(6)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "_save", later)
        patch.setattr(zip_writer, "_knows_torch", lambda: True)
        patch.setattr(torch, "save", lambda obj, target: target.write(written(save, obj)))
        save = _untouched(real)
        with pytest.warns(UserWarning, match="asks for write_something_new when it saves.*more slowly and larger"):
            zip_writer.save(content, file)
    assert file.getvalue()[:6] == b"before"
    assert_same(torch.load(io.BytesIO(file.getvalue()[6:]), weights_only=False)["large"], content["large"])
    assert "news" not in str(zipfile.ZipFile(io.BytesIO(file.getvalue()[6:])).namelist())


def _untouched(real: Any) -> Callable[[Any, IO[bytes]], None]:
    """Return ``torch.save`` as it is without the change that a test made."""

    def save(obj: Any, file: IO[bytes]) -> None:
        with torch.serialization._open_zipfile_writer(file) as archive:
            real(obj, archive, pickle, 2, False)

    return save


def test_a_writer_that_was_told_to_leave_sums_out_does(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        writer.write_checkpoint({"state_dict": {"x": torch.arange(9)}}, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert QuantizedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["x"].tolist() == list(range(9))


def test_storages_of_a_device_are_taken_to_the_host_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(zip_writer.UnknownRequest):
        zip_writer._bytes_of(torch.empty(3, device="meta").untyped_storage())


# Sums in parts


@pytest.mark.parametrize("lengths", [(0, 0), (0, 9), (9, 0), (1, 1), (5, 4096), (70_000, 3), (2**20, 2**20)], ids=str)
def test_the_sum_of_two_stretches_is_that_of_both(lengths: tuple[int, int]) -> None:
    first, second = (random.Random(length).randbytes(length) for length in lengths)
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_a_sum_of_many_stretches_beyond_4_gib() -> None:
    """2^33 zeros, doubling; zlib sums the same in its own way from the other end."""
    one = zlib.crc32(bytes(2**20))
    total, length = one, 2**20
    while length < 2**33:
        total, length = combine(total, total, length), 2 * length
    expected = 0
    for _ in range(2**13):
        expected = combine(expected, one, 2**20)
    assert total == expected


# Checksums ahead


def test_checksums_made_ahead_are_those_of_the_payloads() -> None:
    payloads = [
        QuantizedTensor.encode(torch.randn(1024, 1024), get_codec("softsign"), f"x{index}") for index in range(5)
    ]
    expected = [payload.__reduce__()[1][1:3] for payload in payloads]
    content = {"a": payloads[:2], "b": (payloads[2], {"c": payloads[3]}), "d": payloads[0], "e": payloads[4]}
    assert payloads_in(content) == payloads
    with Parts(payloads) as parts:
        assert our_threads(), "threads compute them"
        assert [parts.reduce(payload)[1][1:3] for payload in payloads] == expected
    assert our_threads() == []
    assert [payload.__reduce__()[1][1:3] for payload in payloads] == expected
    assert [payload.checksum for payload in payloads] == [None] * 5, "they are as they were"


def test_parts_of_one_buffer_are_the_payloads() -> None:
    """In batches of several, of which one is larger than all others, and the last is short."""
    sizes = [64, 2**16, 96, 64, 2**12, 2**15, 64, 128]
    items = [(torch.randn(size, 65), get_codec("softsign"), f"x{index}") for index, size in enumerate(sizes)]
    payloads = encode_tensors(items).payloads
    with Parts(payloads) as parts:
        reduced = [parts.reduce(payload) for payload in payloads]
    assert len({id(arguments[3]) for _, arguments in reduced}) == 1
    for payload, (function, arguments) in zip(payloads, reduced, strict=True):
        assert arguments[1:3] == payload.__reduce__()[1][1:3]
        assert same_bits(function(*arguments), payload.decode())


def test_a_payload_that_was_loaded_keeps_its_checksum() -> None:
    large = QuantizedTensor.encode(torch.randn(2**23), get_codec("softsign"), "large")  # for which threads are started
    payload = QuantizedTensor.encode(torch.randn(64, 65), get_codec("softsign"), "x")
    payload.checksum = 7
    with Parts([payload, large]) as parts:
        assert parts.reduce(payload)[1][2] == payload.__reduce__()[1][2] == 7
        assert parts.reduce(large)[1][2] == large.__reduce__()[1][2]


def test_a_small_checkpoint_starts_no_thread() -> None:
    payload = QuantizedTensor.encode(torch.randn(64, 65), get_codec("softsign"), "x")
    with Parts([payload]) as parts:
        assert our_threads() == []
        assert parts.reduce(payload)[1][1:3] == payload.__reduce__()[1][1:3]


def test_a_payload_costs_a_pickle_few_objects() -> None:
    """Each is work that holds Python's lock, while training waits for it, and as much again when it is loaded."""

    def opcodes(count: int) -> int:
        items = [(torch.randn(64, 65), get_codec("softsign"), f"state_dict.{index}.weight") for index in range(count)]
        content = {"state_dict": {str(i): each for i, each in enumerate(encode_tensors(items).payloads)}}
        archive = written(partial(zip_writer.save, compact=True), content)
        pickled = zipfile.ZipFile(io.BytesIO(archive)).read("archive/data.pkl")
        return sum("PUT" not in opcode.name for opcode, *_ in pickletools.genops(pickled))

    # Its key, the function, the word, header, checksum, buffer, start and length; a mark, a tuple and the call.
    assert (opcodes(300) - opcodes(100)) / 200 == 11


# When something goes wrong: the error is itself, no thread and no file is left


LARGE = {"weight": torch.zeros(2 * write_behind.STEP // 4), "more": torch.zeros(CHUNK // 4)}


class Failing:
    """A file whose writes fail from some byte on."""

    def __init__(self, file: IO[bytes], at: int, error: BaseException) -> None:
        self.file, self.at, self.error = file, at, error

    def write(self, data: Any) -> int:
        if self.file.tell() + len(data) > self.at:
            raise self.error
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("at", [0, 100, CHUNK + 1000, 5 * CHUNK // 2], ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda: OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt, MemoryError],
    ids=["full disk", "interrupt", "memory"],
)
def test_an_error_of_the_file_is_raised_as_it_is(at: int, make: Callable[[], BaseException], tmp_path: Path) -> None:
    error = make()
    writer.write_checkpoint({"old": torch.ones(3)}, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    with pytest.raises(type(error)) as raised:
        writer.write_durably(tmp_path / "a.ckpt", lambda file: zip_writer.save(LARGE, Failing(file, at, error)))
    assert raised.value is error
    assert not isinstance(error, OSError) or str(tmp_path / "a.ckpt") in str(error)
    assert our_threads() == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").read_bytes() == before


def test_an_error_of_a_sum_is_raised_and_no_half_file_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zlib:
        @staticmethod
        def crc32(data: Any, start: int = 0) -> int:
            if len(data) == CHUNK:
                raise MemoryError("no memory")
            return zlib.crc32(data, start)

    # Sums do not fail, unless there is no memory.
    monkeypatch.setattr(zip_writer, "zlib", Zlib)
    file = io.BytesIO()
    with pytest.raises(MemoryError, match="no memory"):
        zip_writer.save(LARGE, file)
    assert our_threads() == []
    assert b"PK\x05\x06" not in file.getvalue()


@pytest.mark.parametrize("when", ["while writing", "at the end"])
def test_what_the_disk_refuses_behind_our_back_is_raised(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no sync_file_range, the thread flushes, and hears of errors that fsync then does not repeat."""
    tried, error = threading.Event(), OSError(errno.EIO, "Input/output error")

    def fdatasync(_: int) -> None:
        tried.set()
        raise error

    # As on a system without it, with a disk that fails.
    monkeypatch.setattr(write_behind, "_sync_file_range", lambda: None)
    monkeypatch.setattr(os, "fdatasync", fdatasync)

    def write(file: IO[bytes]) -> None:
        for _ in range(2 if when == "at the end" else 40):
            file.write(bytes(write_behind.STEP // 2))
            tried.wait(0.05)

    with pytest.raises(OSError, match=r"Input/output error: '.*a\.ckpt'") as raised:
        writer.write_durably(tmp_path / "a.ckpt", write)
    assert raised.value is error
    assert our_threads() == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_sent_to_the_disk_meanwhile(tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []

    def send(_: int, start: int, nbytes: int) -> None:
        sent.append((start, nbytes))

    with open(tmp_path / "a", "wb") as file, WriteBehind(file, send) as behind:
        for _ in range(6):
            behind.write(bytes(write_behind.STEP // 2))
            for _ in range(100):
                if behind._written - behind._sent < write_behind.STEP:
                    break
                time.sleep(0.01)
    assert len(sent) == 3
    assert [start for start, _ in sent] == [0, *itertools.accumulate(n for _, n in sent)][:-1]
    assert (tmp_path / "a").stat().st_size == 3 * write_behind.STEP
    sent.clear()
    with open(tmp_path / "b", "wb") as file, WriteBehind(file, send) as behind:
        behind.write(bytes(write_behind.STEP - 1))
    assert sent == [], "a small file needs no thread"


def test_the_file_is_not_closed_while_it_is_sent(tmp_path: Path) -> None:
    began, closed = threading.Event(), []

    def send(*_: int) -> None:
        began.set()
        time.sleep(0.1)
        closed.append(file.closed)

    with open(tmp_path / "a", "wb") as file, WriteBehind(file, send) as behind:
        behind.write(bytes(write_behind.STEP))
        assert began.wait(20)
    assert closed == [False]


# Threads


def test_without_threads_the_work_is_done_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        patch.setattr("q8lightning.checkpoint.file.pack.parts.WORTH_THREADS", 0)
        writer.write_checkpoint(LARGE | everything(), tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert_same(found["large"], everything()["large"])


def test_jobs_that_nobody_began_are_dropped_and_the_others_waited_for() -> None:
    began, go_on, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        began.set()
        go_on.wait(20)
        done.append("slow")

    with Workers(1) as group:
        group.submit(slow)
        never = group.submit(done.append, "never")
        assert began.wait(20)
        threading.Timer(0.05, go_on.set).start()
    assert done == ["slow"]
    assert never.cancelled()
    assert our_threads() == []


SCRIPT = """
import sys, torch
from q8lightning import QuantizedCheckpointIO
torch.manual_seed(0)
io = QuantizedCheckpointIO(async_save=True)
state = {"a": torch.randn(2000, 2000), "b": torch.randn(2000, 2000)}
io.save_checkpoint({"state_dict": state, "raw": torch.arange(4_000_000)}, sys.argv[1])
"""


def test_a_process_that_ends_at_once_still_finishes_its_save(tmp_path: Path) -> None:
    """While the interpreter shuts down, the executors of the standard library take no more work."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "a.ckpt"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = QuantizedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert bool((found["raw"] == torch.arange(4_000_000)).all())
    assert float(found["state_dict"]["a"].std()) == pytest.approx(1, rel=0.01)
