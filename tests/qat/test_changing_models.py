"""The selection follows a model that changes while it is trained, and a file claims only what was trained quantized.

============================  ==========================================================================
what changes                  where it is tested
============================  ==========================================================================
layers                        replaced, appended, wrapped (LoRA), removed, under ``torch.compile``
parameters                    assigned anew, tied, untied, parametrized, pruned, converted to other dtypes
what no rule selects          biases, excluded layers: nothing is said
when                          in hooks of the model and of callbacks, inside the training step, between fits
rules                         weights, activations, freeze; those that match nothing any more
optimizers, parameters        that cannot work are refused in mid-fit, too
files                         saved before the next step, after training, of weights only
compiled models               patterns by both names, activations after an earlier run, every way to compile
============================  ==========================================================================
"""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.models import quiet_trainer
from support.straight_through import Call, Trained, as_it_is, quantized, straight_through
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from q8lightning import ActivationRule, FreezeRule, QATConfig, QuantizationCallback, WeightRule, export_quantized
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer

INT4 = WeightRule(codebook="int4", block_size=64)
CHANGED = "the model has changed since its last step, and QAT follows it: "


class Net(nn.Module):
    """Layers in a list, called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def replace(net: Net) -> None:
    net.layers[1] = nn.Linear(64, 64)


def append(net: Net) -> None:
    net.layers.append(nn.Linear(64, 64))


def wrap(net: Net) -> None:
    net.layers[1] = Lora(net.layers[1])


def remove(net: Net) -> None:
    net.layers[1] = nn.Identity()


def compile_one(net: Net) -> None:
    net.layers[1] = torch.compile(net.layers[1], backend="eager")  # type: ignore[assignment]


def assign(net: Net) -> None:
    net.layers[1].weight = nn.Parameter(torch.randn(64, 64) / 8)


def tie(net: Net) -> None:
    net.layers[2].weight = net.layers[0].weight


def untie(net: Net) -> None:
    net.layers[2].weight = nn.Parameter(net.layers[0].weight.detach() / 2)


def parametrized(net: Net) -> None:
    parametrize.register_parametrization(net.layers[1], "weight", Doubled())


def pruned(net: Net) -> None:
    prune.l1_unstructured(net.layers[1], "weight", amount=0.3)


def converted(net: Net) -> None:
    net.bfloat16()


def converted_and_replaced(net: Net) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def replace_bias(net: Net) -> None:
    net.layers[1].bias = nn.Parameter(torch.zeros(64))


NAMES = ["net.layers.0.weight", "net.layers.1.weight", "net.layers.2.weight"]
CHANGES: dict[str, tuple[Callable[[Net], None], str | None]] = {
    "replaced": (replace, "replaced: net.layers.1.weight."),
    "appended": (append, "new: net.layers.3.weight."),
    "wrapped": (
        wrap,
        "new: net.layers.1.base.weight, net.layers.1.a.weight, net.layers.1.b.weight;"
        " no longer quantized: net.layers.1.weight.",
    ),
    "removed": (remove, "no longer quantized: net.layers.1.weight."),
    "compiled": (compile_one, "new: net.layers.1._orig_mod.weight; no longer quantized: net.layers.1.weight."),
    "assigned": (assign, "replaced: net.layers.1.weight."),
    "tied": (tie, "replaced: net.layers.2.weight."),
    "untied": (untie, "replaced: net.layers.2.weight."),
    "parametrized": (
        parametrized,
        "new: net.layers.1.parametrizations.weight.original; no longer quantized: net.layers.1.weight.",
    ),
    "pruned": (pruned, "new: net.layers.1.weight_orig; no longer quantized: net.layers.1.weight."),
    "converted": (converted, None),
    "converted and replaced": (converted_and_replaced, f"replaced: {', '.join(NAMES)}."),
    "bias": (replace_bias, None),
}


class Changing(Trained):
    """Changes its net at the global step 2, and gives its optimizer all parameters of the changed net."""

    def __init__(self, change: Callable[[Net], None], call: Call = as_it_is, where: str = "on_train_batch_end") -> None:
        super().__init__(Net(), call=call)
        if change is untie:
            tie(self.net)
        self.change = change
        self.where = where

    def at(self, where: str) -> None:
        if where == self.where and self.global_step == 2:
            self.where = ""  # once
            torch.manual_seed(7)
            self.change(self.net)
            self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.at("on_train_batch_start")

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.at("training_step")
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.at("on_train_batch_end")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: pl.LightningModule, folder: Path, *callbacks: pl.Callback, steps: int = 5, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(folder, max_steps=steps, limit_val_batches=0, callbacks=list(callbacks), **options)
    trainer.fit(model)
    return trainer


def warned(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught if "quantized" in str(each.message)]


def described(path: Path) -> dict[str, Any]:
    entries: dict[str, Any] = torch.load(path, weights_only=True).get("q8lightning", {}).get("qat", {})
    return entries


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_trains_as_with_autograd_and_files_say_what_was_trained(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    torch.manual_seed(0)
    expected = Changing(change, straight_through("int4", 64))
    fit(expected, tmp_path)
    torch.manual_seed(0)
    model, callback = Changing(change), QuantizationCallback(None, qat=QATConfig([INT4]))
    trainers: list[pl.Trainer] = []
    messages = warned(lambda: trainers.append(fit(model, tmp_path, callback)))
    assert [each for each in messages if "has changed" in each] == [
        f"{CHANGED}{message} Exclude by name what should not be quantized; give what should be a rule"
        for _ in range(message is not None)
    ]
    assert model.losses == expected.losses
    assert len(model.losses) == 5
    assert list(model.state_dict()) == list(expected.state_dict())
    for parameter, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[parameter]), parameter

    trainers[0].save_checkpoint(tmp_path / "qat.ckpt")
    matrices = {each for each, value in model.named_parameters(remove_duplicate=False) if value.ndim == 2}
    assert set(described(tmp_path / "qat.ckpt")) == matrices
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    exported = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    for each in matrices:
        assert torch.equal(exported[each], quantized(model.state_dict()[each], "int4", 64)), each


class ChangesLate(pl.Callback):
    """Changes the model in a hook that runs after those of other callbacks."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.at("callback")


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("on_train_batch_start", {}),
        ("training_step", {}),
        ("callback", {}),
        ("on_train_batch_end", {"accumulate_grad_batches": 2}),
        ("on_train_batch_end", {"val_check_interval": 1, "limit_val_batches": 1}),
    ],
    ids=["batch start", "training step", "callback", "accumulated", "with validation"],
)
def test_a_change_is_followed_wherever_it_happens(where: str, options: dict[str, Any], tmp_path: Path) -> None:
    def train(call: Call, *callbacks: pl.Callback) -> Changing:
        torch.manual_seed(0)
        model = Changing(replace, call, where)
        settings = {"max_steps": 4, "limit_val_batches": 0, **options}
        quiet_trainer(tmp_path, callbacks=[*callbacks, ChangesLate()], **settings).fit(model)
        return model

    expected = train(straight_through("int4", 64))
    got = train(as_it_is, QuantizationCallback(None, qat=QATConfig([INT4])))
    assert got.losses == expected.losses
    assert got.evaluated == expected.evaluated
    assert all(map(torch.equal, got.parameters(), expected.parameters()))


def test_activation_and_freeze_rules_follow_a_replaced_layer(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.equal(x, quantized(x.flatten(), "int2", 64).view_as(x)))
            return super().forward(x)

    history: list[Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            history.append(pl_module.net.layers[1].weight.detach().clone())

    def change(net: Net) -> None:
        net.layers[1] = Look(64, 64)

    qat = QATConfig([INT4], activations=[ActivationRule("*.1", "int2")], freeze=[FreezeRule("net.layers.1.*", 4)])
    model = Changing(change)
    messages = warned(lambda: fit(model, tmp_path, QuantizationCallback(None, qat=qat), Keep(), steps=6))
    assert f"{CHANGED}replaced: net.layers.1.weight, inputs of net.layers.1." in messages[0]
    assert seen == [True] * 4
    changes = [not torch.equal(before, after) for before, after in pairwise(history[2:])]
    assert changes == [True, False, False]  # steps 3, 4 and 5
    seen.clear()
    model.net(torch.randn(2, 64))
    assert seen == [False]  # and no hook is left


def test_what_is_excluded_is_not_followed_and_rules_may_match_nothing_any_more(tmp_path: Path) -> None:
    def change(net: Net) -> None:
        net.layers[0], net.layers[1] = nn.Linear(64, 64), nn.Identity()

    rules = [WeightRule("*.1.weight", "int4", 64), WeightRule("*", "int8", 64)]
    model, callback = Changing(change), QuantizationCallback(None, qat=QATConfig(rules, exclude=["*.0.weight"]))
    trainers: list[pl.Trainer] = []
    (message,) = warned(lambda: trainers.append(fit(model, tmp_path, callback)))
    assert f"{CHANGED}no longer quantized: net.layers.1.weight." in message
    trainers[0].save_checkpoint(tmp_path / "qat.ckpt")
    assert set(described(tmp_path / "qat.ckpt")) == {"net.layers.2.weight"}


def test_what_cannot_be_trained_is_refused_in_the_middle_too_and_leaves_the_masters(tmp_path: Path) -> None:
    def lazy(net: Net) -> None:
        net.layers[1] = nn.LazyLinear(64)

    def strided(net: Net) -> None:
        net.layers[1].weight = nn.Parameter(torch.randn(64, 128)[:, ::2])

    def fused(net: Net) -> None:
        replace(net)
        net.layers[1].weight.register_post_accumulate_grad_hook(lambda _: None)

    for change, message in ((lazy, "is lazy"), (strided, "has strides"), (fused, "outside of backward")):
        model = Changing(change)
        with pytest.raises(ValueError, match=rf"net\.layers\.1\.weight.*{message}|{message}.*net\.layers\.1\.weight"):
            fit(model, tmp_path, QuantizationCallback(None, qat=QATConfig([INT4])))
        assert not torch.equal(quantized(model.net.layers[0].weight, "int4", 64), model.net.layers[0].weight)


@pytest.mark.parametrize("checkpoint", [None, "resume"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_does_not_claim_what_was_replaced_since_it_was_trained(
    weights_only: bool, checkpoint: Any, tmp_path: Path
) -> None:
    class Saves(Changing):
        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            self.trainer.save_checkpoint(tmp_path / f"{self.global_step}.ckpt", weights_only=weights_only)

    model, callback = Saves(replace), QuantizationCallback(checkpoint, qat=QATConfig([INT4]))
    trainers: list[pl.Trainer] = []
    messages = warned(lambda: trainers.append(fit(model, tmp_path, callback, steps=3)))
    assert "net.layers.1.weight was replaced since it was last trained with quantized weights" in messages[0]
    untouched = {NAMES[0], NAMES[2]}
    assert [set(described(tmp_path / f"{step}.ckpt")) for step in (1, 2, 3)] == [{*NAMES}, untouched, {*NAMES}]

    model.net.layers[0] = nn.Linear(64, 64)  # after training
    (message,) = warned(lambda: trainers[0].save_checkpoint(tmp_path / "qat.ckpt", weights_only=weights_only))
    assert "net.layers.0.weight was replaced" in message
    assert set(described(tmp_path / "qat.ckpt")) == {*NAMES[1:]}
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "float.ckpt")
    exported = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    saved = torch.load(tmp_path / "qat.ckpt", weights_only=True)["state_dict"]
    assert [torch.equal(exported[name], saved[name]) for name in NAMES] == [True, False, False]


def test_a_second_fit_and_a_second_model_are_described_as_they_are(tmp_path: Path) -> None:
    callback = QuantizationCallback(None, qat=QATConfig([INT4]))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[callback])
    for net in (Net(), nn.Sequential(nn.Linear(64, 64))):
        model = Trained(net)
        trainer.fit_loop.epoch_loop.max_steps += 1
        trainer.fit(model)
        trainer.save_checkpoint(tmp_path / "qat.ckpt", weights_only=True)
        matrices = {name for name, value in model.named_parameters() if value.ndim == 2}
        assert set(described(tmp_path / "qat.ckpt")) == matrices


def test_what_was_trained_is_known_to_copies(tmp_path: Path) -> None:
    callback = QuantizationCallback(None, qat=QATConfig([INT4]))
    model = Trained(Net())
    fit(model, tmp_path, callback, steps=1)
    both = callback.qat_training.trained, model.net
    for trained, net in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert [f"net.{name}" for name in trained.codecs(net)] == NAMES
        assert trained.codecs(Net()) == {}


# Compiled models


def losses(net: nn.Module, folder: Path, qat: QATConfig, steps: int = 3) -> list[float]:
    model = Trained(net)
    fit(model, folder, QuantizationCallback(None, qat=qat), steps=steps)
    return model.losses


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def a_part(net: nn.Sequential) -> nn.Module:
    net[0] = torch.compile(net[0], backend="eager")  # type: ignore[assignment]
    return net


class Function(nn.Module):
    """Calls its module in a function that is compiled."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.add_module("0", net[0])
        self.add_module("2", net[2])
        self.compiled = torch.compile(lambda x: self.get_submodule("2")(nn.functional.gelu(self.get_submodule("0")(x))),
                                      backend="eager")  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


WAYS: dict[str, Callable[..., nn.Module]] = {
    "wrapped": lambda net: torch.compile(net, backend="eager"),
    "in place": in_place,
    "a part": a_part,
    "a function": Function,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_that_ran_before_trains_as_an_eager_one(way: str, tmp_path: Path) -> None:
    """Patterns match the names that modules have without ``torch.compile``."""
    weights, activations = [WeightRule("net.[02].weight", "int4", 64)], [ActivationRule("net.[02]", "int2")]
    first, second = QATConfig(weights), QATConfig(weights, activations=activations)
    eager, compiled = sequence(), WAYS[way](sequence())
    x = torch.randn(4, 64)
    compiled(x)
    for qat in (first, second, first, second):
        expected, got = losses(eager, tmp_path, qat), losses(compiled, tmp_path, qat)
        assert got == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(compiled(x), eager(x))  # nothing stays behind


def test_patterns_match_by_the_names_with_and_without_the_compiled_module() -> None:
    compiled = nn.ModuleDict({"net": torch.compile(sequence(), backend="eager")})
    for pattern in ("net.0.weight", "net._orig_mod.0.weight"):
        (weight,) = FakeQuantizer(compiled, QATConfig([WeightRule(pattern)])).weights
        assert weight.names == ("net._orig_mod.0.weight",)
        excluded = FakeQuantizer(compiled, QATConfig(exclude=[pattern]))
        assert [each.names for each in excluded.weights] == [("net._orig_mod.2.weight",)]
    inner = compiled["net"]._orig_mod  # type: ignore[union-attr]
    for pattern, modules in (
        ("net", [inner]),
        ("net._orig_mod", [inner]),
        ("net.2", [inner[2]]),
        ("*", [inner, *inner]),
    ):
        quantizer = FakeQuantizer(compiled, QATConfig(activations=[ActivationRule(pattern)]))
        assert [module for module in compiled.modules() if module._forward_pre_hooks] == modules
        quantizer.close()
    with pytest.raises(ValueError, match=re.escape("the weight rule 'net.1.weight' matches no parameter")):
        FakeQuantizer(compiled, QATConfig([WeightRule("net.1.weight")]))


def test_activation_rules_for_modules_that_cannot_be_hooked_are_not_ignored_silently() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "script": torch.jit.script(sequence())})
    names = "attention.out_proj, script, script.0, script.1, ..."
    for pattern, refused in (("*", names), ("script.0", "script.0"), ("attention.*", "attention.out_proj")):
        qat = QATConfig(exclude=["script.*"], activations=[ActivationRule(pattern)])
        with pytest.warns(UserWarning, match=f"the activation rules select {re.escape(refused)}, but what Script"):
            FakeQuantizer(net, qat).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FakeQuantizer(net, QATConfig(exclude=["script.*"], activations=[ActivationRule("attention")])).close()
    with pytest.raises(
        ValueError, match=r"script\.0\.weight belongs to a ScriptModule, which allows no hooks; exclude"
    ):
        FakeQuantizer(net, QATConfig())
