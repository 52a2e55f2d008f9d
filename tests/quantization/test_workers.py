"""Threads that compute with CPU tensors, one tensor each: the results are the same, and torch is left as it was."""

import threading
from collections.abc import Iterator

import pytest
import torch

from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.many.update_directions import Moments, StoredMoment, update_direction_sums
from q8lightning.system import workers
from q8lightning.system.workers import share_out


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has torch use two threads, and anything be worth starting some."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(workers, "WORTH_THREADS", 0)
    yield
    torch.set_num_threads(before)


def where() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


@pytest.mark.usefixtures("two_threads")
def test_each_job_has_a_thread_of_its_own_and_torch_is_left_as_it_was() -> None:
    assert share_out([where] * 4, [1] * 4) == [("q8lightning worker", 1)] * 4
    assert torch.get_num_threads() == 2
    inside: list[int] = []
    thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [2]  # what new threads begin with


@pytest.mark.usefixtures("two_threads")
def test_what_would_keep_one_thread_busy_alone_has_all_of_them() -> None:
    here = threading.current_thread().name
    assert share_out([where] * 3, [1, 10, 1]) == [("q8lightning worker", 1), (here, 2), ("q8lightning worker", 1)]


def test_little_work_stays_in_the_thread_that_asks() -> None:
    assert share_out([where] * 2, [100, 100]) == [where()] * 2
    assert share_out([], []) == []


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_a_job_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        share_out([where, fail, where], [1, 1, 1])
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference_mode"])
def test_tensors_are_encoded_and_measured_as_one_after_the_other(inference: bool) -> None:
    """Also within validation, whose tensors nobody outside of inference mode may write to."""
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        tensors = [x for numel in (5000, 4096, 33, 70_000) for x in (torch.randn(numel), torch.rand(numel) + 0.1)]
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
