"""A tensor that would lose more than the policy allows gets the residual stage or is stored as it is, and is named."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.promises import assert_same, load, payloads_of, same_bits, same_parts
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizedCheckpointIO, Rule
from q8lightning.checkpoint.encode.checkpoint import encode_and_report, encode_checkpoint
from q8lightning.quantization.codecs.table import get_codec

COARSE = Rule("state_dict.*", "int4", 4096)
ADAM = (
    Rule("optimizer_states.*.exp_avg", "softsign", 128),
    Rule("optimizer_states.*.exp_avg_sq", "log", 128),
)
EPS = 1e-8


def policy_of(*rules: Rule, **limits: Any) -> CheckpointPolicy:
    rules += (Rule("optimizer_states.*"),)  # the moment that a test leaves out is left out on purpose
    return CheckpointPolicy(rules, **({"min_sqnr_db": None, "max_update_direction_error": None} | limits))


def outliers(magnitude: float = 1000.0) -> Tensor:
    """Ordinary values, one of which is huge."""
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    values[3, 17] = magnitude
    return values


def adam(exp_avg: Tensor, exp_avg_sq: Tensor, eps: float = EPS) -> dict[str, Any]:
    state = {0: {"step": torch.tensor(9.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}}
    return {"optimizer_states": [{"state": state, "param_groups": [{"params": [0], "eps": eps}]}]}


def moments(spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Moments of gradients whose scale spans so many powers of ten within every block."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** -(spread * torch.rand(64, 128, generator=generator))
    first = torch.randn(64, 128, generator=generator) * scale
    return first, (first.square() + scale.square()) / 2


def saved(checkpoint: dict[str, Any], policy: CheckpointPolicy | str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Save and load; return that and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        QuantizedCheckpointIO(checkpoint=policy).save_checkpoint(checkpoint, path)
    return load(path), [str(each.message) for each in caught]


def codecs_of(path: Path) -> dict[str, str]:
    return {
        name.rsplit(".", 1)[-1]: "residual" if payload.codec.residual_bits else payload.codec.name
        for name, payload in payloads_of(path).items()
    }


def sqnr(original: Tensor, decoded: Tensor) -> float:
    one, two = original.double().numpy(), decoded.double().numpy()
    return float(10 * np.log10((one**2).sum() / ((two - one) ** 2).sum()))


def direction_error(first: Tensor, second: Tensor, decoded_first: Tensor, decoded_second: Tensor) -> float:
    def direction(m: Tensor, v: Tensor) -> Any:
        return m.double().numpy() / (np.sqrt(v.double().numpy()) + EPS)

    one, two = direction(first, second), direction(decoded_first, decoded_second)
    return float(np.sqrt(((two - one) ** 2).sum() / (one**2).sum()))


# Weights


def test_a_weight_with_outliers_gets_the_residual_then_is_stored_as_it_is(tmp_path: Path) -> None:
    weight, path = outliers(), tmp_path / "a.ckpt"
    found = {}
    for limit in (None, 60.0, 140.0):
        after, messages = saved({"state_dict": {"weight": weight}}, policy_of(COARSE, min_sqnr_db=limit), path)
        found[limit] = codecs_of(path).get("weight")
        assert len(messages) == (limit is not None)
        if limit is not None and found[limit]:
            assert sqnr(weight, after["state_dict"]["weight"]) >= limit
    assert found == {None: "int4", 60.0: "residual", 140.0: None}
    assert same_bits(after["state_dict"]["weight"], weight)


def test_the_warning_names_the_tensor_the_figure_and_the_remedy(tmp_path: Path) -> None:
    state = {"bad": outliers(), "good": torch.ones(64, 128)}
    unguarded, _ = saved({"state_dict": state}, policy_of(COARSE), tmp_path / "a.ckpt")
    figure = sqnr(state["bad"], unguarded["state_dict"]["bad"])
    after, messages = saved({"state_dict": state}, policy_of(COARSE, min_sqnr_db=60), tmp_path / "a.ckpt")
    assert len(messages) == 1
    assert f"state_dict.bad (SQNR {figure:.1f} dB under int4; stored in 16 bits)" in messages[0]
    assert "good" not in messages[0]
    assert "min_sqnr_db" in messages[0]
    assert after["q8lightning"]["guarded"] == {
        "state_dict.bad": {"found": f"SQNR {figure:.1f} dB under int4", "remedy": "residual"}
    }


def test_a_tensor_is_named_once_and_again_when_it_fares_worse(tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(checkpoint=policy_of(COARSE, min_sqnr_db=60))
    state = {"one": outliers()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = []
        for change in (None, None, "two", None):
            if change:
                state[change] = outliers()
            io.save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
            counts.append(len(caught))
    assert counts == [1, 1, 2, 2]
    assert "state_dict.two" in str(caught[1].message)
    assert "state_dict.one" not in str(caught[1].message)


def test_what_the_residual_would_not_make_smaller_is_stored_as_it_is(tmp_path: Path) -> None:
    weight = outliers().bfloat16()
    after, _ = saved({"state_dict": {"weight": weight}}, policy_of(COARSE, min_sqnr_db=60), tmp_path / "a.ckpt")
    assert not payloads_of(tmp_path / "a.ckpt")
    assert same_bits(after["state_dict"]["weight"], weight)


def test_bytes_of_what_was_not_kept_do_not_stay_in_the_file() -> None:
    state = {"bad": outliers(), "good": torch.ones(64, 128), "fine": torch.zeros(64, 128)}
    with pytest.warns(UserWarning, match="state_dict.bad"):
        encoded = encode_checkpoint({"state_dict": state}, policy_of(COARSE, min_sqnr_db=140))
    assert encoded["state_dict"]["bad"] is state["bad"]
    storage = encoded["state_dict"]["good"].data.untyped_storage()
    sizes = [encoded["state_dict"][name].nbytes for name in ("good", "fine")]
    assert storage.data_ptr() == encoded["state_dict"]["fine"].data.untyped_storage().data_ptr()
    assert storage.nbytes() < sum(sizes) + 32


def test_the_presets_pass_on_ordinary_values_and_the_default_stops_four_bits(preset: str, tmp_path: Path) -> None:
    checkpoint = {"state_dict": {"weight": torch.randn(64, 64)}, **adam(*moments(0.5))}
    _, messages = saved(checkpoint, preset, tmp_path / "a.ckpt")
    assert not messages
    assert len(payloads_of(tmp_path / "a.ckpt")) == 3
    with pytest.warns(UserWarning, match=r"state_dict\.weight \(SQNR 1\d\.\d dB under int4"):
        QuantizedCheckpointIO(checkpoint=CheckpointPolicy([Rule("*", "int4", 256)])).save_checkpoint(
            {"state_dict": {"weight": torch.randn(64, 64)}}, tmp_path / "b.ckpt"
        )


# Moments


@pytest.mark.parametrize("codec", ["linear", "softsign", "dynamic_unsigned", "int8"])
def test_a_nonzero_second_moment_never_becomes_zero(codec: str, tmp_path: Path) -> None:
    first, second = moments(6.0)
    second[:, :3] = 0.0  # zeros may stay zeros
    rule = Rule("optimizer_states.*.exp_avg_sq", codec, 128)
    after, messages = saved(adam(first, second), policy_of(rule), tmp_path / "a.ckpt")
    kept = after["optimizer_states"][0]["state"][0]["exp_avg_sq"]
    assert same_bits(kept, second)
    assert len(messages) == 1
    assert "state.0.exp_avg_sq (" in messages[0]
    assert f"nonzero values become zero under {codec}; stored as it is)" in messages[0]
    assert "log" in messages[0]


def test_the_first_moment_is_judged_beside_what_is_stored_of_the_second(tmp_path: Path) -> None:
    first, second = moments(1.0)
    rules = (ADAM[0], Rule("optimizer_states.*.exp_avg_sq", "softsign", 128))
    after, messages = saved(adam(first, second), policy_of(*rules, max_update_direction_error=0.2), tmp_path / "a.ckpt")
    assert codecs_of(tmp_path / "a.ckpt") == {"exp_avg": "softsign"}
    assert "exp_avg (" not in messages[0]
    kept = after["optimizer_states"][0]["state"][0]["exp_avg"]
    expected = direction_error(first, second, kept, second)
    assert after["q8lightning"]["metrics"]["update_direction_error"] == pytest.approx(expected, rel=1e-5)


def test_a_second_moment_that_a_codebook_can_hold_is_encoded(tmp_path: Path) -> None:
    second = torch.rand(64, 128) + 0.5
    _, messages = saved(
        adam(torch.randn(64, 128), second),
        policy_of(Rule("optimizer_states.*.exp_avg_sq", "linear", 128), max_update_direction_error=0.2),
        tmp_path / "a.ckpt",
    )
    assert not messages
    assert codecs_of(tmp_path / "a.ckpt") == {"exp_avg_sq": "linear"}


def test_a_first_moment_that_turns_the_step_gets_the_residual(tmp_path: Path) -> None:
    first, second = moments(3.0)
    free, _ = saved(adam(first, second), policy_of(*ADAM), tmp_path / "a.ckpt")
    kept = free["optimizer_states"][0]["state"][0]
    turned = direction_error(first, second, kept["exp_avg"], kept["exp_avg_sq"])
    assert turned > 0.3, "the test is about moments that fare badly"
    limit = 0.1
    after, messages = saved(
        adam(first, second), policy_of(*ADAM, max_update_direction_error=limit), tmp_path / "a.ckpt"
    )
    kept = after["optimizer_states"][0]["state"][0]
    assert codecs_of(tmp_path / "a.ckpt") == {"exp_avg": "residual", "exp_avg_sq": "log"}
    assert direction_error(first, second, kept["exp_avg"], kept["exp_avg_sq"]) < limit
    assert len(messages) == 1
    assert "state.0.exp_avg (update direction off by" in messages[0]
    assert "exp_avg_sq" not in messages[0]
    summary = after["q8lightning"]
    expected = direction_error(first, second, kept["exp_avg"], kept["exp_avg_sq"])
    assert summary["metrics"]["update_direction_error"] == pytest.approx(expected, rel=1e-5)


def test_a_second_moment_that_turns_the_step_is_stored_as_it_is(tmp_path: Path) -> None:
    first, second = moments(12.0)
    _, messages = saved(
        adam(first, second),
        policy_of(ADAM[1], max_update_direction_error=1e-3),
        tmp_path / "a.ckpt",
    )
    assert not payloads_of(tmp_path / "a.ckpt")
    assert "state.0.exp_avg_sq (update direction off by" in messages[0]


def test_eps_is_that_of_the_optimizer(tmp_path: Path) -> None:
    """A large eps hides what happens to small second moments."""
    first, second = moments(3.0)
    policy = policy_of(*ADAM, max_update_direction_error=0.1)
    for eps, codec in ((1e-8, "residual"), (1.0, "softsign")):
        saved(adam(first, second, eps), policy, tmp_path / "a.ckpt")
        assert codecs_of(tmp_path / "a.ckpt")["exp_avg"] == codec


def test_moments_are_not_judged_by_their_sqnr(tmp_path: Path) -> None:
    first, second = moments(1.0)
    policy = policy_of(*ADAM, min_sqnr_db=70, max_update_direction_error=0.2)
    _, messages = saved(adam(first, second), policy, tmp_path / "a.ckpt")
    assert codecs_of(tmp_path / "a.ckpt") == {"exp_avg": "softsign", "exp_avg_sq": "log"}
    assert not messages
    _, messages = saved(adam(first, second), policy_of(*ADAM, min_sqnr_db=70), tmp_path / "a.ckpt")
    assert codecs_of(tmp_path / "a.ckpt") == {"exp_avg": "residual", "exp_avg_sq": "log"}


@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg"])
def test_a_first_moment_without_a_second_is_the_direction(key: str, tmp_path: Path) -> None:
    """SGD steps by its momentum, and Lion by the sign of one."""
    momentum = torch.randn(64, 128)
    checkpoint = {"optimizer_states": [{"state": {0: {key: momentum}}, "param_groups": [{"params": [0]}]}]}
    rule = Rule(f"optimizer_states.*.{key}", "softsign", 128, bits=5)
    found = {}
    for limits in ({}, {"max_update_direction_error": 0.01}, {"max_update_direction_error": None}):
        after, messages = saved(checkpoint, CheckpointPolicy([rule], **limits), tmp_path / "a.ckpt")
        found[str(limits)] = codecs_of(tmp_path / "a.ckpt"), messages
        if not limits:
            error = 10 ** (-sqnr(momentum, after["optimizer_states"][0]["state"][0][key]) / 20)
            assert 10 ** (-30 / 20) < error < 0.2  # beyond the limit of weights
    default, strict, by_sqnr = found.values()
    assert default == ({key: "softsign"}, [])
    assert strict[0] == by_sqnr[0] == {key: "residual"}
    assert f"{key} (update direction off by {error:.1%} under softsign5; stored in 16 bits)" in strict[1][0]
    assert f"{key} (SQNR {-20 * np.log10(error):.1f} dB under softsign5; stored in 16 bits)" in by_sqnr[1][0]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["adamw", "momentum"])
def test_the_presets_hold_what_the_first_steps_leave(options: dict[str, float], preset: str, tmp_path: Path) -> None:
    """Early gradients are of very different magnitude in a block, and second moments are their squares."""
    weight = nn.Parameter(torch.randn(64, 128) / 8)
    optimizer = torch.optim.SGD([weight], lr=0.1, **options) if options else torch.optim.AdamW([weight])
    for _ in range(2):
        (torch.randn(16, 64) @ weight).relu().square().mean().backward()
        optimizer.step()
    checkpoint = {"state_dict": {"weight": weight.detach()}, "optimizer_states": [optimizer.state_dict()]}
    _, messages = saved(checkpoint, preset, tmp_path / "a.ckpt")
    assert not messages
    assert len(payloads_of(tmp_path / "a.ckpt")) == (2 if options else 3)


def test_moments_without_a_direction_do_not_spoil_the_others(tmp_path: Path) -> None:
    """With an eps of zero, a parameter that never had a gradient has the direction 0 / 0."""
    first, second = moments(1.0)
    unused = torch.zeros(64, 128)
    states = {0: {"exp_avg": first, "exp_avg_sq": second}, 1: {"exp_avg": unused, "exp_avg_sq": unused.clone()}}
    checkpoint = {"optimizer_states": [{"state": states, "param_groups": [{"params": [0, 1], "eps": 0.0}]}]}
    after, messages = saved(checkpoint, CheckpointPolicy(ADAM), tmp_path / "a.ckpt")
    assert not messages
    assert len(payloads_of(tmp_path / "a.ckpt")) == 4
    assert 0 < after["q8lightning"]["metrics"]["update_direction_error"] < 0.2


# Saving again


@pytest.mark.parametrize("spread", [1.0, 2.0, 2.5, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("second", ["log", "linear", "dynamic_unsigned"])
@pytest.mark.parametrize("limit", [0.003, 0.03, 0.1, 0.3])
def test_what_the_guard_decided_it_decides_again(spread: float, second: str, limit: float, tmp_path: Path) -> None:
    rules = (ADAM[0], Rule("optimizer_states.*.exp_avg_sq", second, 128), COARSE)
    policy = policy_of(*rules, max_update_direction_error=limit, min_sqnr_db=25)
    checkpoint = {"state_dict": {"weight": outliers(10.0 * spread)}, **adam(*moments(spread))}
    first, _ = saved(checkpoint, policy, tmp_path / "a.ckpt")
    before = payloads_of(tmp_path / "a.ckpt")
    again, _ = saved({key: first[key] for key in checkpoint}, policy, tmp_path / "a.ckpt")
    after = payloads_of(tmp_path / "a.ckpt")
    assert list(before) == list(after)
    assert all(same_parts(before[name], after[name]) for name in before)
    assert_same({key: again[key] for key in checkpoint}, {key: first[key] for key in checkpoint})


@pytest.mark.parametrize("second", ["log", "dynamic_unsigned"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.7, 0.8, 0.9, 0.97, 1.03])
def test_limits_between_the_error_of_one_moment_and_of_both(second: str, share: float, tmp_path: Path) -> None:
    """If both moments were judged together, saving one better would let the other pass the next time."""
    rules = (ADAM[0], Rule("optimizer_states.*.exp_avg_sq", second, 128))
    for seed in range(5):
        checkpoint = adam(*moments(0.4, seed))
        free = encode_and_report(checkpoint, policy_of(*rules)).report.metrics["update_direction_error"]
        policy = policy_of(*rules, max_update_direction_error=free * share)
        first, _ = saved(checkpoint, policy, tmp_path / "a.ckpt")
        before = payloads_of(tmp_path / "a.ckpt")
        saved({"optimizer_states": first["optimizer_states"]}, policy, tmp_path / "a.ckpt")
        after = payloads_of(tmp_path / "a.ckpt")
        assert list(before) == list(after)
        assert all(same_parts(before[name], after[name]) for name in before)


@pytest.mark.parametrize("raw", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_stays_raw_at_the_limit_is_judged_beside_the_same_neighbour_again(
    raw: str, tmp_path: Path
) -> None:
    """Its neighbour is rounded by the save, which moves the error: limits between both errors are those that matter."""
    softsign, log = get_codec("softsign", 128), get_codec("log", 128)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(64, 128, generator=generator)
        second = 10.0 ** -(12 * torch.rand(64, 128, generator=generator))
        if raw == "exp_avg":
            first, second = (first * second.sqrt()).bfloat16(), second  # in two bytes, the residual saves nothing
        decoded = [codec.decode(codec.encode(x), x.dtype) for x, codec in ((first, softsign), (second, log))]
        if raw == "exp_avg":
            errors = [direction_error(first, v, decoded[0], v) for v in (second, decoded[1])]
        else:
            errors = [direction_error(m, second, m, decoded[1]) for m in (first, decoded[0])]
        assert min(errors) < max(errors) < 1.01 * min(errors)
        policy = policy_of(*ADAM, max_update_direction_error=sum(errors) / 2)
        loaded, _ = saved(adam(first, second), policy, tmp_path / "a.ckpt")
        before = payloads_of(tmp_path / "a.ckpt")
        saved({"optimizer_states": loaded["optimizer_states"]}, policy, tmp_path / "a.ckpt")
        assert list(before) == list(payloads_of(tmp_path / "a.ckpt")), f"{raw}, errors {errors}"


FINER = get_codec("linear", 256, residual_bits=8)
"""What a tensor gets that loses too much under another codec of blocks of 256."""


def _error_under(rule: Rule, weight: Tensor) -> float:
    report = encode_and_report({"state_dict": {"w": weight}}, policy_of(rule)).report
    return report.tensors[0].figures["sqnr_db"]


@pytest.mark.parametrize(
    "rule", [Rule("state_dict.*", "softsign", 256), Rule("state_dict.*", "linear", 256, residual_bits=4)], ids=str
)
def test_a_tensor_at_the_limit_stays_on_its_side_of_it(rule: Rule, tmp_path: Path) -> None:
    """What the finer codec rounded is nearer to the limit, or farther, than the original was by hundredths of a dB."""
    crossed = 0
    for seed in range(40):
        weight = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
        loaded, _ = saved(
            {"state_dict": {"w": weight}},
            policy_of(Rule("state_dict.*", "linear", residual_bits=8)),
            tmp_path / "a.ckpt",
        )
        original, rounded = _error_under(rule, weight), _error_under(rule, loaded["state_dict"]["w"])
        if rounded <= original:
            continue
        crossed += 1
        policy = policy_of(rule, min_sqnr_db=(original + rounded) / 2)
        first, _ = saved({"state_dict": {"w": weight}}, policy, tmp_path / "a.ckpt")
        assert [each.codec for each in payloads_of(tmp_path / "a.ckpt").values()] == [FINER]
        again, _ = saved({"state_dict": first["state_dict"]}, policy, tmp_path / "a.ckpt")
        assert [each.codec for each in payloads_of(tmp_path / "a.ckpt").values()] == [FINER]
        assert same_bits(first["state_dict"]["w"], again["state_dict"]["w"])
    assert crossed > 5, "the test is about those that end up on the other side"


# Options


@pytest.mark.parametrize("name", ["min_sqnr_db", "max_update_direction_error"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "30", True, [30]])
def test_a_limit_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a finite number above 0, or None .* got .*; try "):
        CheckpointPolicy([COARSE], **{name: value})


def test_limits_are_part_of_a_policy_and_of_what_a_file_says_about_it(tmp_path: Path) -> None:
    policy = CheckpointPolicy(
        [COARSE, Rule("callbacks.*", [-1, 0, 1])], min_sqnr_db=12, max_update_direction_error=None
    )
    assert policy != CheckpointPolicy(policy.rules)
    after, _ = saved({"state_dict": {"w": torch.randn(64, 64)}}, policy, tmp_path / "a.ckpt")
    assert CheckpointPolicy(**after["q8lightning"]["policy"]) == policy


def test_moments_whose_elements_lie_in_another_order_are_no_pair() -> None:
    exp_avg, exp_avg_sq = torch.randn(64, 128), torch.rand(128, 64).t()
    report = encode_and_report(adam(exp_avg, exp_avg_sq), CheckpointPolicy.of("resume")).report
    assert {loss.kind for loss in report.tensors} == {"exp_avg", "exp_avg_sq"}
    assert not report.directions
    report = encode_and_report(adam(exp_avg, exp_avg_sq.contiguous()), CheckpointPolicy.of("resume")).report
    assert len(report.directions) == 1
