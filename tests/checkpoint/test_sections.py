"""The table of sections knows what real Trainers write, and everything that goes by sections goes by it."""

from typing import Any

import pytest
from lightning.pytorch.callbacks import WeightAveraging
from support.models import Autoencoder, train_and_save
from support.promises import load

from q8lightning import QuantizationCallback
from q8lightning.checkpoint.layout.optimizer_states import moments_of
from q8lightning.checkpoint.layout.sections import (
    FOR_TRAINING,
    NEVER,
    SECTIONS,
    SUMMARY_KEY,
    WEIGHTS,
    epsilons_of,
    is_state,
    kind_of,
    optimizers_in,
    parameter_of,
)
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.checkpoint.tree import tensors

PROGRESS = {"epoch", "global_step", "pytorch-lightning_version", "hparams_name"}
"""What is no container."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint of everything that Lightning adds to one on a CPU."""
    folder = tmp_path_factory.mktemp("sections")
    callbacks = [WeightAveraging(), QuantizationCallback()]
    train_and_save(folder, Autoencoder(), *callbacks)
    return load(folder / "a.ckpt")


def test_every_section_that_lightning_writes_is_in_the_table(checkpoint: dict[str, Any]) -> None:
    own = {"something_extra", SUMMARY_KEY}
    assert checkpoint.keys() - PROGRESS - own - SECTIONS.keys() == set()
    assert {"current_model_state", "averaging_state", "lr_schedulers"} <= checkpoint.keys()


def test_no_rule_reaches_what_must_be_exact() -> None:
    for section in SECTIONS:
        found = PRESETS["compact"].codec_for(f"{section}.0.state.1.exp_avg")
        assert (found is None) == (section not in (*WEIGHTS, "optimizer_states")), section
        assert not (section in NEVER and section in WEIGHTS)
    assert "state_dict" not in FOR_TRAINING


def test_every_tensor_of_a_checkpoint_has_its_kind_and_parameter(checkpoint: dict[str, Any]) -> None:
    names = [tuple(name for name, _ in Autoencoder().named_parameters())]
    state = Autoencoder().state_dict()
    seen = set()
    for keys, tensor in tensors(checkpoint):
        kind, parameter = kind_of(keys), parameter_of(keys, names)
        seen.add(kind)
        if keys[0] in WEIGHTS:
            assert (kind, parameter) == ("weights", keys[1])
        elif is_state(keys):
            assert kind == keys[-1]
            assert parameter in names[0]
            assert kind == "step" or tensor.shape == state[parameter].shape
        else:
            assert (kind, parameter) == (keys[0], None)
    assert {"weights", "exp_avg", "exp_avg_sq", "step", "something_extra"} <= seen


def test_epsilons_are_those_of_the_groups(checkpoint: dict[str, Any]) -> None:
    keys = [("optimizer_states", 0, "state", key) for key in optimizers_in(checkpoint)[0]["state"]]
    assert epsilons_of(checkpoint) == dict.fromkeys(keys, 1e-8)


def test_moments_of_a_direction_are_where_they_are() -> None:
    assert moments_of("optimizer_states.0.state.3.exp_avg") == [
        f"optimizer_states.0.state.3.{key}" for key in ("exp_avg", "max_exp_avg_sq", "exp_avg_sq")
    ]


@pytest.mark.parametrize("content", [{}, {"optimizer_states": 1}, {"optimizer_states": [3, {"param_groups": [1]}]}])
def test_a_hook_may_have_put_anything_there(content: dict[str, Any]) -> None:
    assert epsilons_of(content) == {}
    assert all(each == {} or "param_groups" in each for each in optimizers_in(content))
