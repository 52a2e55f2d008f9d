"""What it costs to hash a checkpoint: each hash alone, and its share of a save and of a load, in CPU time.

    python benchmarks/hashes.py [--megabytes 100]

CPU time of all threads, the median of nine runs, because it hardly changes with what else the machine does. The file
lies in memory (``/dev/shm``) where there is such a thing. A hash is left out by a function that returns at once.
"""

import argparse
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import xxhash

from q8lightning import QuantizedTensor, without_verification
from q8lightning.checkpoint import payload
from q8lightning.checkpoint.file import read, write
from q8lightning.checkpoint.file.verify import archive
from q8lightning.quantization.codecs.table import get_codec

RUNS = 9


def cpu_ms(job: Callable[[], Any]) -> float:
    """Return the CPU time of a job in milliseconds."""
    job()
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave hashes out: ``crc32``, ``xxh3``."""
    functions = {"crc32": (zlib, "crc32"), "xxh3": (xxhash, "xxh3_64_intdigest")}
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(*functions[name], lambda *_, **__: 1))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of payloads")
    megabytes = parser.parse_args().megabytes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = 1024
    names = [f"state_dict.{index}" for index in range(megabytes)]
    payloads = {name: QuantizedTensor.encode(torch.randn(side, side), get_codec("softsign"), name) for name in names}
    nbytes = sum(each.nbytes for each in payloads.values())
    data = memoryview(torch.randint(256, (nbytes,), dtype=torch.uint8).numpy())  # type: ignore[arg-type]
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / "a.ckpt"
        save = partial(write.write_checkpoint, payloads, path)
        load = partial(torch.load, path, weights_only=True)
        read_file = partial(read.read_checkpoint, path, partial(torch.load, weights_only=True))

        def report(name: str, milliseconds: float) -> None:
            print(f"{name:50} {milliseconds:7.1f} ms CPU")

        report(f"CRC32 of {nbytes / 1e6:.0f} MB (zlib {zlib.ZLIB_RUNTIME_VERSION})", cpu_ms(partial(zlib.crc32, data)))
        report("XXH3 of the same", cpu_ms(partial(xxhash.xxh3_64_intdigest, data)))
        report("save, both", cpu_ms(save))
        with without("xxh3"):
            report("save, CRC32 alone", cpu_ms(save))
        with without("crc32"):
            report("save, XXH3 alone", cpu_ms(save))
        with without("crc32", "xxh3"):
            report("save, neither", cpu_ms(save))
        save()
        report("torch.load, XXH3", cpu_ms(load))
        with mock.patch.object(payload, "verify", lambda _, __, data, ___: zlib.crc32(data.numpy())):
            report("torch.load, CRC32 in the place of XXH3", cpu_ms(load))
        with without_verification():
            report("torch.load, neither", cpu_ms(load))
        report("Trainer, XXH3 of payloads", cpu_ms(read_file))
        with mock.patch.object(archive, "records_of_payloads", return_value=set()):
            report("Trainer, both", cpu_ms(read_file))
        report("Trainer, neither", cpu_ms(partial(read_file, verify=False)))


if __name__ == "__main__":
    main()
