"""Converting takes memory for one tensor, however large the file is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MIB = 2**20
TENSORS, TENSOR = 32, 6 * MIB
ALLOWED = TENSOR + 24 * MIB
"""Beside the largest tensor: what the codecs' chunks, the pickle and Python's own memory take."""

WATCH = """
import re, sys, threading
import torch
from q8lightning.cli.main import main

def private():
    # What is not a page of a file: those of the input are the system's cache.
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) for key in ("RssAnon", "RssShmem")) * 1024

def peak(*arguments):
    before, stop, seen = private(), threading.Event(), [private()]
    def watch():
        while not stop.wait(0.002):
            seen.append(private())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert main(list(arguments)) == 0
    finally:
        stop.set()
        watcher.join()
    return max(seen) - before

tiny, tiny_small, large, small, again, preset = sys.argv[1:]
torch.set_num_threads(1)
main(["compress", tiny, tiny_small, "--preset", preset])  # whatever is imported and looked up once
main(["decompress", tiny_small, tiny + ".again"])
sizes = [peak("compress", large, small, "--preset", preset), peak("decompress", small, again), peak("verify", small)]
sizes.append(peak("compare", large, small, "--top", "1"))
print(*sizes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_that_of_one_tensor(preset: str, tmp_path: Path) -> None:
    """The file is 144 MiB; its codes alone would take 36 to 73."""
    tiny, large = tmp_path / "tiny.ckpt", tmp_path / "large.ckpt"
    torch.save({"state_dict": {"weight": torch.randn(256, 256)}}, tiny)
    rows = [TENSOR // 4 // 64 // (1 + index % 2) + index for index in range(TENSORS)]  # sizes that leave gaps in a heap
    torch.save({"state_dict": {f"w{index}": torch.randn(count, 64) for index, count in enumerate(rows)}}, large)
    names = (tiny, tmp_path / "tiny_small", large, tmp_path / "small.ckpt", tmp_path / "again.ckpt", preset)
    command = [sys.executable, "-c", WATCH, *map(str, names)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    sizes = [int(size) for size in result.stdout.splitlines()[-1].split()]
    assert max(sizes) < ALLOWED, [f"{size / MIB:.0f} MiB" for size in sizes]
