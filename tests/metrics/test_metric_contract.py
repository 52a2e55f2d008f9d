"""Every metric keeps the promises of torchmetrics, with the values of NumPy."""

import copy
import math
import pickle
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forked
from support.metric_cases import CASES, Batch, Case, assert_agrees, pair
from torch import distributed
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.audio import SignalNoiseRatio

from q8lightning import metrics

PROCESSES = 2


def updated(metric: Metric, batches: list[Batch]) -> Metric:
    for batch in batches:
        metric.update(*batch)
    return metric


def together(batches: list[Batch]) -> Batch:
    """Return the arguments of one update with everything that the batches hold."""
    return tuple(torch.cat([part.reshape(-1) for part in column]) for column in zip(*batches, strict=True))


def share(batches: list[Batch], rank: int) -> list[Batch]:
    """Deal out unequal numbers of batches, the first process one more."""
    return batches[: math.ceil(len(batches) / PROCESSES) + 1] if rank == 0 else batches[len(batches) // PROCESSES + 1 :]


def work(rank: int, folder: str) -> None:
    """Compute all metrics as one of the processes, and write the values to a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    computed: dict[int, Any] = {}
    for index, case in enumerate(CASES):
        mine = share(case.batches(), rank)
        alone = updated(case.make(sync_on_compute=False), mine)
        computed[index] = {
            "merged": updated(case.make(), mine).compute(),
            "of one process only": updated(case.make(), mine if rank == 0 else []).compute(),
            "step": case.make(dist_sync_on_step=True)(*together(mine)),
            "not merged": alone.compute(),
        }
    torch.save(computed, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    """The values that two real processes computed, each from its share of the batches."""
    folder = tmp_path_factory.mktemp("processes")
    processes = [forked.start(work, rank, str(folder)) for rank in range(PROCESSES)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestEveryMetric:
    def test_class_and_function_compute_what_numpy_does(self, case: Case) -> None:
        batch = together(case.batches())
        assert_agrees(case.function(*batch), case.expected([batch]))
        assert_agrees(updated(case.make(), [batch]).compute(), case.expected([batch]))

    def test_batches_add_up(self, case: Case) -> None:
        batches = case.batches()
        metric = case.make()
        for seen in range(1, len(batches) + 1):
            metric.update(*batches[seen - 1])
            assert_agrees(metric.compute(), case.expected(batches[:seen]))

    def test_forward_returns_the_value_of_the_batch_and_adds_it(self, case: Case) -> None:
        batches = [batch for batch in case.batches() if math.prod(batch[0].shape)]
        metric = case.make()
        for batch in batches:
            assert_agrees(metric(*batch), case.expected([batch]))
        assert_agrees(metric.compute(), case.expected(batches))

    def test_two_processes_merge(self, case: Case, of_processes: list[dict[int, Any]]) -> None:
        batches = case.batches()
        for rank, computed in enumerate(of_processes):
            values = computed[CASES.index(case)]
            assert_agrees(values["merged"], case.expected(batches))
            assert_agrees(values["step"], case.expected(batches))
            assert_agrees(values["of one process only"], case.expected(share(batches, 0)))
            assert_agrees(values["not merged"], case.expected(share(batches, rank)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_other_dtypes_are_summed_in_float64(self, case: Case, dtype: torch.dtype) -> None:
        batches = case.batches(dtype)
        if case.takes_floats:
            assert all(part.dtype == dtype for batch in batches for part in batch)
        assert_agrees(updated(case.make(), batches).compute(), case.expected(batches))

    @pytest.mark.parametrize(
        "convert",
        [
            lambda metric: metric.half(),
            lambda metric: metric.to(torch.bfloat16),
            lambda metric: metric.set_dtype(torch.float16),
            lambda metric: torch.nn.Sequential(metric).to(torch.bfloat16)[0],
        ],
        ids=["half", "to", "set_dtype", "to of a module around it"],
    )
    def test_a_module_of_half_precision_keeps_its_metrics(self, case: Case, convert: Any) -> None:
        batches = case.batches()
        assert_agrees(updated(convert(case.make()), batches).compute(), case.expected(batches))

    def test_a_pickled_metric_goes_on(self, case: Case) -> None:
        batches = case.batches()
        metric = pickle.loads(pickle.dumps(updated(case.make(), batches[:2])))
        assert_agrees(metric.compute(), case.expected(batches[:2]))
        assert_agrees(updated(metric, batches[2:]).compute(), case.expected(batches))

    @pytest.mark.parametrize("copied", [lambda metric: metric.clone(), copy.deepcopy], ids=["clone", "deepcopy"])
    def test_a_copy_is_of_its_own(self, case: Case, copied: Any) -> None:
        batches = case.batches()
        metric = updated(case.make(), batches[:2])
        updated(copied(metric), batches[2:])
        assert_agrees(metric.compute(), case.expected(batches[:2]))

    def test_reset_forgets(self, case: Case) -> None:
        batches = case.batches()
        metric = updated(case.make(), batches[2:])
        metric.reset()
        assert not metric.update_called
        assert_agrees(updated(metric, batches[:2]).compute(), case.expected(batches[:2]))

    def test_states_are_saved_when_asked_for(self, case: Case) -> None:
        batches = case.batches()
        metric = updated(case.make(), batches)
        assert metric.state_dict() == {}
        metric.persistent(True)
        restored = case.make()
        restored.persistent(True)
        restored.load_state_dict(metric.state_dict())
        restored.update(*(part[:0] for part in together(batches)))  # nothing is added
        assert_agrees(restored.compute(), case.expected(batches))

    def test_says_truly_whether_it_has_a_gradient(self, case: Case) -> None:
        """Gradients are numerical ones; metrics without gradient take no floats at all."""
        metric = case.make()
        assert metric.is_differentiable == case.takes_floats
        if case.takes_floats:
            arguments = [part.requires_grad_() for part in case.batches(torch.float64)[0]]
            assert torch.autograd.gradcheck(case.function, arguments)
            value = metric(*arguments)
            assert value.requires_grad
            assert not metric.compute().requires_grad
        else:
            with pytest.raises(ValueError, match="must"):
                case.function(*(part.double() for part in case.batches()[0]))

    def test_says_truly_which_way_is_better(self, case: Case) -> None:
        batch = case.batches()[0]
        if case.takes_floats:
            half = len(batch) // 2
            exact = (*batch[:half], *batch[:half])
            better, worse = case.function(*exact), case.function(*batch)
        elif len(batch) == 2:
            better, worse = case.function(batch[0], batch[1] // 2), case.function(*batch)
        else:
            better, worse = case.function(*batch)["entropy_bits"], case.function(batch[0] * 0)["entropy_bits"]
        assert (better > worse) == case.make().higher_is_better
        assert better != worse

    def test_unknown_options_are_refused(self, case: Case) -> None:
        with pytest.raises(ValueError, match="Unexpected keyword"):
            case.make(colour="red")

    def test_plots_its_value_and_a_history(self, case: Case) -> None:
        plt = pytest.importorskip("matplotlib.pyplot")
        plt.switch_backend("Agg")
        batches = case.batches()
        metric = updated(case.make(), batches)
        expected = case.expected(batches)
        figure, axes = metric.plot()
        assert isinstance(figure, plt.Figure)
        drawn = [float(line.get_ydata()[0]) for line in axes.get_lines()]
        assert drawn == pytest.approx(list(expected.values()) if isinstance(expected, dict) else [expected])
        assert axes.get_ylabel() == case.name

        _, given = plt.subplots()
        figure, axes = case.make().plot([metric(*batch) for batch in batches if math.prod(batch[0].shape)], ax=given)
        assert figure is None
        assert axes is given
        assert {len(line.get_ydata()) for line in axes.get_lines()} == {4}
        plt.close("all")


def test_metrics_in_a_collection_share_what_they_sum() -> None:
    cases = [case for case in CASES if case.batch is pair]
    collection = MetricCollection([case.make() for case in cases])
    for batch in cases[0].batches():
        collection.update(*batch)
    values = collection.compute()
    for case in cases:
        assert_agrees(values[case.name], case.expected(case.batches()))
    groups = {frozenset(names) for names in collection.compute_groups.values()}
    assert frozenset({"ReconstructionSQNR", "RelativeReconstructionError"}) in groups


OTHERS: list[Callable[[], Metric]] = [
    lambda: metrics.UpdateDirectionError(eps=1e-3),
    lambda: metrics.CodebookUsage(num_levels=16),
    MeanSquaredError,
    MeanAbsoluteError,
    SignalNoiseRatio,
]
"""Metrics of the same class with another update, and torchmetrics' own over the same arguments."""

MOMENTS, DECODED = ("exp_avg", "exp_avg_sq"), ("decoded_exp_avg", "decoded_exp_avg_sq")
ALL = [*(case.make for case in CASES), *OTHERS]


@pytest.mark.parametrize("first", ["zeros", "equal", "tiny"])
def test_two_metrics_in_a_collection_are_two_after_any_first_update(first: str) -> None:
    """A MetricCollection takes metrics whose states have the same names and values for one."""
    generator = torch.Generator().manual_seed(3)
    values = {"zeros": torch.zeros(8), "equal": torch.ones(8), "tiny": torch.full((8,), 1e-12)}[first]
    start = dict.fromkeys(("preds", "target", *MOMENTS, *DECODED), values)
    start |= {"codes": torch.zeros(8, dtype=torch.uint8), "original_bytes": 0, "stored_bytes": 0}
    after: dict[str, Any] = {name: torch.rand(8, generator=generator) ** 8 for name in start}
    after |= {"codes": torch.arange(8, dtype=torch.uint8), "original_bytes": 400, "stored_bytes": 100}
    for one, two in combinations(ALL, 2):
        alone, collection = (one(), two()), MetricCollection({"one": one(), "two": two()})
        for arguments in (start, after):
            collection.update(**arguments)
            for metric in alone:
                metric.update(**metric._filter_kwargs(**arguments))
        for name, metric in zip(("one", "two"), alone, strict=True):
            expected, found = metric.compute(), collection[name].compute()
            assert expected == found or torch.stack([expected, found]).isnan().all(), (name, *alone)


@pytest.mark.parametrize("case", [case for case in CASES if case.takes_floats], ids=lambda case: case.name)
def test_reads_no_value_of_tensors(case: Case) -> None:
    """On a GPU, that would wait for it; tensors of the meta device have none."""
    metric = case.make().to("meta")
    for batch in case.batches():
        metric.update(*(part.to("meta") for part in batch))
    assert metric.compute().is_meta
