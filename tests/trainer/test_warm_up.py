"""Saves in miniature need what the first real save will need, and disturb nobody."""

import atexit
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from support import forked
from support.loaded import loaded
from support.models import batches, quiet_trainer
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO, Rule
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.tree import PATHS, tensors
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.trainer.prepare.miniatures import Form, miniatures_of
from q8lightning.trainer.prepare.warm_up import WarmUp, guarded
from q8lightning.trainer.save.door import door_of

CPU = torch.device("cpu")

POLICIES: dict[str, CheckpointPolicy] = {
    "resume": CheckpointPolicy.of("resume"),
    "compact": CheckpointPolicy.of("compact"),
    "first moments of one": CheckpointPolicy(
        [Rule("optimizer_states.*.exp_avg", "dynamic", parameter="second.*"), Rule("state_dict.third*", "int4", 64)],
        min_sqnr_db=None,
    ),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "rmsprop": torch.optim.RMSprop,
}


class Parts(pl.LightningModule):
    """Weights of which some end within 16 elements, a small one, a frozen one and one in 16 bits."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 65)
        self.third = nn.Linear(65, 67)
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.sixteen = nn.Parameter(torch.randn(64, 96).bfloat16())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        output: Tensor = self.third(self.second(self.first(batch))).square().mean() + self.sixteen.square().mean()
        return output

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.hparams["optimizer"]](self.trained())

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train_dataloader(self) -> Any:
        return batches()


class Keeps(CheckpointIO):
    """Keeps what it is to write."""

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.content = checkpoint

    def load_checkpoint(self, *_: Any, **__: Any) -> Any: ...
    def remove_checkpoint(self, path: Any) -> None: ...


Encoded = tuple[set[Any], set[Any]]


def encoded(policy: CheckpointPolicy, checkpoint: dict[str, Any], names: ModelNames) -> Encoded:
    """Return how tensors are encoded, as far as kernels care, and how the moments of pairs that are measured are."""
    keeps = Keeps()
    io = QuantizedCheckpointIO(keeps, policy)
    io.describe_model = lambda: names
    io.save_checkpoint(checkpoint, "nowhere")
    ways: dict[str, Any] = {}
    for keys, x in tensors(checkpoint, PATHS):
        payload: Any = keeps.content
        for key in keys:
            payload = payload[key]
        ways[".".join(map(str, keys))] = (payload.codec if isinstance(payload, QuantizedTensor) else None, Form.of(x))
    report = io.reports[-1].result()
    pairs = {
        tuple(
            ways.get(f"{each.path.removesuffix('exp_avg')}{key}") for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        )
        for each in report.directions
    }
    return {way for way in ways.values() if way[0] is not None}, pairs


def names_of(module: nn.Module, trained: list[nn.Parameter]) -> ModelNames:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return ModelNames(frozenset(names.values()), (tuple(names[id(parameter)] for parameter in trained),))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("begun", [False, True])
def test_miniatures_are_encoded_in_all_the_ways_that_the_model_is(begun: bool, name: str, optimizer: str) -> None:
    torch.manual_seed(0)
    module, policy = Parts(optimizer), POLICIES[name]
    live = module.configure_optimizers()
    before = [] if begun else miniatures_of(policy, module, [live], CPU)
    module.training_step(torch.randn(8, 64), 0).backward()
    live.step()
    names = names_of(module, module.trained())
    real = encoded(policy, {"state_dict": module.state_dict(), "optimizer_states": [live.state_dict()]}, names)
    miniatures = before or miniatures_of(policy, module, [live], CPU)
    ways, pairs = set[Any](), set[Any]()
    for miniature in miniatures:
        small = encoded(POLICIES[name], miniature.checkpoint(CPU), names)
        ways |= small[0]
        pairs |= small[1]
    assert real[0] == ways
    assert real[1] == pairs
    assert len(miniatures) <= 6
    assert bool(ways) or name == "first moments of one"


def test_parameters_without_memory_need_no_miniatures() -> None:
    """Those of lazy layers have no shape yet when the fit starts, and sparse ones no address."""
    module = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 128))
    module.graph = nn.Parameter(torch.eye(100).to_sparse())
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    optimizer.state[module.graph]["momentum_buffer"] = torch.eye(100).to_sparse()
    optimizer.state[module[1].weight]["momentum_buffer"] = torch.zeros(128, 64).to_sparse()
    assert [each.name for each in miniatures_of(POLICIES["resume"], module, [optimizer], CPU)] == ["1.weight"]


def test_a_form_has_the_alignment_of_the_tensor_it_is_taken_from() -> None:
    memory = torch.zeros(9000, dtype=torch.bfloat16)
    for tensor in (memory, memory[1:], memory[8:5008], memory[3:5011], memory[:4097]):
        assert all(Form.of(Form.of(tensor).tensor(CPU, lossless)) == Form.of(tensor) for lossless in (True, False))


def test_what_the_guard_may_need_is_encoded_too() -> None:
    (held, lossless), (strict, other) = guarded(POLICIES["resume"])
    assert (lossless, other) == (True, False)
    assert held.codec_for("optimizer_states.0.state.0.exp_avg", "w").residual_bits  # type: ignore[union-attr]
    assert held.codec_for("optimizer_states.0.state.0.exp_avg_sq", "w").name == "log"  # type: ignore[union-attr]
    assert not guarded(CheckpointPolicy([Rule("*", "softsign")], min_sqnr_db=None, max_update_direction_error=None))

    module, keeps = Parts(), Keeps()
    names = names_of(module, module.trained())
    for miniature in miniatures_of(POLICIES["resume"], module, [module.configure_optimizers()], CPU):
        io = QuantizedCheckpointIO(keeps, replace(strict, min_numel=1))
        io.describe_model = lambda: names
        with pytest.warns(UserWarning, match="would have lost more"):
            io.save_checkpoint(miniature.checkpoint(CPU, lossless=False), "nowhere")
        report = io.reports[-1].result()
        assert {each.remedy for each in report.guarded} == {"raw"}
        loses = miniature.weight is not None
        assert len(report.guarded) == loses + len(miniature.states)


@pytest.mark.parametrize("axis", [None, 0])
def test_codes_of_weights_that_are_trained_quantized_are_encoded_as_the_models_are(axis: int | None) -> None:
    module, policy = Parts(), POLICIES["compact"]
    names = ("first.weight", "second.weight", "third.weight")
    quantized = {name: WeightCodec("int4", 64 if axis is None else 32, axis) for name in names}
    miniatures = miniatures_of(policy, module, [module.configure_optimizers()], CPU, quantized)
    real = {(codec, shape_of(module.get_parameter(name), codec)) for name, codec in quantized.items()}
    small = {
        (quantized[each.name], shape_of(each.checkpoint(CPU)["state_dict"][each.name], quantized[each.name]))
        for each in miniatures
        if each.name in quantized
    }
    assert small == real


def shape_of(weight: Tensor, codec: WeightCodec) -> tuple[Form, bool, int | None]:
    """What kernels are compiled for, and whether they take it."""
    return Form.of(weight), codec.runs_along_memory(weight), None if codec.axis is None else weight[0].numel()


def test_nothing_is_loaded_without_a_gpu(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            door = door_of(trainer)
            assert door is not None
            assert door.warm_up is None

    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback(), Look()]).fit(Parts())


def test_what_fails_is_one_warning_and_nobody_waits_for_it() -> None:
    """A CPU has no streams."""
    module = Parts()
    warm_up = WarmUp(POLICIES["resume"], module, [module.configure_optimizers()], CPU, True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warm_up.start()
        warm_up.wait()
        while warm_up._thread is not None and warm_up._thread.is_alive():
            time.sleep(0.01)
    (said,) = [str(each.message) for each in caught if "kernels" in str(each.message)]
    assert "The first save loads them while training waits" in said


# On a GPU, each in a process in which nothing has been compiled

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gpu_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return quiet_trainer(
        folder, accelerator="gpu", limit_val_batches=0, max_epochs=-1, callbacks=[*callbacks], **options
    )


class SavesWarm(pl.Callback):
    """Saves once everything is warm, and says which kernels that loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] | None = None
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        door = door_of(trainer)
        assert door is not None
        if self.found is None and trainer.global_step == 2:
            assert door.warm_up is not None
            assert door.warm_up._thread is not None
            door.warm_up._thread.join()
            self.found = loaded()
            torch.cuda.synchronize()
            start = time.perf_counter()
            trainer.save_checkpoint(self.path)
            self.seconds = time.perf_counter() - start


def saves_warm(folder: Path, name: str, optimizer: str, precision: Any, async_save: bool, qat: Any = None) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    saves = SavesWarm(folder / "a.ckpt")
    callback = QuantizationCallback(POLICIES[name], async_save=async_save, qat=qat)
    gpu_trainer(folder, callback, saves, max_steps=3, precision=precision).fit(Parts(optimizer))
    print(f"the first save: {saves.seconds:.3f} s")
    assert saves.found == [], saves.found
    assert torch.load(folder / "a.ckpt", weights_only=True)["q8lightning"]


def saves_cold(folder: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    found = loaded()
    saves = ModelCheckpoint(folder, every_n_train_steps=1)
    gpu_trainer(folder, saves, max_steps=1, enable_checkpointing=True, plugins=[QuantizedCheckpointIO()]).fit(Parts())
    assert len(found) >= 4, found


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize(
    ("name", "optimizer", "precision"),
    [
        ("resume", "adamw", "bf16-mixed"),
        ("compact", "amsgrad", "32-true"),
        ("compact", "adamw", "bf16-true"),
        ("resume", "momentum", "16-true"),
        ("first moments of one", "adamw", "32-true"),
    ],
)
class TestOnGpu:
    pytestmark = on_gpu

    def test_the_first_save_after_it_loads_no_kernel(
        self, name: str, optimizer: str, precision: str, async_save: bool, tmp_path: Path
    ) -> None:
        assert forked.run(saves_warm, tmp_path, name, optimizer, precision, async_save) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", [None, 0])
def test_nor_does_one_with_the_codes_of_weights_that_are_trained_quantized(axis: int | None, tmp_path: Path) -> None:
    qat = {"weights": [{"codebook": "int4", "block_size": 64, "axis": axis}]}
    assert forked.run(saves_warm, tmp_path, "compact", "adamw", "bf16-mixed", True, qat) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_save_without_it_loads_kernels(tmp_path: Path) -> None:
    assert forked.run(saves_cold, tmp_path) == 0


def captures(folder: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    module = Parts().cuda()
    optimizer = module.configure_optimizers()
    warm_up = WarmUp(POLICIES["resume"], module, [optimizer], torch.device("cuda", 0), async_save=False)
    x = torch.ones(1000, device="cuda")
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm_up.start()
        captured = 0
        while warm_up._thread is not None and warm_up._thread.is_alive():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.add_(1)
                time.sleep(0.02)
            captured += 1
    assert captured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_can_be_captured_meanwhile(tmp_path: Path) -> None:
    assert forked.run(captures, tmp_path) == 0


def exits_at_once(folder: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    module = Parts().cuda()
    WarmUp(POLICIES["resume"], module, [module.configure_optimizers()], torch.device("cuda", 0), True).start()
    atexit._run_exitfuncs()  # what a process that is not started by multiprocessing does


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_that_ends_meanwhile_ends(tmp_path: Path) -> None:
    start = time.perf_counter()
    assert forked.run(exits_at_once, tmp_path) == 0
    assert time.perf_counter() - start < 60
