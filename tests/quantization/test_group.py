"""A group of tensors is quantized in place to the values of the reference, measured, and put back bit for bit."""

import pytest
import torch
from oracle import same_bits
from torch import Tensor

from q8lightning.quantization import group_batches
from q8lightning.quantization import reference
from q8lightning.quantization.codebook import BUILTIN, Codebook
from q8lightning.quantization.block_choice import chosen_blocks, mix
from q8lightning.quantization.group import FakeQuantizeGroup

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


def test_batching_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def values() -> list[Tensor]:
        torch.manual_seed(0)
        live = tensors()
        FakeQuantizeGroup(live, BUILTIN["normal_float4"], 64).engage(share=0.4, seed=5)
        return live

    together = values()
    monkeypatch.setattr(group_batches, "BATCH", 1)
    for one, other in zip(values(), together, strict=True):
        assert same_bits(one, other)


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


@pytest.mark.parametrize("whole", [False, True], ids=["a part of other memory", "the same memory twice"])
def test_tensors_in_memory_that_others_share_stay_where_they_are(whole: bool) -> None:
    memory = torch.randn(192)
    views = [memory.view(12, 16), memory.view(12, 16)] if whole else [memory[:64], memory[40:168]]
    live = [torch.nn.Parameter(view) for view in views]
    own, before = [view.data_ptr() for view in views], memory.clone()
    originals = [view.clone() for view in views]
    group = FakeQuantizeGroup(live, BUILTIN["int2"], 32)
    for _ in range(2):
        group.engage()
        assert [tensor.data_ptr() for tensor in live] == own
        assert same_bits(views[1], expected(originals[1], BUILTIN["int2"], 32, None))  # others see it
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


def test_tensors_that_moved_are_found_again() -> None:
    parameter = torch.nn.Parameter(torch.randn(64))
    group = FakeQuantizeGroup([parameter], BUILTIN["int2"], 32)
    group.engage()
    group.release()
    parameter.data = torch.randn(64)
    original = parameter.detach().clone()
    group.engage()
    assert same_bits(parameter.detach(), expected(original, BUILTIN["int2"], 32, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("codebook", BOOKS, ids=lambda book: book.name)
def test_a_gpu_engages_to_the_same_bits(codebook: Codebook, axis: int | None, share: float) -> None:
    here = tensors()
    there = [torch.empty_like(tensor, device="cuda").copy_(tensor) for tensor in here]
    before = [tensor.clone() for tensor in there]
    groups = [FakeQuantizeGroup(live, codebook, 64, axis) for live in (here, there)]
    expected, got = (group.engage(share, seed=9) for group in groups)
    for one, other in zip(here, there, strict=True):
        assert same_bits(one, other.cpu())
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=0)
    for master, original in zip(groups[1].masters, before, strict=True):
        assert same_bits(master.cpu(), original.cpu())
    groups[1].release()
    for tensor, original in zip(there, before, strict=True):
        assert same_bits(tensor.cpu(), original.cpu())
