"""A copy is the checkpoint at its moment: every storage copied once, what was shared still shared, nothing changed.

Copies from a device are tested here with the CPU in its place, and on a GPU in ``test_on_gpu.py``.
"""

import copy
import gc
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.parsing import AttributeDict
from support.containers import Pair
from support.odd_checkpoints import ODD
from support.promises import assert_same, load, same_bits
from torch import Tensor, UntypedStorage, nn

from q8lightning import QuantizedCheckpointIO, QuantizedTensor
from q8lightning.checkpoint.load_locations import located
from q8lightning.checkpoint.staging import copier
from q8lightning.checkpoint.staging import transfer as host_memory
from q8lightning.checkpoint.staging.copier import Copier
from q8lightning.checkpoint.staging.transfer import ALIGNMENT, HostMemory, Transfer
from q8lightning.quantization.codecs.table import get_codec


class Snapshot:
    """A copy of a checkpoint, as a save makes one of what it does not encode."""

    def __init__(self, checkpoint: Any, live: bool) -> None:
        self._copier = Copier(live)
        self._content = self._copier.copy(checkpoint)
        self._copier.start()

    @contextmanager
    def fetch(self, memory: HostMemory | None = None) -> Iterator[Any]:
        with located(self._copier.fetch(memory).tags):
            yield self._content


def content_of(checkpoint: Any, live: bool = True) -> Any:
    with Snapshot(checkpoint, live).fetch() as content:
        return content


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def everything() -> dict[str, Any]:
    memory = torch.arange(600.0)
    state = OrderedDict(a=memory[:200].view(10, 20), b=memory[100:300], c=memory[:200].view(10, 20))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    leaf = nn.Parameter(torch.randn(3, 4))
    return {
        "state_dict": state,
        "parameters": [leaf, nn.Parameter(torch.arange(3), requires_grad=False), leaf * 2],
        "views": {"transposed": torch.randn(4, 6).t(), "expanded": torch.randn(1, 4).expand(3, 4)},
        "dtypes": [torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.int8, torch.bfloat16, torch.complex64)],
        "odd": (torch.empty(0, 3), torch.tensor(1.5), torch.randn(4, 4).to_sparse_csr().values()),
        "containers": [Pair([1], torch.ones(2)), defaultdict(list, {"x": [torch.ones(2)]}), AttributeDict(y=[3])],
        "milestones": Counter({30: 1, 80: 2}),  # of MultiStepLR
        "others": ({1, 2}, b"bytes", 1.5, None, torch.float32, "word", range(3)),
    }


def test_it_equals_the_checkpoint_and_shares_nothing_that_could_change() -> None:
    checkpoint = everything()
    content = content_of(checkpoint)
    assert_same(content, checkpoint)
    for here, there in (
        (content["state_dict"]["a"], checkpoint["state_dict"]["a"]),
        (content["parameters"][0], checkpoint["parameters"][0]),
        (content["views"]["transposed"], checkpoint["views"]["transposed"]),
        (content["odd"][2], checkpoint["odd"][2]),
        (content["containers"][0].two, checkpoint["containers"][0].two),
    ):
        assert memory_of(here) != memory_of(there)
    for path in (("containers", 0, 0), ("containers", 1, "x"), ("containers", 2, "y"), ("others", 0), ("parameters",)):
        here, there = content, checkpoint
        for key in path:
            here, there = here[key], there[key]
        assert here is not there, path
    assert content["state_dict"]._metadata is not checkpoint["state_dict"]._metadata


def test_what_shared_memory_still_does_and_is_copied_once() -> None:
    checkpoint = everything()
    checkpoint["module"] = nn.Linear(3, 3, bias=False)
    checkpoint["weight"] = checkpoint["module"].weight
    checkpoint["list"] = checkpoint["parameters"]
    content = content_of(checkpoint)
    state = content["state_dict"]
    assert memory_of(state["a"]) == memory_of(state["b"]) == memory_of(state["c"])
    assert state["b"].storage_offset() == 100
    assert state["a"].untyped_storage().nbytes() == 2400
    assert content["module"].weight is content["weight"]
    assert content["list"] is content["parameters"]


def test_without_going_on_nothing_is_copied() -> None:
    checkpoint = everything()
    assert content_of(checkpoint, live=False) is checkpoint


def test_the_bytes_of_payloads_are_not_copied() -> None:
    """Nobody else has them; also where one storage holds those of several."""
    together = torch.randint(0, 256, (20_000,), dtype=torch.uint8)
    payload = QuantizedTensor.encode(torch.randn(64, 64), get_codec("softsign"), "x")
    together[100 : 100 + payload.nbytes] = payload.data
    packed = payload.replace_data(together[100 : 100 + payload.nbytes])
    content = content_of({"a": payload, "b": packed, "c": packed})
    assert content["a"].data is payload.data
    assert content["b"].data is packed.data
    assert same_bits(content["b"].decode(), payload.decode())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_whatever_torch_can_save_is_saved_in_the_background(make: Any, tmp_path: Path) -> None:
    checkpoint = make()
    for name, async_save in (("a", True), ("b", False)):
        io = QuantizedCheckpointIO(async_save=async_save)
        io.save_checkpoint(checkpoint, tmp_path / name)
        io.finish()
    assert (tmp_path / "a").stat().st_size <= (tmp_path / "b").stat().st_size  # clones of some are more compact
    assert list(torch.load(tmp_path / "a", weights_only=False)) == [*checkpoint, "q8lightning"]


@pytest.fixture
def storages_warn() -> Iterator[None]:
    """Have torch warn of a ``TypedStorage`` whenever it is used, and not only the first time in a process."""
    torch.storage._set_always_warn_typed_storage_removal(True)
    yield
    torch.storage._set_always_warn_typed_storage_removal(False)


@pytest.mark.usefixtures("storages_warn")
def test_tensors_that_pickle_their_storage_are_saved_without_a_word(tmp_path: Path) -> None:
    remembers = torch.ones(3)
    remembers.origin = "here"  # type: ignore[attr-defined]
    checkpoint = {"a": torch.ones(2, dtype=torch.complex64).conj(), "b": remembers, "c": remembers[1:]}
    io = QuantizedCheckpointIO(async_save=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        io.save_checkpoint(checkpoint, tmp_path / "a")
        remembers.zero_()
        io.finish()
    loaded = torch.load(tmp_path / "a", weights_only=False)
    assert loaded["a"].is_conj()
    assert loaded["b"].origin == "here"
    assert loaded["b"].tolist() == [1, 1, 1]
    assert loaded["b"].untyped_storage().data_ptr() == loaded["c"].untyped_storage().data_ptr()


# From a device: the CPU stands in for it


@pytest.fixture
def as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every storage of the CPU treated as if it were on a device: there is no other without a GPU."""
    monkeypatch.setattr(copier, "_on_host", lambda tensor: False)


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("live", [True, False])
def test_what_comes_from_a_device_is_the_same(live: bool) -> None:
    checkpoint = everything()
    checkpoint["payload"] = payload = QuantizedTensor.encode(torch.randn(70, 70), get_codec("log"), "x")
    before = copy.deepcopy({**checkpoint, "parameters": checkpoint["parameters"][:2], "payload": None})
    frozen = Snapshot(checkpoint, live)
    if live:
        for tensor in (*checkpoint["state_dict"].values(), *checkpoint["dtypes"], checkpoint["parameters"][0].data):
            tensor.zero_()
    with frozen.fetch(HostMemory()) as content:
        found = content["payload"]
        assert found.data.data_ptr() != payload.data.data_ptr()
        assert same_bits(found.data, payload.data)
        content["parameters"] = content["parameters"][:2]
        assert_same({**content, "payload": None}, before)
        state = content["state_dict"]
        assert memory_of(state["a"]) == memory_of(state["b"])
        assert state["a"].untyped_storage().nbytes() == 2400, "torch.save would write more than belongs to it"


@pytest.mark.usefixtures("as_device")
def test_the_devices_memory_is_let_go_before_the_file_is_written() -> None:
    payload = QuantizedTensor.encode(torch.randn(70, 70), get_codec("log"), "x")
    raw = torch.randn(300)
    alive = [weakref.ref(payload.data.untyped_storage()), weakref.ref(raw.untyped_storage())]
    frozen = Snapshot({"payload": payload, "raw": raw}, live=True)
    del payload, raw
    with frozen.fetch():
        gc.collect()
        assert [each() for each in alive] == [None, None]


def test_a_transfer_gives_each_storage_its_bytes_at_an_address_that_fits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    kinds = (torch.int8, torch.float32, torch.bool, torch.float64, torch.bfloat16, torch.complex128, torch.uint8)
    live = [torch.randint(0, 2, (size,)).to(kinds[size % 7]) for size in (1, 3, 5, 7, 0, 64, 33, 129, 15, 2, 1000)]
    private = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (100, 1, 0, 4096)]
    transfer = Transfer(torch.device("cpu"))
    for tensor in (*live, *private):
        transfer.add(tensor.untyped_storage(), private=any(tensor is each for each in private))
    transfer.start()
    values = [tensor.clone() for tensor in live]
    for tensor in live:
        tensor.zero_()
    memory = HostMemory().take(transfer.nbytes)
    copies = transfer.finish(memory)
    for tensor, expected in (*zip(live, values, strict=True), *zip(private, private, strict=True)):
        copied = copies[tensor.untyped_storage()._cdata]
        assert copied.nbytes() == expected.nbytes
        assert same_bits(torch.empty(0, dtype=tensor.dtype).set_(copied), expected)
        assert copied.nbytes() == 0 or copied.data_ptr() % tensor.element_size() == 0
    assert transfer.nbytes == 0, "it still keeps the device's memory alive"
    assert memory.nbytes % ALIGNMENT == 0


def test_pinned_memory_is_kept_for_the_next_save_and_given_back_at_the_end() -> None:
    memory = HostMemory()
    first = memory.take(1000)
    assert memory.take(500).data_ptr() == first.data_ptr()
    assert 1000 < memory.nbytes < 1100
    assert memory.take(memory.nbytes).data_ptr() == first.data_ptr()
    assert memory.take(2000).nbytes == 2000
    assert 2000 < memory.nbytes < 2200
    memory.release()
    assert memory.nbytes == 0


@pytest.mark.usefixtures("as_device")
def test_the_io_reuses_its_memory_only_where_nobody_keeps_what_is_written(tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(async_save=True)
    addresses = set()
    for value in range(3):
        memory = torch.full((64, 65), float(value))
        io.save_checkpoint({"state_dict": {"weight": memory[0], "table": memory}}, tmp_path / f"{value}.ckpt")
        io.wait_until_durable()
        assert io._memory._memory is not None
        addresses.add(io._memory._memory.data_ptr())
    assert len(addresses) == 1
    assert [load(tmp_path / f"{value}.ckpt")["state_dict"]["weight"][0] for value in range(3)] == [0, 1, 2]
    io.teardown()
    assert io._memory.nbytes == 0

    kept: list[dict[str, Any]] = []

    class KeepingIO(type(io.base)):  # type: ignore[misc]
        def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            kept.append(checkpoint)

    io = QuantizedCheckpointIO(KeepingIO(), async_save=True)
    for value in range(3):
        io.save_checkpoint({"state_dict": {"weight": torch.full((64, 64), float(value))}}, tmp_path / "x.ckpt")
    io.teardown()
    assert [float(each["state_dict"]["weight"].decode()[0, 0]) for each in kept] == [0, 1, 2]


@pytest.mark.usefixtures("as_device")
def test_copies_are_saved_under_the_location_of_what_they_are_copies_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a plain checkpoint of a GPU's tensors: it loads to the GPU, wherever its bytes were when they were written."""
    with monkeypatch.context() as where:  # torch's registry of locations can be added to, but nothing taken away
        where.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        frozen = Snapshot({"state_dict": {"weight": torch.ones(3), "payload": torch.ones(64, 64)}}, live=True)
    seen = []

    def remember(storage: UntypedStorage, location: str) -> UntypedStorage:
        seen.append(location)
        return storage

    with frozen.fetch() as content:
        torch.save(content, tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", map_location=remember)
    assert seen == ["cuda:0", "cuda:0"]
    torch.save(content, tmp_path / "b.ckpt")
    torch.load(tmp_path / "b.ckpt", map_location=remember)
    assert seen[2:] == ["cpu", "cpu"], "it outlives the save"


def test_views_of_a_tensor_that_is_copied_as_a_whole_stay_its_views() -> None:
    whole = torch.arange(12.0)
    content = content_of({"whole": whole, "part": whole[2:5], "table": whole.view(3, 4)})
    assert memory_of(content["whole"]) == memory_of(content["part"]) == memory_of(content["table"]) != memory_of(whole)
    content["whole"][2] = -1
    assert content["part"][0] == content["table"][0, 2] == -1


def test_a_tensor_with_gaps_as_large_as_its_memory_keeps_its_strides() -> None:
    tensor = torch.arange(4.0).as_strided((2, 2), (2, 0))  # as many elements as the storage, not the same ones
    copied = content_of({"x": tensor})["x"]
    assert copied.stride() == tensor.stride()
    assert torch.equal(copied, tensor)


def test_locked_memory_is_given_back_with_the_object_but_not_when_python_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may be torn down by then, and to call it would crash a process that has done its work.

    Without a GPU no memory can be locked, so that the two calls of CUDA are stood in for.
    """
    given_back: list[int] = []
    monkeypatch.setattr(host_memory, "_register", lambda memory: True)
    monkeypatch.setattr(host_memory, "_unregister", lambda memory: given_back.append(memory.nbytes))
    memory = HostMemory()
    memory.take(1000)
    assert memory._unregister is not None
    assert not memory._unregister.atexit
    del memory
    assert len(given_back) == 1
