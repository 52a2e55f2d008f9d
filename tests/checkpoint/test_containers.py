"""What is in a checkpoint, whatever it is in: every door gives what plain ``torch.save`` and ``torch.load`` give.

| what                                                                           | saved                      |
|--------------------------------------------------------------------------------|----------------------------|
| dicts, lists, tuples, what Python derives from them, subclasses, also such as  | at once, in the background |
| convert; cycles, 400 levels, 2^60 paths                                        |                            |
| containers that are more than their items: whole, and the file says so         | at once, in the background |
| ``None`` and worse in the place of sections                                    | at once, in the background |
| objects that cannot be copied or unpickled, share their copies, change at once | in the background          |
| parameters and tensors that require grad, tied, views, in all combinations     | at once, in the background |
| AMSGrad's three moments: judged, reported                                      | encoded                    |
| nothing that any rule names: one warning                                       | at once, in the background |

Each is loaded by ``torch.load`` and by ``QuantizedCheckpointIO.load_checkpoint``.
How containers are walked is tested in ``test_tree.py``, later saves of the same tensors in ``test_repeat.py``.
"""

import copy
import enum
import functools
import io as files
import pickle
import re
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.parsing import AttributeDict
from support.containers import Bag, Pair, Row, Stack, Typed, deep, shared
from support.files import without_identity
from support.models import Autoencoder, Shrink, quiet_trainer, train_and_save
from support.promises import load, payloads_of
from support.steps import Steps
from torch import Tensor, nn

from q8lightning import (
    CheckpointPolicy,
    QuantizationCallback,
    QuantizedCheckpointIO,
    QuantizedTensor,
    Rule,
    keep_encoded,
)
from q8lightning.checkpoint.encode.checkpoint import encode_and_report, encode_checkpoint
from q8lightning.checkpoint.loading import collect_encoded
from q8lightning.quantization.codecs.table import get_codec

EVERYTHING = CheckpointPolicy([Rule("*", "softsign")])

WAYS = pytest.mark.parametrize("async_save", [False, True], ids=["synchronous", "async"])


def save(checkpoint: Any, path: Path, async_save: bool, policy: str | CheckpointPolicy = EVERYTHING) -> None:
    io = QuantizedCheckpointIO(checkpoint=policy, async_save=async_save)
    io.save_checkpoint(checkpoint, path)
    io.finish()


def doors(path: Path) -> list[Any]:
    """Load a file through each door."""
    return [
        torch.load(path, weights_only=False),
        QuantizedCheckpointIO().load_checkpoint(path, weights_only=False),
    ]


def described(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return what everything but the values of tensors pickles as, what is shared included, and the tensors."""
    tensors: dict[int, Tensor] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if torch.is_storage(obj):
                return obj.tolist()
            if not isinstance(obj, Tensor):
                return None
            number = list(tensors).index(id(obj)) if id(obj) in tensors else len(tensors)
            tensors[id(obj)] = obj
            return number, type(obj).__name__, obj.dtype, tuple(obj.shape), obj.requires_grad

    pickled = files.BytesIO()
    Pickler(pickled, 2).dump(value)
    return pickled.getvalue(), list(tensors.values())


def plain(checkpoint: Any, path: Path) -> Any:
    torch.save(checkpoint, path)
    return torch.load(path, weights_only=False)


def assert_like(found: Any, expected: Any, exact: bool = False) -> None:
    found, expected = ({k: v for k, v in each.items() if k != "q8lightning"} for each in (found, expected))
    (one, here), (other, there) = described(found), described(expected)
    assert one == other
    for a, b in zip(here, there, strict=True):
        a, b = a.detach(), b.detach()
        # The coarsest codec of the presets, for first moments in 5 bits, loses 4.5% of normal values.
        assert torch.equal(a, b) or (not exact and float((a - b).norm() / b.norm()) < 0.06)


def encoded_in(path: Path) -> set[str]:
    """Return the names of all payloads of a file, wherever they are."""
    with collect_encoded() as found:
        torch.load(path, weights_only=False)
        return {payload.name for payload in found}


# Containers


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """In the manner of transformers' ModelOutput: its attributes are its items."""

    logits: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        make, _, *more = super().__reduce__()
        return make, tuple(getattr(self, field.name) for field in fields(self)), *more


class Attributes(dict):  # type: ignore[type-arg]
    """The usual dict whose items are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Doubling(dict):  # type: ignore[type-arg]
    """Doubles what is put into it, but not what it is made from."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value * 2 if isinstance(value, Tensor) else value)

    def update(self, other: Any) -> None:
        for key, value in other.items():
            self[key] = value

    def __reduce__(self) -> Any:
        return doubling, (list(self.items()),)


def doubling(items: Any) -> Doubling:
    made = Doubling()
    for key, value in items:
        dict.__setitem__(made, key, value)
    return made


class Shifting(dict):  # type: ignore[type-arg]
    """Adds one to what is put into it, also when it is unpickled."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value + 1 if isinstance(value, Tensor) else value)


def shifting(**items: Tensor) -> Shifting:
    made = Shifting()
    dict.update(made, items)
    return made


def bag(**items: Any) -> Bag:
    made = Bag(items)
    made.note = {"by": "hand"}  # type: ignore[attr-defined]
    return made


def mirror(x: Tensor) -> Stack:
    made = Stack([x])
    made.best = x  # type: ignore[attr-defined]
    return made


def family(x: Tensor) -> dict[str, Any]:
    node: dict[str, Any] = {"name": "root", "children": [], "weight": x}
    node["children"].append({"parent": node, "tuple": (node, x)})
    return node


def holds_itself(x: Tensor) -> list[Any]:
    made: list[Any] = [x]
    made.append(made)
    return made


ENTERED: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"a": x},
    "list": lambda x: [x, [x]],
    "tuple": lambda x: (1, (x, None)),
    "OrderedDict": lambda x: OrderedDict(a=x),
    "defaultdict": lambda x: defaultdict(list, a=x),
    "Counter": lambda x: Counter(a=x),
    "namedtuple": lambda x: Pair(x, 1),
    "NamedTuple": lambda x: Typed(1, x),
    "tuple subclass": lambda x: Row([x]),
    "list subclass": lambda x: Stack([1, x]),
    "dict subclass": lambda x: bag(a=x),
    "Lightning's AttributeDict": lambda x: AttributeDict(a=x),
    "converts when it is unpickled": lambda x: shifting(a=x),
    "cycle": family,
    "holds itself": holds_itself,
    "400 levels": lambda x: [x, deep(400)],
    "2^60 paths": lambda x: [shared(60), x],
    "shared": lambda x: [[part := {"a": x}, part], part],
}
WHOLE: dict[str, Callable[[Tensor], Any]] = {
    "model output": lambda x: Output(logits=x),
    "its own attributes": lambda x: Attributes(a=x),
    "converts what is put into it": lambda x: doubling([("a", x), ("b", torch.ones(3))]),
    "an attribute is an item": mirror,
    "values and indices": lambda x: x.view(100, 100).max(0),
}


@WAYS
@pytest.mark.parametrize("make", [*ENTERED.values(), *WHOLE.values()], ids=[*ENTERED, *WHOLE])
def test_containers_are_what_they_were_and_the_file_says_what_is_so(
    make: Callable[[Tensor], Any], async_save: bool, tmp_path: Path
) -> None:
    checkpoint = {"extra": make(torch.randn(10_000)), "state_dict": {"w": torch.randn(64, 65)}}
    expected, before = plain(checkpoint, tmp_path / "plain"), described(checkpoint)[0]
    save(checkpoint, tmp_path / "a.ckpt", async_save)
    for found in doors(tmp_path / "a.ckpt"):
        said = found["q8lightning"]
        assert len(said["tensors"]) == (2 if make in ENTERED.values() else 1)
        assert set(said["tensors"]) == encoded_in(tmp_path / "a.ckpt")
        assert said["bytes"]["encoded_original"] == 4 * (64 * 65 + (10_000 if make in ENTERED.values() else 0))
        if make in WHOLE.values():
            assert_like({"extra": found["extra"]}, {"extra": expected["extra"]}, exact=True)
        assert_like(found, expected)
    assert described(checkpoint)[0] == before
    assert "q8lightning" not in checkpoint


@WAYS
def test_a_model_output_of_transformers(async_save: bool, tmp_path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    checkpoint = {"extra": outputs.CausalLMOutput(logits=torch.randn(100, 100))}
    save(checkpoint, tmp_path / "a.ckpt", async_save)
    for found in doors(tmp_path / "a.ckpt"):
        assert found["q8lightning"]["tensors"] == {}
        assert torch.equal(found["extra"].logits, checkpoint["extra"].logits)
        assert found["extra"]["logits"] is found["extra"].logits


@WAYS
def test_a_checkpoint_that_holds_itself(async_save: bool, tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {"state_dict": {"w": torch.randn(64, 65)}}
    checkpoint["whole"] = (checkpoint,)
    save(checkpoint, tmp_path / "a.ckpt", async_save)
    for found in doors(tmp_path / "a.ckpt"):
        assert found["whole"][0] is found
    assert list(checkpoint) == ["state_dict", "whole"]


def test_the_command_line_takes_them_too(tmp_path: Path) -> None:
    main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main
    checkpoint = {"state_dict": {"w": torch.randn(64, 65)}, "a": shared(60), "b": deep(400), "c": family(torch.ones(3))}
    torch.save(checkpoint, tmp_path / "plain")
    main(["compress", str(tmp_path / "plain"), str(tmp_path / "a.ckpt")])
    for found in doors(tmp_path / "a.ckpt"):
        assert_like(found, checkpoint)
    assert encoded_in(tmp_path / "a.ckpt") == {"state_dict.w"}


SECTIONS: dict[str, Any] = {
    "none": {"state_dict": None, "optimizer_states": None, "current_model_state": None},
    "empty": {"state_dict": {}, "optimizer_states": []},
    "words": {"state_dict": "gone", "optimizer_states": "gone"},
    "numbers": {"state_dict": 1, "optimizer_states": 2.5},
    "lists": {"state_dict": [torch.randn(64, 65)], "optimizer_states": [None, [], {"param_groups": None}]},
    "odd groups": {"optimizer_states": [{"state": None, "param_groups": [None, {"params": None, "eps": 1.0}]}]},
    "tuples": {"optimizer_states": ({"state": {0: {"exp_avg": torch.randn(5000)}}, "param_groups": ({},)},)},
    "by name": {"optimizer_states": {"main": {"state": {}, "param_groups": [{"param_names": 3}]}}},
}


@WAYS
@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS)
def test_sections_may_be_anything(sections: dict[str, Any], async_save: bool, tmp_path: Path) -> None:
    save(sections, tmp_path / "a.ckpt", async_save, "compact")
    for found in doors(tmp_path / "a.ckpt"):
        assert_like(found, sections)


@pytest.mark.parametrize("checkpoint", ["resume", None], ids=str)
@pytest.mark.parametrize("value", [None, [], {"other": 1}], ids=str)
def test_a_hook_may_put_anything_in_the_place_of_the_weights(checkpoint: Any, value: Any, tmp_path: Path) -> None:
    class Model(Shrink):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = value

    callback = QuantizationCallback(checkpoint=checkpoint, qat={})
    train_and_save(tmp_path, Model(nn.Linear(64, 64)), callback, max_steps=1)
    assert torch.load(tmp_path / "a.ckpt")["state_dict"] == value


# Objects


class NoCopy:
    """Can be pickled and not be copied."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("only one of these")


class SharesItself(NoCopy):
    """Its copy is itself."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class NotAgain(NoCopy):
    """Can be pickled and not be unpickled."""

    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("never again")


class Slots:
    """Has no attributes but these."""

    __slots__ = ("values",)

    def __init__(self, *values: Any) -> None:
        self.values = list(values)


class Keywords(NoCopy):
    """Is made anew with keywords."""

    def __new__(cls, *values: Any, name: str = "") -> "Keywords":
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (1,), {"name": "word"}


class Called(NoCopy):
    """Pickles as a call of what is an object itself."""

    def __reduce__(self) -> Any:
        return PARTIAL, (1, self.values)


PARTIAL = functools.partial(Pair)


class Set(set):  # type: ignore[type-arg]
    """A set with a name."""


class Colour(enum.Enum):
    """Pickles as a call of its class."""

    RED = 1


def chain(length: int) -> Any:
    first: Any = None
    for number in range(length):
        first = NoCopy(number, first)
    return first


def parent() -> Any:
    one, other = NoCopy(), NoCopy()
    one.values, other.values = [other, {"tuple": (one,)}], [one, one.values]
    return one


def discriminator() -> Any:
    net = nn.utils.spectral_norm(nn.Linear(8, 8))
    net(torch.ones(1, 8))
    return net


OBJECTS: dict[str, Callable[[], Any]] = {
    "no copy": lambda: NoCopy(1, [2], torch.ones(3)),
    "shares itself": lambda: SharesItself(1, {"x": [2]}),
    "never again": lambda: NotAgain(torch.ones(3)),
    "slots": lambda: Slots([1], torch.ones(2)),
    "keywords": lambda: Keywords([1]),
    "called": lambda: Called([1]),
    "300 long": lambda: chain(150),
    "its own parent": parent,
    "spectral norm": discriminator,
    "module": lambda: nn.Sequential(nn.Linear(64, 65), nn.BatchNorm1d(65)),
    "sets": lambda: [{1, 2}, frozenset("a"), Set([3]), bytearray(b"b"), b"c", range(3), slice(1, 2), ...],
    "words": lambda: [PurePosixPath("a/b"), Colour.RED, re.compile("x"), torch.float16, torch.strided, int, chain],
    "numpy": lambda: [np.arange(5.0), np.float32(2), np.random.default_rng(0)],
    "storage": lambda: [torch.ones(3).untyped_storage(), torch.ones(3)],
    "tensors that are more": lambda: [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        torch.ones(3, requires_grad=True) * 2,
        nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, device="meta"),
    ],
    "converts": lambda: Doubling(a=1),
}


def change(value: Any) -> None:
    """Change whatever can be changed in an object, at once."""
    if isinstance(value, nn.Module):
        for tensor in value.state_dict().values():
            tensor.zero_()
        value.training = not value.training
    elif isinstance(value, list):
        for item in value:
            change(item)
        value.append("changed")
    elif isinstance(value, NoCopy | Slots):
        value.values.append("changed")
    elif isinstance(value, set | bytearray):
        value.clear()
    elif isinstance(value, np.ndarray):
        value[0] = 7
    elif isinstance(value, Tensor) and not (value.is_meta or value.is_quantized):
        value.detach().zero_()


@pytest.mark.filterwarnings("ignore")  # torch's remarks on prototypes
@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_in_the_background_the_file_is_that_of_the_call(make: Callable[[], Any], steps: Steps, tmp_path: Path) -> None:
    torch.manual_seed(1)
    value = make()
    bias = torch.randn(20)
    checkpoint = {"state_dict": {"bias": bias}, "hyper_parameters": {"it": value, "again": (value, NoCopy(bias[3:]))}}
    save(checkpoint, tmp_path / "now", async_save=False)
    torch.save(checkpoint, tmp_path / "plain")
    io = QuantizedCheckpointIO(checkpoint=EVERYTHING, async_save=True)
    gate = steps.hold("fetched")
    io.save_checkpoint(checkpoint, tmp_path / "later")
    change(value)
    bias.zero_()
    gate.set()
    io.finish()
    assert without_identity((tmp_path / "later").read_bytes()) == without_identity((tmp_path / "now").read_bytes())
    if not isinstance(value, NotAgain):
        expected = torch.load(tmp_path / "plain", weights_only=False)
        for found in doors(tmp_path / "later"):
            assert described(found["hyper_parameters"])[0] == described(expected["hyper_parameters"])[0]
            held = found["hyper_parameters"]["again"][1].values[0]
            assert held.untyped_storage().data_ptr() == found["state_dict"]["bias"].untyped_storage().data_ptr()


def test_another_checkpoint_io_still_gets_objects(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looking(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            seen.append(checkpoint)
            super().save_checkpoint(checkpoint, *args, **kwargs)

    io = QuantizedCheckpointIO(Looking(), async_save=True)
    live = [1]
    io.save_checkpoint({"path": PurePosixPath("a"), "it": NoCopy(live), "slots": Slots(live)}, tmp_path / "a.ckpt")
    live.append(2)
    io.finish()
    assert seen[0]["path"] == PurePosixPath("a")
    assert seen[0]["slots"].values == [[1]]
    found = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert found["it"].values == [[1]]
    assert found["slots"].values == [[1]]


def test_what_cannot_be_pickled_is_an_error_of_the_call(tmp_path: Path) -> None:
    io = QuantizedCheckpointIO(async_save=True)
    with pytest.raises(TypeError, match="cannot pickle"):
        io.save_checkpoint({"lock": threading.Lock()}, tmp_path / "a.ckpt")
    io.finish()


# Parameters


def weights() -> dict[str, Any]:
    tied = nn.Parameter(torch.randn(64, 65))
    memory = torch.randn(5000)
    return {
        "parameter": nn.Parameter(torch.randn(64, 65)),
        "frozen": nn.Parameter(torch.randn(64, 65), requires_grad=False),
        "leaf": torch.randn(64, 65, requires_grad=True),
        "result": torch.randn(64, 65, requires_grad=True) * 2,
        "tensor": torch.randn(64, 65),
        "tied": tied,
        "with": tied,
        "transposed": nn.Parameter(torch.randn(65, 64).t()),
        "beside": nn.Parameter(memory[:4500]),
        "neighbour": nn.Parameter(memory[4500:], requires_grad=False),
        "small": nn.Parameter(torch.ones(3)),
    }


RAW = {"small", "neighbour"}


@WAYS
@pytest.mark.parametrize("preset", ["resume", "compact"])
def test_parameters_are_encoded_and_come_back_as_parameters(preset: str, async_save: bool, tmp_path: Path) -> None:
    checkpoint = {"state_dict": weights()}
    expected = plain(checkpoint, tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(checkpoint, tmp_path / "a.ckpt", async_save, preset)
    # One that stands for two has the name of the first.
    assert set(payloads_of(tmp_path / "a.ckpt")) == {
        f"state_dict.{name}" for name in checkpoint["state_dict"].keys() - RAW
    }
    assert (tmp_path / "a.ckpt").stat().st_size < (tmp_path / "plain").stat().st_size * 0.6
    for found in (*doors(tmp_path / "a.ckpt"), load(tmp_path / "a.ckpt")):
        assert found["state_dict"]["neighbour"].untyped_storage().nbytes() == 4 * 500
        assert_like(found, expected)
    with keep_encoded():
        kept = load(tmp_path / "a.ckpt")
    save(copy.deepcopy(kept), tmp_path / "b.ckpt", async_save, preset)
    assert_like(load(tmp_path / "b.ckpt"), expected)
    QuantizedCheckpointIO(checkpoint=preset).save_checkpoint(load(tmp_path / "a.ckpt"), tmp_path / "c.ckpt")
    assert_like(load(tmp_path / "c.ckpt"), load(tmp_path / "a.ckpt"), exact=True)


def test_a_hook_that_puts_live_parameters_there_loses_nothing(tmp_path: Path) -> None:
    class Model(Shrink):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = dict(self.named_parameters())

    train_and_save(tmp_path, Model(nn.Linear(64, 64)), QuantizationCallback("compact"), max_steps=1)
    assert {"state_dict.net.weight"} == {name for name in payloads_of(tmp_path / "a.ckpt") if "state_dict" in name}
    assert type(load(tmp_path / "a.ckpt")["state_dict"]["net.weight"]) is nn.Parameter
    other = Model(nn.Linear(64, 64))
    other.load_state_dict(load(tmp_path / "a.ckpt")["state_dict"])
    assert torch.equal(other.net.weight, load(tmp_path / "a.ckpt")["state_dict"]["net.weight"])


def test_the_command_line_keeps_parameters(tmp_path: Path) -> None:
    main = pytest.importorskip("q8lightning.cli.main", reason="needs the extra cli").main
    expected = plain({"state_dict": weights()}, tmp_path / "plain")
    main(["compress", str(tmp_path / "plain"), str(tmp_path / "a.ckpt")])
    main(["decompress", str(tmp_path / "a.ckpt"), str(tmp_path / "large")])
    for name in ("a.ckpt", "large"):
        assert_like(torch.load(tmp_path / name), expected)


@WAYS
def test_what_cannot_be_both_says_so_and_stays_as_it_is(async_save: bool, tmp_path: Path) -> None:
    parameter, marked = nn.Parameter(torch.randn(64, 65)), nn.Parameter(torch.randn(64, 65))
    marked.no_decay = True  # type: ignore[attr-defined]
    checkpoint = {"state_dict": {"w": parameter.detach(), "m": marked}, "extra": {"live": parameter}}
    expected = plain(checkpoint, tmp_path / "plain")
    with pytest.warns(
        UserWarning, match=r"state_dict\.m \(it has attributes \(no_decay\).*state_dict\.w .*extra\.live"
    ):
        save(checkpoint, tmp_path / "a.ckpt", async_save)
    for found in doors(tmp_path / "a.ckpt"):
        assert_like(found, expected, exact=True)
        state = found["state_dict"]
        assert state["w"].data_ptr() == found["extra"]["live"].data_ptr()
        assert state["m"].no_decay


# AMSGrad

COARSE = [0.0, 0.25, 0.5, 0.75, 1.0]
"""Levels for values between 0.25 and 1: none becomes zero, and the root is off by several percent."""


def adam(amsgrad: bool) -> dict[str, Any]:
    """A checkpoint of an optimizer after three steps, as ``precise`` encodes it well."""
    parameter = nn.Parameter(torch.randn(64, 65))
    optimizer = torch.optim.AdamW([parameter], amsgrad=amsgrad)
    for step in range(3):
        parameter.grad = torch.randn(64, 65) / (step + 1)
        optimizer.step()
    return {"optimizer_states": [optimizer.state_dict()]}


@pytest.mark.parametrize("key", ["exp_avg_sq", "max_exp_avg_sq"])
def test_each_second_moment_of_amsgrad_is_held_to_the_limit(key: str) -> None:
    checkpoint = adam(amsgrad=True)
    state = checkpoint["optimizer_states"][0]["state"][0]
    state[key].copy_(torch.rand(64, 65) * 0.75 + 0.25)
    rules = [Rule(f"*.{key}", COARSE), *CheckpointPolicy.of("precise").rules]
    _, report = encode_and_report(checkpoint, CheckpointPolicy(rules, max_update_direction_error=0.01))
    assert [(each.path.rpartition(".")[2], each.remedy) for each in report.guarded] == [(key, "residual")]
    assert all(each.squared_error < 1e-4 * each.squares for each in report.directions)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_direction_reported_is_the_one_that_the_optimizer_steps_by(amsgrad: bool) -> None:
    checkpoint = adam(amsgrad)
    encoded, report = encode_and_report(checkpoint, CheckpointPolicy.of("compact"))
    (before,), (after,) = (
        [
            {key: getattr(value, "decode", lambda value=value: value)() for key, value in state.items()}
            for state in each["optimizer_states"][0]["state"].values()
        ]
        for each in (checkpoint, encoded)
    )
    key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    one, other = (each["exp_avg"] / (each[key].sqrt() + 1e-8) for each in (before, after))
    (direction,) = report.directions
    assert direction.path.endswith(".exp_avg")
    assert (direction.squared_error / direction.squares) ** 0.5 == pytest.approx(
        float((other - one).norm() / one.norm()), rel=1e-3
    )


# Nothing encoded


def model() -> nn.Module:
    return nn.Linear(64, 65)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return optimizer


UNNAMED: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: {"my_weight": torch.randn(64, 128)},
    "in a list": lambda: {"my_weights": [torch.randn(64, 128)]},
    "data of the user's own": lambda: {"replay": {"observed_weight": torch.randn(64, 128), "step": 1}},
}


@WAYS
@pytest.mark.parametrize("make", UNNAMED.values(), ids=UNNAMED)
def test_that_nothing_is_encoded_is_said_once(make: Callable[[], Any], async_save: bool, tmp_path: Path) -> None:
    checkpoint = make()
    io = QuantizedCheckpointIO(async_save=async_save)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
        io.finish()
    (warning,) = said
    assert re.search(r'nothing of the checkpoint is quantized: .*weight.*"state_dict"', str(warning.message))
    with pytest.warns(UserWarning, match="nothing of the checkpoint"):
        encode_checkpoint(checkpoint, io.policy)
    assert_like(load(tmp_path / "a.ckpt"), plain(dict(checkpoint), tmp_path / "plain"), exact=True)


SILENT: dict[str, Callable[[], Any]] = {
    "small": lambda: {"state_dict": nn.Linear(8, 8).state_dict()},
    "small and bare": lambda: nn.Linear(8, 8).state_dict(),
    "named to stay as it is": lambda: {"norm.running_mean": torch.ones(5000)},
    "never encoded": lambda: {"hyper_parameters": {"prior": torch.ones(5000)}},
    "integers": lambda: {"tokens": torch.arange(5000)},
    "too coarse already": lambda: {"state_dict": {"w": torch.ones(5000).bfloat16()}},
}


@pytest.mark.parametrize("make", SILENT.values(), ids=SILENT)
def test_where_there_is_nothing_to_encode_nothing_is_said(make: Callable[[], Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(make(), tmp_path / "a.ckpt", False, "resume")
        with keep_encoded():  # and where all is encoded already
            save(
                {"w": QuantizedTensor.encode(torch.ones(5000), get_codec("linear"), "w")},
                tmp_path / "b",
                False,
                "resume",
            )


def test_a_small_model_of_a_trainer_is_saved_without_a_word(tmp_path: Path) -> None:
    class Small(Shrink):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    net = nn.Linear(64, 3)
    net.register_buffer("table", torch.ones(5000))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback()])
    trainer.fit(Small(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not payloads_of(tmp_path / "a.ckpt")


def test_patterns_that_match_nothing_of_a_trainer_are_named(tmp_path: Path) -> None:
    """Its weights are under "state_dict" already, so that advice to put them there would not help."""
    policy = CheckpointPolicy([Rule("my_callback.*", "softsign"), Rule("buffers.*", "log"), Rule("*.mean")])
    callback = QuantizationCallback(policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_and_save(tmp_path, Autoencoder(), callback)
    (said,) = (str(each.message) for each in caught if "nothing of the checkpoint" in str(each.message))
    assert "nothing in it matches 'my_callback.*', 'buffers.*'; patterns match whole paths" in said
    assert "`q8lightning inspect` shows" in said
    assert 'under "state_dict"' not in said
    assert not payloads_of(tmp_path / "a.ckpt")
