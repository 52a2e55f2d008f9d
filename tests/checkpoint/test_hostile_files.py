"""SECURITY.md: what a file made to do harm can and cannot do through ``torch.load(weights_only=True)``."""

import itertools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audit import listening
from torch import Tensor

from q8lightning import CorruptCheckpointError, NewerFormatError, keep_encoded, without_verification
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


def forged(kind: str = "linear", text: str | None = None, **entries: Any) -> tuple[str, int, Tensor]:
    """Return the arguments of a payload of 4,096 elements with another header, and a checksum that fits it."""
    payload = QuantizedTensor.encode(torch.rand(64, 64), CODECS[kind], "state_dict.weight")
    header = json.loads(payload.header)
    for key, value in entries.items():
        (header["codec"] if key in header["codec"] and key != "name" else header)[key] = value
    text = json.dumps(header) if text is None else text
    return text, checksum(text, memoryview(payload.data.numpy())), payload.data


def tensor(kind: str = "linear", start: int = 0, nbytes: int | None = None, **entries: Any) -> tuple[Any, ...]:
    text, total, data = forged(kind, **entries)
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

OURS = CorruptCheckpointError, NewerFormatError
"""What says that a file is damaged, or of a later version; any other error would be one of the reader."""

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_call_is_an_error_and_does_nothing_else(name: str, tmp_path: Path) -> None:
    good, path = tmp_path / "good.ckpt", tmp_path / "hostile.ckpt"
    torch.save({"weight": Calls(rebuild_v1, *tensor())}, good)
    assert torch.load(good, weights_only=True)["weight"].shape == (64, 64)  # and everything is imported
    torch.save({"weight": Calls(rebuild_v1, *HOSTILE[name]())}, path)
    seen: list[tuple[str, tuple[Any, ...]]] = []
    with listening(lambda event, arguments: seen.append((event, arguments))), pytest.raises(OURS):
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


# Each field, forged, with a sum that fits


def spread(count: int) -> Tensor:
    """One byte that stands for many."""
    return torch.zeros(1, dtype=torch.uint8).expand(count)


HUGE = 2**45
WEIGHT = r"the tensor state_dict\.weight \("
FORGED: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "strides of 0": (lambda: tensor(stride=[0, 0]), WEIGHT + r"whose strides \[0, 0\] leave gaps or overlap"),
    "one stride of 0": (lambda: tensor(stride=[64, 0]), WEIGHT + "whose strides"),
    "equal strides": (lambda: tensor(stride=[1, 1]), WEIGHT + "whose strides"),
    "strides with gaps": (lambda: tensor(stride=[128, 2]), WEIGHT + "whose strides"),
    "negative strides": (lambda: tensor(stride=[-64, 1]), WEIGHT + r"whose stride is \[-64, 1\]"),
    "strides of text": (lambda: tensor(stride=["64", "1"]), WEIGHT + "whose stride is"),
    "fractions as strides": (lambda: tensor(stride=[64.0, 1.0]), WEIGHT + "whose stride is"),
    "one stride": (lambda: tensor(stride=[1]), WEIGHT + "with 2 dimensions and 1 strides"),
    "no strides": (lambda: tensor(stride=None), WEIGHT + "whose stride is None"),
    "strides that no tensor has": (
        lambda: tensor(shape=[64, 64, 1], stride=[64, 1, 2**64]),
        WEIGHT + "whose stride is",
    ),
    "a shape of text": (lambda: tensor(shape="64"), WEIGHT + "whose shape is '64'"),
    "a shape with text": (lambda: tensor(shape=["64", 64]), WEIGHT + "whose shape is"),
    "a shape with true": (lambda: tensor(shape=[4096, True], stride=[1, 1]), WEIGHT + "whose shape is"),
    "a shape of fractions": (lambda: tensor(shape=[64.0, 64.0]), WEIGHT + "whose shape is"),
    "a shape that is an object": (lambda: tensor(shape={}, stride={}), WEIGHT + "whose shape is"),
    "a negative shape": (lambda: tensor(shape=[-64, -64]), WEIGHT + "whose shape is"),
    "a shape that no tensor has": (lambda: tensor(shape=[2**64], stride=[1]), WEIGHT + "whose shape is"),
    "nothing, of a size that no tensor has": (
        lambda: tensor(shape=[0, 2**62, 2**62], stride=[1, 1, 1]),
        WEIGHT + "whose strides",
    ),
    "a shape of more elements": (lambda: tensor(shape=[64, 65], stride=[65, 1]), WEIGHT + "with fewer or more codes"),
    "fewer bits": (lambda: tensor(bits=4), WEIGHT + "with fewer or more codes"),
    "fewer bits of the rest": (lambda: tensor(residual_bits=2), WEIGHT + "with fewer or more codes"),
    "larger blocks": (lambda: tensor(block_size=4096), WEIGHT + "with fewer or more codes"),
    "a codec that is a list": (lambda: tensor(codec=["linear"]), WEIGHT + "whose codec is"),
    "a codec without a name": (lambda: tensor(codec={}), WEIGHT + "whose codec is"),
    "a codec of another name": (lambda: tensor(codec={"name": ["linear"]}), WEIGHT + "whose codec is"),
    "a dtype that is a list": (lambda: tensor(dtype=["float32"]), WEIGHT + "whose dtype is"),
    "gradients of text": (lambda: tensor(requires_grad="yes"), WEIGHT + "whose requires_grad is 'yes'"),
    "a parameter of 1": (lambda: tensor(parameter=1), WEIGHT + "whose parameter is 1"),
    "a save of a number": (lambda: tensor(save=7), WEIGHT + "whose save is 7"),
    "a name of a number": (lambda: tensor(name=7), r"a tensor \(with the header .*: its name is no text"),
    "a header without entries": (lambda: tensor(text="{}"), r"a tensor \(with the header '\{\}'"),
    "a header that is a list": (lambda: tensor(text="[1, 2]"), r"a tensor \(with the header"),
    "a header that is no JSON": (lambda: tensor(text="float32"), r"a tensor \(with the header 'float32'"),
    "a header as deep as the stack": (lambda: tensor(text="[" * 100_000), r"a tensor \(with the header '\[.*\.\.\.: "),
    "a header of bytes": (lambda: ("tensor", 7, *tensor()[2:]), r"a tensor \(with the header 7"),
    "a negative start": (lambda: tensor(start=-100, nbytes=100), WEIGHT + "which has 100 bytes from -100 on"),
    "a start of text": (lambda: (*tensor()[:4], "0", 100), WEIGHT + "which has 100 bytes from '0' on"),
    "more bytes than there are": (lambda: tensor(nbytes=2**40), WEIGHT + f"which has {2**40} bytes from 0 on, of"),
    "bytes that are none": (
        lambda: (*tensor()[:3], torch.zeros(9000), *tensor()[4:]),
        WEIGHT + "whose bytes are .*float32",
    ),
    "bytes in two dimensions": (
        lambda: (*tensor()[:3], tensor()[3][None], *tensor()[4:]),
        WEIGHT + r"whose bytes are a tensor of torch\.uint8 with the shape \[1, ",
    ),
    "bytes that are a list": (
        lambda: (*tensor()[:3], [1, 2], *tensor()[4:]),
        WEIGHT + "whose bytes are of the type list",
    ),
    "one byte for all": (
        lambda: (*tensor(shape=[HUGE], stride=[1])[:3], spread(2 * HUGE), 0, CODECS["linear"].encoded_bytes(HUGE)),
        WEIGHT + r"whose bytes are .* the strides \[0\]",
    ),
    "too few arguments": (lambda: tensor()[:3], "the call for 'tensor' .with 2 arguments instead of 5"),
    "one element for all": (
        lambda: ("tensors", torch.zeros(1).expand(HUGE), [(HUGE,)], [None]),
        r"the small tensors \(whose elements are .* the strides \[0\]",
    ),
    "elements that are a list": (
        lambda: ("tensors", [1.0], [(1,)], [None]),
        r"the small tensors \(whose elements are of",
    ),
    "more elements": (
        lambda: ("tensors", FLAT, [(100,), (1,)], [None, None]),
        "the small tensors .whose shapes have more",
    ),
    "fewer elements": (
        lambda: ("tensors", FLAT, [(99,)], [None]),
        "the small tensors .whose shapes have more or fewer",
    ),
    "negative sizes of small tensors": (lambda: ("tensors", FLAT, [(-10, -10)], [None]), "whose shape is"),
    "a shape that is a number": (lambda: ("tensors", FLAT, [100], [None]), "whose shape is 100"),
    "shapes without strides": (lambda: ("tensors", FLAT, [(100,)], []), "whose shapes and strides are not as many"),
    "strides of 0 of small tensors": (lambda: ("tensors", FLAT, [(10, 10)], [(0, 0)]), "whose strides"),
    "a negative number": (lambda: ("item", (FLAT,), -1), r"a small tensor \(which has the number -1"),
    "a number of text": (lambda: ("item", (FLAT,), "0"), r"a small tensor \(which has the number '0'"),
    "an item of a tensor": (lambda: ("item", FLAT, 0), "a small tensor"),
    "a raw tensor that is a list": (lambda: ("raw", "a", "0", 0, [1.0]), r"the tensor a \(which is of the type list"),
    "a raw tensor without a name": (lambda: ("raw", 7, "0", 0, FLAT), r"a tensor \(with the name 7"),
    "a raw tensor with a sum of text": (lambda: ("raw", "a", "0", "0", FLAT), "the sum '0'"),
    "one element for a raw tensor": (
        lambda: ("raw", "a", "0", 0, torch.zeros(1).expand(HUGE)),
        f"the tensor a .which has {4 * HUGE} bytes in memory and 4 in the file",
    ),
}


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("name", FORGED)
def test_a_forged_field_is_damage_of_that_tensor(name: str, verified: bool, tmp_path: Path) -> None:
    """Without verification as well, since neither memory nor values may be what no writer has written."""
    call, message = FORGED[name]
    torch.save({"weight": Calls(rebuild_v1, *call())}, tmp_path / "hostile.ckpt")
    for kept in (False, True):
        with ExitStack() as stack:
            if not verified:
                stack.enter_context(without_verification())
            if kept:
                stack.enter_context(keep_encoded())
            stack.enter_context(pytest.raises(CorruptCheckpointError, match=message))
            torch.load(tmp_path / "hostile.ckpt", weights_only=True)
    if verified:
        with pytest.raises(CorruptCheckpointError, match=message) as error:
            torch.load(str(tmp_path / "hostile.ckpt"), weights_only=True)
        assert error.value.file == str(tmp_path / "hostile.ckpt")


@pytest.mark.parametrize(
    "shape",
    [(64, 64), (1, 64, 1, 64), (4096,), (16, 4, 8, 8), (2, 3, 0)],
    ids=str,
)
def test_every_layout_that_a_tensor_can_be_encoded_in_is_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    for order in itertools.permutations(range(len(shape))):
        original = torch.rand([shape[each] for each in order]).permute(
            [order.index(each) for each in range(len(shape))]
        )
        for odd in {
            original.stride(),
            tuple(step if size > 1 else 7 for step, size in zip(original.stride(), shape, strict=True)),
        }:
            written = original.as_strided(shape, odd) if original.numel() else original
            torch.save([QuantizedTensor.encode(written, CODECS["linear"], "a")], tmp_path / "a.ckpt")
            (read,) = torch.load(tmp_path / "a.ckpt", weights_only=True)
            assert (read.shape, read.stride()) == (written.shape, written.stride())


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
