"""Statistics of a codec give the metrics of decoded tensors, without decoding."""

import pytest
import torch
from support.metric_cases import CASES, Case, assert_agrees, max_error, pair, relative_error, sqnr
from support.oracle import float64
from torch import Tensor

from q8lightning.metrics import MaxReconstructionError, ReconstructionSQNR, UpdateDirectionError
from q8lightning.metrics.functional.update_direction import update_direction_update
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.spec.reference import ErrorStatistics, measure

FROM_STATISTICS = [case for case in CASES if case.batch is pair]
CODECS = [get_codec("linear"), get_codec("softsign", 128), get_codec("linear", residual_bits=8), get_codec("log", 128)]


def originals() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [10.0**k * torch.rand(shape, generator=generator) for k, shape in enumerate([(300,), (), (0,), (7, 130)])]


def test_the_order_is_that_of_the_codecs() -> None:
    """The metrics must not import ``ErrorStatistics``, so this test compares both orders."""
    assert ErrorStatistics._fields == ("squared_error", "squares", "max_error", "zeros", "zeroed")


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.label}{'+' * bool(codec.residual_bits)}")
@pytest.mark.parametrize("case", FROM_STATISTICS, ids=lambda case: case.name)
class TestFromStatistics:
    def test_equals_what_the_tensors_give(self, case: Case, codec: Codec) -> None:
        """Only the order of float64 additions differs."""
        from_tensors, from_codec, from_reference = case.make(), case.make(), case.make()
        for x in originals():
            parts, lost = codec.encode_and_measure(x)
            decoded = codec.decode(parts, x.dtype)
            from_tensors.update(decoded, x)
            from_codec.update_from_statistics(lost)
            from_reference.update_from_statistics(measure(x, decoded))
        assert_agrees(from_codec.compute(), float(from_tensors.compute()))
        assert_agrees(from_reference.compute(), float(from_tensors.compute()))

    def test_rows_may_be_stacked(self, case: Case, codec: Codec) -> None:
        encoded = [codec.encode_and_measure(x) for x in originals()]
        decoded = [codec.decode(parts, torch.float32) for parts, _ in encoded]
        lost = [statistics for _, statistics in encoded]
        flat = [torch.cat([x.reshape(-1) for x in tensors]) for tensors in (decoded, originals())]
        metric = case.make()
        metric.update_from_statistics(torch.stack(lost).view(2, 2, 5))
        metric.update_from_statistics(torch.zeros(0, 5, dtype=torch.float64))
        assert_agrees(metric.compute(), case.reference(*map(float64, flat)))


@pytest.mark.parametrize("case", FROM_STATISTICS, ids=lambda case: case.name)
def test_counts_as_an_update(case: Case) -> None:
    """No cached value is returned, both ways may be mixed, and no warning of a missing update appears."""
    (decoded, x), more = case.batches(torch.float64)[:2]
    metric = case.make()
    metric.update_from_statistics(measure(x, decoded))
    assert metric.update_count == 1
    assert_agrees(metric.compute(), case.expected([(decoded, x)]))
    metric.update(*more)
    assert_agrees(metric.compute(), case.expected([(decoded, x), more]))
    metric.update_from_statistics(measure(x, 1.5 * x))
    assert_agrees(metric.compute(), case.expected([(decoded, x), more, (1.5 * x, x)]))


def test_reads_no_value_of_statistics() -> None:
    """On a GPU, that would wait for it; tensors of the meta device have none."""
    statistics = torch.zeros(2, 5, dtype=torch.float64, device="meta")
    for case in FROM_STATISTICS:
        metric = case.make().to("meta")
        metric.update_from_statistics(statistics)
        assert metric.compute().is_meta
    direction = UpdateDirectionError().to("meta")
    direction.update_from_sums(statistics[:, :2])
    assert direction.compute().is_meta


def test_statistics_keep_no_graph() -> None:
    statistics = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for metric in (ReconstructionSQNR(), MaxReconstructionError()):
        metric.update_from_statistics(statistics)
        assert not metric.compute().requires_grad


def test_a_block_that_is_no_number_makes_no_number() -> None:
    x = originals()[0]
    x[3] = torch.nan
    for case in FROM_STATISTICS:
        metric = case.make()
        metric.update_from_statistics(CODECS[0].encode_and_measure(originals()[0])[1])
        metric.update_from_statistics(CODECS[0].encode_and_measure(x)[1])
        assert metric.compute().isnan()


def test_the_direction_from_sums_equals_that_from_tensors() -> None:
    case = next(case for case in CASES if case.make is UpdateDirectionError)
    batches = case.batches()
    sums = torch.stack([update_direction_update(*batch, eps=1e-8) for batch in batches])
    stacked, one_by_one = UpdateDirectionError(), UpdateDirectionError()
    stacked.update_from_sums(sums.view(3, 2, 2))
    stacked.update_from_sums(sums[:0])
    for row in sums:
        one_by_one.update_from_sums(row)
    assert one_by_one.update_count == len(batches)
    assert_agrees(stacked.compute(), case.expected(batches))
    assert_agrees(one_by_one.compute(), case.expected(batches))


def test_the_references_are_right_in_a_case_done_by_hand() -> None:
    """Values by hand show that the package and NumPy do not share a misreading of the formulas."""
    decoded, x = (float64(torch.tensor(values)) for values in ([3.0, 4.5, 0.0], [3.0, 4.0, 0.0]))
    assert relative_error(decoded, x) == 0.1
    assert sqnr(decoded, x) == pytest.approx(20.0, rel=1e-15)
    assert max_error(decoded, x) == 0.5
