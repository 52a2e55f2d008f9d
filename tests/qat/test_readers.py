"""Code outside of forward and backward that reads a parameter or takes a state dict sees the masters."""

import copy
import io
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    WeightAveraging,
)
from support.models import batches, quiet_trainer
from support.straight_through import (
    Adversaries,
    Trained,
    as_it_is,
    assert_trained_alike,
    quantized,
    straight_through,
    trained,
)
from torch import Tensor, nn

from q8lightning import QATConfig, QuantizationCallback, WeightRule
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer

QAT = QATConfig([WeightRule(codebook="int4", block_size=64)])
HOOKS = [
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad",
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end",
    "on_train_end", "on_fit_end", "on_sanity_check_start", "on_sanity_check_end",
    *(
        f"on_{stage}_{when}"
        for stage in ("validation", "test", "predict")
        for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
    ),
]  # fmt: skip
EXTRA = ["configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
         "on_after_batch_transfer", "on_validation_model_eval", "on_validation_model_train"]  # fmt: skip


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def on_the_grid(net: nn.Module) -> list[bool]:
    """Tell for each weight matrix whether it is its own quantized value."""
    return [torch.equal(quantized(weight, "int4", 64), weight) for weight in net.parameters() if weight.ndim == 2]


class Seen(list):
    def look(self, where: str, net: nn.Module) -> None:
        self.append((where, any(on_the_grid(net))))


def watching(model: Trained, seen: Seen, hooks: list[str]) -> Trained:
    """Override hooks of a model, as a user's class would."""
    base = type(model)

    def override(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.look(f"model {name}", self.net)
            result = getattr(base, name)(self, *args, **kwargs)
            seen.look(f"model {name}", self.net)
            return result

        return hook

    model.__class__ = type("Watched", (base,), {name: override(name) for name in hooks})
    return model


def watcher(seen: Seen, hooks: list[str]) -> pl.Callback:
    def override(name: str) -> Any:
        return lambda self, trainer, module, *args, **kwargs: seen.look(f"callback {name}", module.net)

    return type("Watcher", (pl.Callback,), {name: override(name) for name in hooks})()


OPTIONS: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "accumulated"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_every_hook_sees_the_masters(first: bool, options: dict[str, Any], tmp_path: Path) -> None:
    seen, ours = Seen(), QuantizationCallback(qat=QAT)
    others = watcher(seen, HOOKS)
    callbacks = [others, ours] if first else [ours, others]
    model = watching(Trained(net()), seen, [name for name in HOOKS if hasattr(pl.LightningModule, name)] + EXTRA)
    trainer = quiet_trainer(
        tmp_path, max_epochs=2, callbacks=callbacks, val_check_interval=4, num_sanity_val_steps=1, **options
    )
    trainer.fit(model)
    trainer.validate(model)
    trainer.test(model)
    trainer.predict(model)
    assert {where for where, quantized in seen if quantized} == set()
    expected = {f"{who} {name}" for name in HOOKS for who in ("callback", "model")} | {
        f"model {name}" for name in EXTRA
    }
    missing = {f"model {name}" for name in HOOKS if not hasattr(pl.LightningModule, name)} | {"model lr_scheduler_step"}
    assert {where for where, _ in seen} == expected - missing


@pytest.mark.parametrize(
    "hook", ["on_before_zero_grad", "on_after_backward", "on_train_batch_end", "on_train_batch_start"]
)
def test_training_is_the_same_whether_or_not_somebody_looks(hook: str, tmp_path: Path) -> None:
    options, seen = {"max_steps": 4, "accumulate_grad_batches": 2}, Seen()
    expected = trained(lambda: Trained(net(), call=straight_through("int4", 64)), tmp_path, **options)
    callbacks = QuantizationCallback(qat=QAT), watcher(seen, [hook])
    assert_trained_alike(trained(lambda: Trained(net()), tmp_path, *callbacks, **options), expected)
    assert {quantized for _, quantized in seen} == {False}


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_hooks_in_the_middle_of_a_manual_step_see_the_masters_and_it_goes_on_quantized(
    hook: str, tmp_path: Path
) -> None:
    class Net(Adversaries):
        def training_step(self, batch: Tensor, index: int) -> None:
            super().training_step(batch, index)
            assert all(on_the_grid(self.net))

    seen = Seen()
    expected = trained(lambda: Adversaries(straight_through("int4", 64)), tmp_path, max_steps=8)
    callbacks = watcher(seen, [hook]), QuantizationCallback(qat=QAT)
    assert_trained_alike(trained(Net, tmp_path, *callbacks, max_steps=8), expected)
    assert len(seen) == 8
    assert {quantized for _, quantized in seen} == {False}


def test_a_training_step_that_lightning_abandons_leaves_the_masters(tmp_path: Path) -> None:
    """A manual step may end with StopIteration, which Lightning takes as "no more data", not as a failure."""
    seen = Seen()

    class Stops(Adversaries):
        def training_step(self, batch: Tensor, index: int) -> None:
            super().training_step(batch, index)
            raise StopIteration

    trainer = quiet_trainer(
        tmp_path, max_steps=4, callbacks=[QuantizationCallback(qat=QAT), watcher(seen, ["on_train_batch_end"])]
    )
    trainer.fit(Stops())
    assert seen == [("callback on_train_batch_end", False)] * 2


@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_are_quantized_once_for_an_optimizer_step(accumulate: int, tmp_path: Path) -> None:
    callback = QuantizationCallback(qat=QAT)
    engaged = []

    class Count(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            groups = callback.qat_training._engagement.quantizer._groups
            original = groups.engage
            groups.engage = lambda *args: engaged.append(trainer.global_step) or original(*args)

    trainer = quiet_trainer(
        tmp_path,
        max_steps=8 // accumulate,
        accumulate_grad_batches=accumulate,
        callbacks=[Count(), callback, ModelCheckpoint(tmp_path, every_n_train_steps=1)],
        enable_checkpointing=True,
        enable_progress_bar=True,
        limit_val_batches=0,
    )
    trainer.fit(Trained(net()))
    assert engaged == [*range(8 // accumulate)]


class TakesStateDicts(Trained):
    """Saves and takes state dicts in the middle of its training step."""

    folder: Path

    def loss(self, batch: Tensor) -> Tensor:
        x = torch.tanh(self.net[0](batch))
        if self.trainer.training:
            self.taken = [
                {name: value.clone() for name, value in each.items()}
                for each in (
                    self.net.state_dict(),
                    {f"2.{name}": value for name, value in self.net[2].state_dict().items()},
                    {name.removeprefix("net."): value for name, value in self.state_dict().items()},
                )
            ]
            self.trainer.save_checkpoint(self.folder / "inside.ckpt")
            assert on_the_grid(self.net) == [True, True]  # forward goes on with the quantized values
        return self.net[2](x).square().mean()


@pytest.mark.parametrize("checkpoint", [None, "resume"])
def test_a_state_dict_taken_inside_a_training_step_holds_the_masters(checkpoint: str | None, tmp_path: Path) -> None:
    masters: dict[str, Tensor] = {}

    class Before(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            masters.update({name: value.clone() for name, value in pl_module.net.state_dict().items()})

    model = TakesStateDicts(net())
    model.folder = tmp_path
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[QuantizationCallback(checkpoint, qat=QAT), Before()])
    trainer.fit(model)
    for taken in model.taken:
        for name, value in taken.items():
            assert torch.equal(value, masters[name]), name
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    for name, value in masters.items():
        half_a_step = float(value.abs().max()) / (2 * 127 * 7)  # at most, of the residual of 3 bits
        tolerance = {"atol": 0 if checkpoint is None else 1.01 * half_a_step, "rtol": 0}
        torch.testing.assert_close(saved[f"net.{name}"], value, **tolerance)


def test_what_is_done_to_a_state_dict_does_not_move_the_masters() -> None:
    module = net()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    quantizer = FakeQuantizer(module, QAT)
    quantizer.engage()
    for value in module.state_dict().values():
        value.data = value.data.half()  # as when a copy of half the size is to be saved
    quantizer.release()
    assert all(map(torch.equal, module.parameters(), before))


def test_a_state_dict_loaded_inside_a_training_step_becomes_the_masters(tmp_path: Path) -> None:
    new = {name: value + 0.25 for name, value in net().state_dict().items()}

    class Loads(Trained):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            self.net.load_state_dict(new)
            assert on_the_grid(self.net) == [True, True]
            return super().training_step(batch, index) * 0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Loads(net())
    quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizationCallback(qat=QAT)]).fit(model)
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, new[name])


def test_tied_weights_stay_tied_in_a_state_dict_taken_while_engaged(tmp_path: Path) -> None:
    class Tied(Trained):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            state = self.state_dict()
            assert state["net.0.weight"].data_ptr() == state["net.2.weight"].data_ptr()
            return super().training_step(batch, index)

    model = Tied(net())
    model.net[2].weight = model.net[0].weight
    quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(qat=QAT)]).fit(model)
    assert model.net[2].weight is model.net[0].weight


# Weight averaging


@pytest.mark.parametrize("average", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)], ids=["mean", "ema"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_average_is_of_the_masters(average: Any, first: bool, tmp_path: Path) -> None:
    """Validation runs with the quantized average, as with autograd's estimator."""

    def train(call: Any, *callbacks: pl.Callback) -> Trained:
        averaging = average()
        order = [averaging, *callbacks] if first else [*callbacks, averaging]
        options = {"max_steps": 8, "val_check_interval": 4, "accumulate_grad_batches": 2}
        return trained(lambda: Trained(net(), call=call), tmp_path, *order, **options)

    assert_trained_alike(train(as_it_is, QuantizationCallback(qat=QAT)), train(straight_through("int4", 64)))


# ModelCheckpoint, in every trigger


@pytest.mark.parametrize(
    "trigger",
    [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        {"train_time_interval": timedelta(seconds=0)},
        {"monitor": "step", "mode": "max", "save_weights_only": True},
    ],
    ids=["steps", "epoch", "validation", "time", "monitor"],
)
def test_saved_checkpoints_hold_the_masters(trigger: dict[str, Any], tmp_path: Path) -> None:
    class Logs(Trained):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            self.log("step", float(self.global_step))
            return super().training_step(batch, index)

    model = Logs(net())
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=1 if "monitor" in trigger else -1, **trigger)
    callbacks = [saving, QuantizationCallback(None, qat=QAT)]
    quiet_trainer(
        tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True, accumulate_grad_batches=4
    ).fit(model)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        state = torch.load(file, weights_only=True)["state_dict"]
        for name in ("net.0.weight", "net.2.weight"):
            assert not torch.equal(quantized(state[name], "int4", 64), state[name])
    if "monitor" not in trigger:
        assert torch.equal(state["net.0.weight"], model.net[0].weight)


# Exceptions


class Fails(Trained):
    def __init__(self, where: str) -> None:
        super().__init__(net())
        self.where = where

    def fail(self, where: str) -> None:
        if where == self.where and (where == "validation" or self.trainer.global_step == 2):
            self.before = [weight.clone() for weight in self.masters]
            raise ArithmeticError(where)

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.masters = [weight.detach().clone() for weight in self.net.parameters()]

    on_validation_epoch_start = lambda self: self.on_train_batch_start(None, 0)  # type: ignore[arg-type]  # noqa: E731

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        assert on_the_grid(self.net) == [True, True]
        self.fail("training")
        return loss

    def backward(self, loss: Tensor, *args: Any) -> None:
        loss.backward()
        assert on_the_grid(self.net) == [True, True]
        self.fail("backward")

    def validation_step(self, batch: Tensor, index: int) -> None:
        super().validation_step(batch, index)
        assert on_the_grid(self.net) == [True, True]
        self.fail("validation")

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.trainer.global_step == 2 and self.masters.clear())
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any) -> None:
        def closure_then_fail() -> Any:
            result = closure()
            self.fail("optimizer")
            return result

        super().optimizer_step(epoch, index, optimizer, closure_then_fail)


@pytest.mark.parametrize("where", ["training", "backward", "optimizer", "validation"])
def test_an_exception_leaves_the_masters_in_place(where: str, tmp_path: Path) -> None:
    model = Fails(where)
    callback = QuantizationCallback(None, qat=QAT)
    trainer = quiet_trainer(tmp_path, max_steps=8, val_check_interval=3, callbacks=[callback])
    with pytest.raises(ArithmeticError, match=where):
        trainer.fit(model)
    for weight, master in zip(model.net.parameters(), model.before, strict=True):
        assert torch.equal(weight, master)
    assert not any(on_the_grid(model.net))
    assert_left_alone(model, trainer)


def test_a_checkpoint_on_an_exception_holds_the_masters(tmp_path: Path) -> None:
    model = Fails("training")
    callbacks = [OnExceptionCheckpoint(tmp_path), QuantizationCallback(None, qat=QAT)]
    with pytest.raises(ArithmeticError):
        quiet_trainer(tmp_path, max_steps=8, callbacks=callbacks, enable_checkpointing=True).fit(model)
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    for (name, weight), master in zip(model.net.named_parameters(), model.before, strict=True):
        assert torch.equal(state[f"net.{name}"], master)
        assert torch.equal(weight, master)


# What is left behind


def assert_left_alone(model: nn.Module, trainer: pl.Trainer) -> None:
    hooks = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    for each in model.modules():
        assert not any(getattr(each, hook) for hook in hooks)
    wrapped = {"train_step_context", "backward", "optimizer_step", "post_backward", "pre_backward", "val_step_context"}
    assert wrapped.isdisjoint(vars(trainer.precision_plugin))
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("model", [lambda: Trained(net()), Adversaries], ids=["automatic", "manual"])
def test_nothing_is_left_behind(model: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(qat=QAT)])
    module = model()
    names, identities = zip(*((name, id(value)) for name, value in module.named_parameters()), strict=True)
    keys, metadata = list(module.state_dict()), module.state_dict()._metadata
    trainer.fit(module)
    assert_left_alone(module, trainer)
    assert [*zip(names, identities, strict=True)] == [(name, id(value)) for name, value in module.named_parameters()]
    assert list(module.state_dict()) == keys
    assert module.state_dict()._metadata == metadata


def test_a_model_can_be_copied_and_pickled_while_it_trains(tmp_path: Path) -> None:
    copies: list[nn.Module] = []

    class Copies(Trained):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            copies.append(copy.deepcopy(self.net))
            copies.append(pickle.loads(pickle.dumps(self.net)))
            buffer = io.BytesIO()
            torch.save(self.net, buffer)
            return super().training_step(batch, index)

    qat = QATConfig([WeightRule(codebook="int4", block_size=64)], activations=[{"pattern": "net.*"}])
    quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizationCallback(qat=qat)]).fit(Copies(net()))
    for each in copies:
        each.load_state_dict(each.state_dict())
        x = torch.randn(3, 64)
        expected = nn.functional.linear(torch.tanh(nn.functional.linear(x, each[0].weight, each[0].bias)),
                                        each[2].weight, each[2].bias)  # fmt: skip
        assert torch.equal(each(x), expected)  # no activation is quantized any more


# Optimizers past the Trainer


class RawOptimizer(Adversaries):
    """Steps the optimizers of ``configure_optimizers``, not the Trainer's wrappers."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers(use_pl_optimizer=False)


def test_optimizers_stepped_past_the_trainer_update_the_masters(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "limit_val_batches": 0}
    expected = trained(lambda: RawOptimizer(straight_through("int4", 64)), tmp_path, **options)
    assert_trained_alike(trained(RawOptimizer, tmp_path, QuantizationCallback(qat=QAT), **options), expected)


def test_a_closure_past_the_trainer_is_refused(tmp_path: Path) -> None:
    class Closure(RawOptimizer):
        def training_step(self, batch: Tensor, index: int) -> None:
            self.optimizers()[0].step(lambda: self.loss(batch))

    with pytest.raises(RuntimeError, match=r"AdamW\.step was called with one past the Trainer; call the step of"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizationCallback(qat=QAT)]).fit(Closure())


def test_a_closure_of_the_trainers_optimizer_trains_as_with_autograd(tmp_path: Path) -> None:
    class Closure(Adversaries):
        def training_step(self, batch: Tensor, index: int) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.call(self.net["g"], batch).square().mean()
                self.manual_backward(loss)
                self.losses.append(loss.item())
                return loss

            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step(closure=closure)

    expected = trained(lambda: Closure(straight_through("int4", 64)), tmp_path, max_steps=6)
    assert_trained_alike(trained(Closure, tmp_path, QuantizationCallback(qat=QAT), max_steps=6), expected)


def test_a_lambda_callback_sees_the_masters(tmp_path: Path) -> None:
    seen = Seen()
    watch = LambdaCallback(on_after_backward=lambda trainer, module: seen.look("", module.net))
    quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(qat=QAT), watch]).fit(Trained(net()))
    assert seen == [("", False)] * 2


def test_validation_test_and_predict_run_with_quantized_weights(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[QuantizationCallback(qat=QAT)])
    model = Trained(net())
    weights = copy.deepcopy(model.net.state_dict())
    expected = [straight_through("int4", 64)(model.net, batch).square().mean().item() for batch in batches(8)]
    for run in (trainer.validate, trainer.test, trainer.predict):
        model.evaluated.clear()
        run(model)
        assert model.evaluated == expected
        assert all(torch.equal(value, weights[name]) for name, value in model.net.state_dict().items())
    assert_left_alone(model, trainer)
