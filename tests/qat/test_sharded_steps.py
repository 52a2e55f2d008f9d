"""What a step with sharded parameters shows, to whom, at what cost, and what it refuses."""

from collections import Counter
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from support import processes
from support.models import batches
from support.sharded_training import ROWS, Case, Trace, fully, run_cases, train, whole
from support.straight_through import Trained, quantized
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from q8lightning import LostWriteError, QATConfig, WeightRule
from q8lightning.qat.config import ActivationRule


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 64, max_norm=1.0), nn.Linear(64, 64))


def taught() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 64))


def narrow() -> nn.Module:
    """33 rows of 64 elements: two processes hold 17 and 16 of them."""
    return nn.Sequential(nn.Linear(64, 33))


class Observed(Trained):
    """Notes, in every step, its masters, what it shows in the step, and what a state dict says there."""

    notes: dict[str, Any]

    def on_train_batch_start(self, *_: Any) -> None:
        self.note("masters", dict(self.net.named_parameters()))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.note("shown", dict(self.net.named_parameters()))
        self.note("state dict", self.net.state_dict())
        return super().training_step(batch, index)

    def note(self, what: str, tensors: dict[str, Tensor]) -> None:
        values = {name: whole(each).numpy() for name, each in tensors.items()}
        self.notes.setdefault(what, []).append(values)


class Layer(nn.Linear):
    """Notes the last weight that it computed with."""

    def forward(self, x: Tensor) -> Tensor:
        self.used = self.weight.detach().float().clone().numpy()
        return super().forward(x)


def layer() -> nn.Module:
    return nn.Sequential(Layer(64, 64))


class InHalf(Observed):
    def on_fit_end(self) -> None:
        self.notes["used"] = self.net[0].used  # type: ignore[index,union-attr]


class PerSample(Observed):
    """Computes the loss of each sample by itself, so that it does not depend on how many there are in a batch."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        losses = [self.loss(each[None]) for each in batch]
        self.notes.setdefault("losses", []).append([each.item() for each in losses])
        super().training_step(batch, index)
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        samples, count = batches(4).dataset, self.trainer.world_size
        return DataLoader(samples[self.global_rank :: count], batch_size=8 // count)  # type: ignore[index]


class Counting(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Counted(Trained):
    """Counts the collectives between the start and the end of training."""

    notes: dict[str, Any]

    def on_train_start(self) -> None:
        self.mode = Counting()
        self.mode.__enter__()

    def on_train_end(self) -> None:
        self.mode.__exit__(None, None, None)
        self.notes["collectives"] = dict(self.mode.count)


class Writes(Trained):
    """Writes to a weight inside a step."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        with torch.no_grad():
            self.net[0].weight.mul_(0.5)  # type: ignore[index,union-attr,operator]
        return loss


class WritesLocally(Writes):
    """Writes to the part of the weight that it holds."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            self.net[0].weight.to_local().mul_(0.5)  # type: ignore[index,union-attr,operator]
        return super(Writes, self).training_step(batch, index)


class Teaches(Trained):
    """Copies a weight, inside a step, to one that is not quantized."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        with torch.no_grad():
            self.net[3].weight.copy_(self.net[2].weight)  # type: ignore[index,union-attr,operator]
        return loss


class Measured(Trained):
    notes: dict[str, Any]

    def on_fit_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.notes["metrics"] = {name: each.item() for name, each in metrics.items() if name.startswith("q8/qat/")}


def tensor_parallel(net: nn.Module, mesh: Any, shard: bool = True) -> None:
    """Divide the first layer by rows, the second by columns; shard both over the other processes."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(net, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if shard:
        fully(net, mesh["data_parallel"])


def in_half(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    fully(net, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def by_columns(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor import Shard

    fully(net, mesh, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))


def all_of_it(mesh: Any) -> Any:
    return mesh


TENSORS = {"mesh": all_of_it, "tensor_parallel": 2}
KEPT = partial(fully, reshard_after_forward=False)
SMALL = QATConfig([WeightRule(codebook="int4", block_size=32, axis=0)])
FLAT = QATConfig([WeightRule("*weight", "int4", 128)])
LARGE = QATConfig([WeightRule("*weight", "int4", 128, axis=0)])
INPUTS = QATConfig(ROWS.weights, activations=[ActivationRule("net.2")])
LOCAL = partial(tensor_parallel, shard=False)

CASES: dict[str, Case] = {
    "observed": Case(net, model=Observed),
    "observed, kept": Case(net, shard=KEPT, model=Observed),
    "by columns": Case(net, SMALL, by_columns, model=Observed),
    "tensor parallel": Case(net, shard=LOCAL, model=Observed, **TENSORS),  # type: ignore[arg-type]
    "tensor parallel, sharded": Case(net, shard=tensor_parallel, model=Observed, **TENSORS),  # type: ignore[arg-type]
    "half": Case(layer, shard=in_half, model=InHalf),
    "parts of the data": Case(net, model=PerSample),
    "clipped by the norm": Case(net, options={"gradient_clip_val": 0.01}),
    "measured": Case(net, model=Measured, options={"log_every_n_steps": 1}),
    "counted": Case(net, model=Counted, options={"accumulate_grad_batches": 2}),
    "counted, plain": Case(net, None, model=Counted, options={"accumulate_grad_batches": 2}),
    "counted, evaluated": Case(net, model=Counted, options={"val_check_interval": 2}),
    "counted, evaluated, plain": Case(net, None, model=Counted, options={"val_check_interval": 2}),
    "counted, kept, evaluated": Case(net, shard=KEPT, model=Counted, options={"val_check_interval": 2}),
    "counted, kept, evaluated, plain": Case(net, None, KEPT, model=Counted, options={"val_check_interval": 2}),
    "counted, kept": Case(net, shard=KEPT, model=Counted),
    "counted, kept, plain": Case(net, None, KEPT, model=Counted),
    "writes": Case(net, model=Writes),
    "writes locally": Case(net, model=WritesLocally),
    "teaches": Case(taught, QATConfig(ROWS.weights, exclude=["*3.weight"]), model=Teaches),
    "flat": Case(narrow, FLAT),
    "columns": Case(net, LARGE, by_columns),
    "max_norm": Case(embedding, batch=torch.arange(48)),
    "flat, tensor parallel": Case(net, FLAT, LOCAL, **TENSORS),  # type: ignore[arg-type]
    "blocks of columns": Case(net, LARGE, LOCAL, **TENSORS),  # type: ignore[arg-type]
    "inputs": Case(net, INPUTS, LOCAL, **TENSORS),  # type: ignore[arg-type]
}
OF_FOUR: dict[str, Case] = {
    "tensor parallel, sharded": CASES["tensor parallel, sharded"],
    "flat": Case(net, QATConfig([WeightRule(codebook="int4", block_size=64)]), model=Observed),
}


@cache
def came_to(count: int) -> list[dict[str, Any]]:
    """Train all cases in so many processes, started once."""
    cases = OF_FOUR if count == 4 else CASES
    return processes.run(run_cases, count, count, cases, [*cases], Path(mkdtemp()), limit=240)


def traces(name: str, count: int = 2) -> list[Trace]:
    found = [each[name] for each in came_to(count)]
    assert all(isinstance(each, Trace) for each in found), found
    return found


def errors(name: str, kind: type[Exception]) -> list[str]:
    """Return what each process has refused; all have."""
    found = [each[name] for each in came_to(2)]
    assert len(found) == 2
    assert all(type(each) is kind for each in found), found
    return [str(each) for each in found]


def by_rows(master: Any, block_size: int) -> Any:
    """Return a weight as the reference quantizes each of its rows."""
    return np.stack([quantized(torch.from_numpy(row), "int4", block_size).numpy() for row in master])


OBSERVED = [("observed", 2), ("observed, kept", 2), ("by columns", 2), ("half", 2), ("parts of the data", 2)]
OBSERVED += [("tensor parallel", 2), ("tensor parallel, sharded", 2), ("tensor parallel, sharded", 4), ("flat", 4)]


@pytest.mark.parametrize(("name", "count"), OBSERVED)
def test_a_step_shows_what_the_reference_makes_of_the_whole_masters(name: str, count: int) -> None:
    block_size = 32 if name == "by columns" else 64
    for trace in traces(name, count):
        assert len(trace.notes["shown"]) == 5
        noted = [trace.notes[key] for key in ("masters", "shown", "state dict")]
        for masters, shown, state in zip(*noted, strict=True):
            for weight, master in masters.items():
                expected = by_rows(master, block_size) if master.ndim == 2 else master
                assert np.array_equal(shown[weight], expected), weight
                assert np.array_equal(state[weight], master), weight
                assert master.ndim == 1 or not np.array_equal(shown[weight], master)


@pytest.mark.parametrize("name", ["observed", "by columns", "tensor parallel", "tensor parallel, sharded"])
def test_tensor_parallel_losses_are_those_of_one_process(name: str) -> None:
    """The first exactly but for the order of sums; later ones as close as the optimizer keeps that."""
    expected = train(CASES[name], Path(mkdtemp()))
    for trace in traces(name):
        assert trace.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
        assert trace.losses == pytest.approx(expected.losses, rel=1e-3)


def test_a_gathered_weight_in_half_precision_is_the_quantized_one_rounded() -> None:
    for trace in traces("half"):
        quantized_last = torch.from_numpy(trace.notes["shown"][-1]["0.weight"])
        assert np.array_equal(trace.notes["used"], quantized_last.bfloat16().float().numpy())


def test_processes_with_parts_of_a_batch_compute_the_losses_of_the_whole() -> None:
    """Each sample's first loss exactly; later ones but for the order in which gradients are added up."""
    expected = train(CASES["parts of the data"], Path(mkdtemp())).notes["losses"]
    got = [trace.notes["losses"] for trace in traces("parts of the data")]
    for step, losses in enumerate(expected):
        together = [loss for pair in zip(got[0][step], got[1][step], strict=True) for loss in pair]
        assert together == (losses if step == 0 else pytest.approx(losses, rel=1e-4))


def test_gradients_are_clipped_by_the_norm_of_all_parts() -> None:
    expected = train(CASES["clipped by the norm"], Path(mkdtemp()))
    for trace in traces("clipped by the norm"):
        assert trace.losses == pytest.approx(expected.losses, rel=1e-5)


def test_what_weights_lose_is_added_up_over_the_parts() -> None:
    expected = train(CASES["measured"], Path(mkdtemp())).notes["metrics"]
    assert expected
    for trace in traces("measured"):
        assert trace.notes["metrics"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["counted", "counted, evaluated", "counted, kept"])
def test_engaging_and_releasing_communicates_nothing(name: str) -> None:
    with_qat, plain = traces(name), traces(f"{name}, plain")
    for trace, other in zip(with_qat, plain, strict=True):
        assert sum(other.notes["collectives"].values()) > 0
        assert trace.notes["collectives"] == other.notes["collectives"]
        assert trace.losses != other.losses


def test_what_evaluation_left_gathered_is_gathered_once_more_for_training() -> None:
    """FSDP2 would go on with it, but hooks between them see the masters. Nothing is gathered again batch by batch."""
    validations, layers = 2, 2
    with_qat, plain = traces("counted, kept, evaluated"), traces("counted, kept, evaluated, plain")
    for trace, other in zip(with_qat, plain, strict=True):
        more = Counter(trace.notes["collectives"])
        more.subtract(other.notes["collectives"])
        assert 0 < sum(more.values()) <= validations * layers + layers
        assert len(trace.evaluated) >= 8 * validations


@pytest.mark.parametrize("name", ["writes", "writes locally"])
def test_a_write_inside_a_step_stops_every_process(name: str) -> None:
    for error in errors(name, LostWriteError):
        assert "a step wrote to net.0.weight" in error
        assert "is sharded" in error
        assert "q8lightning.masters" in error


def test_what_a_step_copies_from_a_sharded_weight_to_another_parameter_stops_every_process() -> None:
    for error in errors("teaches", LostWriteError):
        assert "a step wrote to net.3.weight and what it wrote may have been computed from quantized values" in error


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("flat", ["'*weight' quantizes net.0.weight", "along dimension 0, at 17", "block_size=128, axis=0)"]),
        ("columns", ["net.0.weight", "along dimension 1, at 32", "block_size=32, axis=0)"]),
        ("flat, tensor parallel", ["net.2.weight", "along dimension 1, at 64", "block_size=64)"]),
        ("blocks of columns", ["net.2.weight", "along dimension 1, at 64", "block_size=64, axis=0)"]),
        ("max_norm", ["net.0.weight is sharded", "max_norm"]),
        ("inputs", ["activation rule", "codebook None"]),
    ],
)
def test_what_would_depend_on_the_number_of_processes_is_refused(name: str, parts: list[str]) -> None:
    for error in errors(name, ValueError):
        for part in parts:
            assert part in error
