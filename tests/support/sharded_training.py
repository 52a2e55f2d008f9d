"""Trainings that run alike in one process and in several that share the parameters: the same data, or parts of it.

With the same data in every process gradients are averages of equal numbers. For two or four processes these are the
numbers themselves, so that losses and weights must be those of one process, bit for bit.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from q8lightning import QATConfig, QuantizationCallback, WeightRule
from support.models import quiet_trainer
from support.straight_through import Adversaries, Call, Trained, as_it_is

ROWS = QATConfig([WeightRule(codebook="int4", block_size=64, axis=0)])

Shard = Callable[[nn.Module, Any], None]


def fully(net: nn.Module, mesh: Any, **options: Any) -> None:
    """Shard every layer that has parameters of its own, then what is left."""
    from torch.distributed.fsdp import fully_shard

    for each in [*net.modules()][1:]:
        if any(True for _ in each.parameters(recurse=False)):
            fully_shard(each, mesh=mesh, **options)
    if not isinstance(net, nn.ModuleDict):  # which has no forward
        fully_shard(net, mesh=mesh, **options)


def data_parallel(strategy_mesh: Any) -> Any:
    return strategy_mesh["data_parallel"]


def values_of(tensor: Tensor) -> Any:
    """Return all of a tensor as an array, of float32 if NumPy does not know its dtype."""
    values = whole(tensor).cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


@dataclass
class Case:
    """A training.

    Attributes:
        net: Returns the network, the same every time.
        qat: How it is quantized; None for no callback.
        shard: Shards the network.
        mesh: Returns the mesh to shard over, of Lightning's.
        model: The LightningModule around the network.
        batch: What the network receives; None for the data.
        tensor_parallel: Over how many processes tensors are parallel.
        options: Of the Trainer.
        ddp: Train with DDP in place of sharding.
        validate: Evaluate by itself after that.
    """

    net: Callable[[], nn.Module]
    qat: QATConfig | None = ROWS
    shard: Shard = fully
    mesh: Callable[[Any], Any] = data_parallel
    model: type[Trained] = Trained
    batch: Tensor | None = None
    tensor_parallel: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    ddp: bool = False
    validate: bool = False


@dataclass
class Trace:
    """What a training left: losses, evaluated losses, the whole masters, and what else the model noted."""

    losses: list[float]
    evaluated: list[float]
    weights: dict[str, Any]
    notes: dict[str, Any]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, a copy; every process calls this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def train(case: Case, folder: Path, processes: int = 0, call: Call = as_it_is, callbacks: Any = ()) -> Trace:
    """Train in this process alone, or as one of several."""
    torch.manual_seed(0)
    base: Any = case.model
    sharded = processes > 0 and not case.ddp

    class Model(base):  # type: ignore[misc]
        notes: Any

        def configure_model(self) -> None:
            if sharded and not hasattr(self, "mesh"):
                self.mesh = case.mesh(self.device_mesh)
                case.shard(self.net, self.mesh)

        def on_fit_end(self) -> None:
            self.masters = {name: values_of(each) for name, each in self.net.named_parameters()}
            super().on_fit_end()

    model = Model(call=call) if issubclass(base, Adversaries) else Model(copy.deepcopy(case.net()), case.batch, call)
    model.notes = {}
    strategy: Any = "auto"
    if case.ddp and processes:
        strategy = DDPStrategy(process_group_backend="gloo")
    elif processes:
        tensors, backend = case.tensor_parallel, None if case.options.get("accelerator") == "gpu" else "gloo"
        strategy = ModelParallelStrategy(processes // tensors, tensors, process_group_backend=backend)
    options = {"max_steps": 5, "max_epochs": -1, "use_distributed_sampler": False, **case.options}
    trainer = quiet_trainer(
        folder,
        devices=max(processes, 1),
        strategy=strategy,
        callbacks=[*callbacks, *([QuantizationCallback(None, qat=case.qat)] if case.qat is not None else [])],
        **options,
    )
    trainer.fit(model)
    if case.validate:
        trainer.validate(model)
    return Trace(model.losses, model.evaluated, model.masters, model.notes)


def run_cases(rank: int, processes: int, cases: Mapping[str, Case], names: list[str], folder: Path) -> dict[str, Any]:
    """Train cases one after another, in one of several processes; an error is what its case came to."""
    came_to: dict[str, Any] = {}
    for name in names:
        try:
            came_to[name] = train(cases[name], folder / name, processes)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            came_to[name] = error
    return came_to
