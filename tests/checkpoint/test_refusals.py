"""What cannot be kept is stored as it is, with a warning that names it; what cannot work is refused at the start."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from support.models import Autoencoder, Shrink, batches, quiet_trainer, trainer_with
from support.promises import load, payloads_of, same_bits, same_parts, stored
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO, Rule

# Values that a codec cannot hold


def saved(tensors: dict[str, Tensor], folder: Path, *rules: Rule) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """Save a state dict, by default as ``compact``; return it loaded, the encoded names and the warnings."""
    io = QuantizedCheckpointIO(checkpoint=CheckpointPolicy(rules) if rules else "compact")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        io.save_checkpoint({"state_dict": tensors}, folder / "a.ckpt")
    encoded = {name.removeprefix("state_dict.") for name in payloads_of(folder / "a.ckpt")}
    return load(folder / "a.ckpt")["state_dict"], encoded, [str(each.message) for each in caught]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 2500, 4999])
def test_a_tensor_that_is_not_finite_is_stored_as_it_is_and_named(
    value: float, position: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    broken = torch.randn(5000).to(dtype)
    broken[position] = value
    after, encoded, messages = saved({"broken": broken, "whole": torch.randn(5000).to(dtype)}, tmp_path)
    assert same_bits(after["broken"], broken)
    assert encoded == {"whole"}
    assert len(messages) == 1
    assert "state_dict.broken (it holds NaN or infinity)" in messages[0]
    assert "whole" not in messages[0]


def test_a_diverged_training_saves_everything_it_has(preset: str, tmp_path: Path) -> None:
    module = Autoencoder()
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[QuantizationCallback(preset)])
    trainer.fit(module)
    module.decoder.weight.data[3, 3] = torch.nan
    moments = trainer.optimizers[0].state[module.decoder.weight]
    moments["exp_avg"][0, 0] = torch.inf
    moments["exp_avg_sq"][1, 1] = -1e-9
    live = {name: tensor.clone() for name, tensor in moments.items()}
    with pytest.warns(UserWarning, match="not quantized") as caught:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    message = str(next(each.message for each in caught if "not quantized" in str(each.message)))
    index = next(i for i, (name, _) in enumerate(module.named_parameters()) if name == "decoder.weight")
    assert "state_dict.decoder.weight (it holds NaN or infinity)" in message
    assert "decoder.weight: exp_avg (it holds NaN or infinity)" in message
    assert "decoder.weight: exp_avg_sq (it holds a negative value)" in message
    after = load(tmp_path / "a.ckpt")
    assert same_bits(after["state_dict"]["decoder.weight"], module.decoder.weight)
    for name, tensor in live.items():
        assert same_bits(after["optimizer_states"][0]["state"][index][name], tensor), name
    assert "state_dict.encoder.0.weight" in payloads_of(tmp_path / "a.ckpt")


@pytest.mark.parametrize("codec", ["log", "dynamic_unsigned"])
def test_a_negative_value_where_none_belongs_is_stored_as_it_is_and_named(codec: str, tmp_path: Path) -> None:
    squares = torch.rand(64, 64)
    squares[1, 1] = -1e-12
    after, encoded, messages = saved({"squares": squares}, tmp_path, Rule("state_dict.*", codec))
    assert same_bits(after["squares"], squares)
    assert not encoded
    assert "state_dict.squares (it holds a negative value" in messages[0]


def test_negative_zero_is_no_negative_value(tmp_path: Path) -> None:
    squares = torch.rand(64, 64)
    squares[1, 1] = -0.0
    after, encoded, messages = saved({"squares": squares}, tmp_path, Rule("state_dict.*", "log"))
    assert encoded == {"squares"}
    assert not messages
    assert after["squares"][1, 1] == 0


@pytest.mark.parametrize("codec", ["log", "softsign", "linear"])
def test_float64_beyond_the_range_of_float32_is_stored_as_it_is(codec: str, tmp_path: Path) -> None:
    huge = torch.rand(4096, dtype=torch.float64)
    huge[9] = 1e39
    after, encoded, messages = saved({"huge": huge}, tmp_path, Rule("state_dict.*", codec))
    assert same_bits(after["huge"], huge)
    assert not encoded
    assert "state_dict.huge (its values exceed the range of float32)" in messages[0]


def test_a_float64_second_moment_that_is_zero_in_float32_is_stored_as_it_is(tmp_path: Path) -> None:
    tiny = torch.rand(4096, dtype=torch.float64)
    tiny[9] = 1e-60
    after, encoded, messages = saved({"tiny": tiny}, tmp_path, Rule("state_dict.*", "log"))
    assert same_bits(after["tiny"], tiny)
    assert not encoded
    assert "state_dict.tiny (it holds nonzero values that are zero in float32)" in messages[0]


@pytest.mark.parametrize("codec", ["softsign", "linear", "dynamic"])
def test_float64_blocks_that_are_all_zero_in_float32_are_not_lost(codec: str, tmp_path: Path) -> None:
    tiny = torch.randn(8192, dtype=torch.float64)
    tiny[4096:] *= 1e-60
    after, encoded, messages = saved({"tiny": tiny}, tmp_path, Rule("state_dict.*", codec))
    assert same_bits(after["tiny"], tiny)
    assert not encoded
    assert "state_dict.tiny" in messages[0]


def test_a_warning_stays_readable_with_levels_of_ones_own(tmp_path: Path) -> None:
    levels = [-1.0, *(k / 128 for k in range(-100, 101)), 1.0]
    small = (torch.rand(64, 64) * 2.0**-20).half()
    _, encoded, messages = saved({"small": small}, tmp_path, Rule("state_dict.*", levels))
    assert not encoded
    assert len(messages[0]) < 500


@pytest.mark.parametrize(
    ("codec", "largest", "too_coarse"),
    [
        ("softsign", 2877, False),
        ("linear", 2877, False),
        ("log", 2877, False),
        ("dynamic", 2877, True),
        ("dynamic_unsigned", 3944, True),
        ("fp8_e4m3", 2198, True),
        ("fp8_e5m2", 1228, True),
    ],
)
def test_half_precision_is_stable_down_to_its_smallest_numbers(
    codec: str, largest: int, too_coarse: bool, tmp_path: Path
) -> None:
    """Levels finer than the numbers that half precision has: rounding to these finds other codes the next time.

    The tensor is one block of all half-precision numbers from zero to the one whose bits are ``largest``.
    """
    values = torch.arange(4096).clamp(max=largest).to(torch.int16).view(torch.float16)
    rule = Rule("state_dict.*", codec, 4096)
    first, encoded, messages = saved({"small": values}, tmp_path, rule)
    before = payloads_of(tmp_path / "a.ckpt")
    if too_coarse:
        assert same_bits(first["small"], values)
        assert "state_dict.small (torch.float16 is too coarse" in messages[0]
    else:
        assert encoded
        assert not messages
    second, again, _ = saved(first, tmp_path, rule)
    assert again == encoded
    assert same_bits(first["small"], second["small"])
    assert all(same_parts(payload, payloads_of(tmp_path / "a.ckpt")[name]) for name, payload in before.items())


def test_nothing_is_refused_without_reason(preset: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not quantized.*")
        QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(
            {
                "state_dict": {
                    "zeros": torch.zeros(64, 64),
                    "ones": torch.ones(64, 64),
                    "huge": torch.rand(4096) * 3e38,
                },
                "optimizer_states": [{"state": {0: {"exp_avg_sq": torch.rand(4096) * 1e-40}}}],
            },
            tmp_path / "a.ckpt",
        )
    assert len(payloads_of(tmp_path / "a.ckpt")) == 4
    after = load(tmp_path / "a.ckpt")
    assert not after["state_dict"]["zeros"].any()
    assert after["state_dict"]["ones"].eq(1).all()
    assert after["state_dict"]["huge"].isfinite().all()
    assert after["optimizer_states"][0]["state"][0]["exp_avg_sq"].gt(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_view_of_a_shared_memory_does_not_spoil_its_neighbours(bad: float, tmp_path: Path) -> None:
    memory = torch.randn(12288)
    memory[100] = bad
    views = {"broken": memory[:4096], "whole": memory[4096:8192], "small": memory[8192:8292]}
    after, encoded, _ = saved(dict(views), tmp_path)
    assert encoded == {"whole"}
    assert same_bits(after["broken"], views["broken"])
    assert same_bits(after["whole"], stored(views["whole"], "softsign", 256))
    assert same_bits(after["small"], views["small"])


# Options


@pytest.mark.parametrize("make", [QuantizationCallback, lambda name: QuantizedCheckpointIO(checkpoint=name)])
@pytest.mark.parametrize("name", ["tiny", "Resume", "", "resume "])
def test_an_unknown_preset_is_refused_with_the_known_ones(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"resume, compact, precise.*got"):
        make(name)


@pytest.mark.parametrize("make", [QuantizationCallback, lambda name: QuantizedCheckpointIO(checkpoint=name)])
@pytest.mark.parametrize("value", [True, 8, ["resume"], {"weights": "linear"}])
def test_what_is_no_preset_at_all_is_refused_alike(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="resume, compact, precise"):
        make(value)


@pytest.mark.parametrize("value", ["compact", "", 8, CheckpointPolicy([Rule("state_dict.*", "softsign")])])
def test_a_policy_in_the_place_of_a_checkpoint_io_is_refused_before_a_save_is_lost(value: Any) -> None:
    with pytest.raises(ValueError, match=r"QuantizedCheckpointIO\(checkpoint="):
        QuantizedCheckpointIO(value)


@pytest.mark.parametrize("codec", ["int9", "Linear", "", "levels:zz", "logarithm"])
def test_an_unknown_codec_is_refused_with_the_rule_it_is_in(codec: str) -> None:
    with pytest.raises(ValueError, match=r"rule for 'state_dict\.\*'"):
        Rule("state_dict.*", codec)


@pytest.mark.parametrize("block_size", [100, 16, 8192, 0, -128, 255, 4097])
def test_a_block_size_that_no_kernel_has_is_refused_with_one_that_fits(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"block_size must be a power of two .* got {block_size}; try \d+"):
        Rule("state_dict.*", "linear", block_size)


@pytest.mark.parametrize("block_size", [128.0, "128", True, None])
def test_a_block_size_that_is_no_integer_is_refused(block_size: Any) -> None:
    with pytest.raises(ValueError, match="block_size must be an integer"):
        Rule("state_dict.*", "linear", block_size)


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ([0.0, 0.5, 0.25, 1.0], "increase strictly"),
        ([-1.0, 0.0, 0.0, 1.0], "increase strictly"),
        ([-2.0, 0.0, 1.0], r"lie in \[-1, 1\]"),
        ([-1.0, 0.0, 1.5], r"lie in \[-1, 1\]"),
        ([-1.0, 0.0, float("nan")], r"lie in \[-1, 1\]"),
        ([0.0], "2 to 256 levels"),
        ([k / 300 for k in range(-150, 151)], "2 to 256 levels"),
        ([-1.0, 0.5, 1.0], "level 0"),
        ([-0.5, 0.0, 0.5], "1 or -1"),
    ],
)
def test_levels_that_are_no_codebook_are_refused(levels: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rule("state_dict.*", levels)


@pytest.mark.parametrize("codec", ["log", "softsign", "dynamic"])
def test_a_residual_is_for_linear_only(codec: str) -> None:
    with pytest.raises(ValueError, match=rf"residual .* got '{codec}'"):
        Rule("state_dict.*", codec, residual_bits=8)


def test_a_policy_without_any_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rule with a codec"):
        CheckpointPolicy([Rule("state_dict.*")])
    with pytest.raises(ValueError, match="at least one rule with a codec"):
        CheckpointPolicy([])


def test_a_wrong_smallest_size_is_refused() -> None:
    with pytest.raises(ValueError, match="min_numel must be an integer of at least 1, got 0"):
        CheckpointPolicy([Rule("*", "linear")], min_numel=0)


@pytest.mark.parametrize(
    "rule",
    [
        Rule("encoder.*", "softsign"),
        Rule("stat_dict.*", "softsign"),
        Rule("optimizer_state.*.exp_avg", "softsign"),
        Rule("state_dict.enc.*", "softsign"),
        Rule("state_dict.*", "softsign", parameter="enc.*"),
        Rule("optimizer_states.*.exp_avgs", "softsign", parameter="x"),
    ],
    ids=[
        "no section",
        "misspelled section",
        "section in the singular",
        "wrong name",
        "wrong parameter",
        "wrong parameter of a moment",
    ],
)
def test_a_policy_that_matches_nothing_is_refused_before_the_first_step(rule: Rule, tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback(CheckpointPolicy([rule]))]
    )
    with pytest.raises(ValueError, match=r"matches no tensor of this model: patterns .*encoder\.0\.weight"):
        trainer.fit(Autoencoder())
    assert trainer.global_step == 0


class Guess(pl.LightningModule):
    """A baseline without parameters: it trains nothing, and its checkpoints hold nothing to quantize."""

    def training_step(self, batch: Tensor, index: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None

    def train_dataloader(self) -> Any:
        return batches()


def test_a_model_without_parameters_trains_with_the_callback_as_without(preset: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[QuantizationCallback(preset)])
    trainer.fit(Guess())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt")["state_dict"] == {}


# Trainers and strategies


def deepspeed() -> DeepSpeedStrategy:
    """The strategy as it is after its constructor, which asks for a package that no CPU machine has."""
    return object.__new__(DeepSpeedStrategy)


class OwnShards(ModelParallelStrategy):
    """Writes its checkpoints in a way of its own."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("make", [deepspeed, OwnShards], ids=["deepspeed", "own shards"])
def test_a_strategy_whose_saves_pass_nothing_of_ours_is_refused_at_setup(make: Any, tmp_path: Path) -> None:
    trainer = trainer_with(make(), tmp_path)
    with pytest.raises(ValueError, match="without the Trainer's CheckpointIO") as error:
        QuantizationCallback().setup(trainer, Autoencoder(), "fit")
    assert type(trainer.strategy).__name__ in str(error.value)
    for other in ("ModelParallelStrategy", "FSDPStrategy", "DDP"):
        assert other in str(error.value)
    QuantizationCallback(checkpoint=None).setup(trainer, Autoencoder(), "fit")


@pytest.mark.parametrize(
    "make",
    [
        lambda: FSDPStrategy(state_dict_type="full"),
        lambda: ModelParallelStrategy(save_distributed_checkpoint=False),
    ],
    ids=["fsdp-full", "model-parallel-full"],
)
def test_the_same_strategies_with_whole_checkpoints_are_accepted(make: Any, tmp_path: Path) -> None:
    trainer = trainer_with(make(), tmp_path)
    QuantizationCallback().setup(trainer, Autoencoder(), "fit")
    assert type(trainer.strategy.checkpoint_io) is QuantizedCheckpointIO


def test_a_refused_tensor_does_not_stop_the_training(tmp_path: Path) -> None:
    class Diverging(Shrink):
        def on_train_batch_end(self, *args: Any) -> None:
            self.net.weight.data.fill_(torch.inf)

    trainer = quiet_trainer(
        tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[QuantizationCallback()], limit_val_batches=0
    )
    with pytest.warns(UserWarning, match="training has diverged"):
        trainer.fit(Diverging(nn.Linear(64, 64)))
    (file,) = tmp_path.rglob("*.ckpt")
    assert load(file)["state_dict"]["net.weight"].isinf().all()
