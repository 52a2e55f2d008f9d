"""SECURITY.md: what a file made to do harm can and cannot do through ``torch.load(weights_only=True)``."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audit import listening
from torch import Tensor

from q8lightning import CorruptCheckpointError, keep_encoded
from q8lightning.checkpoint.integrity import checksum
from q8lightning.checkpoint.payload import QuantizedTensor, rebuild_v1
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.tools import ToolError, inspect

CODECS = {"linear": get_codec("linear", 256, residual_bits=4), "log": get_codec("log", 128, bits=5)}


class Calls:
    """Pickles as a call of a function with arguments of the attacker's choice."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def forged(codec: str = "linear", text: str | None = None, **entries: Any) -> tuple[str, int, Tensor]:
    """Return the arguments of a payload of 4,096 elements with another header, and a checksum that fits it."""
    payload = QuantizedTensor.encode(torch.rand(64, 64), CODECS[codec], "state_dict.weight")
    header = json.loads(payload.header)
    for key, value in entries.items():
        (header["codec"] if key in header["codec"] and key != "name" else header)[key] = value
    text = json.dumps(header) if text is None else text
    return text, checksum(text, memoryview(payload.data.numpy())), payload.data


def tensor(codec: str = "linear", start: int = 0, nbytes: int | None = None, **entries: Any) -> tuple[Any, ...]:
    text, total, data = forged(codec, **entries)
    return "tensor", text, total, data, start, len(data) if nbytes is None else nbytes


FLAT = torch.arange(100.0)
NO_NUMBERS = {
    "codec": {"name": "levels:zz", "bits": 8, "block_size": 256},
    "dtype": "float32",
    "name": "a",
    "shape": [64, 64],
    "stride": [64, 1],
}
HOSTILE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "a shape larger than its codes": lambda: tensor(shape=[128, 64], stride=[64, 1]),
    "a huge shape": lambda: tensor(shape=[2**40], stride=[1]),
    "a shape smaller than its codes": lambda: tensor("log", shape=[32, 64], stride=[64, 1]),
    "a negative shape": lambda: tensor(shape=[-64, -64]),
    "a shape of text": lambda: tensor(shape="__import__('os').system('true')"),
    "strides beyond the values": lambda: tensor(stride=[2**20, 1]),
    "negative strides": lambda: tensor("log", stride=[-64, 1]),
    "a start beyond the buffer": lambda: tensor(start=2**40),
    "a negative length": lambda: tensor(nbytes=-5),
    "a codec of code": lambda: tensor(text=json.dumps({"codec": {"name": "eval"}, "dtype": "float32"})),
    "levels that are no numbers": lambda: tensor(text=json.dumps(NO_NUMBERS)),
    "a block size of 3": lambda: tensor(block_size=3),
    "a dtype that is a function": lambda: tensor(dtype="load"),
    "a header as deep as the stack": lambda: tensor(text="[" * 100_000),
    "a checksum of text": lambda: (*tensor()[:2], "0", *tensor()[3:]),
    "an unknown kind": lambda: ("eval", "1"),
    "shapes beyond the elements": lambda: ("tensors", FLAT, [(10, 100)], [None]),
    "strides beyond the elements": lambda: ("tensors", FLAT, [(10, 10)], [(2**30, 1)]),
    "an item that is not there": lambda: ("item", (FLAT,), 7),
    "a sum that does not fit": lambda: ("raw", "a", "0", 0, FLAT),
}

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_call_is_an_error_and_does_nothing_else(name: str, tmp_path: Path) -> None:
    good, path = tmp_path / "good.ckpt", tmp_path / "hostile.ckpt"
    torch.save({"weight": Calls(rebuild_v1, *tensor())}, good)
    assert torch.load(good, weights_only=True)["weight"].shape == (64, 64)  # and everything is imported
    torch.save({"weight": Calls(rebuild_v1, *HOSTILE[name]())}, path)
    seen: list[tuple[str, tuple[Any, ...]]] = []
    with listening(lambda event, arguments: seen.append((event, arguments))), pytest.raises(Exception):  # noqa: B017, PT011
        torch.load(path, weights_only=True)
    opened = {str(arguments[0]) for event, arguments in seen if event == "open"}
    assert not [event for event, _ in seen if event.startswith(FORBIDDEN)]
    assert {name for name in opened if not name.endswith(".py")} <= {str(path)}  # tracebacks read sources


SIZES = ["a shape larger than its codes", "a huge shape", "a shape smaller than its codes", "a negative length"]


@pytest.mark.parametrize("name", SIZES)
def test_codes_that_are_not_as_many_as_the_shape_says_are_refused_before_a_kernel_reads_them(
    name: str, tmp_path: Path
) -> None:
    torch.save({"weight": Calls(rebuild_v1, *HOSTILE[name]())}, tmp_path / "hostile.ckpt")
    with keep_encoded(), pytest.raises(CorruptCheckpointError, match="the tensor state_dict"):
        torch.load(tmp_path / "hostile.ckpt", weights_only=True)


def test_functions_that_are_not_ours_are_not_called(tmp_path: Path) -> None:
    path, proof = tmp_path / "hostile.ckpt", tmp_path / "proof"
    torch.save({"weight": Calls(os.system, f"touch {proof}")}, path)
    with pytest.raises(Exception, match=r"(posix|nt)\.system"):
        torch.load(path, weights_only=True)
    with pytest.raises(ToolError, match="system"):
        inspect(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file would have run it"
