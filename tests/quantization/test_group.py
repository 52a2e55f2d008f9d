"""A group of tensors shows and measures the values of the reference, and then its own again, bit for bit."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.devices import NOT_COMPILED, NOT_INTERPRETED
from support.oracle import same_bits
from torch import Tensor
from torch.overrides import TorchFunctionMode

from q8lightning.quantization.backends.choose import launching
from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup
from q8lightning.quantization.many.write_quantized import BATCH, InLaunch
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.block_choice import chosen_blocks, mix
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

MINE = Codebook("mine", (-1.0, -0.3, 0.0, 0.4, 1.0))
BOOKS = [*(book for book in BUILTIN.values() if book.signed), MINE]


def tensors() -> list[Tensor]:
    """Mixed sizes, dtypes and orders of memory; zeros, a signed zero, values that vanish, a short last block."""
    special = torch.tensor([0.0, -0.0, 1e-39, -3.0, 3.0, 2.0**-126])
    return [
        torch.randn(40, 33),
        torch.randn(40, 33).bfloat16(),
        torch.randn(6, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(65),
        special,
        torch.randn(3, 100, dtype=torch.float64).t(),
        -torch.rand(129).half(),
        torch.randn(0, 4),
        torch.randn(64, 64),
    ]


def expected(x: Tensor, codebook: Codebook, block_size: int, axis: int | None) -> Tensor:
    """Return what the reference makes of a tensor, in the order of memory or row by row."""

    def one(flat: Tensor) -> Tensor:
        parts = reference.quantize(flat, codebook, block_size, codebook.one_sided)
        return reference.dequantize(*parts, codebook, block_size, x.dtype)

    if axis is not None:
        return torch.stack([one(row) for row in x.unbind(axis)], dim=axis) if x.numel() else x
    flat = one(x.as_strided((x.numel(),), (1,)))
    return flat.as_strided(x.shape, x.stride())


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("codebook", BOOKS, ids=lambda book: book.name)
def test_engaged_tensors_hold_the_values_of_the_reference_and_come_back(codebook: Codebook, axis: int | None) -> None:
    live = tensors()
    before = [tensor.clone() for tensor in live]
    group = FakeQuantizeGroup(live, codebook, 32, axis)
    statistics = group.engage()
    assert group.engaged
    for tensor, original, master, row in zip(live, before, group.masters, statistics, strict=True):
        assert same_bits(tensor, expected(original, codebook, 32, axis))
        assert same_bits(master, original)
        assert master.stride() == original.stride()
        assert torch.equal(row, torch.stack(reference.error_statistics(original, tensor)))
    group.release()
    assert not group.engaged
    for tensor, original in zip(live, before, strict=True):
        assert same_bits(tensor, original)


def test_engaging_again_quantizes_the_masters_not_what_was_quantized() -> None:
    live = [torch.randn(64, 64)]
    original = live[0].clone()
    group = FakeQuantizeGroup(live, BUILTIN["int2"], 64)
    group.engage(share=0.5, seed=1)
    group.engage()
    assert same_bits(live[0], expected(original, BUILTIN["int2"], 64, None))
    group.release()
    assert same_bits(live[0], original)


def test_releasing_twice_leaves_what_was_written_since() -> None:
    live = [torch.randn(64)]
    group = FakeQuantizeGroup(live, BUILTIN["linear"], 32)
    group.engage()
    group.release()
    live[0].fill_(2.0)
    group.release()
    assert bool((live[0] == 2.0).all())


def test_more_than_operators_take_at_once_is_quantized_in_batches() -> None:
    live = [torch.randn(640, 1000), torch.randn(BATCH - 64 * 2000), torch.randn(33), torch.randn(BATCH + 7)]
    before = [x.clone() for x in live]
    FakeQuantizeGroup(live, BUILTIN["int2"], 64).engage(share=0.4, seed=5)
    for index, (x, original) in enumerate(zip(live, before, strict=True)):
        full = expected(original, BUILTIN["int2"], 64, None).flatten()
        chosen = chosen_blocks(index, -(-x.numel() // 64), 0.4, seed=5).repeat_interleave(64)[: x.numel()]
        assert same_bits(x.flatten(), torch.where(chosen, full, original.flatten()))


def test_the_buffer_is_made_once_and_released_tensors_lie_where_they_lay() -> None:
    live = [torch.nn.Parameter(torch.randn(100)), torch.nn.Parameter(torch.randn(50))]
    own = [tensor.data_ptr() for tensor in live]
    group = FakeQuantizeGroup(live, BUILTIN["linear"], 32)
    engaged_at = []
    for _ in range(3):
        group.engage()
        assert [master.data_ptr() for master in group.masters] == own
        engaged_at.append([tensor.data_ptr() for tensor in live])
        assert live[0].untyped_storage().data_ptr() == live[1].untyped_storage().data_ptr()
        assert live[0].untyped_storage().nbytes() == 2 * 512  # one buffer, a slot for each
        group.release()
        assert [tensor.data_ptr() for tensor in live] == own
    assert engaged_at[0] == engaged_at[1] == engaged_at[2]
    assert not set(engaged_at[0]) & set(own)
    assert all(address % 512 == engaged_at[0][0] % 512 for address in engaged_at[0])


@pytest.mark.parametrize(
    "views_of",
    [lambda x: [x[64:]], lambda x: [x[:64], x[40:168]], lambda x: [x.view(12, 16), x.view(12, 16)]],
    ids=["a part of other memory", "parts that overlap", "the same memory twice"],
)
def test_tensors_in_memory_that_others_share_stay_where_they_are(views_of: Callable[[Tensor], list[Tensor]]) -> None:
    memory = torch.randn(192)
    views = views_of(memory)
    live = [torch.nn.Parameter(view) for view in views]
    own, before = [view.data_ptr() for view in views], memory.clone()
    originals = [view.clone() for view in views]
    group = FakeQuantizeGroup(live, BUILTIN["int2"], 32)
    for _ in range(2):
        group.engage()
        assert [tensor.data_ptr() for tensor in live] == own
        assert same_bits(views[-1], expected(originals[-1], BUILTIN["int2"], 32, None))  # others see it
        for master, original in zip(group.masters, originals, strict=True):
            assert same_bits(master, original)
        group.release()
        assert same_bits(memory, before)


def test_tensors_that_moved_while_engaged_get_their_masters_where_they_are() -> None:
    parameter = torch.nn.Parameter(torch.randn(64))
    original = parameter.detach().clone()
    group = FakeQuantizeGroup([parameter], BUILTIN["int2"], 32)
    group.engage()
    parameter.data = parameter.data.double()
    address = parameter.data_ptr()
    group.release()
    assert parameter.dtype == torch.float64
    assert parameter.data_ptr() == address
    assert same_bits(parameter.detach(), original)


def test_tensors_that_changed_their_dtype_get_a_new_buffer() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 16))
    group = FakeQuantizeGroup([parameter], BUILTIN["int2"], 32)
    group.engage()
    group.release()
    parameter.data = parameter.data.half().t().contiguous().t()
    original = parameter.detach().clone()
    group.engage()
    assert parameter.dtype == torch.float16
    assert parameter.stride() == (1, 4)
    assert same_bits(parameter.detach(), expected(original, BUILTIN["int2"], 32, None))
    assert same_bits(group.masters[0], original)


def test_what_autograd_saved_stays_valid() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    group = FakeQuantizeGroup([weight], BUILTIN["int4"], 64)
    group.engage()
    x = torch.randn(3, 64, requires_grad=True)
    loss = (x @ weight.t()).square().sum()
    group.release()
    group.engage()
    loss.backward()  # would raise if the version counter of the weight had moved
    expected_gradient = 2 * (x @ weight.t()) @ weight
    assert torch.allclose(x.grad, expected_gradient)  # type: ignore[arg-type]


def test_a_group_made_while_evaluating_serves_training() -> None:
    weight = torch.randn(64)
    with torch.inference_mode():
        group = FakeQuantizeGroup([weight], BUILTIN["linear"], 32)
        group.engage()
    group.release()
    group.engage()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_blocks_is_quantized_and_the_others_are_the_masters(share: float) -> None:
    live = [torch.randn(100, 64), torch.randn(70, 64)]
    before = [tensor.clone() for tensor in live]
    FakeQuantizeGroup(live, BUILTIN["int2"], 32).engage(share, seed=7)
    for index, (tensor, original) in enumerate(zip(live, before, strict=True)):
        chosen = chosen_blocks(index, original.numel() // 32, share, seed=7)
        assert abs(float(chosen.float().mean()) - share) < 0.12
        blocks, quantized = (x.view(-1, 32) for x in (tensor, expected(original, BUILTIN["int2"], 32, None)))
        assert same_bits(blocks[chosen], quantized[chosen])
        assert same_bits(blocks[~chosen], original.view(-1, 32)[~chosen])


def test_the_choice_of_blocks_is_a_hash_that_other_devices_can_repeat() -> None:
    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    numbers = [0, 1, 2**31, 2**32 - 1, 123456789]
    assert mix(torch.tensor(numbers)).tolist() == [lowbias32(x) for x in numbers]
    key = lowbias32(lowbias32(42) ^ 3)
    by_hand = [lowbias32(key ^ block) < int(0.3 * 2**32) for block in range(1000)]
    assert chosen_blocks(3, 1000, 0.3, seed=42).tolist() == by_hand


def test_seeds_and_tensors_choose_differently() -> None:
    choices = [chosen_blocks(t, 1000, 0.5, seed) for t, seed in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for i, one in enumerate(choices):
        for other in choices[:i]:
            assert 0.4 < float((one == other).float().mean()) < 0.6


def test_a_larger_share_keeps_the_blocks_of_a_smaller_one_at_the_same_seed() -> None:
    few, many = (chosen_blocks(0, 1000, share, seed=3) for share in (0.2, 0.7))
    assert not bool((few & ~many).any())


class NoMemory(TorchFunctionMode):
    """Raises as a full device does when a tensor is copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


def test_what_raises_while_engaging_leaves_the_masters() -> None:
    memory = torch.randn(128)
    live = [torch.nn.Parameter(torch.randn(64)), torch.nn.Parameter(memory[:64])]
    before, own = [x.detach().clone() for x in live], [x.data_ptr() for x in live]
    group = FakeQuantizeGroup(live, BUILTIN["int2"], 32)

    with NoMemory(), pytest.raises(torch.OutOfMemoryError):
        group.engage()
    assert not group.engaged
    assert [x.data_ptr() for x in live] == own
    assert all(map(same_bits, map(Tensor.detach, live), before))


def test_tensors_that_moved_are_found_again() -> None:
    parameter = torch.nn.Parameter(torch.randn(64))
    group = FakeQuantizeGroup([parameter], BUILTIN["int2"], 32)
    group.engage()
    group.release()
    parameter.data = torch.randn(64)
    original = parameter.detach().clone()
    group.engage()
    assert same_bits(parameter.detach(), expected(original, BUILTIN["int2"], 32, None))


def kernel_cases() -> list[Tensor]:
    """As :func:`tensors`, longer ones too, and views that do not begin at multiples of 16 bytes."""
    shifted = torch.randn(5000)
    rows = [torch.randn(3, 64), torch.randn(2, 2, 128).half(), torch.randn(5, 64).t()]
    return [*tensors(), *rows, -torch.rand(1), shifted[3:3001], torch.randn(17, 96).half()[1:]]


def on(device: str, x: Tensor) -> Tensor:
    """Return a tensor with the same values and strides on a device, in memory that is as badly aligned."""
    if x.untyped_storage().nbytes() == x.nbytes:
        return torch.empty_like(x, device=device).copy_(x)
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device, copy=True)  # type: ignore[call-overload]
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


# Compiling takes a second a kernel, and interpreting it seconds a group; test_grouped.py knows more combinations.
INTERPRETED = [("int4", 32, None, 0.3), ("int4", 64, 0, 0.3), ("normal_float4", 32, -1, 1.0)]
COMPILED = [
    *((book.name, (32, 64, 4096)[i % 3], None, (1.0, 0.3)[i % 2]) for i, book in enumerate(BOOKS)),
    *(("linear", 64, axis, 1.0) for axis in (0, -1)),
    *(("int4", 32, axis, 0.3) for axis in (0, -1)),
]


@pytest.mark.parametrize(
    ("launch_device", "codebook", "block_size", "axis", "share"),
    [
        *(pytest.param("cpu", *case, id=f"interpreted-{case}", marks=NOT_INTERPRETED) for case in INTERPRETED),
        *(pytest.param("cuda", *case, id=f"cuda-{case}", marks=[pytest.mark.gpu, NOT_COMPILED]) for case in COMPILED),
    ],
    indirect=["launch_device"],
)
def test_kernels_engage_to_the_same_bits(
    launch_device: str,
    codebook: str,
    block_size: int,
    axis: int | None,
    share: float,
) -> None:
    book = MINE if codebook == "mine" else BUILTIN[codebook]
    here = kernel_cases()
    there = [on(launch_device, x) for x in here]
    before = [x.clone() for x in there]
    fast = FakeQuantizeGroup(there, book, block_size, axis)
    assert any(isinstance(batch, InLaunch) for batch in fast._batches)
    with launching(False):
        slow = FakeQuantizeGroup(here, book, block_size, axis)
    for seed in (9, 10):
        wanted, got = (group.engage(share, seed) for group in (slow, fast))
        for one, other in zip(here, there, strict=True):
            assert same_bits(one, other.cpu())
        # Kernels add up in float32, where the squares of the smallest values are zero beside those of others.
        torch.testing.assert_close(got.cpu(), wanted, rtol=2e-6, atol=1e-70)  # type: ignore[union-attr]
        for master, original in zip(fast.masters, before, strict=True):
            assert same_bits(master.cpu(), original.cpu())
            assert master.stride() == original.stride()
        assert fast.engage(1.0, measure=False) is None  # as when a validation begins in the middle of a ramp
        slow.engage()
        for one, other in zip(here, there, strict=True):
            assert same_bits(one, other.cpu())
        fast.release()
        slow.release()
        for tensor, original in zip(there, before, strict=True):
            assert same_bits(tensor.cpu(), original.cpu())
        for one, other, kept in zip(here, there, before, strict=True):  # an optimizer's step
            for tensor in (one, other, kept):
                tensor.mul_(0.5)


def test_a_launch_for_each_dtype_and_its_work_list_is_kept(launch_device: str, launched: list[Any]) -> None:
    from q8lightning.quantization.backends.kernels import work_list

    live = [torch.randn(64 * n, 64, device=launch_device).to(d) for n in (1, 2) for d in (torch.float32, torch.float16)]
    group = FakeQuantizeGroup(live, BUILTIN["int4"], 64)
    work_list.launches.cache_clear()
    for seed in range(3):
        group.engage(0.5 if seed else 1.0, seed, measure=False)
        group.release()
    assert len(launched) == 3 * 2
    assert work_list.launches.cache_info().misses == 2


def test_rows_of_whole_blocks_are_launched_others_are_not(launch_device: str) -> None:
    live = [torch.randn(8, 64), torch.randn(8, 96), torch.randn(64, 8).t(), torch.randn(8, 4, 4, 4)]
    live.append(live[-1].contiguous(memory_format=torch.channels_last))
    group = FakeQuantizeGroup([x.to(launch_device) for x in live], BUILTIN["int4"], 64, axis=0)
    launched = [batch.indices for batch in group._batches if isinstance(batch, InLaunch)]
    assert launched == [(0, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_for_nothing() -> None:
    live = [torch.nn.Parameter(torch.randn(128, 64, device="cuda")) for _ in range(3)]
    group = FakeQuantizeGroup(live, BUILTIN["int4"], 64)
    for share in (1.0, 0.5):  # compile, and make the work lists
        for measure in (False, True):
            group.engage(share, 1, measure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            group.engage(1.0, measure=False)
            group.engage(0.5, seed=step, measure=True)
            group.release()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_need_not_be_the_group_s() -> None:
    x = torch.randn(128, 64)
    live = x.to("cuda:1")
    with torch.cuda.device(0):
        FakeQuantizeGroup([live], BUILTIN["int4"], 64).engage()
    assert same_bits(live.cpu(), expected(x, BUILTIN["int4"], 64, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_of_a_recurrent_layer_stay_in_the_one_piece_that_cudnn_wants() -> None:
    layer = torch.nn.LSTM(64, 64, num_layers=2).cuda()
    weights = [x for x in layer.parameters() if x.ndim > 1]
    before = [x.detach().clone() for x in weights]
    at = [x.data_ptr() for x in weights]
    group = FakeQuantizeGroup(weights, BUILTIN["int4"], 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "RNN module weights are not part of single contiguous chunk of memory"
        for _ in range(2):
            group.engage()
            layer(torch.randn(3, 2, 64, device="cuda"))[0].sum().backward()
            assert [x.data_ptr() for x in weights] == at
            for x, original in zip(weights, before, strict=True):
                assert same_bits(x.detach().cpu(), expected(original.cpu(), BUILTIN["int4"], 64, None))
            group.release()
    for x, original in zip(weights, before, strict=True):
        assert torch.equal(x, original)


# Who writes to tensors that show quantized values


@pytest.mark.parametrize("launched", [True, False])
def test_slots_follow_masters_that_were_written_to(launched: bool, launch_device: str) -> None:
    """Some tensors are in place, some point elsewhere, some share memory; the slots of all others stay."""
    memory = torch.randn(128, device=launch_device)
    live = [torch.nn.Parameter(torch.randn(64, device=launch_device)) for _ in range(3)]
    live += [torch.nn.Parameter(memory[:64]), torch.nn.Parameter(torch.randn(64, device=launch_device).double())]
    book = BUILTIN["int4"]
    with launching(False) if not launched else nullcontext():
        group = FakeQuantizeGroup(live, book, 32)
        group.engage(0.7, seed=3)
        with torch.no_grad():
            for index in (0, 3, 4):
                if index == 0 and not launched:
                    group.masters[index].data = torch.randn(64, device=launch_device)
                else:
                    group.masters[index].mul_(-2)
                group.wrote(index)
        masters = [x.clone() for x in group.masters]
        versions = [x._version for x in live]
        group.settle(0.7, seed=3)
    assert not group.written
    assert group.lost() == []
    assert [x._version - version for x, version in zip(live, versions, strict=True)] == [1, 0, 0, 1, 1]
    for index, (x, master) in enumerate(zip(live, masters, strict=True)):
        chosen = chosen_blocks(index, 2, 0.7, seed=3)[:, None]
        full = expected(master.cpu(), book, 32, None).view(2, 32)
        assert same_bits(x.detach().cpu(), torch.where(chosen, full, master.cpu().view(2, 32)).view(64))
    group.release()
    assert all(same_bits(x.detach().cpu(), master.cpu()) for x, master in zip(live, masters, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_a_write_to_what_shows_quantized_values_is_found(shared: bool) -> None:
    def in_place(x: torch.nn.Parameter) -> None:
        with torch.no_grad():
            x.mul_(2)

    def through_a_view(x: torch.nn.Parameter) -> None:
        x.detach().view(-1)[3].fill_(1)

    def elsewhere(x: torch.nn.Parameter) -> None:
        x.data = x.data + 1

    def moved(x: torch.nn.Parameter) -> None:
        x.data = x.data.clone()

    def moved_without_autograd(x: torch.nn.Parameter) -> None:
        with torch.no_grad():
            x.set_(x.detach().clone())

    def nothing(x: torch.nn.Parameter) -> None:
        x.square().sum().backward()

    writes = {in_place: True, through_a_view: True, elsewhere: True}
    writes |= {moved: False, moved_without_autograd: False, nothing: False}
    for write, is_lost in writes.items():
        memory = torch.randn(128)
        memory[0] = torch.nan  # which equals nothing
        live = [torch.nn.Parameter(torch.randn(64)), torch.nn.Parameter(memory[:64] if shared else memory)]
        before = [x.detach().clone() for x in live]
        group = FakeQuantizeGroup(live, BUILTIN["int2"], 32)
        group.engage()
        assert group.lost() == []
        write(live[1])
        assert group.lost() == ([1] if is_lost else []), write
        group.release()
        assert group.lost() == []
        assert all(map(same_bits, map(Tensor.detach, live), before))
