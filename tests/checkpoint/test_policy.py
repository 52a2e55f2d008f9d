"""Rules decide in order, over paths and parameter names; some things no rule reaches."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from support.models import Autoencoder, TwoOptimizers, train_and_save
from support.promises import load, payloads_of, same_bits, tensors
from torch import nn

from q8lightning import CheckpointPolicy, Codebook, QuantizationCallback, QuantizedCheckpointIO, Rule
from q8lightning.checkpoint.policy import PRESETS, CodecName, Preset
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.spec.codebook import ALIASES, BUILTIN

TERNARY = [-1.0, 0.0, 1.0]


def codecs_of(path: Path) -> dict[str, tuple[str, int, int, int]]:
    """Return name, block size, bits and residual bits of the codec of every payload in a file, by path."""
    return {name: described(payload.codec) for name, payload in payloads_of(path).items()}


def described(codec: Codec) -> tuple[str, int, int, int]:
    return codec.name, codec.block_size, codec.bits, codec.residual_bits


def save(state: dict[str, Any], path: Path, *rules: Any, **options: Any) -> dict[str, tuple[str, int, int, int]]:
    QuantizedCheckpointIO(checkpoint=CheckpointPolicy(rules, **options)).save_checkpoint(state, path)
    return codecs_of(path)


# Order and patterns


def test_the_first_rule_that_matches_decides() -> None:
    policy = CheckpointPolicy(
        [
            Rule("state_dict.head.*"),
            Rule("state_dict.body.0.*", "linear", 64, bits=7, residual_bits=3),
            Rule("state_dict.body.*", "dynamic", 128),
            Rule("state_dict.*", "softsign"),
            Rule("state_dict.body.1.weight", "int4"),
        ]
    )

    def found(path: str) -> Any:
        codec = policy.codec_for(path)
        return codec and described(codec)

    assert found("state_dict.head.weight") is None
    assert found("state_dict.body.0.weight") == ("linear", 64, 7, 3)
    assert found("state_dict.body.1.weight") == ("dynamic", 128, 8, 0)
    assert found("state_dict.tail") == ("softsign", 256, 8, 0)
    assert found("optimizer_states.0.state.0.exp_avg") is None


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("state_dict.*", "state_dict.a.b.c", True),
        ("state_dict.*.weight", "state_dict.a.b.weight", True),
        ("state_dict.*.weight", "state_dict.weight", False),
        ("state_dict.layer[12].*", "state_dict.layer2.weight", True),
        ("state_dict.layer?.*", "state_dict.layer12.weight", False),
        ("state_dict", "state_dict.weight", False),
        ("*.weight", "state_dict.a.weight", True),
        ("state_dict.A", "state_dict.a", False),
        ("optimizer_states.*.exp_avg", "optimizer_states.0.state.0.exp_avg_sq", False),
        ("optimizer_states.1.*", "optimizer_states.0.state.1.exp_avg", False),
        ("callbacks.*", "callbacks.Diary.exp_avg", True),
    ],
)
def test_patterns_are_shell_patterns_over_the_whole_path(pattern: str, path: str, matches: bool) -> None:
    assert (CheckpointPolicy([Rule(pattern, "linear")]).codec_for(path) is not None) is matches


def test_a_parameter_pattern_needs_a_known_parameter() -> None:
    policy = CheckpointPolicy([Rule("*", "linear", parameter="head.*"), Rule("*", "softsign", parameter="*")])
    path = "optimizer_states.0.state.3.exp_avg"
    assert policy.codec_for(path, "head.weight").name == "linear"  # type: ignore[union-attr]
    assert policy.codec_for(path, "body.weight").name == "softsign"  # type: ignore[union-attr]
    assert policy.codec_for(path, None).name == "softsign"  # type: ignore[union-attr]


def test_rules_decide_for_a_whole_training(tmp_path: Path) -> None:
    policy = CheckpointPolicy(
        [
            Rule("state_dict.decoder.*"),
            Rule("state_dict.*", "int8", 64),
            Rule("optimizer_states.*.exp_avg_sq", "dynamic_unsigned", 32),
            Rule("optimizer_states.*.memory", "softsign"),
            Rule("callbacks.*", "softsign"),
            Rule("something_extra.*", TERNARY, 4096),
        ],
        min_sqnr_db=None,
    )
    train_and_save(tmp_path, Autoencoder(), QuantizationCallback(policy))
    assert codecs_of(tmp_path / "a.ckpt") == {
        "state_dict.encoder.0.weight": ("int8", 64, 8, 0),
        "something_extra.floats": (Codebook("custom", tuple(TERNARY)).spec, 4096, 2, 0),
        "optimizer_states.0.state.0.exp_avg_sq": ("dynamic_unsigned", 32, 8, 0),
        "optimizer_states.0.state.4.exp_avg_sq": ("dynamic_unsigned", 32, 8, 0),
    }
    before = torch.linspace(0, 1, 5000)  # blocks of 4096, of which each keeps its largest value and zero
    levels = load(tmp_path / "a.ckpt")["something_extra"]["floats"].unique()
    assert levels.tolist() == [0.0, before[4095].item(), before[4999].item()]


# Parameter names reach the optimizers' states


class ManyGroups(Autoencoder):
    """Parameters in several groups, in another order than the model's, one of them frozen."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.encoder[0].bias.requires_grad_(False)
        return torch.optim.AdamW(
            [
                {"params": [self.decoder.bias, self.decoder.weight], "weight_decay": 0.0},
                {"params": [self.encoder[0].bias, self.encoder[1].weight, self.encoder[0].weight]},
            ]
        )


@pytest.mark.parametrize(
    ("make", "encoded"),
    [
        (Autoencoder, "optimizer_states.0.state.4.exp_avg"),
        (TwoOptimizers, "optimizer_states.1.state.0.momentum_buffer"),
        (ManyGroups, "optimizer_states.0.state.1.exp_avg"),
    ],
    ids=["one optimizer", "two optimizers", "groups in another order"],
)
def test_rules_know_the_parameter_that_an_optimizer_state_belongs_to(make: Any, encoded: str, tmp_path: Path) -> None:
    policy = CheckpointPolicy(
        [
            Rule("optimizer_states.*.exp_avg", "softsign", 128, parameter="decoder.*"),
            Rule("optimizer_states.*.momentum_buffer", "softsign", 128, parameter="decoder.*"),
        ]
    )
    module = make()
    trainer = train_and_save(tmp_path, module, QuantizationCallback(policy), max_steps=1)
    (found,) = payloads_of(tmp_path / "a.ckpt")
    assert found == encoded
    payload = payloads_of(tmp_path / "a.ckpt")[found]
    optimizer = trainer.optimizers[-1]
    live = optimizer.state[module.decoder.weight][encoded.rsplit(".", 1)[-1]]
    scale = live.abs().max()
    assert (payload.decode() - live).abs().max() < scale / 64, "the state is of another parameter"


def test_without_a_callback_named_parameters_are_known_from_the_checkpoint(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "head": nn.Linear(64, 64)})
    optimizer = torch.optim.AdamW(model.named_parameters())
    model["head"](model["body"](torch.randn(4, 64))).sum().backward()
    optimizer.step()
    state = {"optimizer_states": [optimizer.state_dict()]}
    rule = Rule("optimizer_states.*.exp_avg", "softsign", parameter="head.*")
    assert list(save(state, tmp_path / "a.ckpt", rule)) == ["optimizer_states.0.state.2.exp_avg"]


def test_states_that_go_by_name_are_known_by_it(tmp_path: Path) -> None:
    """As those of FSDP do."""
    moments = {name: {"exp_avg": torch.randn(64, 64)} for name in ("body.weight", "head.weight")}
    state = {"optimizer_states": [{"state": moments, "param_groups": [{"params": list(moments)}]}]}
    rule = Rule("optimizer_states.*.exp_avg", "softsign", parameter="head.*")
    assert list(save(state, tmp_path / "a.ckpt", rule)) == ["optimizer_states.0.state.head.weight.exp_avg"]


# What no rule reaches


@pytest.mark.parametrize(
    "section", ["loops", "lr_schedulers", "hyper_parameters", "datamodule_hyper_parameters", "MixedPrecision"]
)
def test_some_sections_no_rule_reaches(section: str, tmp_path: Path) -> None:
    values = torch.randn(5000)
    state = {section: {"deep": [values]}, "state_dict": {"weight": torch.randn(64, 64)}}
    assert list(save(state, tmp_path / "a.ckpt", Rule("*", "softsign"))) == ["state_dict.weight"]
    assert same_bits(load(tmp_path / "a.ckpt")[section]["deep"][0], values)


def test_a_rule_for_everything_leaves_the_rest_of_a_training_alone(tmp_path: Path) -> None:
    policy = CheckpointPolicy([Rule("*", "softsign")], min_numel=1)
    module = Autoencoder()
    train_and_save(tmp_path, module, QuantizationCallback(policy))
    encoded, after = set(payloads_of(tmp_path / "a.ckpt")), load(tmp_path / "a.ckpt")
    assert "state_dict.encoder.0.bias" in encoded
    for path, tensor in tensors(after):
        name = ".".join(map(str, path))
        if not tensor.is_floating_point() or tensor.ndim == 0 or path[-1] in ("table", "running_mean", "running_var"):
            assert name not in encoded
    buffers = dict(module.named_buffers())
    assert len(buffers) == 5
    for name, buffer in buffers.items():
        assert same_bits(after["state_dict"][name], buffer), name


@pytest.mark.parametrize("numel", [1, 99, 100, 4096])
def test_tensors_below_the_smallest_size_are_left_alone(numel: int, tmp_path: Path) -> None:
    state = {"state_dict": {"weight": torch.randn(numel)}}
    assert bool(save(state, tmp_path / "a.ckpt", Rule("*", "softsign"), min_numel=100)) is (numel >= 100)


@pytest.mark.parametrize(
    ("dtype", "rule", "smaller"),
    [
        (torch.bfloat16, {"codec": "linear", "residual_bits": 8}, False),
        (torch.bfloat16, {"codec": "linear", "residual_bits": 7}, True),
        (torch.bfloat16, {"codec": "linear", "residual_bits": 7, "block_size": 32}, False),  # a bit a value for scales
        (torch.float16, {"codec": "linear", "residual_bits": 8}, False),
        (torch.float32, {"codec": "linear", "residual_bits": 8}, True),
        (torch.float64, {"codec": "linear", "residual_bits": 8}, True),
        (torch.bfloat16, {"codec": "log", "block_size": 32}, True),
        (torch.float16, {"codec": "linear"}, True),
    ],
    ids=str,
)
def test_what_would_not_become_smaller_is_stored_as_it_is(
    dtype: torch.dtype, rule: dict[str, Any], smaller: bool, tmp_path: Path
) -> None:
    weight = torch.rand(64, 64).to(dtype)
    assert bool(save({"state_dict": {"weight": weight}}, tmp_path / "a.ckpt", Rule("*", **rule))) is smaller
    assert smaller or same_bits(load(tmp_path / "a.ckpt")["state_dict"]["weight"], weight)


def test_one_element_does_not_become_larger(tmp_path: Path) -> None:
    state = {"state_dict": {"one": torch.randn(1), "two": torch.randn(2)}}
    assert list(save(state, tmp_path / "a.ckpt", Rule("*", "softsign"), min_numel=1)) == ["state_dict.two"]


# Ways to write a policy


def test_rules_may_be_mappings_as_a_yaml_file_gives_them() -> None:
    written = CheckpointPolicy(
        rules=[
            {"pattern": "state_dict.head.*"},
            {"pattern": "state_dict.*", "codec": "linear", "block_size": 256, "residual_bits": 8},
            {"pattern": "optimizer_states.*.exp_avg", "codec": "softsign", "parameter": "body.*"},
            {"pattern": "optimizer_states.*", "codec": [-1, 0, 1]},
        ]
    )
    assert written == CheckpointPolicy(
        [
            Rule("state_dict.head.*"),
            Rule("state_dict.*", "linear", 256, residual_bits=8),
            Rule("optimizer_states.*.exp_avg", "softsign", parameter="body.*"),
            Rule("optimizer_states.*", [-1.0, 0.0, 1.0]),
        ]
    )
    assert hash(written) == hash(written)


@pytest.mark.parametrize("rule", [{"codec": "linear"}, {"pattern": "*", "codek": "linear"}], ids=["missing", "unknown"])
def test_a_mapping_that_is_no_rule_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"pattern|codek"):
        CheckpointPolicy([rule])


def test_levels_of_ones_own_survive_in_the_file(tmp_path: Path) -> None:
    levels = torch.tensor([-1.0, -0.25, 0.0, 0.3, 1.0])
    weight = torch.randn(64, 64)
    save({"state_dict": {"weight": weight}}, tmp_path / "a.ckpt", Rule("state_dict.*", levels, 4096), min_sqnr_db=None)
    after = load(tmp_path / "a.ckpt")["state_dict"]["weight"]
    assert torch.equal(after.unique(), levels * weight.abs().max())


@pytest.mark.parametrize("levels", [(0.0, 1.0), (-1.0, 0.0)], ids=str)
def test_two_levels_of_ones_own_take_one_bit(tmp_path: Path, levels: tuple[float, float]) -> None:
    weight = 3 * levels[int(levels[0] == 0)] * (torch.rand(5001) > 0.5)
    save({"state_dict": {"weight": weight}}, tmp_path / "a.ckpt", Rule("state_dict.*", levels, 32))
    payload = payloads_of(tmp_path / "a.ckpt")["state_dict.weight"]
    assert (payload.codec.bits, payload.nbytes) == (1, 157 * (4 + 32 // 8))
    assert torch.equal(load(tmp_path / "a.ckpt")["state_dict"]["weight"], weight)
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["weight"], weight)


def test_a_policy_is_not_changed_by_use(tmp_path: Path) -> None:
    rules = [Rule("state_dict.*", "softsign")]
    policy = CheckpointPolicy(rules)
    rules.append(Rule("callbacks.*", "softsign"))
    assert len(policy.rules) == 1
    assert QuantizationCallback(policy).policy is policy
    with pytest.raises(AttributeError):
        policy.min_numel = 1  # type: ignore[misc]


# What is wrong where


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"patern": "x"}, r"rules\[1\] has the key 'patern' in \{'patern': 'x'\}.* did you mean 'pattern'\?"),
        ({"pattern": "x", "codecs": "log"}, r"rules\[1\] has the key 'codecs' .* did you mean 'codec'\?"),
        ({"pattern": "x", 3: "log"}, r"rules\[1\] has the key 3 .* arguments of Rule are pattern, codec"),
        ({"codec": "log"}, r"rules\[1\] needs the key 'pattern', got \{'codec': 'log'\}; add it"),
        ({"pattern": "x", "codec": "sofsign"}, r"rules\[1\]: rule for 'x': .*got 'sofsign'; did you mean 'softsign'\?"),
        ({"pattern": "x", "codec": 8}, r"rules\[1\]: rule for 'x': codebook is a name.*got 8"),
        ({"pattern": "x", "codec": "log", "block_size": 100}, r"rules\[1\]: rule for 'x': block_size .* got 100; try"),
        (
            {"pattern": "x", "codec": "linear", "residual": True},
            r"rules\[1\] has the key 'residual' .*'residual_bits'\?",
        ),
        ({"pattern": "x", "codec": "log", "bits": 9}, r"rules\[1\]: rule for 'x': bits must be .* got 9; try 6"),
        ({"pattern": 3, "codec": "linear"}, r"rules\[1\]: .*pattern is a pattern over names, got 3"),
        ({"pattern": "x", "parameter": None}, r"rules\[1\]: .*parameter is a pattern over names, got None"),
        ("state_dict.*", r"rules\[1\] is a Rule or a mapping of its arguments, got 'state_dict\.\*'; write such as"),
        (("state_dict.*", "log"), r"rules\[1\] is a Rule or a mapping .*got \('state_dict\.\*', 'log'\)"),
    ],
)
def test_a_wrong_rule_is_named_by_its_place_its_pattern_and_what_is_wrong(rule: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CheckpointPolicy([Rule("state_dict.*", "linear"), rule])


@pytest.mark.parametrize("rules", ["state_dict.*", {"pattern": "state_dict.*", "codec": "log"}, 3])
def test_rules_that_are_no_list_are_refused(rules: Any) -> None:
    with pytest.raises(ValueError, match=r"rules is a list of rules, got .*; put it into a list"):
        CheckpointPolicy(rules)


@pytest.mark.parametrize("make", [QuantizationCallback, lambda name: QuantizedCheckpointIO(checkpoint=name)])
@pytest.mark.parametrize(("name", "meant"), [("compct", "compact"), ("Resume", "resume"), ("comp", "compact")])
def test_a_preset_with_a_slip_is_refused_with_the_one_that_was_meant(make: Any, name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}'; did you mean '{meant}'\?"):
        make(name)


# Bits

WRONG_BITS: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"codec": "linear", "bits": 1}, "bits must be an integer from 2 to 8, got 1; try 6"),
    "none at all": ({"codec": "softsign", "bits": 0}, "bits must be an integer from 2 to 8, got 0; try 6"),
    "too many": ({"codec": "log", "bits": 9}, "bits must be an integer from 2 to 8, got 9; try 6"),
    "a float": ({"codec": "log", "bits": 6.0}, "bits must be an integer from 2 to 8, got 6.0; write 6"),
    "a word": ({"codec": "log", "bits": "6"}, "bits must be an integer from 2 to 8, got '6'; write 6"),
    "a residual of one": (
        {"codec": "linear", "residual_bits": 1},
        "residual_bits must be an integer from 2 to 8, got 1; try 6",
    ),
    "a residual as it was": (
        {"codec": "linear", "residual_bits": True},
        "residual_bits is 0 for no second code, or an integer from 2 to 8, got True; write 0, or such as 4",
    ),
    "a residual of another codec": (
        {"codec": "softsign", "bits": 6, "residual_bits": 4},
        "a residual stage needs the codec linear, got 'softsign'; drop residual_bits or use linear",
    ),
    "of a codebook that has its own": (
        {"codec": "int4", "bits": 5},
        "the codes of int4 have 4 bits, got bits=5; leave bits out, or use linear or softsign, which have 2 to 8",
    ),
    "twice, and not alike": (
        {"codec": "softsign6", "bits": 5},
        "the codes of softsign6 have 6 bits, got bits=5; leave bits out, or use linear or softsign, which have 2 to 8",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_BITS)
def test_wrong_bits_are_refused_with_the_rule_the_value_and_what_to_do(wrong: str) -> None:
    options, says = WRONG_BITS[wrong]
    with pytest.raises(ValueError, match=f"^{re.escape(f'rule for {PATTERN!r}: {says}')}$"):
        Rule(PATTERN, **options)
    with pytest.raises(ValueError, match=re.escape(f"rules[0]: rule for {PATTERN!r}: {says}")):
        CheckpointPolicy([{"pattern": PATTERN, **options}])


PATTERN = "state_dict.*"
RULES_WITH_BITS = [
    Rule(PATTERN, "linear", 128, bits=7, residual_bits=3, parameter="body.*"),
    Rule(PATTERN, "softsign", bits=2),
    Rule(PATTERN, "linear5"),
    Rule(PATTERN, "int4"),
    Rule(PATTERN, TERNARY),
    Rule(PATTERN, "log", 32),
    Rule(PATTERN),
]


def test_a_policy_with_bits_comes_back_from_a_file_of_yaml() -> None:
    policy = CheckpointPolicy(RULES_WITH_BITS, min_sqnr_db=None)
    written = yaml.safe_dump(policy.as_primitives())
    assert CheckpointPolicy(**yaml.safe_load(written)) == policy
    assert CheckpointPolicy(**json.loads(json.dumps(policy.as_primitives()))) == policy


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_what_a_file_says_of_it(name: str, tmp_path: Path) -> None:
    QuantizedCheckpointIO(checkpoint=name).save_checkpoint(
        {"state_dict": {"weight": torch.randn(64, 64)}}, tmp_path / "a.ckpt"
    )
    assert CheckpointPolicy(**load(tmp_path / "a.ckpt")["q8lightning"]["policy"]) == CheckpointPolicy.of(name)


@pytest.mark.parametrize(
    ("rule", "bits"),
    [(RULES_WITH_BITS[i], bits) for i, bits in enumerate([(7, 3), (2, 0), (5, 0), (4, 0), (2, 0), (8, 0)])],
    ids=str,
)
def test_a_rule_says_the_bits_that_its_codes_take(rule: Rule, bits: tuple[int, int], tmp_path: Path) -> None:
    assert (rule.bits, rule.residual_bits) == bits
    weight = torch.rand(64, 64)
    (found,) = save(
        {"state_dict": {"body.weight": weight}}, tmp_path / "a.ckpt", replace(rule, parameter="*"), min_sqnr_db=None
    ).values()
    assert found[2:] == bits
    (payload,) = payloads_of(tmp_path / "a.ckpt").values()
    scales = 4096 // rule.block_size * (8 if rule.codec == "log" else 4)
    assert payload.nbytes == scales + 4096 * sum(bits) // 8


def test_another_name_of_a_codebook_is_the_codebook(tmp_path: Path) -> None:
    rule = Rule("state_dict.*", "nf4")
    assert rule == Rule("state_dict.*", "normal_float4")
    assert save({"state_dict": {"weight": torch.randn(64, 64)}}, tmp_path / "a.ckpt", rule, min_sqnr_db=None) == {
        "state_dict.weight": ("normal_float4", 256, 4, 0)
    }
    assert load(tmp_path / "a.ckpt")["q8lightning"]["policy"]["rules"][0]["codec"] == "normal_float4"


def test_types_name_what_there_is() -> None:
    assert set(get_args(Preset)) == set(PRESETS)
    assert {name for names in get_args(CodecName) for name in get_args(names)} == {"log", *BUILTIN, *ALIASES}
