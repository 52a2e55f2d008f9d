"""What a save is told of the model is what the model is at that moment, although it is looked up only when it changed.

| what changes between two saves | what a save is told then |
|---|---|
| nothing | the very same names, not looked up |
| layers or weights replaced, added, removed, tied, renamed, swapped | the new names |
| the optimizer replaced, its parameters in another order, others added | the names in its order |
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Shrink, quiet_trainer
from torch import nn

from q8lightning import QATConfig, QuantizationCallback, WeightRule
from q8lightning.trainer.checkpoint_io.quantized import find_quantized_io
from q8lightning.trainer.save.describe_model import DescribeModel

QAT = QATConfig([WeightRule(codebook="int4", block_size=64)])


def rename(model: Any) -> None:
    """Give a weight another name; order and identity stay."""
    layer = model.net[0]
    weight, bias = layer._parameters.pop("weight"), layer._parameters.pop("bias")
    layer._parameters.update({"renamed": weight, "bias": bias})


def swap(model: Any) -> None:
    """Let two weights of one shape change places."""
    model.net[0].weight, model.net[2].weight = model.net[2].weight, model.net[0].weight


def change_all(model: Any) -> None:
    for layer in (model.net[0], model.net[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())


CHANGES: dict[str, Callable[[Any], object]] = {
    "a layer replaced": lambda model: setattr(model.net, "0", nn.Linear(64, 64)),
    "all weights replaced": change_all,
    "a layer added": lambda model: model.net.append(nn.Linear(64, 64)),
    "a layer removed": lambda model: model.net.pop(2),
    "a parameter added": lambda model: model.register_parameter("more", nn.Parameter(torch.zeros(64, 64))),
    "a weight tied": lambda model: setattr(model.net[2], "weight", model.net[0].weight),
    "a weight renamed": rename,
    "two weights swapped": swap,
}


def reorder(trainer: Any) -> None:
    trainer.optimizers[0].param_groups[0]["params"].reverse()


def replace_optimizer(trainer: Any) -> None:
    trainer.strategy.optimizers = [torch.optim.SGD([*trainer.model.parameters()][1:], lr=0.1)]


def add_group(trainer: Any) -> None:
    trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def trained(folder: Path, qat: QATConfig | None) -> tuple[Any, Any, Any]:
    """Return a Trainer that has trained for a step, its model, and what tells its saves of the model."""
    trainer = quiet_trainer(folder, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback(qat=qat)])
    model = Shrink(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    trainer.fit(model)
    installed = find_quantized_io(trainer.strategy.checkpoint_io)
    assert installed is not None
    return trainer, model, installed.describe_model


def fresh(trainer: Any, describe: Any) -> Any:
    """Return what somebody is told who knew nothing before."""
    return DescribeModel(trainer, describe.callback)()


@pytest.mark.parametrize("qat", [None, QAT], ids=["plain", "qat"])
@pytest.mark.filterwarnings("ignore:.*was replaced since")
@pytest.mark.parametrize("change", CHANGES)
def test_a_save_is_told_the_names_of_the_model_as_it_is(change: str, qat: QATConfig | None, tmp_path: Path) -> None:
    trainer, model, describe = trained(tmp_path, qat)
    before = describe()
    CHANGES[change](model)
    after = describe()
    assert after == fresh(trainer, describe) != before
    assert after.parameters == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = {id(each): name for name, each in model.named_parameters()}
    in_order = [known.get(id(each), "") for group in trainer.optimizers[0].param_groups for each in group["params"]]
    assert after.optimizer_parameters == (tuple(in_order),)
    if qat is not None:
        weights = dict(model.named_parameters(remove_duplicate=False))
        selected = {weight.parameter for weight in describe.callback.qat_training.trained.weights}
        assert set(after.quantized) == {name for name, each in weights.items() if each in selected}


@pytest.mark.parametrize("change", [reorder, replace_optimizer, add_group])
def test_a_save_is_told_the_parameters_of_the_optimizers_as_they_are(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    trainer, _, describe = trained(tmp_path, None)
    before = describe()
    change(trainer)
    after = describe()
    assert after == fresh(trainer, describe) != before
    assert after.parameters is before.parameters


def test_names_are_not_looked_up_again_where_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, describe = trained(tmp_path, QAT)
    before = describe()
    monkeypatch.delattr(nn.Module, "_named_members")  # what named_parameters goes by
    assert describe() == before


def test_a_model_that_names_its_parameters_itself_is_asked_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, describe = trained(tmp_path, None)
    prefix = "a."

    def named_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ((prefix + name, each) for name, each in nn.Module.named_parameters(self, *args, **kwargs))

    monkeypatch.setattr(type(model), "named_parameters", named_parameters)
    assert "a.net.0.weight" in describe().parameters
    prefix = "b."
    assert "b.net.0.weight" in describe().parameters


def test_what_was_replaced_is_not_kept_alive(tmp_path: Path) -> None:
    trainer, model, describe = trained(tmp_path, None)
    describe()
    old = weakref.ref(model.net[0]), weakref.ref(model.net[0].weight)
    trainer.strategy.optimizers = []
    model.net[0] = nn.Linear(64, 64)
    gc.collect()
    assert [each() for each in old] == [None, None]
