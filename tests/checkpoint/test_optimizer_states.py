"""States of optimizers that are stored as they are, and what is said of them.

tests/trainer/test_optimizers.py has every optimizer in a Trainer.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Autoencoder, train_and_save
from support.optimizers import Soap
from support.promises import assert_same, load, payloads_of, same_bits
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO, Rule, inspect
from q8lightning.checkpoint.layout import optimizer_states
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.quantization.codecs.table import get_codec


def of_one(state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return a checkpoint with the state of one parameter."""
    return {"optimizer_states": [{"state": {0: state}, "param_groups": [{"params": [0], **options}]}]}


def saved(checkpoint: dict[str, Any], path: Path, policy: Any = "resume", times: int = 1) -> tuple[set[str], list[str]]:
    """Save so many times; return what is encoded, by the last part of the path, and all warnings."""
    io = QuantizedCheckpointIO(checkpoint=policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            io.save_checkpoint(checkpoint, path)
    return {name.rsplit(".", 1)[-1] for name in payloads_of(path)}, [str(each.message) for each in caught]


# The table


def test_the_presets_encode_what_the_table_says_and_nothing_else() -> None:
    for name, policy in PRESETS.items():
        weights = policy.codec_for("state_dict.layer.weight")
        for key, state in optimizer_states.STATES.items():
            codec = policy.codec_for(f"optimizer_states.0.state.3.{key}")
            if state.holds == optimizer_states.EXACT:
                assert codec is None, (name, key)
                assert state.why, f"{key}: the reason is missing"
            elif state.holds == optimizer_states.WEIGHTS:
                assert codec == weights, (name, key)
            else:
                expected = "softsign" if state.holds == optimizer_states.FIRST else "log"
                assert codec is not None, (name, key)
                assert codec.name == expected, (name, key)
        assert policy.codec_for("optimizer_states.0.state.3.memory") is None


def test_every_second_moment_is_kept_from_becoming_zero(tmp_path: Path) -> None:
    """Also by a rule of the user's own, whose codec would do that."""
    values = 10.0 ** torch.linspace(-12, 0, 8192).view(64, 128)
    for key in optimizer_states.SECOND_MOMENTS:
        policy = CheckpointPolicy([Rule(f"optimizer_states.*.{key}", "linear", 4096)])
        encoded, messages = saved(of_one({key: values}), tmp_path / "a.ckpt", policy)
        assert not encoded, key
        assert "nonzero values become zero" in messages[0]


# RMSprop(centered=True)


def steady(centered: bool) -> tuple[nn.Parameter, torch.optim.RMSprop]:
    """Return a parameter whose gradient is nearly the same at each of 120 steps, and its optimizer."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    optimizer = torch.optim.RMSprop([parameter], lr=1e-3, alpha=0.9, centered=centered)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 128, generator=generator)
    for _ in range(120):
        parameter.grad = mean * (1 + 1e-3 * torch.randn(64, 128, generator=generator))
        optimizer.step()
    return parameter, optimizer


def resumed(state: dict[str, Any]) -> Tensor:
    """Return a parameter after one more step from a state."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    optimizer = torch.optim.RMSprop([parameter], lr=1e-3, alpha=0.9, centered=True)
    optimizer.load_state_dict(state)
    parameter.grad = torch.full((64, 128), 0.5)
    optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("policy", ["resume", CheckpointPolicy([Rule("*", "log", 128)])], ids=str)
def test_the_centered_second_moment_is_exact_under_every_policy(policy: Any, tmp_path: Path) -> None:
    _, optimizer = steady(centered=True)
    checkpoint = {"state_dict": {"w": torch.randn(64, 64)}, "optimizer_states": [optimizer.state_dict()]}
    encoded, messages = saved(checkpoint, tmp_path / "a.ckpt", policy, times=2)
    assert "square_avg" not in encoded
    said = [text for text in messages if "centered=True" in text]
    assert len(said) == 1
    assert "square_avg" in said[0]
    after = load(tmp_path / "a.ckpt")["optimizer_states"][0]
    if policy == "resume":
        assert same_bits(resumed(after), resumed(optimizer.state_dict()))
    rounded = get_codec("log", 128)
    state = optimizer.state_dict()["state"][0]
    square_avg = state["square_avg"].view(-1)
    state["square_avg"] = rounded.decode(rounded.encode(square_avg), torch.float32).view(64, 128)
    assert resumed(optimizer.state_dict() | {"state": {0: state}}).isnan().any(), "why it must be exact"


def test_without_centering_the_same_state_is_encoded(tmp_path: Path) -> None:
    _, optimizer = steady(centered=False)
    encoded, messages = saved({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    assert encoded == {"square_avg"}
    assert not messages


# What no rule names


def unknown() -> dict[str, Any]:
    """States with a name that no table has, beside one that it has: in a tensor, in a dict and in a list."""
    values = torch.linspace(-1, 1, 8192)
    state = {"exp_avg": values.clone(), "memory": values.clone(), "own": {"velocity": values.clone()}}
    return of_one(state | {"pair": [values.clone(), values.clone()], "small": torch.ones(64), "count": 3})


def test_a_state_that_no_rule_names_is_said_once_with_the_rule_to_write(tmp_path: Path) -> None:
    encoded, messages = saved(unknown(), tmp_path / "a.ckpt", times=3)
    assert encoded == {"exp_avg"}
    assert len(messages) == 3
    for key, text in zip(("memory", "velocity", "pair.*"), messages, strict=True):
        assert f'Rule("optimizer_states.*.{key}", "softsign", block_size=128)' in text
        assert "not quantized: optimizer_states.0.state.0." in text
    assert "optimizer_states.0.state.0.pair.0 and 1 more" in messages[2]


def test_the_rule_that_the_message_names_ends_it(tmp_path: Path) -> None:
    rules = [*PRESETS["resume"].rules, Rule("optimizer_states.*.velocity"), Rule("optimizer_states.*.pair.*")]
    encode = Rule("optimizer_states.*.memory", "softsign", block_size=128)
    encoded, messages = saved(unknown(), tmp_path / "a.ckpt", CheckpointPolicy([*rules, encode]))
    assert encoded == {"exp_avg", "memory"}
    assert not messages


def test_nothing_is_said_of_optimizers_where_a_policy_is_about_weights(tmp_path: Path) -> None:
    checkpoint = unknown() | {"state_dict": {"weight": torch.randn(64, 64)}}
    for pattern in ("state_dict.*", "*.weight"):
        policy = CheckpointPolicy([Rule(pattern, "softsign"), Rule("optimizer_states.*")])
        assert saved(checkpoint, tmp_path / "a.ckpt", policy)[1] == []
    assert saved(checkpoint, tmp_path / "a.ckpt", CheckpointPolicy([Rule("state_dict.*", "softsign")]))[1] == []


def test_a_rule_for_some_parameters_is_a_rule_for_the_state(tmp_path: Path) -> None:
    rule = Rule("optimizer_states.*.exp_avg", "softsign", parameter="encoder.*")
    checkpoint = of_one({"exp_avg": torch.randn(64, 64)}, param_names=["head.weight"])
    checkpoint["state_dict"] = {"weight": torch.randn(64, 64)}
    policy = CheckpointPolicy([Rule("state_dict.*", "softsign"), rule])
    assert saved(checkpoint, tmp_path / "a.ckpt", policy) == ({"weight"}, [])


def test_compressing_a_file_says_the_same_and_encodes_the_same(tmp_path: Path) -> None:
    from q8lightning.tools.convert.compress import compress

    module = Autoencoder("factored")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_and_save(tmp_path, module, QuantizationCallback())
    said = [str(each.message) for each in caught if "memory" in str(each.message)]
    assert len(said) == 1
    assert "and 1 more" in said[0]
    train_and_save(tmp_path / "plain", Autoencoder("factored"))
    result = compress(tmp_path / "plain" / "a.ckpt", tmp_path / "b.ckpt")
    assert [text for text in result.warnings if "memory" in text and "and 1 more" in text]
    files = [payloads_of(tmp_path / name) for name in ("a.ckpt", "b.ckpt")]
    states = [{path for path in each if path.startswith("optimizer_states")} for each in files]
    assert states[0] == states[1] != set()
    for name in ("a.ckpt", "b.ckpt"):
        found = inspect(tmp_path / name)
        (each,) = found.exceptions
        assert said[0].startswith(f"stored as they are, not quantized: {each.name} ({each.reason})")
        assert f"  exceptions  {each.name} (no rule of the policy names it); as it is" in str(found).splitlines()


def test_the_summary_names_states_that_no_rule_names(tmp_path: Path) -> None:
    saved(unknown(), tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt")["q8lightning"]["kept"] == {
        key: {"name": f"optimizer_states.0.state.0.{first}", "number": number, "why": "no rule of the policy names it"}
        for key, first, number in (("memory", "memory", 1), ("velocity", "own.velocity", 1), ("pair.*", "pair.0", 2))
    }
    saved(of_one({"exp_avg": torch.randn(64, 64)}), tmp_path / "b.ckpt")
    assert "kept" not in load(tmp_path / "b.ckpt")["q8lightning"]


# SOAP


def test_moments_in_different_coordinates_are_no_pair(tmp_path: Path) -> None:
    """``exp_avg`` is in those of the parameter and ``exp_avg_sq`` in those of Q: their quotient is no direction."""
    matrix, vector = nn.Parameter(torch.randn(64, 96)), nn.Parameter(torch.randn(6000))
    optimizer = Soap([matrix, vector])
    for _ in range(4):
        matrix.grad, vector.grad = torch.randn(64, 96), torch.randn(6000)
        optimizer.step()
    state = optimizer.state_dict()
    encoded, messages = saved({"optimizer_states": [state]}, tmp_path / "a.ckpt")
    assert encoded == {"exp_avg", "exp_avg_sq"}
    assert not messages
    after = load(tmp_path / "a.ckpt")
    policy = CheckpointPolicy([*PRESETS["resume"].rules, Rule("optimizer_states.*.Q.*", "linear", residual_bits=8)])
    saved({"optimizer_states": [state]}, tmp_path / "b.ckpt", policy)
    places = [path.removeprefix("optimizer_states.0.state.0.") for path in payloads_of(tmp_path / "b.ckpt")]
    assert {place for place in places if "Q" in place or "GG" in place} == {"Q.0", "Q.1"}, "by a rule of one's own"
    for key in ("GG", "Q"):
        assert_same(after["optimizer_states"][0]["state"][0][key], state["state"][0][key])
    directions = {
        path: figures["update_direction_error"]
        for path, figures in after["q8lightning"]["tensors"].items()
        if "update_direction_error" in figures
    }
    assert directions.keys() == {"optimizer_states.0.state.1.exp_avg"}, "for vectors it is Adam"


# The guard of first moments without a pair


def test_a_first_moment_alone_is_judged_as_the_direction_that_it_is(tmp_path: Path) -> None:
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for codec, bits, error, kept in (("softsign", 4, 0.12, "softsign"), ("softsign", 2, 0.6, "linear")):
        rule = Rule("optimizer_states.*.momentum_buffer", codec, 128, bits)
        policy = CheckpointPolicy([rule])
        _, messages = saved(of_one({"momentum_buffer": values}), tmp_path / "a.ckpt", policy)
        (payload,) = payloads_of(tmp_path / "a.ckpt").values()
        assert payload.codec.name == kept
        assert len(messages) == (kept != codec)
        lost = payload.decode() - values
        assert float(lost.norm() / values.norm()) < 0.2
        assert bool(messages) == (error > 0.2)
        assert all("update direction off by" in text for text in messages)
        again = load(tmp_path / "a.ckpt")
        saved({"optimizer_states": again["optimizer_states"]}, tmp_path / "b.ckpt", policy)
        assert same_bits(payloads_of(tmp_path / "b.ckpt").popitem()[1].data, payload.data)


# States that are quantized already


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW8bit", {}), ("Lion8bit", {}), ("SGD8bit", {"momentum": 0.9}), ("Adagrad8bit", {}), ("AdEMAMix8bit", {})],
)
def test_eight_bit_states_of_bitsandbytes_are_left_alone(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.randn(1024, 1040))  # more than 4,096 blocks of 256: their scales are large, too
    optimizer = getattr(bitsandbytes.optim, name)([weight], lr=1e-3, **options)
    weight.grad = torch.randn(1024, 1040)
    optimizer.step()
    before = optimizer.state_dict()
    encoded, messages = saved({"state_dict": {"w": weight.detach()}, "optimizer_states": [before]}, tmp_path / "a.ckpt")
    assert encoded == {"w"}
    assert not messages
    assert_same(load(tmp_path / "a.ckpt")["optimizer_states"][0], before)


def test_32_bit_states_of_bitsandbytes_are_said_once(tmp_path: Path) -> None:
    """``state1`` is a first moment of Adam and a second moment of RMSprop, which its name does not say."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = bitsandbytes.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.randn(64, 128)
    optimizer.step()
    checkpoint = {"state_dict": {"w": weight.detach()}, "optimizer_states": [optimizer.state_dict()]}
    encoded, messages = saved(checkpoint, tmp_path / "a.ckpt", times=2)
    assert encoded == {"w"}
    assert [key in text for key, text in zip(("*.state1", "*.state2"), messages, strict=True)] == [True, True]
    rules = [Rule("optimizer_states.*.state1", "softsign", 128), Rule("optimizer_states.*.state2", "log", 128)]
    encoded, messages = saved(checkpoint, tmp_path / "a.ckpt", CheckpointPolicy(rules))
    assert (encoded, messages) == ({"state1", "state2"}, [])


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_states_of_torchao_are_left_alone(name: str, tmp_path: Path) -> None:
    """They are tensor subclasses."""
    torchao = pytest.importorskip("torchao.optim")
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = getattr(torchao, name)([weight], lr=1e-3)
    weight.grad = torch.randn(64, 128)
    optimizer.step()
    checkpoint = {"state_dict": {"w": weight.detach()}, "optimizer_states": [optimizer.state_dict()]}
    encoded, messages = saved(checkpoint, tmp_path / "a.ckpt")
    assert encoded == {"w"}
    assert not messages
    after = torch.load(tmp_path / "a.ckpt", weights_only=False)["optimizer_states"][0]["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        assert type(after[key]) is type(optimizer.state_dict()["state"][0][key])
        assert same_bits(after[key].codes, optimizer.state_dict()["state"][0][key].codes)


def test_states_with_the_keys_of_flashoptim_are_left_alone(tmp_path: Path) -> None:
    """As its ``state_dict`` has them, by its source (0.1.4); the optimizer itself needs a GPU.

    ``error_bits`` are bits of the weights that are viewed as bfloat16, so they may look like NaN.
    """
    generator = torch.Generator().manual_seed(0)
    state = {
        "exp_avg::quantized": torch.randint(-128, 128, (512, 512), generator=generator, dtype=torch.int8),
        "exp_avg::scales": torch.rand(8192, generator=generator).half(),
        "exp_avg_sq::quantized": torch.randint(256, (512, 512), generator=generator, dtype=torch.uint8),
        "exp_avg_sq::scales": torch.rand(8192, generator=generator).half(),
        "error_bits": torch.full((512, 512), -1, dtype=torch.int16).view(torch.bfloat16),
        "step": torch.tensor(3.0),
    }
    checkpoint = of_one(state) | {"state_dict": {"w": torch.randn(512, 512)}}
    assert saved(checkpoint, tmp_path / "a.ckpt") == ({"w"}, [])
    after = load(tmp_path / "a.ckpt")["optimizer_states"][0]["state"][0]
    assert all(same_bits(after[key], value) for key, value in state.items())
