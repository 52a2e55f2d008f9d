"""Optimizer states go by the names of their parameters, where a checkpoint tells them or leaves one assignment only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.files import edit_pickle, flip, place_of
from support.models import Autoencoder, Shrink, TwoOptimizers, train_and_save
from support.promises import load, payloads_of
from torch import Tensor, nn

from q8lightning import CorruptCheckpointError, QuantizationCallback, QuantizedCheckpointIO, keep_encoded
from q8lightning.checkpoint.layout.parameter_names import names_of_states, parameters_of_states
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, PARAMETERS_KEY, SUMMARY_KEY, name_of

Shapes = dict[str, tuple[int, ...]]


def checkpoint_of(weights: Shapes, groups: Iterable[Iterable[str]], **options: Any) -> dict[str, Any]:
    """Return a checkpoint of weights with these shapes, and an optimizer over groups of them."""
    state: dict[int, Any] = {}
    made = []
    for group in groups:
        keys = range(len(state), len(state) + len(list(group)))
        state |= {key: {"exp_avg": torch.zeros(weights[name])} for key, name in zip(keys, group, strict=True)}
        made.append({"params": list(keys), **options})
    values = {name: torch.ones(shape) for name, shape in weights.items()}
    return {"state_dict": values, OPTIMIZER_STATES: [{"state": state, "param_groups": made}]}


def names_in(checkpoint: dict[str, Any]) -> dict[int, str]:
    return {keys[3]: name for keys, name in parameters_of_states(checkpoint).items()}


MODEL: Shapes = {"in.weight": (8, 4), "in.bias": (8,), "mid.weight": (8, 8), "out.weight": (4, 8), "out.bias": (4,)}


def test_order_and_shapes_show_the_names() -> None:
    assert names_in(checkpoint_of(MODEL, [MODEL])) == dict(enumerate(MODEL))


def test_groups_of_weights_with_and_without_decay_are_told_apart() -> None:
    groups = [[name for name in MODEL if name.endswith(end)] for end in ("weight", "bias")]
    assert names_in(checkpoint_of(MODEL, groups)) == dict(enumerate([*groups[0], *groups[1]]))


def test_a_name_that_is_not_certain_is_not_given() -> None:
    """A frozen layer among others of its shape may be any of them; what lies around them is certain all the same."""
    model: Shapes = {"in": (8, 4), "a": (8, 8), "b": (8, 8), "c": (8, 8), "out": (4, 8)}
    assert names_in(checkpoint_of(model, [["in", "a", "c", "out"]])) == {0: "in", 3: "out"}


def test_an_order_that_does_not_fit_gives_no_names() -> None:
    assert names_in(checkpoint_of(MODEL, [["out.weight", "in.weight"]])) == {}


def test_buffers_are_no_parameters() -> None:
    """Those of BatchNorm are known by name, integers by their dtype; another one only leaves more possibilities."""
    checkpoint = checkpoint_of({"w": (8, 4), "b": (8,)}, [["w", "b"]])
    checkpoint["state_dict"] |= {"norm.running_mean": torch.ones(8), "norm.count": torch.ones(8, dtype=torch.int64)}
    assert names_in(checkpoint) == {0: "w", 1: "b"}
    checkpoint["state_dict"]["table"] = torch.ones(8)
    assert names_in(checkpoint) == {0: "w"}


def test_parameters_without_a_state_fit_anywhere() -> None:
    checkpoint = checkpoint_of(MODEL, [MODEL])
    del checkpoint[OPTIMIZER_STATES][0]["state"][1]
    assert names_in(checkpoint) == {0: "in.weight", 2: "mid.weight", 3: "out.weight", 4: "out.bias"}


@given(st.data())
def test_no_name_is_ever_wrong(data: st.DataObject) -> None:
    """Whichever parameters an optimizer has, in the model's order: what is named is named rightly."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=9))
    model: Shapes = {f"w{index}": (size,) for index, size in enumerate(sizes)}
    optimized = [name for name in model if data.draw(st.booleans())]
    cut = data.draw(st.integers(0, len(optimized)))
    found = names_in(checkpoint_of(model, [optimized[:cut], optimized[cut:]]))
    assert found.items() <= dict(enumerate(optimized)).items()
    if len(optimized) == len(model) and cut in (0, len(model)):
        assert list(found.values()) == optimized


def test_what_a_checkpoint_says_comes_before_what_it_shows() -> None:
    model: Shapes = {"a": (8, 8), "b": (8, 8)}
    assert names_in(checkpoint_of(model, [["a", "b"]], param_names=["b", "a"])) == {0: "b", 1: "a"}
    summary = {SUMMARY_KEY: {PARAMETERS_KEY: [["b", "a"]]}}
    assert names_in(checkpoint_of(model, [["a", "b"]]) | summary) == {0: "b", 1: "a"}


@pytest.mark.parametrize("content", [None, [1], {}, {OPTIMIZER_STATES: 3}, {OPTIMIZER_STATES: [None, {"state": 1}]}])
def test_of_anything_else_nothing_is_known(content: Any) -> None:
    assert parameters_of_states(content) == names_of_states(content) == {}


def test_odd_values_are_no_hindrance() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    checkpoint = checkpoint_of(MODEL, [MODEL])
    odd = {"extra": {"a": 1}, "nested": nested, "sparse": torch.eye(8).to_sparse(), 5: torch.ones(3)}
    checkpoint["state_dict"] = odd | checkpoint["state_dict"]
    assert names_in(checkpoint) == dict(enumerate(MODEL))


# Checkpoints of real Trainers


def trained(module: Any, folder: Path, *callbacks: Any) -> tuple[Path, list[list[str]]]:
    """Return a checkpoint, and for each of its optimizers the names of its parameters."""
    trainer = train_and_save(folder, module, *callbacks)
    names = {id(value): name for name, value in module.named_parameters()}
    return folder / "a.ckpt", [
        [names[id(value)] for group in optimizer.param_groups for value in group["params"]]
        for optimizer in trainer.optimizers
    ]


class Tied(nn.Module):
    """As language models are: one weight, before and after everything else; all layers alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64, bias=False)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("callbacks", [[], [QuantizationCallback()]], ids=["plain", "quantized"])
@pytest.mark.parametrize("make", [Autoencoder, lambda: Shrink(Tied())], ids=["buffers", "tied"])
def test_all_parameters_of_a_trainer_are_named(make: Any, callbacks: list[Any], tmp_path: Path) -> None:
    path, (expected,) = trained(make(), tmp_path, *callbacks)
    with keep_encoded():
        encoded = load(path)
    for content in (encoded, load(path)):
        assert names_in(content) == dict(enumerate(expected))


def test_two_optimizers_name_nothing_wrongly(tmp_path: Path) -> None:
    path, expected = trained(TwoOptimizers(), tmp_path)
    found = parameters_of_states(load(path))
    assert all(expected[keys[1]][keys[3]] == name for keys, name in found.items())
    assert found[(OPTIMIZER_STATES, 0, "state", 0)] == "encoder.0.weight"


def test_names_read_as_the_parameter_and_the_key(tmp_path: Path) -> None:
    path, _ = trained(Autoencoder(), tmp_path)
    names = names_of_states(load(path))
    assert names["optimizer_states.0.state.4.exp_avg"] == "decoder.weight: exp_avg"
    assert len(names) == 18
    keys = (OPTIMIZER_STATES, 0, "state", 4, "exp_avg")
    assert name_of(keys, None) == "optimizer_states.0.state.4.exp_avg"
    assert name_of(("state_dict", "decoder.weight"), "decoder.weight") == "state_dict.decoder.weight"


# Damage


@pytest.mark.parametrize("callbacks", [[], [QuantizationCallback()]], ids=["plain", "quantized"])
def test_a_damaged_state_is_called_by_its_parameter(callbacks: list[Any], tmp_path: Path) -> None:
    """In a plain file only the sum of its record tells, and the file is not loaded to say what is in it."""
    path, _ = trained(Autoencoder(), tmp_path, *callbacks)
    state = payloads_of(path).get("optimizer_states.0.state.4.exp_avg")
    stored = load(path)[OPTIMIZER_STATES][0]["state"][4]["exp_avg"] if state is None else state.data
    flip(path, place_of(path, stored))
    with pytest.raises(
        CorruptCheckpointError, match=r"the tensor .*decoder\.weight: exp_avg.* in .*a\.ckpt is damaged"
    ):
        QuantizedCheckpointIO().load_checkpoint(path)


def test_a_damaged_payload_in_a_whole_file_too(tmp_path: Path) -> None:
    path, _ = trained(Autoencoder(), tmp_path, QuantizationCallback())
    with keep_encoded():
        content = load(path)
    content[OPTIMIZER_STATES][0]["state"][4]["exp_avg"].data[7] ^= 1
    torch.save(content, path)
    with pytest.raises(CorruptCheckpointError, match=r"the tensor decoder\.weight: exp_avg in .*a\.ckpt is damaged"):
        QuantizedCheckpointIO().load_checkpoint(path)


def test_without_a_state_dict_damage_is_called_by_its_path(tmp_path: Path) -> None:
    path, _ = trained(Autoencoder(), tmp_path)
    edit_pickle(path, b"state_dict", b"state_dicu")
    flip(path, place_of(path, load(path)[OPTIMIZER_STATES][0]["state"][4]["exp_avg"]))
    with pytest.raises(CorruptCheckpointError, match=r"the tensor optimizer_states\.0\.state\.4\.exp_avg in "):
        QuantizedCheckpointIO().load_checkpoint(path)
