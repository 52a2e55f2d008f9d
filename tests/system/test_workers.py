"""Threads that compute with CPU tensors, one tensor each: the results are the same, and torch is left as it was."""

import threading
from collections.abc import Iterator

import pytest
import torch
from support.threads import using_threads

from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.system.workers import MOST, WORTH_THREADS, count_workers, share_out


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Has torch use two threads."""
    with using_threads(2):
        yield


def where() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


@pytest.mark.usefixtures("two_threads")
def test_each_job_has_a_thread_of_its_own_and_torch_is_left_as_it_was() -> None:
    assert share_out([where] * 4, [WORTH_THREADS] * 4) == [("q8lightning worker", 1)] * 4
    assert torch.get_num_threads() == 2
    inside: list[int] = []
    thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [2]  # what new threads begin with


@pytest.mark.usefixtures("two_threads")
def test_what_would_keep_one_thread_busy_alone_has_all_of_them() -> None:
    here = threading.current_thread().name
    found = share_out([where] * 3, [WORTH_THREADS, 10 * WORTH_THREADS, WORTH_THREADS])
    assert found == [("q8lightning worker", 1), (here, 2), ("q8lightning worker", 1)]


def test_little_work_stays_in_the_thread_that_asks() -> None:
    assert share_out([where] * 2, [100, 100]) == [where()] * 2
    assert share_out([], []) == []


def test_no_more_threads_than_jobs_or_cores() -> None:
    assert [count_workers(jobs, cores=64) for jobs in (0, 1, 3, 1000)] == [1, 1, 3, MOST]
    assert count_workers(1000, cores=2) == 2
    assert 1 <= count_workers(1000) <= MOST


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_a_job_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        share_out([where, fail, where], [WORTH_THREADS] * 3)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference_mode"])
def test_tensors_are_encoded_and_measured_as_one_after_the_other(inference: bool) -> None:
    """Also within validation, whose tensors nobody outside of inference mode may write to."""
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        tensors = [x for numel in (500_000, 4096, 33, 400_001) for x in (torch.randn(numel), torch.rand(numel) + 0.1)]
        codecs = [get_codec("softsign", 128), get_codec("log", 128)] * 4
        packed = encode_many(tensors, codecs, measure=True)
        moments = [StoredMoment(x, codec, data) for x, codec, data in zip(tensors, codecs, packed.data, strict=True)]
        pairs = [Moments(*moments[i : i + 2]) for i in range(0, 8, 2)]
        sums = update_direction_sums(pairs)
        assert packed.statistics is not None
        for i, (x, codec) in enumerate(zip(tensors, codecs, strict=True)):
            alone = encode_many([x], [codec], measure=True)
            assert alone.statistics is not None
            assert torch.equal(packed.data[i], alone.data[0])
            torch.testing.assert_close(packed.statistics[i], alone.statistics[0], rtol=1e-12, atol=0.0)
        for i, pair in enumerate(pairs):
            torch.testing.assert_close(sums[i], update_direction_sums([pair])[0], rtol=1e-12, atol=0.0)
