"""The configuration and the global step decide which weights are quantized, and when."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from support.models import quiet_trainer, trainer_with
from support.straight_through import Adversaries, Trained, assert_trained_alike, quantized, trained
from torch import Tensor, nn

from q8lightning import ActivationRule, FreezeRule, QATConfig, QuantizationCallback, WeightRule
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.quantization.functional import fake_quantize_rows
from q8lightning.quantization.spec.block_choice import chosen_blocks


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64))


def selected(module: nn.Module, **options: Any) -> dict[str, tuple[str, int, int | None]]:
    named = {name: each.codec for each in FakeQuantizer(module, QATConfig(**options)).weights for name in each.names}
    return {name: (codec.codebook, codec.block_size, codec.axis) for name, codec in named.items()}


# Selection


def test_the_default_takes_every_weight_of_rank_2_or_more() -> None:
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "lstm": nn.LSTM(4, 4)})
    module.register_parameter("bare", nn.Parameter(torch.randn(2, 3, 4)))
    assert selected(module) == dict.fromkeys(
        ("bare", "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"), ("linear", 256, None)
    )


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        {"pattern": "0.*", "codebook": "int4", "block_size": 64},
        {"pattern": "2.*", "codebook": None},
        WeightRule("*", [-1.0, 0.0, 1.0], 128, axis=0),
    ]
    got = selected(layers(), weights=rules)
    assert got["0.weight"] == ("int4", 64, None)
    assert "2.weight" not in got
    assert got["3.weight"][1:] == (64, 0)  # a row of 64 needs no longer block
    assert got["3.weight"][0].startswith("levels:")


def test_what_is_excluded_is_not_quantized() -> None:
    assert list(selected(layers(), exclude=["0.*", "3.weight"])) == ["2.weight"]


def test_the_first_and_the_last_layer_are_left_out_by_a_switch() -> None:
    assert list(selected(layers(), exclude_first_and_last=True)) == ["2.weight"]


def test_a_rank_can_be_asked_for() -> None:
    assert "1.weight" in selected(layers(), min_rank=1)


def test_a_tied_weight_goes_by_all_of_its_names() -> None:
    module = layers()
    module[3].weight = module[0].weight
    assert set(selected(module, weights=[WeightRule("3.weight")])) == {"0.weight", "3.weight"}
    assert set(selected(module, exclude=["3.weight"])) == {"2.weight"}


def test_a_channel_of_an_axis_has_its_own_scale() -> None:
    module = nn.ConvTranspose2d(4, 6, 3)
    quantizer = FakeQuantizer(module, QATConfig([WeightRule(codebook="int4", block_size=4096, axis=1)]))
    before = module.weight.detach().clone()
    quantizer.engage()
    for channel in range(6):
        row = before[:, channel].reshape(-1)
        expected = quantized(row, "int4", 64).view(4, 3, 3)
        assert torch.equal(module.weight[:, channel], expected)


# What is refused, before the first step


def refused(module: Any, error: type[Exception] = ValueError, **options: Any) -> str:
    trainer_options = options.pop("trainer", {})
    model = module if isinstance(module, pl.LightningModule) else Trained(module)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = options.pop("folder")
    trainer = quiet_trainer(folder, max_steps=2, callbacks=[QuantizationCallback(qat=options)], **trainer_options)
    with pytest.raises(error) as raised:
        trainer.fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not vars(trainer.precision_plugin).get("backward")
    return str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [{"pattern": "encoder.*"}]}, "the weight rule 'encoder.*' matches no parameter of rank 2 or more"),
        ({"weights": [{"pattern": "*.bias"}]}, "the weight rule '*.bias' matches no parameter of rank 2 or more"),
        ({"weights": [{"pattern": "*", "axis": 2}]}, "axis 2 is not one of a tensor of shape (64, 64)"),
        ({"exclude": ["head"]}, "the exclude 'head' matches no parameter"),
        ({"exclude": ["*"]}, "QAT selects nothing"),
        ({"activations": [{"pattern": "attn"}]}, "the activation rule 'attn' matches no module"),
        ({"freeze": [{"pattern": "attn", "step": 3}]}, "the freeze rule 'attn' matches no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(layers(), folder=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": []}, "no rule with a codebook"),
        ({"weights": {"pattern": "*"}}, "weights is a list of rules"),
        ({"exclude": "*.bias"}, "exclude is a list of patterns"),
        ({"follow_steps": -1}, "follow_steps is at least 0, got -1; write 0 to follow no step"),
        ({"start_step": 5, "end_step": 5}, "end_step must be after start_step, got 5 and 5"),
        ({"start_step": 5, "ramp": 5, "end_step": 9}, "the ramp must end before end_step, got 5 + 5 > 9"),
        ({"ramp": -1}, "at least 0"),
        ({"weights": [{"codebook": "int9"}]}, "weight rule for '*': codebook is one of"),
        ({"weights": [{"codebook": "dynamic_unsigned"}]}, "has negative levels"),
        ({"weights": [{"block_size": 48}]}, "power of two between 32 and 4096, got 48"),
        ({"activations": [{"pattern": "*", "per": "channel"}]}, 'per is "token" or "tensor", got \'channel\''),
        ({"freeze": [{"pattern": "*", "step": -1}]}, "step must not be negative"),
        ("int4", "got 'int4'; write qat={'weights': [{'codebook': 'int4'}]}"),
        ([{"codebook": "int4"}], "write qat={'weights': [{'codebook': 'int4'}]}"),
        (True, "got True; write qat={} for 8-bit weights"),
        ({"wieghts": []}, "qat has the key 'wieghts' in {'wieghts': []}, but the arguments of QATConfig are weights,"),
        ({"wieghts": []}, "did you mean 'weights'?"),
        ({"weights": [{}, {"pattern": "*.w", "codebok": "int4"}]}, "weights[1] has the key 'codebok' in"),
        ({"weights": [{"codebok": "int4"}]}, "block_size, axis, scale_dtype; did you mean 'codebook'?"),
        ({"weights": ["int4"]}, "weights[0] is of type WeightRule or a mapping of its arguments, got 'int4'; write"),
        ({"weights": [{}, {"pattern": "*.w", "codebook": "int44"}]}, "weights[1]: weight rule for '*.w': codebook is"),
        ({"weights": [{"codebook": "int44"}]}, "got 'int44'; did you mean 'int4'?"),
        ({"weights": [{"codebook": 4}]}, "codebook is a name, a Codebook or a list of levels in [-1, 1], got 4"),
        ({"weights": [{"axis": "0"}]}, "axis is of type int | None, got '0'"),
        ({"weights": [{"pattern": 3}]}, "pattern is of type str, got 3"),
        ({"weights": None}, "weights is a list of rules, got None"),
        ({"activations": ["net.0"]}, "activations[0] is of type ActivationRule or a mapping of its arguments"),
        ({"activations": [{"codebook": "int8"}]}, "activations[0] needs the key 'pattern', got {'codebook': 'int8'}"),
        ({"activations": [{"pattern": "*", "codebook": "nf3"}]}, "did you mean 'nf4'?"),
        ({"freeze": [{"pattern": "*"}]}, "freeze[0] needs the key 'step'"),
        ({"freeze": [{"pattern": "*", "step": "3"}]}, "freeze[0]: step is of type int, got '3'"),
        ({"start_step": "4"}, "start_step is of type int, got '4'"),
        ({"exclude": 4}, "exclude is a list of patterns, got 4"),
    ],
)
def test_a_wrong_configuration_is_refused_where_it_is_made(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizationCallback(qat=options)


def test_an_optimizer_that_evaluates_its_closure_repeatedly_is_refused(tmp_path: Path) -> None:
    class Repeats(Trained):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    assert "evaluates its closure once a step, got LBFGS" in refused(Repeats(layers()), folder=tmp_path)


class Fused(Adversaries):
    """Steps in the middle of backward, as soon as a gradient is there."""

    early = True

    def step_in_backward(self) -> None:
        for parameter in (self.net["g"].weight, self.net["d"].weight):
            optimizer = torch.optim.SGD([parameter], lr=0.1)
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())

    def configure_optimizers(self) -> Any:
        if self.early:
            self.step_in_backward()

    def training_step(self, batch: Tensor, index: int) -> None:
        if not self.early:
            self.step_in_backward()
        self.manual_backward(self.net["g"](batch).square().mean())


def test_a_step_fused_into_backward_is_refused(tmp_path: Path) -> None:
    message = refused(Fused(), folder=tmp_path)
    assert "optimizer steps outside of backward, but net.g.weight has a hook" in message


def test_a_step_that_turns_up_inside_backward_is_refused(tmp_path: Path) -> None:
    model = Fused()
    model.early = False
    assert "SGD steps inside it" in refused(model, RuntimeError, folder=tmp_path)


def test_strategies_that_flatten_parameters_are_refused(tmp_path: Path) -> None:
    trainer = trainer_with(FSDPStrategy(), tmp_path)
    callback = QuantizationCallback(None, qat=QATConfig())
    with pytest.raises(ValueError, match="shards each by itself, got FSDPStrategy; use ModelParallelStrategy"):
        callback.setup(trainer, Trained(layers()), "fit")


def test_lazy_and_overlapping_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is lazy; run one batch"):
        FakeQuantizer(nn.LazyLinear(4), QATConfig())
    module = nn.Module()
    module.register_parameter("wide", nn.Parameter(torch.randn(8, 1).expand(8, 8)))
    with pytest.raises(ValueError, match=r"wide of shape .* has strides"):
        FakeQuantizer(module, QATConfig())


# The schedule


def test_the_share_is_a_function_of_the_step() -> None:
    config = QATConfig(start_step=10, ramp=4, end_step=20)
    assert [config.share(step) for step in (0, 9, 10, 11, 12, 13, 14, 19, 20, 99)] == [
        0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0,
    ]  # fmt: skip
    assert QATConfig().share(0) == 1


def test_each_step_and_each_seed_chooses_its_own_blocks() -> None:
    seeds = [QATConfig(seed=seed).seed_at(step) for seed in range(20) for step in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


class Watch(Trained):
    """Keeps the weights that its forward pass saw, by global step, and the masters it started from."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), batch=torch.randn(4, 64))
        self.seen: dict[int, list[Tensor]] = {}
        self.masters: dict[int, list[Tensor]] = {}
        self.validated: list[list[Tensor]] = []

    def matrices(self) -> list[Tensor]:
        return [self.net[0].weight.detach().clone(), self.net[1].weight.detach().clone()]

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.masters.setdefault(self.global_step, self.matrices())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.setdefault(self.global_step, self.matrices())
        return super().training_step(batch, index)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.validated.append(self.matrices())


SCHEDULE = QATConfig([WeightRule(codebook="int4", block_size=32)], start_step=2, ramp=4, end_step=10, seed=11)


def run(folder: Path, steps: int, ckpt_path: Path | None = None, **options: Any) -> Watch:
    torch.manual_seed(0)
    model = Watch()
    callbacks = [QuantizationCallback(None, qat=SCHEDULE)]
    trainer = quiet_trainer(folder, max_steps=steps, limit_val_batches=0, callbacks=callbacks, **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return model


def test_weights_follow_the_schedule_and_a_resume_in_the_middle_goes_on_with_it(tmp_path: Path) -> None:
    model = run(tmp_path, 12)
    for step in range(12):
        share = SCHEDULE.share(step)
        for index, (seen, master) in enumerate(zip(model.seen[step], model.masters[step], strict=True)):
            blocks, master_blocks = seen.view(-1, 32), master.view(-1, 32)
            full = quantized(master, "int4", 32).view(-1, 32)
            chosen = chosen_blocks(index, len(blocks), share, SCHEDULE.seed_at(step)) if share else torch.zeros(128) > 0
            assert torch.equal(blocks, torch.where(chosen[:, None], full, master_blocks))
            assert abs(float(chosen.float().mean()) - share) < 0.15
    for stop in (1, 3, 4, 7, 11):  # before, at the start, inside the ramp, after it, after the end
        run(tmp_path, stop)
        resumed = run(tmp_path, 12, tmp_path / f"{stop}.ckpt")
        assert min(resumed.seen) == stop
        for step, weights in resumed.seen.items():
            assert all(map(torch.equal, weights, model.seen[step]))


def test_gradient_accumulation_keeps_the_blocks_of_a_step(tmp_path: Path) -> None:
    class Twice(Watch):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if self.global_step in self.seen:
                assert all(map(torch.equal, self.matrices(), self.seen[self.global_step]))
            return super().training_step(batch, index)

    model = Twice()
    callbacks = [QuantizationCallback(None, qat=SCHEDULE)]
    quiet_trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, limit_val_batches=0, callbacks=callbacks).fit(model)
    assert len(model.seen) == 4


def test_validation_quantizes_all_blocks_from_the_start_step_on(tmp_path: Path) -> None:
    model = Watch()
    callbacks = [QuantizationCallback(None, qat=SCHEDULE)]
    quiet_trainer(
        tmp_path, max_steps=12, val_check_interval=1, limit_val_batches=1, callbacks=callbacks, max_epochs=None
    ).fit(model)
    for step, seen in enumerate(model.validated[:11], start=1):
        quantize = SCHEDULE.active(step)
        for value, master in zip(seen, model.masters[step], strict=True):
            assert torch.equal(value, quantized(master, "int4", 32) if quantize else master)


def test_frozen_parameters_keep_their_values(tmp_path: Path) -> None:
    def values(*freeze: FreezeRule) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        model, history = Watch(), []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
                history.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})

        qat = QATConfig([WeightRule(codebook="int4", block_size=32)], freeze=freeze)
        callbacks = [QuantizationCallback(None, qat=qat), Keep()]
        quiet_trainer(tmp_path, max_steps=6, limit_val_batches=0, callbacks=callbacks, gradient_clip_val=0.1).fit(model)
        return history

    free = values()
    history = values(FreezeRule("net.0.*", 3), FreezeRule("*.bias", 5))
    for name in history[0]:
        frozen_after = 3 if name.startswith("0.") else 5 if name.endswith("bias") else 99
        for step in range(1, 6):
            assert torch.equal(history[step][name], history[step - 1][name]) == (step >= frozen_after), (name, step)
    assert all(torch.equal(value, free[2][name]) for name, value in history[2].items())


# Activations


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_activations_are_quantized_as_they_arrive(per: str, tmp_path: Path) -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(fake_quantize_rows(x, "int8", per == "tensor"))

    def train(kind: type[nn.Linear], **rules: Any) -> Trained:
        callback = QuantizationCallback(None, qat=QATConfig([WeightRule(codebook="int4", block_size=32)], **rules))

        def make() -> Trained:
            return Trained(nn.Sequential(kind(64, 100), nn.Tanh(), kind(100, 64)))

        return trained(make, tmp_path, callback, max_steps=4, val_check_interval=2)

    rules = [ActivationRule("net.1", None), {"pattern": "net.*", "codebook": "int8", "per": per}]
    got = train(nn.Linear, activations=rules)
    assert_trained_alike(got, train(Layer))
    assert got.losses != train(nn.Linear).losses


def test_activations_alone_can_be_quantized_and_only_while_training_runs(tmp_path: Path) -> None:
    model = Trained(nn.Sequential(nn.Linear(64, 64)))
    qat = {"weights": [{"codebook": None}], "activations": [{"pattern": "net.0", "codebook": "int2"}]}
    quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(qat=qat)]).fit(model)
    x = torch.randn(3, 64)
    assert torch.equal(model.net(x), nn.functional.linear(x, model.net[0].weight, model.net[0].bias))


def test_activations_follow_the_schedule(tmp_path: Path) -> None:
    seen = []

    class Look(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.equal(x, fake_quantize_rows(x, "normal_float4")))
            return super().forward(x)

    qat = QATConfig(activations=[ActivationRule("net.0", "normal_float4")], start_step=2, end_step=4)
    trainer = quiet_trainer(tmp_path, max_steps=6, limit_val_batches=0, callbacks=[QuantizationCallback(None, qat=qat)])
    trainer.fit(Trained(nn.Sequential(Look(64, 64))))
    assert seen == [False, False, True, True, False, False]


def test_activations_compile_into_one_graph(tmp_path: Path) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    model = Trained(torch.compile(net, backend="aot_eager", fullgraph=True))  # type: ignore[arg-type]
    qat = QATConfig(activations=[ActivationRule("*.0")])
    callbacks = [QuantizationCallback(None, qat=qat)]
    quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=callbacks).fit(model)
    torch.manual_seed(0)


# What it tells


def test_loggers_get_the_error_of_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Watch()
    callback = QuantizationCallback(None, qat=QATConfig([WeightRule(codebook="int4", block_size=64)]))
    errors = []

    class Read(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            errors.append(dict(callback.statistics))

    trainer = quiet_trainer(
        tmp_path, max_steps=4, limit_val_batches=0, logger=CSVLogger(tmp_path), log_every_n_steps=2,
        callbacks=[callback, Read()],
    )  # fmt: skip
    trainer.fit(model)
    assert errors[0] == {}
    assert set(errors[1]) == {"net.0.weight", "net.1.weight"}
    assert errors[2]["net.0.weight"] is errors[1]["net.0.weight"]  # measured at every second step only
    assert errors[3]["net.0.weight"] is not errors[1]["net.0.weight"]

    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = {int(row["step"]): row for row in csv.DictReader(lines) if row["q8/qat/weights/sqnr_db"]}
    assert list(rows) == [1, 3]  # the steps at which Lightning logs
    for step, row in rows.items():
        pairs = list(zip(model.seen[step], model.masters[step], strict=True))
        lost = sum(float(((seen - master).double() ** 2).sum()) for seen, master in pairs)
        squares = sum(float((master.double() ** 2).sum()) for _, master in pairs)
        assert float(row["q8/qat/weights/sqnr_db"]) == pytest.approx(10 * math.log10(squares / lost), rel=1e-6)
        assert float(row["q8/qat/weights/relative_error"]) == pytest.approx(math.sqrt(lost / squares), rel=1e-6)
    assert float(trainer.callback_metrics["q8/qat/weights/sqnr_db"]) == pytest.approx(
        float(rows[3]["q8/qat/weights/sqnr_db"])
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_does_not_wait_for_the_gpu_to_tell_it(tmp_path: Path) -> None:
    """Each step's values are on the logger in the end, in the order of the steps."""

    class Hurried(QuantizationCallback):
        def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().on_train_batch_end(trainer, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    callback = Hurried(None, qat=QATConfig([WeightRule(codebook="int4", block_size=64)]))
    trainer = quiet_trainer(
        tmp_path, accelerator="gpu", max_steps=6, limit_val_batches=0, logger=CSVLogger(tmp_path), log_every_n_steps=1,
        callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))))
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines) if row["q8/qat/weights/sqnr_db"]]
    assert steps == list(range(6))
