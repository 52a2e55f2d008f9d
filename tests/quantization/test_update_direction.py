"""The error of Adam's update direction is that of NumPy in float64, and that of the metric of the same name."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import each_device
from torch import Tensor

from q8lightning.metrics import UpdateDirectionError
from q8lightning.quantization.backends.choose import launching
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many import update_directions as update_direction
from q8lightning.quantization.many.buffer import copy_together, split
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.quantization.spec import sampling

EPS = 1e-8
SIZES = (4096, 5001, 1, 33, 300_000)
FIRST = get_codec("softsign", 128)
SECOND = get_codec("log", 64)


def moments_of(numel: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(numel)
    scale = 10.0 ** -(6 * torch.rand(numel, generator=generator))
    exp_avg = torch.randn(numel, generator=generator) * scale
    exp_avg_sq = (torch.randn(numel, generator=generator) * scale).square()
    return exp_avg.to(dtype).to(device), exp_avg_sq.to(dtype).to(device)


def stored(values: Tensor, codec: Codec | None) -> StoredMoment:
    return (
        StoredMoment(values) if codec is None else StoredMoment(values, codec, encode_many([values], [codec]).data[0])
    )


def decoded(moment: StoredMoment) -> Tensor:
    if moment.codec is None:
        return moment.values
    return moment.codec.decode(moment.codec.encode(moment.values), moment.values.dtype)


def expected(pair: Moments) -> list[float]:
    """The definition, in float64 NumPy."""

    def direction(first: Tensor, second: Tensor) -> np.ndarray:
        return first.cpu().double().numpy() / (np.sqrt(second.cpu().double().numpy()) + pair.eps)

    original = direction(pair.exp_avg.values, pair.exp_avg_sq.values)
    kept = direction(decoded(pair.exp_avg), decoded(pair.exp_avg_sq))
    return [float(((kept - original) ** 2).sum()), float((original**2).sum())]


def close(got: Tensor, pair: Moments) -> bool:
    """Directions are float32 after three operations: off by less than two ulp, and so is their difference."""
    error, squares = expected(pair)
    ulp = 4 * 2.0**-24
    slack = 2 * ulp * (error * squares) ** 0.5 + ulp**2 * squares + 2 * ulp * error
    return float(got[0]) == pytest.approx(error, abs=slack) and float(got[1]) == pytest.approx(squares, rel=1e-6)


@pytest.fixture
def in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU measure tensors in whole up to the size at which a GPU does."""
    monkeypatch.setattr(sampling, "WHOLE_ON_CPU", sampling.WHOLE)


@each_device
@pytest.mark.usefixtures("in_whole")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FIRST, SECOND),
        (get_codec("linear", 256, None, 8), SECOND),
        (get_codec("softsign", 128, 6), get_codec("log", 128, 5)),
        (None, get_codec("log", 64, 5)),
        (None, SECOND),
        (FIRST, None),
        (None, None),
        (FIRST, get_codec("dynamic_unsigned", 4096)),
    ],
    ids=str,
)
def test_sums_are_those_of_numpy(
    first: Codec | None, second: Codec | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(update_direction.CHUNK, device, 4096)
    pairs = []
    for numel in SIZES:
        one, two = moments_of(numel, dtype, device)
        pairs.append(Moments(stored(one, first), stored(two, second), EPS))
    sums = update_direction_sums(pairs)
    assert sums.dtype == torch.float64
    assert sums.shape == (len(SIZES), 2)
    assert all(map(close, sums.cpu(), pairs))
    assert (first is None and second is None) == (not sums[:, 0].any())


@each_device
@pytest.mark.usefixtures("in_whole")
def test_it_is_the_error_that_the_metric_of_this_name_computes(device: str) -> None:
    metric, from_sums = UpdateDirectionError(EPS).to(device), UpdateDirectionError(EPS).to(device)
    pairs = []
    for numel in SIZES:
        one, two = moments_of(numel, torch.float32, device)
        pairs.append(Moments(stored(one, FIRST), stored(two, SECOND), EPS))
        metric.update(one, two, decoded(pairs[-1].exp_avg), decoded(pairs[-1].exp_avg_sq))
    from_sums.update_from_sums(update_direction_sums(pairs))
    assert float(from_sums.compute()) == pytest.approx(float(metric.compute()), rel=1e-6)


@each_device
def test_a_second_moment_that_becomes_zero_turns_the_step(device: str) -> None:
    one = torch.full((4096,), 1e-4, device=device)
    two = one.square()
    two[0] = 1.0  # so large that a linear code of the others is zero
    wrong, right = (
        Moments(StoredMoment(one), stored(two, codec), EPS) for codec in (get_codec("linear", 4096), SECOND)
    )
    sums = update_direction_sums([wrong, right])
    assert float(sums[0, 0] / sums[0, 1]) > 1e7
    assert float(sums[1, 0] / sums[1, 1]) < 1e-3


@each_device
def test_the_moments_stay_as_they_are_and_empty_ones_count_nothing(device: str) -> None:
    one, two = moments_of(5001, torch.float32, device)
    before = one.clone(), two.clone()
    nothing = StoredMoment(one[:0])
    sums = update_direction_sums([Moments(stored(one, FIRST), StoredMoment(two)), Moments(nothing, nothing)])
    assert torch.equal(one, before[0])
    assert torch.equal(two, before[1])
    assert not sums[1].any()


def test_a_moment_without_numbers_makes_no_number() -> None:
    one, two = moments_of(5001, torch.float32, "cpu")
    one[17] = torch.nan
    assert update_direction_sums([Moments(stored(one, FIRST), stored(two, SECOND))]).isnan().all()


def test_repacked_data_is_the_same_and_keeps_nothing_else_alive() -> None:
    tensors = [torch.randn(numel) for numel in (4096, 5001, 33)]
    packed = encode_many(tensors, [FIRST] * 3).data
    copies = split(*copy_together([packed[2], packed[1]]))
    assert torch.equal(copies[0], packed[2])
    assert torch.equal(copies[1], packed[1])
    assert copies[0].untyped_storage().nbytes() < packed[1].nbytes + packed[2].nbytes + 32
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr()
    assert all(copy.storage_offset() % 16 == 0 for copy in copies)  # scales are read as float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for() -> None:
    pairs = []
    for numel in SIZES:
        one, two = moments_of(numel, torch.float32, "cuda")
        pairs.append(Moments(stored(one, FIRST), stored(two, SECOND), EPS))
    update_direction_sums(pairs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_direction_sums(pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets tensors of a hundred thousand elements count as large."""
    # Interpreted kernels take ten seconds for tensors that are large by themselves.
    monkeypatch.setattr(sampling, "WHOLE", 2**16)
    sampling.stretches_of.cache_clear()
    yield
    sampling.stretches_of.cache_clear()


def test_of_a_large_tensor_one_stretch_in_eight_is_looked_at() -> None:
    assert sampling.stretches_of(sampling.WHOLE) is None
    numel = sampling.WHOLE + 8 * sampling.STRETCH + 5
    taken = sampling.stretches_of(numel)
    assert taken is not None
    assert torch.equal(taken // 8, torch.arange(numel // (8 * sampling.STRETCH)))
    assert len(set((taken % 8).tolist())) > 4
    assert int(taken.max() + 1) * sampling.STRETCH <= numel
    assert sampling.weight_of(numel) == numel / (len(taken) * sampling.STRETCH)
    assert sampling.weight_of(sampling.WHOLE) == 1.0


def taken_of(numel: int, device: str, block_size: int) -> tuple[Tensor, float]:
    """The indices of the elements in the sample, and how many elements each stands for."""
    taken, length = sampling.stretches_of(numel), sampling.STRETCH
    if device == "cpu":
        taken, length = sampling.stretches_on_cpu(numel, block_size)
    assert taken is not None
    index = (taken[:, None] * length + torch.arange(length)).flatten()
    return index, numel / len(index)


@each_device
@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("second", [SECOND, get_codec("dynamic_unsigned", 4096)], ids=str)
def test_sums_of_a_large_tensor_are_those_of_its_stretches_and_stand_for_all_of_it(second: Codec, device: str) -> None:
    numel = 600_007
    torch.manual_seed(0)
    one, two = torch.randn(numel).to(device), (torch.randn(numel).square() + 0.01).to(device)
    pair = Moments(stored(one, FIRST), stored(two, second), EPS)
    sums = update_direction_sums([pair])[0].cpu()
    # Blocks divide stretches, so these encode by themselves as they do within the whole.
    index, weight = taken_of(numel, device, second.block_size)
    assert len(index) < numel
    assert close(sums / weight, Moments(StoredMoment(one.cpu()[index], FIRST), StoredMoment(two.cpu()[index], second)))
    error, squares = expected(pair)
    assert float(sums[0]) == pytest.approx(error, rel=0.05)
    assert float(sums[1]) == pytest.approx(squares, rel=0.02)


def test_a_cpu_looks_at_all_of_it_where_the_sample_has_no_direction() -> None:
    numel = 100_000
    index, _ = taken_of(numel, "cpu", 128)
    one, two = moments_of(numel, torch.float32, "cpu")
    one[index] = 0.0
    pair = Moments(stored(one, FIRST), stored(two, SECOND), EPS)
    assert close(update_direction_sums([pair])[0], pair)


def test_pairs_that_a_cpu_measures_together_have_the_sums_of_each_alone() -> None:
    pairs = []
    for numel in (4096, 5001, 300_000, 1, 8192, 33, 70_000, 0, 300_001):
        exp_avg, exp_avg_sq = moments_of(numel, torch.float32, "cpu")
        pairs.append(Moments(stored(exp_avg, FIRST), stored(exp_avg_sq, SECOND), EPS))
        pairs.append(Moments(stored(exp_avg, FIRST), stored(exp_avg_sq, None), EPS))
    exp_avg, exp_avg_sq = moments_of(300_000, torch.float32, "cpu")
    exp_avg[:-8] = 0.0  # no direction in the sample
    pairs.insert(4, Moments(stored(exp_avg, FIRST), stored(exp_avg_sq, SECOND), EPS))
    together = update_direction_sums(pairs)
    for sums, pair in zip(together, pairs, strict=True):
        torch.testing.assert_close(sums, update_direction_sums([pair])[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
def test_unpacking_a_short_last_block_spoils_nothing_that_was_decoded(bits: int) -> None:
    """A chunk computes in the memory that the chunks of the same pair are compared in."""
    codecs = get_codec("softsign", 128, bits), get_codec("log", 128, bits)
    for numel in (240, 5888, 5889, 5950, 6000, 6008):
        one, two = moments_of(numel, torch.float32, "cpu")
        pair = Moments(stored(one, codecs[0]), stored(two, codecs[1]), EPS)
        assert close(update_direction_sums([pair])[0], pair)


def test_a_cpu_takes_sixteen_stretches_or_more_and_none_across_a_block() -> None:
    for block_size in (32, 128, 4096):
        for numel in range(sampling.WHOLE_ON_CPU - 1, 2 * sampling.WHOLE, 77_777):
            taken, length = sampling.stretches_on_cpu(numel, block_size)
            assert length % block_size == 0
            assert (taken is None) == (numel < 128 * length or numel <= sampling.WHOLE_ON_CPU)
            assert taken is None or (len(taken) >= 16 and int(taken[-1] + 1) * length <= numel)


@pytest.mark.usefixtures("sampled")
def test_one_launch_looks_at_the_same_stretches(launch_device: str) -> None:
    pairs = []
    for numel in (400_007, 262_144, 5001):
        one, two = moments_of(numel, torch.float32, launch_device)
        pairs.append((one, two))
    with launching(launch_device == "cuda"):  # to interpret the encoding of so much would take long
        data = iter(encode_many([x for pair in pairs for x in pair], [FIRST, SECOND] * len(pairs)).data)
    moments = [
        Moments(StoredMoment(one, FIRST, next(data)), StoredMoment(two, SECOND, next(data)), EPS) for one, two in pairs
    ]
    expected_sums = torch.stack([update_direction._sums(pair) for pair in moments])  # a CPU takes shorter stretches
    torch.testing.assert_close(update_direction_sums(moments), expected_sums, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("first", "second", "dtypes"),
    [
        (FIRST, SECOND, (torch.float32, torch.float32)),
        (get_codec("linear", 32, None, 8), get_codec("log", 4096), (torch.float16, torch.float32)),
        (get_codec("dynamic", 4096), None, (torch.float32, torch.float32)),
        (None, SECOND, (torch.float32, torch.float16)),
        (None, None, (torch.float32, torch.float32)),
    ],
    ids=str,
)
def test_one_launch_gives_the_sums_of_the_operators(
    first: Codec | None,
    second: Codec | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    launch_device: str,
    launched: list[Any],
) -> None:
    sizes = (4096, 5001, 1, 33, 0, 12_288)  # aligned ones, others, none
    values, codecs = [], []
    for numel in sizes:
        pair = moments_of(numel, torch.float32, launch_device)
        for x, codec, dtype in zip(pair, (first, second), dtypes, strict=True):
            values.append(x.to(dtype))
            codecs.append(codec)
    encoded = [i for i, codec in enumerate(codecs) if codec is not None]
    with launching(launch_device == "cuda"):
        data = encode_many([values[i] for i in encoded], [codecs[i] for i in encoded]).data if encoded else []
    where = dict(zip(encoded, data, strict=True))
    moments = [StoredMoment(x, codecs[i], where.get(i)) for i, x in enumerate(values)]
    pairs = [Moments(*moments[i : i + 2], EPS) for i in range(0, len(moments), 2)]
    launched.clear()  # of the encoding
    sums = update_direction_sums(pairs)
    assert len(launched) == 4, "one for aligned pairs, one for others, each with one that adds up"
    if launch_device == "cuda":
        with launching(False):
            expected_sums = update_direction_sums(pairs)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0.0)
    else:  # torch.sqrt is an ulp off on some CPUs
        assert all(map(close, sums, pairs))
