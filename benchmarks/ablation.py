"""What each hand-written part of saving and loading buys: as it is beside the plainest thing in its place, in turns.

    python benchmarks/ablation.py                                       # 10 M parameters on the CPU
    python benchmarks/ablation.py --device cuda --parameters 355e6 --models blocks
    python benchmarks/ablation.py --only write-behind,zipfile --rounds 15 --output ablation.jsonl

Three checkpoints with AdamW's state: transformer blocks of so many parameters, 125 small layers with 1,500 tensors that
are too small to be quantized, and two wide layers in tensors of 17 MB. Each round measures what a part may change, once
with the part and once without, in alternating order:

- write: a file of what is encoded already, until it is durable; the median of three
- save: the same with encoding before it; the call returns when the file is durable
- held, async: a save in the background, how long the call holds training, and until the file is durable
- load: through the CheckpointIO, from the page cache
- first load: the same in a process that has just begun, as when a training is resumed

Cells have the medians with and without the part, in ms, and the median of the rounds' ratios: above 1, the part is
faster. Other work on the machine changes ratios and CPU times little. Parts are replaced from outside; the package has
no switches.
"""

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import torch
import xxhash
from rich.console import Console
from rich.table import Table
from save import Training
from torch import Tensor, UntypedStorage, nn

from q8lightning import QuantizedCheckpointIO, QuantizedTensor, keep_encoded
from q8lightning.checkpoint.file import crc32, read, write, write_behind
from q8lightning.checkpoint.file.open_file import FileView
from q8lightning.checkpoint.file.pack import compact_pickle, parts, small_tensors, zip_writer
from q8lightning.checkpoint.file.payloads import payloads_in
from q8lightning.checkpoint.file.verify import archive, contents, summed_file
from q8lightning.checkpoint.load_locations import located
from q8lightning.checkpoint.staging import transfer
from q8lightning.checkpoint.tree import leaves

console = Console(width=160)
MEASURES = SAVE, WRITE, ASYNC, LOAD, FIRST, FAIL = "save", "write", "async", "load", "first load", "failing load"
"""What a part may change: only that is measured."""

LOADS, ALL = (LOAD, FIRST), (SAVE, ASYNC, LOAD, FIRST)


@dataclass(frozen=True)
class Part:
    """A part and what is put in its place.

    Attributes:
        instead: What stands in its place.
        replace: Puts it there as long as the context lasts.
        lines: Modules, classes and functions that would go.
        changes: What it may change.
        device: Where it does anything; None for everywhere.
    """

    instead: str
    replace: Callable[[], AbstractContextManager[Any]]
    lines: tuple[Any, ...]
    changes: tuple[str, ...] = (SAVE, ASYNC)
    device: str | None = None


# What stands in the places of parts


class ZipfileWriter:
    """The records of a checkpoint by Python's own ``zipfile``: summed and written by one thread."""

    def __init__(
        self, file: IO[bytes], alignment: int = 64, compressed: Collection[str] = (), unwanted: Collection[int] = ()
    ) -> None:
        self._zip = zipfile.ZipFile(file, "w")
        self._alignment, self._compressed, self._unwanted = alignment, compressed, unwanted

    def __getattr__(self, name: str) -> Any:
        raise zip_writer.UnknownRequest(name)

    def __enter__(self) -> "ZipfileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.write_record("version", "3\n", 2)
            self.write_record(".data/serialization_id", "0" * 40, 40)
            self._zip.close()

    def write_record(self, name: str, data: bytes | str | UntypedStorage, nbytes: int) -> None:
        if isinstance(data, UntypedStorage) and data.data_ptr() in self._unwanted:
            raise zip_writer.SharedMemory
        content = zip_writer._bytes_of(data)[:nbytes]
        info = zipfile.ZipInfo(f"archive/{name}")
        if name in self._compressed and nbytes <= compact_pickle.WORTHWHILE:
            self._zip.writestr(info, content, zipfile.ZIP_DEFLATED, 3)
            return
        info.file_size = nbytes
        zip64 = 20 if nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0
        before = self._zip.start_dir + 30 + len(info.filename) + zip64 + 4
        info.extra = b"FB" + (-before % self._alignment).to_bytes(2, "little") + b"Z" * (-before % self._alignment)
        with self._zip.open(info, "w") as record:
            for start in range(0, nbytes, 2**20):
                record.write(content[start : start + 2**20])


def by_torch(obj: Any, file: IO[bytes], compact: bool = False) -> None:
    """Save by ``torch.save`` and our pickler, which is all that its public arguments allow."""
    found = [leaf for _, leaf in leaves(obj)] if compact else []
    payloads = [leaf for leaf in found if isinstance(leaf, QuantizedTensor)]
    small = small_tensors.SmallTensors(found)
    with parts.Parts(payloads) as known, located(small.tags):
        module = compact_pickle.compact_pickle(known, small)
        torch.save(obj, file, pickle_module=SimpleNamespace(Pickler=module.Pickler, __name__="pickle"))


class PlainFile(FileView):
    """A file that is read by whoever calls; the records are summed from the page cache after that."""

    def __init__(self, file: Any, workers: Any, sums: bool = True) -> None:
        super().__init__(file)

    def leave_out(self, starts: set[int]) -> None: ...

    def sum_of(self, start: int, nbytes: int) -> None: ...


class PlainMemory:
    """New host memory for each save."""

    pinned = False

    def take(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)

    def release(self) -> None: ...


class TorchPinnedMemory(PlainMemory):
    """Torch's own pinned memory, which its allocator keeps."""

    pinned = True


def patch(owner: Any, **names: Any) -> AbstractContextManager[Any]:
    return mock.patch.multiple(owner, **names)


def memory(kind: type) -> AbstractContextManager[Any]:
    return patch(import_module("q8lightning.trainer.checkpoint_io.quantized"), HostMemory=kind)


@contextmanager
def without_sums(*names: str) -> Iterator[None]:
    """Neither make sums nor compare them."""
    with ExitStack() as stack:
        if "crc32" in names:
            stack.enter_context(patch(zlib, crc32=lambda *_: 1))
            stack.enter_context(patch(zip_writer.ZipWriter, _write_and_sum=lambda self, data: self._write(data) or 1))
            stack.enter_context(patch(read, verified=lambda *_, **__: nullcontext()))
            stack.enter_context(patch(read, SummedFile=lambda *each, sums: summed_file.SummedFile(*each, sums=False)))
        if "xxh3" in names:
            stack.enter_context(patch(xxhash, xxh3_64_intdigest=lambda *_, **__: 1))
        yield


@contextmanager
def one_sum(fast: bool = False) -> Iterator[None]:
    """As if the CRC32 of payloads were all: those of records follow from them without looking at a byte again."""
    write_and_sum, payload_records = zip_writer.ZipWriter._write_and_sum, archive.records_of_payloads

    def write_record(self: zip_writer.ZipWriter, data: memoryview) -> int:
        return write_and_sum(self, data) if len(data) <= LARGE else self._write(data) or 1

    def records(opened: zipfile.ZipFile) -> set[str]:
        return payload_records(opened) or {each.filename for each in opened.infolist() if each.file_size > LARGE}

    with (
        fast_crc() if fast else nullcontext(),
        patch(zip_writer.ZipWriter, _write_and_sum=write_record),
        patch(archive, records_of_payloads=records),
        patch(xxhash, xxh3_64_intdigest=lambda data, seed=0: zlib.crc32(data, seed)),
    ):
        yield


LARGE = 2**20
"""Bytes from which on a record of these checkpoints has payloads and nothing else."""


def fast_crc() -> AbstractContextManager[Any]:
    """The CRC32 of zlib-ng or ISA-L, ten times as fast as that of most builds of zlib; installed by hand."""
    for module, name in (("zlib_ng", "zlib_ng"), ("isal", "isal_zlib")):
        try:
            return patch(zlib, crc32=import_module(f"{module}.{name}").crc32)
        except ImportError:
            continue
    raise ImportError("neither zlib-ng nor isal is installed")


def in_one_thread() -> AbstractContextManager[Any]:
    return patch(zip_writer, ALONE=2**62)


def plain_pickle() -> AbstractContextManager[Any]:
    return patch(zip_writer, WORTHWHILE=-1)


PARTS: dict[str, Part] = {
    "torch.save": Part(
        "torch.save, with our pickler",
        lambda: patch(zip_writer, save=by_torch),
        (zip_writer, crc32),
        ALL,
    ),
    "zipfile": Part(
        "Python's zipfile", lambda: patch(zip_writer, ZipWriter=ZipfileWriter), (zip_writer.ZipWriter, crc32)
    ),
    "sum-threads": Part(
        "records summed by the thread that writes", in_one_thread, (crc32, zip_writer.ZipWriter._write_and_sum)
    ),
    "crc32": Part("no CRC32", partial(without_sums, "crc32"), (), ALL),
    "xxh3": Part("no XXH3", partial(without_sums, "xxh3"), (), ALL),
    "both-sums": Part("no sums at all", partial(without_sums, "crc32", "xxh3"), (), ALL),
    "one-sum": Part("CRC32 of zlib for both", one_sum, (), ALL),
    "one-fast-sum": Part("CRC32 of zlib-ng for both", partial(one_sum, fast=True), (), ALL),
    "fast-crc": Part("CRC32 of zlib-ng or ISA-L", fast_crc, (), ALL),
    "sums-ahead": Part(
        "checksums by the thread that pickles", lambda: patch(parts, WORTH_THREADS=2**62), (parts.Parts.__enter__,)
    ),
    "write-behind": Part("write, then fsync", lambda: patch(write, WriteBehind=nullcontext), (write_behind,)),
    "small-tensors": Part(
        "each small tensor by itself",
        lambda: patch(zip_writer, SmallTensors=lambda _: None),
        (small_tensors,),
        ALL,
    ),
    "small-pickle": Part("no compression of the pickle", plain_pickle, (compact_pickle.deflate,), ALL),
    "storage-question": Part(
        "torch asks of everything whether it is a storage", lambda: patch(compact_pickle, _NO_STORAGES=frozenset()), ()
    ),
    "kept-memory": Part(
        "new host memory for each save",
        lambda: memory(PlainMemory),
        (transfer.HostMemory, transfer._register),
    ),
    "registered-memory": Part(
        "torch's pinned memory",
        lambda: memory(TorchPinnedMemory),
        (transfer.HostMemory, transfer._register),
        device="cuda",
    ),
    "reading-in-threads": Part(
        "one thread reads, others sum afterwards", lambda: patch(read, SummedFile=PlainFile), (summed_file,), LOADS
    ),
    "payloads-hashed-once": Part(
        "CRC32 of payloads' records, too",
        lambda: patch(archive, records_of_payloads=lambda _: set()),
        (contents.records_of_payloads, contents._PayloadOutline),
        LOADS,
    ),
    "names-of-damage": Part(
        "the number of the record",
        lambda: patch(archive, describe_record=lambda _, record: f"the record {record.filename}"),
        (contents.describe_record, contents._Anything, contents._tensors_with, contents._Holders),
        (*LOADS, FAIL),
    ),
}


# What is measured


class Layers(Training):
    """Layers of one width, with AdamW."""

    def __init__(self, device: torch.device, count: int, width: int) -> None:
        self.device = device
        torch.manual_seed(0)
        with device:
            layers = (nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(count))
            self.model = nn.Sequential(*layers)
            self.batch = torch.randn(8, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())


class Arm:
    """One side of a comparison: a CheckpointIO of each kind, made and used with the part or without it."""

    def __init__(
        self,
        without: str | None,
        checkpoint: dict[str, Any],
        encoded: Path | None,
        device: torch.device,
        folder: Path,
        preset: str,
    ) -> None:
        self.without = without
        self.checkpoint, self.device, self.path = checkpoint, device, folder / f"without {without}.ckpt"
        self.ios = {mode: QuantizedCheckpointIO(checkpoint=preset, async_save=mode == ASYNC) for mode in (SAVE, ASYNC)}
        self.ios[SAVE].optimizer_device = device
        self.encoded: Any = None
        if encoded is not None:
            with keep_encoded():
                self.encoded = torch.load(encoded, map_location="cpu", weights_only=True)
            for payload in payloads_in(self.encoded):
                payload.checksum = None  # to be made anew by each save

    def numbers(self, whats: Collection[str], first: bool) -> dict[str, float]:
        """Measure in their order; loads read the file that was saved last."""
        if first and SAVE not in whats:
            self.measure(SAVE)
        found: dict[str, float] = {}
        for what in whats:
            runs = [self.measure(what) for _ in range(3 if what == WRITE else 1)]
            found |= {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        return found

    def measure(self, what: str) -> dict[str, float]:
        self._synchronize()
        if what in (SAVE, WRITE, ASYNC):
            self.path.unlink(missing_ok=True)
            os.sync()  # what other files left to be written would be waited for
        start, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
        if what == SAVE:
            self.ios[SAVE].save_checkpoint(self.checkpoint, self.path)
            return {"save": _ms(start), "save, CPU": _ms(cpu, time.process_time)}
        if what == WRITE:
            write.write_checkpoint(self.encoded, self.path)
            return {"write": _ms(start), "write, CPU": _ms(cpu, time.process_time)}
        if what == ASYNC:
            self.ios[ASYNC].save_checkpoint(self.checkpoint, self.path)
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            held, held_cpu = _ms(start), _ms(own, time.thread_time)
            self.ios[ASYNC].wait_until_durable()
            return {"held": held, "held, CPU": held_cpu, "async": _ms(start), "bytes": self.path.stat().st_size}
        if what == LOAD:
            loaded = self.ios[SAVE].load_checkpoint(self.path)
            self._synchronize()
            found = {"load": _ms(start), "load, CPU": _ms(cpu, time.process_time)}
            del loaded
            return found
        return self._load_elsewhere() if what == FIRST else self._fail()

    def _load_elsewhere(self) -> dict[str, float]:
        command = [sys.executable, __file__, "--device", str(self.device), "--threads", str(torch.get_num_threads())]
        command += ["--load", str(self.path), *(() if self.without is None else ("--only", self.without))]
        wall, cpu = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        return {"first load": wall, "first load, CPU": cpu}

    def _fail(self) -> dict[str, float]:
        """Load a file with a flipped bit in the last tensor that is stored as it is."""
        whole = self.path.read_bytes()
        with zipfile.ZipFile(self.path) as opened:
            last = [each for each in opened.infolist() if "/data/" in each.filename][-1]
            place = whole.index(opened.read(last)[:64], last.header_offset)
        self.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        start = time.perf_counter()
        try:
            self.ios[SAVE].load_checkpoint(self.path)
        except RuntimeError as error:
            self.said = str(error).split(" is damaged")[0]
        found = {"failing load": _ms(start)}
        self.path.write_bytes(whole)
        return found

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        for io in self.ios.values():
            io.teardown()


def _ms(start: float, clock: Callable[[], float] = time.perf_counter) -> float:
    return 1e3 * (clock() - start)


def load_once(path: Path, device: torch.device, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Load in this process, which has loaded nothing but a tiny file before; print the times."""
    with context(), tempfile.TemporaryDirectory() as folder:
        io = QuantizedCheckpointIO()
        io.optimizer_device = device
        io.save_checkpoint({"state_dict": {"w": torch.ones(64, 64, device=device)}}, f"{folder}/a.ckpt")
        io.load_checkpoint(f"{folder}/a.ckpt")
        start, cpu = time.perf_counter(), time.process_time()
        io.load_checkpoint(path)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(_ms(start), _ms(cpu, time.process_time))


def compare(
    name: str, training: Training, folder: Path, preset: str, rounds: int, wanted: Collection[str]
) -> dict[str, list[list[float]]]:
    """Return for each thing that is measured the numbers of all rounds, with the part and without it."""
    part = PARTS[name]
    contexts = (nullcontext, part.replace)
    checkpoint = training.checkpoint()
    arms, found = [], dict[str, list[list[float]]]()
    encoded = None
    if WRITE in wanted:
        encoded = folder / "encoded.ckpt"
        QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(checkpoint, encoded)
    for context, without in zip(contexts, (None, name), strict=True):
        with context():
            arms.append(Arm(without, checkpoint, encoded, training.device, folder, preset))
    whats = [each for each in (WRITE, *part.changes) if each in wanted and (each != WRITE or SAVE in part.changes)]
    for number in range(rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            with contexts[side]():
                numbers = arms[side].numbers(whats, first=number == 0)
            for key, value in numbers.items() if number else ():  # the first round makes ready what is kept
                found.setdefault(key, [[], []])[side].append(value)
    for arm in arms:
        arm.close()
    return found


def cell(both: list[list[float]] | None) -> str:
    if both is None:
        return ""
    medians = [f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in map(statistics.median, both)]
    ratio = statistics.median(b / a for a, b in zip(*both, strict=True))
    return f"{' | '.join(medians)} ({ratio:.2f})"


def size(both: list[list[float]] | None) -> str:
    return "" if both is None else " | ".join(f"{each[0] / 1e6:.3f}" for each in both) + " MB"


def lines_of(part: Part) -> int:
    return sum(len(inspect.getsource(each).splitlines()) for each in part.lines)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads of {model[0].split(': ')[1] if model else platform.machine()}"


COLUMNS = (
    *("write", "write, CPU", "save", "save, CPU", "held", "held, CPU", "async"),
    *("load", "load, CPU", "first load", "first load, CPU", "failing load"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--parameters", type=float, default=10e6, help="of the larger model")
    parser.add_argument("--preset", default="resume")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--models", default="blocks,small,wide")
    parser.add_argument("--measures", default=",".join(MEASURES), help=f"some of {', '.join(MEASURES)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=None, help="where files are written; a temporary folder")
    parser.add_argument("--output", type=Path, default=None, help="append JSON lines with all numbers")
    parser.add_argument("--load", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    if arguments.load is not None:
        replaced = PARTS[arguments.only].replace if arguments.only in PARTS else nullcontext
        load_once(arguments.load, arguments.device, replaced)
        return
    table = Table("part", "instead", "lines", "model", *COLUMNS, "file")
    models: dict[str, Callable[[], Training]] = {
        "blocks": partial(Training, arguments.device, arguments.parameters),
        "small": partial(Layers, arguments.device, 125, 96),
        "wide": partial(Layers, arguments.device, 2, 2048),
    }
    for model in arguments.models.split(","):
        training = models[model]()
        training.steps(1)
        for name in arguments.only.split(","):
            part = PARTS[name]
            if part.device not in (None, arguments.device.type):
                continue
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                try:
                    found = compare(
                        name, training, Path(folder), arguments.preset, arguments.rounds, arguments.measures.split(",")
                    )
                except Exception as error:  # one part that cannot be replaced here leaves the others
                    console.print(f"{name}, {model}: {type(error).__name__}: {error}", markup=False)
                    continue
            row = (name, part.instead, str(lines_of(part)), model)
            cells = (*(cell(found.get(column)) for column in COLUMNS), size(found.get("bytes")))
            table.add_row(*row, *cells)
            console.print(*row, *cells, sep="  ", markup=False, soft_wrap=True)
            if arguments.output is not None:
                entry = {"part": name, "model": model, "machine": machine(arguments.device), "numbers": found}
                with arguments.output.open("a") as output:
                    output.write(json.dumps(entry) + "\n")
        del training
    console.print(table)
    console.print(f"{machine(arguments.device)}; torch {torch.__version__}; with the part | without it (ratio)")


if __name__ == "__main__":
    main()
