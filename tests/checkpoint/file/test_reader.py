"""Reading in parallel gives what reading one after the other gives, and looks at every byte of the file."""

import io
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from support.calls import calls_of
from support.containers import Pair
from support.files import flip
from support.models import Autoencoder, Diary, quiet_trainer, train_and_save
from support.promises import assert_same, load, payloads, same_bits
from support.steps import our_threads
from support.threads import using_threads
from torch import Tensor

from q8lightning import (
    CorruptCheckpointError,
    QuantizationCallback,
    QuantizedCheckpointIO,
    QuantizedTensor,
    keep_encoded,
    without_verification,
)
from q8lightning.checkpoint.file import payloads as payload_group
from q8lightning.checkpoint.file import read as reader
from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.file.payloads import decode_payloads, replace_payloads
from q8lightning.checkpoint.file.read import read_checkpoint
from q8lightning.checkpoint.file.verify import archive
from q8lightning.checkpoint.file.verify.summed_file import LONG, SummedFile
from q8lightning.checkpoint.file.write import write_checkpoint
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.decode import EncodedItem
from q8lightning.system.workers import Workers
from q8lightning.tools import verify
from q8lightning.trainer.checkpoint_io.durable import DurableCheckpointIO


def payload(
    name: str = "x", codec: str = "softsign", dtype: torch.dtype = torch.float32, elements: int = 64 * 65
) -> QuantizedTensor:
    return QuantizedTensor.encode(torch.randn(elements // 64, 64).abs().to(dtype), get_codec(codec), name)


def everything() -> Any:
    """Long records and short ones, payloads in containers of every kind, tied ones, and such as share memory."""
    tied = payload("tied")
    state = OrderedDict(a=payload("a"), b=tied, raw=torch.randn(LONG // 4 + 3), small=torch.randn(5))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    shared = (payload("in a tuple"), 1)
    large = QuantizedTensor.encode(torch.randn(LONG + 9), get_codec("linear", 256, residual_bits=4), "large")
    return {
        "state_dict": state,
        "again": tied,
        "list": [payload("listed", "log"), [{"deep": payload("deep", dtype=torch.bfloat16)}]],
        "tuples": (shared, shared, (1, "word", torch.ones(3))),
        "plain": {"one": 1, "pair": Pair(1, torch.ones(2)), "none": None, "set": {1, 2}},
        "large": large,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(everything(), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def plainly(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def read(path: Path, **options: Any) -> Any:
    return read_checkpoint(path, lambda file: torch.load(file, weights_only=False), **options)


# What it returns


def test_it_returns_what_torch_load_returns(path: Path) -> None:
    expected, found = load_all(path), read(path)
    assert_same(found, expected)
    assert found["state_dict"]["b"] is found["again"]
    assert found["tuples"][0] is found["tuples"][1]
    assert found["state_dict"]._metadata == expected["state_dict"]._metadata
    assert our_threads() == []


def load_all(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def test_the_io_reads_so_unless_somebody_else_stands_between(path: Path) -> None:
    expected = load_all(path)
    with calls_of(replace_payloads) as seen:  # both ways give the same, in other times
        assert_same(QuantizedCheckpointIO().load_checkpoint(path, weights_only=False), expected)
        assert_same(QuantizedCheckpointIO(verify=False).load_checkpoint(f"file://{path}", weights_only=False), expected)
    assert len(seen) == 2

    class Other(DurableCheckpointIO):
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            checkpoint = super().load_checkpoint(*args, **kwargs)
            checkpoint["what it saw"] = type(checkpoint["state_dict"]["a"])
            return checkpoint

    with calls_of(replace_payloads) as seen:
        found = QuantizedCheckpointIO(Other()).load_checkpoint(path, weights_only=False)
    assert found.pop("what it saw") is Tensor
    assert_same(found, expected)
    assert not seen


def test_options_reach_torch(path: Path) -> None:
    with pytest.raises(Exception, match="weights_only"):
        QuantizedCheckpointIO().load_checkpoint(path, weights_only=True)  # it has a namedtuple
    places: list[str] = []
    QuantizedCheckpointIO().load_checkpoint(
        path, map_location=lambda storage, place: places.append(place), weights_only=False
    )
    assert set(places) == {"cpu"}


def test_what_is_to_stay_encoded_does(path: Path) -> None:
    with keep_encoded():
        found = read(path)
    assert isinstance(found["state_dict"]["a"], QuantizedTensor)
    assert isinstance(found["large"], QuantizedTensor)
    assert_same(found["large"].decode(), load_all(path)["large"])


class Demanding(dict):  # type: ignore[type-arg]
    """A dict that does something with what is put into it."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value.float())


class Hiding:
    """An object with a payload inside."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Wanting(Hiding):
    """An object that asks what a payload does not know."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = state["value"].clone()


def test_objects_that_want_tensors_get_tensors(tmp_path: Path) -> None:
    inside = payload("inside")
    for name, content in {
        "demanding": {"x": Demanding(), "y": payload("y")},
        "hiding": {"x": Hiding(inside), "y": payload("y")},
        "named": {"x": Pair(inside, 1), "y": inside},
        "hiding what others show": {"x": Hiding(inside), "y": inside},
        "wanting": {"x": Wanting(inside), "y": inside},
    }.items():
        if name == "demanding":
            dict.__setitem__(content["x"], "inside", inside)
        write_checkpoint(content, tmp_path / name)
        found = read(tmp_path / name)
        assert not payload_group.payloads_in(found)
        x = found["x"]
        value = x["inside"] if name == "demanding" else x.one if name == "named" else x.value
        values = [value, found["y"]]
        assert all(type(each) is Tensor for each in values)
        assert same_bits(values[0], inside.decode())


def test_an_error_of_loading_is_that_error(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        raise LookupError("of the loader")

    write_checkpoint(everything(), tmp_path / "a.ckpt")
    with pytest.raises(LookupError, match="of the loader"):
        read_checkpoint(tmp_path / "a.ckpt", fail)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "b.ckpt")
    assert our_threads() == []


class Watched(QuantizedTensor):
    """A payload that calls when somebody verifies it, which is the first step of decoding."""

    def __init__(self, payload: QuantizedTensor, call: Callable[[str], object]) -> None:
        super().__init__(payload.codec, payload.data, payload.shape, payload.stride, payload.dtype, payload.name)
        self.call = call

    def verify(self) -> None:
        self.call(self.name)
        super().verify()


def test_an_interrupt_leaves_no_thread(path: Path) -> None:
    def interrupted(file: Any) -> None:
        torch.load(file, weights_only=False)
        assert our_threads() != [], "the records that they have read are in memory"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_checkpoint(path, interrupted)
    assert our_threads() == []


def test_each_thread_decodes_its_own_tensors_unless_one_is_larger_than_its_share() -> None:
    where: dict[str, tuple[str, int]] = {}

    def note(name: str) -> None:
        where[name] = threading.current_thread().name, torch.get_num_threads()

    payloads: list[QuantizedTensor] = [Watched(payload(str(index), elements=2**20), note) for index in range(9)]
    payloads.insert(4, Watched(payload("large", elements=2**23), note))
    with using_threads(3):
        decoded = decode_payloads(payloads)
        assert torch.get_num_threads() == 3
        after: list[int] = []
        thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert after == [3], "other threads keep what they had"
    assert where.pop("large") == ("MainThread", 3)
    assert set(where.values()) == {("q8lightning worker", 1)}
    for each in payloads:
        assert same_bits(decoded[id(each)], each.decode())
    assert our_threads() == []


def test_small_payloads_that_are_decoded_together_are_as_if_each_had_been_decoded_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    codecs = [
        get_codec("linear", 256, residual_bits=4),
        get_codec("softsign", 128, bits=6),
        get_codec("log", 128, bits=5),
        get_codec("dynamic", 64),
    ]
    payloads = []
    # Some end within a block, one has no element, one is larger than what is decoded together.
    for index, numel in enumerate((256, 4096, 300, 0, 5120, 70_000, 512, 4096, 129, 8192)):
        for codec in codecs:
            dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float64)[index % 4]
            tensor = torch.randn(numel, generator=generator).abs().to(dtype)
            payloads.append(QuantizedTensor.encode(tensor.view(2, -1).t() if numel == 4096 else tensor, codec, "x"))
    with using_threads(2):
        sizes = [len(batch) for batch in payload_group.batches([each.item for each in payloads], 2)]
        decoded = decode_payloads(payloads)
    assert sum(sizes) == len(payloads) > len(sizes) > 4
    for each in payloads:
        found, expected = decoded[id(each)], each.as_decoded(each.codec.decode(each.parts, each.dtype))
        assert same_bits(found, expected)
        assert same_bits(found, each.decode())
        assert found.stride() == expected.stride()
        assert found.untyped_storage().nbytes() == found.nbytes, "memory of its own"


# Damage


def long_records(path: Path) -> list[tuple[int, int]]:
    with zipfile.ZipFile(path) as opened, open(path, "rb") as file:
        found = []
        for record in opened.infolist():
            if record.file_size >= LONG:
                file.seek(record.header_offset + 26)
                start = record.header_offset + 30 + sum(memoryview(file.read(4)).cast("H"))
                found.append((start, record.file_size))
        return found


PADDING = 16
"""Bytes, more than there ever are before a payload in its record."""


@pytest.mark.parametrize("where", [0.0, 0.3, 0.99999])
def test_a_bit_in_a_long_record_is_noticed(where: float, path: Path) -> None:
    records = long_records(path)
    assert len(records) == 2
    for (start, nbytes), what in zip(records, (r"state_dict\.raw", "large"), strict=True):
        position = start + PADDING + int(where * (nbytes - PADDING))
        flip(path, position)
        with pytest.raises(CorruptCheckpointError, match=f"the tensor {what} "):
            read(path)
        read(path, verify=False) if what != "large" else None
        flip(path, position)
    read(path)


def test_long_records_are_read_once_and_short_ones_are_compared_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longest_read_again() -> int:
        with calls_of(zipfile.ZipExtFile.read) as again:  # reading twice gives the same, and no audit event tells
            read(path)
        return max(call["self"]._orig_file_size for call in again)

    assert longest_read_again() < LONG
    monkeypatch.delattr(os, "preadv")  # then records have no sums by the time that they are read
    assert longest_read_again() >= LONG


def hashed_while(load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many bytes are hashed, by whatever hash and whoever wants it, while something is loaded."""
    lengths: list[int] = []

    def counting(real: Callable[..., int]) -> Callable[..., int]:
        return lambda data, *args, **options: (lengths.append(len(data)), real(data, *args, **options))[1]

    with monkeypatch.context() as patch:
        for module, name in ((zlib, "crc32"), (zipfile, "crc32"), (xxhash, "xxh3_64_intdigest")):
            patch.setattr(module, name, counting(getattr(module, name)))
        load()
    return sum(lengths)


def test_each_byte_is_hashed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = path.stat().st_size
    with keep_encoded():
        of_payloads = sum({id(each): each.nbytes for each in payloads(plainly(path)).values()}.values())
    for door in DOORS.values():
        assert size * 0.98 < hashed_while(partial(door, path), monkeypatch) < size * 1.01
    assert of_payloads < hashed_while(partial(plainly, path), monkeypatch) < of_payloads * 1.01


DOORS: dict[str, Callable[[Path], Any]] = {
    "reader": lambda path: read(path),
    "by somebody else": lambda path: reader.read_elsewhere(path, lambda: plainly(path)),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_what_stays_encoded_is_compared_with_the_sums_of_the_file(door: Callable[[Path], Any], path: Path) -> None:
    """Nothing else would look at it before it is decoded."""
    flip(path, long_records(path)[1][0] + PADDING)
    with keep_encoded(), pytest.raises(CorruptCheckpointError, match="the tensor large "):
        door(path)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_record_that_something_else_refers_to_is_compared_with_its_sum(
    door: Callable[[Path], Any], tmp_path: Path
) -> None:
    """A tensor that lies in the memory of a payload, but beyond its data."""
    memory = torch.randint(256, (2 * LONG,), dtype=torch.uint8)
    encoded = payload("alone")
    memory[: encoded.nbytes] = encoded.data
    write_checkpoint({"x": encoded.replace_data(memory[: encoded.nbytes]), "y": memory[LONG:]}, tmp_path / "a.ckpt")
    whole = load(tmp_path / "a.ckpt")
    assert_same(door(tmp_path / "a.ckpt"), whole)
    flip(tmp_path / "a.ckpt", long_records(tmp_path / "a.ckpt")[0][0] + LONG + 77)
    assert not same_bits(load(tmp_path / "a.ckpt")["y"], whole["y"])
    with pytest.raises(CorruptCheckpointError, match="the tensor x, y "):
        door(tmp_path / "a.ckpt")


def test_bytes_of_no_tensor_are_left_to_the_command_line(path: Path) -> None:
    """They lie between payloads, so that the codes of each begin at a multiple of 16 bytes."""
    whole = read(path)
    flip(path, long_records(path)[1][0])
    assert_same(read(path), whole)
    assert verify(path, trust=True).damage == ("the tensor large",)


def test_the_sum_is_of_what_was_loaded_not_of_what_the_file_holds_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips on the way to memory: to read the file once more would find it whole."""
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nbytes = real(descriptor, buffers, offset)
        if offset == long_records(path)[0][0]:
            buffers[0][100] ^= 1
        return nbytes

    # Memory that fails cannot be had.
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CorruptCheckpointError, match=r"state_dict\.raw"):
        read(path)


def test_a_header_that_was_damaged_is_noticed(path: Path) -> None:
    with zipfile.ZipFile(path) as opened:
        headers = [record.header_offset for record in opened.infolist() if record.file_size >= LONG]
    for header in headers:
        for byte in (0, 26, 28, 33):  # signature, lengths of name and extra fields, name
            flip(path, header + byte)
            with pytest.raises(CorruptCheckpointError):
                read(path)
            flip(path, header + byte)
    read(path)


def test_without_verification_reaches_the_threads(path: Path) -> None:
    start, _ = long_records(path)[1]
    flip(path, start + PADDING)
    with pytest.raises(CorruptCheckpointError, match="the tensor large "):
        read(path)
    read(path, verify=False)
    damaged = [payload(elements=2**22), payload(elements=2**22)]
    damaged[1].checksum = 7
    for threads in (1, 2):
        with using_threads(threads):
            with without_verification():
                decode_payloads(damaged)
            with pytest.raises(CorruptCheckpointError, match="the tensor x "):
                decode_payloads(damaged)


def test_the_command_line_still_verifies_long_records_by_itself(path: Path) -> None:
    """Whoever does not read through the file has every record read."""
    flip(path, long_records(path)[0][0] + 5)
    with pytest.raises(CorruptCheckpointError), OpenFile(path) as file, archive.verified(file):
        pass


# The file


@pytest.fixture(scope="module")
def bytes_of_file() -> bytes:
    return os.urandom(3 * LONG + 12_345)


@pytest.fixture
def summed(bytes_of_file: bytes, tmp_path: Path) -> Iterator[SummedFile]:
    (tmp_path / "x").write_bytes(bytes_of_file)
    with Workers(3) as workers, OpenFile(tmp_path / "x") as opened:
        yield SummedFile(opened, workers)


@pytest.mark.parametrize("start", [0, 1, 4097])
@pytest.mark.parametrize("nbytes", [0, 1, LONG - 1, LONG, LONG + 1, 2 * LONG, 2 * LONG + 2**20 + 1])
def test_stretches_are_what_the_file_holds(start: int, nbytes: int, summed: SummedFile, bytes_of_file: bytes) -> None:
    summed.seek(start)
    target = bytearray(nbytes)
    assert summed.readinto(target) == nbytes
    assert target == bytes_of_file[start : start + nbytes]
    assert summed.tell() == start + nbytes
    expected = zlib.crc32(target) if nbytes >= LONG else None
    assert summed.sum_of(start, nbytes) == expected
    assert summed.sum_of(start + 1, nbytes) is None


def test_positions_are_those_of_any_file(summed: SummedFile, bytes_of_file: bytes) -> None:
    assert summed.seek(-10, io.SEEK_END) == len(bytes_of_file) - 10
    assert summed.read() == bytes_of_file[-10:]
    assert summed.read(5) == b""
    assert summed.seek(7) == 7
    assert summed.seek(3, io.SEEK_CUR) == 10
    target = bytearray(len(bytes_of_file))
    assert summed.readinto(target) == len(bytes_of_file) - 10, "as far as the file goes"
    assert target[:-10] == bytes_of_file[10:]


def test_without_parallel_reads_the_file_is_read_plainly(
    summed: SummedFile, bytes_of_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    target = bytearray(LONG)
    assert summed.readinto(target) == LONG
    assert target == bytes_of_file[:LONG]
    assert summed.sum_of(0, LONG) is None


def test_a_file_that_becomes_shorter_is_an_error(summed: SummedFile) -> None:
    os.truncate(summed.name, LONG)
    with pytest.raises(OSError, match="became shorter"):
        summed.readinto(bytearray(2 * LONG))


# Optimizer states on a GPU: the CPU stands in for it here, and test_on_gpu.py has a real one


@pytest.fixture
def training(tmp_path: Path) -> Path:
    train_and_save(tmp_path, Autoencoder(), QuantizationCallback(), Diary())
    return tmp_path / "a.ckpt"


class Gpu:
    """What is asked of a GPU: without one, torch's questions and the launches have to be stood in for."""

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int = 2**40, error: Exception | None = None) -> None:
        self.items: list[EncodedItem] = []
        self.error = error
        for question, answer in {"mem_get_info": (free, 0), "memory_reserved": 0, "memory_allocated": 0}.items():
            monkeypatch.setattr(torch.cuda, question, lambda device, answer=answer: answer)
        monkeypatch.setattr(payload_group, "decode_on", self.unpack)

    def unpack(self, device: torch.device, items: list[EncodedItem]) -> list[Tensor]:
        assert device == self.device
        self.items += items
        if self.error is not None:
            raise self.error
        return [torch.full((item.numel,), 7.0, dtype=item.dtype) for item in items]


def io_with(device: torch.device | None) -> QuantizedCheckpointIO:
    io = QuantizedCheckpointIO()
    io.optimizer_device = device
    return io


def test_optimizer_states_are_decoded_where_the_trainer_wants_them(
    training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, expected = Gpu(monkeypatch), load(training)
    found = io_with(gpu.device).load_checkpoint(training)
    assert_same({**found, "optimizer_states": None}, {**expected, "optimizer_states": None})
    states = found["optimizer_states"][0]["state"]
    sevens = [value for state in states.values() for value in state.values() if bool((value == 7).all())]
    assert len(sevens) == len(gpu.items) > 2
    assert states[0]["step"] == expected["optimizer_states"][0]["state"][0]["step"]
    assert [each.shape for each in states[0].values()] == [
        each.shape for each in expected["optimizer_states"][0]["state"][0].values()
    ]


@pytest.mark.parametrize("problem", ["no room", "out of memory"])
def test_where_they_do_not_fit_the_host_decodes(problem: str, training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, free=1000) if problem == "no room" else Gpu(monkeypatch, error=torch.OutOfMemoryError())
    assert_same(io_with(gpu.device).load_checkpoint(training), load(training))
    assert bool(gpu.items) == (problem == "out of memory")


def test_damage_is_noticed_before_the_gpu_sees_it(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    with keep_encoded():
        state = load(training)["optimizer_states"][0]["state"][0]["exp_avg"]
    flip(training, training.read_bytes().find(state.data.numpy().tobytes()) + 3)
    with pytest.raises(CorruptCheckpointError, match=r"the tensor encoder\.0\.weight: exp_avg"):
        io_with(gpu.device).load_checkpoint(training)
    assert gpu.items == []


def test_what_no_kernel_decodes_and_what_is_tied_to_weights_stays_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    tied, wide, usual = payload("tied"), payload("wide", dtype=torch.float64), payload("usual")
    content = {"state_dict": {"w": tied}, "optimizer_states": [{"state": {0: {"a": tied, "b": wide, "c": usual}}}]}
    write_checkpoint(content, tmp_path / "a.ckpt")
    found = io_with(gpu.device).load_checkpoint(tmp_path / "a.ckpt")["optimizer_states"][0]["state"][0]
    assert len(gpu.items) == 1
    assert same_bits(found["a"], tied.decode())
    assert same_bits(found["b"], wide.decode())
    assert bool((found["c"] == 7).all())


def test_the_callback_asks_for_the_device_of_a_training_only(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=1, callbacks=[QuantizationCallback()])
    trainer.fit(Autoencoder())
    assert trainer.strategy.checkpoint_io.optimizer_device == torch.device("cpu")
    trainer.validate(Autoencoder(), verbose=False)
    assert trainer.strategy.checkpoint_io.optimizer_device is None


def test_payloads_are_replaced_in_place() -> None:
    one, two = payload("one"), payload("two")
    inner: list[Any] = [one, {"x": two}]
    content = {"a": inner, "b": (inner, two), "c": "word"}
    found = replace_payloads(content, {id(one): torch.zeros(1), id(two): torch.ones(1)})
    assert found is content
    assert found["a"] is inner
    assert_same(found, {"a": [torch.zeros(1), {"x": torch.ones(1)}], "b": (inner, torch.ones(1)), "c": "word"})


@pytest.mark.parametrize("weights_only", [True, False])
def test_usual_checkpoints_are_loaded_once(weights_only: bool, training: Path) -> None:
    loads: list[Any] = []

    def load_once(file: Any) -> Any:
        loads.append(file)
        return torch.load(file, weights_only=weights_only)

    assert_same(read_checkpoint(training, load_once), load(training))
    assert len(loads) == 1
