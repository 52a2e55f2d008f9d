"""A plan is made once; every save runs it, and writes the file that a first save would write."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.devices import CUDA
from support.promises import payloads_of
from support.steps import Steps
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizedCheckpointIO
from q8lightning.checkpoint.encode import start
from q8lightning.checkpoint.encode.plan import Plan
from q8lightning.checkpoint.encode.planner import plan_save
from q8lightning.checkpoint.encode.run_parts.trained_codes import TrainedCodes
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.packed_bits import unpack_bits


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors are: operators encode them on the CPU, launches on a GPU.

    Plans are the same for both. What launches do is tested with ``launch_device`` as well, where they are interpreted;
    that takes a hundred times as long.
    """
    name: str = request.param
    return name


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are made."""
    made: list[Plan] = []

    def plan(*arguments: Any) -> Plan:
        made.append(plan_save(*arguments))
        return made[-1]

    # However many plans there are, the file is the same.
    monkeypatch.setattr(start, "plan_save", plan)
    return made


class Net(nn.Module):
    """Encoded weights, tied ones, small ones, buffers, one in another order of memory, and views of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm = nn.BatchNorm1d(32)
        self.conv = nn.Conv2d(4, 9, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        memory = torch.randn(40)
        self.register_buffer("one", memory[:10])
        self.register_buffer("two", memory[20:])
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("count", torch.arange(5))
        self.register_buffer("pointwise", torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last))

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        for layer in self.layers:
            x = x + layer(x)
        image = self.conv(x.new_ones(1, 4, 4, 4)).mean()
        return self.head(self.norm(x)).square().mean() * self.scale + image


class Training:
    """A model, its optimizer, and the checkpoint that a Trainer would save of them."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.model = Net().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.more: dict[str, Any] = {}
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.arange(16, device=self.model.scale.device)).backward()
        self.optimizer.step()

    @property
    def checkpoint(self) -> dict[str, Any]:
        return {
            "epoch": 1,
            "global_step": int(next(iter(self.optimizer.state.values()))["step"]),
            "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "loops": {"fit_loop": {"state_dict": {}, "progress": [1, (2, None)]}},
            **self.more,
        }


RESUME, COMPACT = (replace(CheckpointPolicy.of(name), min_numel=256) for name in ("resume", "compact"))


def written(checkpoint: dict[str, Any], path: Path, policy: CheckpointPolicy) -> bytes:
    """What a CheckpointIO writes of it that has saved nothing before."""
    io = QuantizedCheckpointIO(checkpoint=policy, async_save=True)
    io.save_checkpoint(checkpoint, path)
    io.finish()
    return path.read_bytes()


@pytest.mark.parametrize("policy", [RESUME, COMPACT], ids=["resume", "compact"])
def test_the_file_is_byte_for_byte_that_of_a_first_save(
    policy: CheckpointPolicy, launch_device: str, tmp_path: Path
) -> None:
    training, io = Training(launch_device), QuantizedCheckpointIO(checkpoint=policy, async_save=True)
    for _ in range(2):
        training.step()
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        io.wait_until_durable()
        assert (tmp_path / "a.ckpt").read_bytes() == written(training.checkpoint, tmp_path / "b.ckpt", policy)
    io.finish()


def test_it_reports_what_a_first_save_reports(launch_device: str, tmp_path: Path) -> None:
    training, io = Training(launch_device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    usual = QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    training.step()
    for each in (io, usual):
        each.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        each.finish()
    assert io.reports[-1].result() == usual.reports[-1].result()
    assert io.reports[-1].result().directions


def test_training_goes_on_at_once_and_changes_nothing_of_what_is_saved(device: str, tmp_path: Path) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.wait_until_durable()
    expected = written(training.checkpoint, tmp_path / "b.ckpt", RESUME)
    io.save_checkpoint(checkpoint := training.checkpoint, tmp_path / "a.ckpt")
    training.step()
    with torch.no_grad():
        for value in (*training.model.state_dict().values(), *_tensors(training.optimizer.state_dict())):
            value.zero_()
    checkpoint["optimizer_states"][0]["state"].clear()
    checkpoint["loops"]["fit_loop"]["progress"].append(7)
    del checkpoint, value
    io.wait_until_durable()
    assert (tmp_path / "a.ckpt").read_bytes() == expected
    io.finish()


class Remark:
    """An object that has no copy, and a tensor of its own."""

    def __init__(self, tensor: Tensor) -> None:
        self.words, self.tensor = ["one"], tensor

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def test_parameters_shared_containers_and_objects_are_saved_as_by_a_first_save(
    device: str, steps: Steps, tmp_path: Path
) -> None:
    """As is the state of AMSGrad."""
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-2, amsgrad=True)
    training.step()
    live = {"live": nn.Parameter(torch.randn(16, 32, device=device)), "frozen": torch.randn(16, 32, device=device)}
    live["tied"] = live["live"]
    family: dict[str, Any] = {"small": nn.Parameter(torch.ones(3, device=device)), "children": []}
    family["children"] += [{"parent": family}, (family, family["children"])]
    remark = Remark(torch.ones(3, device=device))
    training.more = {"current_model_state": live, "family": family, "remark": remark}
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.wait_until_durable()
    training.step()
    expected = written(training.checkpoint, tmp_path / "b.ckpt", RESUME)
    io.wait_until_durable()
    gate = steps.hold("fetched")
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    remark.words.append("two")
    for tensor in (*live.values(), family["small"], remark.tensor):
        tensor.detach().zero_()
    gate.set()
    io.finish()
    assert (tmp_path / "a.ckpt").read_bytes() == expected
    report = io.reports[-1].result()
    directions = [each.path for each in report.directions]
    assert len(set(directions)) == len(directions) == 4
    assert {"current_model_state.live", "current_model_state.frozen"} < {each.path for each in report.tensors}


class Bag(dict[str, Any]):
    """A dict with attributes."""


def freeze(tensor: Tensor) -> None:
    tensor.requires_grad_(False)


def shrink(tensor: Tensor) -> None:
    tensor.data = torch.zeros(3, dtype=torch.float16)


@pytest.mark.parametrize("change", [freeze, shrink], ids=lambda f: f.__name__)
def test_tensors_that_become_something_else_before_they_are_written_are_saved_as_they_were(
    change: Callable[[Tensor], None], device: str, steps: Steps, tmp_path: Path
) -> None:
    """A parameter that a callback freezes; a state whose memory an optimizer replaces."""
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    live = {"small": nn.Parameter(torch.randn(8, device=device)), "large": torch.randn(16, 32, device=device)}
    training.more["current_model_state"] = live
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.wait_until_durable()
    expected = written(training.checkpoint, tmp_path / "b.ckpt", RESUME)
    gate = steps.hold("removing")
    io.remove_checkpoint(tmp_path / "none.ckpt")
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    for tensor in live.values():
        change(tensor)
    gate.set()
    io.finish()
    assert (tmp_path / "a.ckpt").read_bytes() == expected


def test_attributes_of_containers_have_copies(device: str, steps: Steps, tmp_path: Path) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    live = torch.ones(8, device=device)
    training.more["bag"] = bag = Bag(tensor=live)
    bag.same = {"tensor": live}  # type: ignore[attr-defined]
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.wait_until_durable()
    gate = steps.hold("removing")
    io.remove_checkpoint(tmp_path / "none.ckpt")
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    live.zero_()
    gate.set()
    io.finish()
    found = torch.load(tmp_path / "a.ckpt", weights_only=False)["bag"]
    assert found["tensor"].tolist() == found.same["tensor"].tolist() == [1] * 8


def test_another_policy_is_followed_at_once(device: str, tmp_path: Path) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.policy = COMPACT
    for _ in range(2):
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.finish()
    assert (tmp_path / "a.ckpt").read_bytes() == written(training.checkpoint, tmp_path / "b.ckpt", COMPACT)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def grow(training: Training) -> None:
    training.more["extra"] = {"table": torch.ones(3)}


def move(training: Training) -> None:
    parameter = training.model.layers[0].weight
    parameter.data = parameter.data.clone()


def narrow(training: Training) -> None:
    state = training.optimizer.state[training.model.layers[0].weight]
    state["exp_avg"] = state["exp_avg"].half()


def share(training: Training) -> None:
    training.model.layers[1].weight = training.model.layers[0].weight
    state = training.optimizer.state
    training.optimizer.param_groups[0]["params"] = list(training.model.parameters())
    training.optimizer.state = type(state)(dict, {p: state[p] for p in training.model.parameters()})


def other_epsilon(training: Training) -> None:
    training.optimizer.param_groups[0]["eps"] = 1e-3


def diverge(training: Training) -> None:
    training.model.layers[0].weight.data[3, 3] = torch.nan


def lose(training: Training) -> None:
    """One gradient in each block so large that the others vanish beside it, though each steps as far."""
    state = training.optimizer.state[training.model.layers[1].weight]
    state["exp_avg"].mul_(1e-6).view(-1)[::128] = 1.0
    state["exp_avg_sq"].copy_(state["exp_avg"].square())


@pytest.mark.filterwarnings("ignore:stored as they are", "ignore:would have lost more")
@pytest.mark.parametrize("change", [move, narrow, share, other_epsilon, diverge, lose], ids=lambda f: f.__name__)
@pytest.mark.parametrize("async_save", [True, False], ids=["async", "synchronous"])
def test_what_is_not_as_before_is_saved_as_by_a_first_save(
    async_save: bool, change: Callable[[Training], None], device: str, planned: list[Plan], tmp_path: Path
) -> None:
    """Other tensors need another plan; other values do not, and the guard decides anew by values alone."""
    check_change(change, Training(device), async_save, planned, tmp_path)


@pytest.mark.filterwarnings("ignore:stored as they are", "ignore:would have lost more")
@pytest.mark.parametrize("change", [diverge, lose], ids=lambda f: f.__name__)
def test_what_a_launch_cannot_keep_is_saved_as_by_a_first_save(
    change: Callable[[Training], None], launch_device: str, planned: list[Plan], tmp_path: Path
) -> None:
    check_change(change, Training(launch_device), True, planned, tmp_path)
    encoded = payloads_of(tmp_path / "a.ckpt")
    assert ("state_dict.layers.0.weight" in encoded) == (change is lose), "what holds NaN is stored as it is"
    assert encoded.keys() >= {"state_dict.layers.1.weight", "state_dict.embed.weight"}


def check_change(
    change: Callable[[Training], None], training: Training, async_save: bool, planned: list[Plan], tmp_path: Path
) -> None:
    io = QuantizedCheckpointIO(checkpoint=COMPACT, async_save=async_save)
    io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    change(training)
    expected = b""
    for _ in range(2):
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        io.wait_until_durable()
        made = len(planned)
        expected = expected or written(training.checkpoint, tmp_path / "b.ckpt", COMPACT)
        del planned[made:]
        assert (tmp_path / "a.ckpt").read_bytes() == expected
    assert len(planned) == (1 if change in (diverge, lose) else 2)
    io.finish()


@pytest.mark.filterwarnings("ignore:would have lost more")
def test_what_the_guard_did_is_undone_when_values_allow_it(device: str, tmp_path: Path) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=COMPACT, async_save=True)
    before = training.checkpoint["optimizer_states"][0]["state"]
    before = {key: {name: value.clone() for name, value in state.items()} for key, state in before.items()}
    lose(training)
    for guarded in (True, False):
        if not guarded:
            training.optimizer.load_state_dict({**training.optimizer.state_dict(), "state": before})
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        io.wait_until_durable()
        assert bool(io.reports[-1].result().guarded) == guarded
        assert (tmp_path / "a.ckpt").read_bytes() == written(training.checkpoint, tmp_path / "b.ckpt", COMPACT)
    io.finish()


def test_keys_that_are_tensors_do_not_compare(device: str, tmp_path: Path) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=COMPACT, async_save=True)
    for _ in range(2):
        training.more["by tensor"] = {torch.ones(2): 1}
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    io.finish()


@pytest.mark.parametrize("async_save", [True, False], ids=["async", "synchronous"])
def test_a_plan_is_made_once_for_the_same_tensors(
    async_save: bool, device: str, planned: list[Plan], tmp_path: Path
) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=async_save)
    for _ in range(3):
        training.step()
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    assert len(planned) == 1
    grow(training)
    for _ in range(3):
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
    assert len(planned) == 2
    io.finish()


def test_scores_of_callbacks_and_counts_of_loops_need_no_new_plan(
    device: str, planned: list[Plan], tmp_path: Path
) -> None:
    """A ModelCheckpoint that monitors a value has other tensors at every save."""
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    expected = []
    for step in range(3):
        score = torch.tensor(1.0 + step, device=device)
        scores = {f"step={i}.ckpt": torch.tensor(float(i), device=device) for i in range(step)}
        training.more = {
            "callbacks": {"ModelCheckpoint": {"best_model_score": score, "best_k_models": scores}},
            "lr_schedulers": [{"last_epoch": step, "history": [0.1] * step}],
        }
        io.save_checkpoint(training.checkpoint, tmp_path / f"{step}.ckpt")
        expected.append((float(score), step))
        score.zero_()
    io.finish()
    assert len(planned) == 1
    for step, (score, count) in enumerate(expected):
        loaded = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert float(loaded["callbacks"]["ModelCheckpoint"]["best_model_score"]) == score
        assert loaded["callbacks"]["ModelCheckpoint"]["best_model_score"].device.type == torch.device(device).type
        assert len(loaded["callbacks"]["ModelCheckpoint"]["best_k_models"]) == count
        assert len(loaded["lr_schedulers"][0]["history"]) == count


@pytest.mark.parametrize("sparse", [False, True], ids=["", "beside a sparse buffer"])
@pytest.mark.parametrize("what", ["the tensor", "a view", "an object that holds it"])
def test_a_score_that_the_model_has_too_stays_the_same_tensor(
    what: str, sparse: bool, device: str, tmp_path: Path
) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    if sparse:
        training.model.register_buffer("graph", torch.eye(3, device=device).to_sparse())
    scale = training.model.scale.data
    score: Any = {"the tensor": scale, "a view": scale.view(1), "an object that holds it": Remark(scale)}[what]
    for _ in range(2):
        training.more = {"callbacks": {"Best": {"score": score}}}
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        io.wait_until_durable()
        loaded = torch.load(tmp_path / "a.ckpt", weights_only=what != "an object that holds it")
        kept = loaded["callbacks"]["Best"]["score"]
        kept = kept.tensor if isinstance(kept, Remark) else kept
        loaded["state_dict"]["scale"].fill_(7.0)
        assert float(kept) == 7.0
        training.step()
    io.finish()


def test_values_that_need_a_second_look_are_saved_as_by_a_first_save(device: str, tmp_path: Path) -> None:
    """Whether float16 holds what was decoded of it is not known before it was decoded."""
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=COMPACT, async_save=True)
    average = torch.randn(512, device=device).half()
    training.more["current_model_state"] = {"average": average}
    for _ in range(2):
        expected = written(training.checkpoint, tmp_path / "b.ckpt", COMPACT)
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        average.zero_()
        io.wait_until_durable()
        assert (tmp_path / "a.ckpt").read_bytes() == expected
        average.normal_()
    io.finish()


def test_a_plan_keeps_no_tensor_alive(device: str, tmp_path: Path) -> None:
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=RESUME, async_save=True)
    for _ in range(2):
        io.save_checkpoint(training.checkpoint, tmp_path / "a.ckpt")
        io.wait_until_durable()
    gone = [
        weakref.ref(x)
        for x in (training.model.layers[0].weight, training.optimizer.state_dict()["state"][0]["exp_avg"])
    ]
    del training
    gc.collect()
    assert [each() for each in gone] == [None, None]
    io.finish()


def test_codes_of_weights_that_are_trained_quantized_are_those_of_their_codec(device: str, tmp_path: Path) -> None:
    """Encoded together or one by one: flat, by rows of whole blocks, by rows that end within a block, out of order."""
    training, io = Training(device), QuantizedCheckpointIO(checkpoint=COMPACT, async_save=True)
    quantized = {
        "embed.weight": WeightCodec("int4", 32),
        "layers.0.weight": WeightCodec("int4", 32, 0),
        "layers.1.weight": WeightCodec("normal_float4", 64, 0),
        "conv.weight": WeightCodec("int8", 32),
    }
    io.describe_model = lambda: ModelNames(quantized=quantized)
    for name in ("a.ckpt", "b.ckpt"):
        expected = {key: codec.encode(training.model.get_parameter(key)) for key, codec in quantized.items()}
        io.save_checkpoint(training.checkpoint, tmp_path / name)
        training.step()
        io.wait_until_durable()
        found = torch.load(tmp_path / name, weights_only=True)["q8lightning"]["qat"]
        for key, (codes, scales) in expected.items():
            entry, bits = found[key], quantized[key].bits
            unpacked = unpack_bits(entry["codes"].cpu(), bits, codes.numel())
            assert torch.equal(unpacked, codes.cpu().reshape(-1)), key
            assert torch.equal(entry["scales"].cpu(), scales.cpu()), key
            assert entry["scales"].untyped_storage().nbytes() == scales.nbytes, "the file has no more than the scales"
    io.finish()


def test_codes_are_kept_until_the_stream_that_packs_them_was_waited_for() -> None:
    """Training's stream, whose memory they are, could hand it out again while another stream still reads it."""
    made: list[weakref.ref[Tensor]] = []

    def encode(tensor: Tensor) -> tuple[Tensor, Tensor]:
        parts = tensor.to(torch.uint8), torch.ones(1)
        made.extend(map(weakref.ref, parts))
        return parts

    plan: Any = SimpleNamespace(codes=[("w", 0, SimpleNamespace(encode=encode, bits=8))], codes_together=())
    codes = TrainedCodes(plan)
    codes.encode(torch.device("cpu"), [torch.arange(4.0)])
    codes.pack(torch.device("cpu"))
    assert all(each() is not None for each in made)
    codes.let_go()
    assert [each() for each in made] == [None, None]
    assert codes.packed["w"][0].tolist() == [0, 1, 2, 3]
