"""The world around is as we found it, and makes no difference: the same bits through every door, whatever surrounds it.

| what surrounds a door | a save, load, export, metric | a fit with QAT on a ramp |
|---|---|---|
| ``set_default_device``, ``with torch.device`` (``meta``; on a GPU ``cuda``) | every door | yes |
| a default dtype of float64, float16, bfloat16 | every door | float64 |
| inference mode | every door | a validation in the middle |
| ``no_grad``, ``set_grad_enabled(False)`` | every door | ``no_grad`` |
| autocast in bfloat16 and float16 | every door | bfloat16 |
| deterministic algorithms, which fill new memory | every door | yes |
| warnings that are errors | every door; the file is there before what it warns of | yes |
| denormal numbers flushed to zero | every door, on several threads too | yes |
| other numbers of threads | every door | yes |
| a function mode and a dispatch mode of the user's | every door | - |
| ``torch.compile`` around the training step, optimizer step and all | - | yes |

Doors: a save, a save in the background, the later ones of its kind; the CheckpointIO's and torch's load; both exports;
the functional API, codebooks of custom levels, metrics; QAT's engage and release; and of the Trainer ``fit``,
``fit(ckpt_path)``, ``validate`` and ``load_from_checkpoint``.
"""

import ast
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.models import batches, quiet_trainer
from support.threads import using_threads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors  # what a default device changes
from torch.utils._python_dispatch import TorchDispatchMode

import q8lightning
from q8lightning import CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO, Rule, export_quantized
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.metrics import CodebookUsage, CompressionRatio, ReconstructionSQNR, UpdateDirectionError
from q8lightning.qat.config import QATConfig
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.qat.rules import ActivationRule, WeightRule
from q8lightning.quantization import affine, functional
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.codebook import get_codebook

State = Callable[[], AbstractContextManager[Any]]


# The states


@contextmanager
def _set(setter: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


class _SeesAll(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _DispatchesAll(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _default_dtype(dtype: torch.dtype) -> State:
    return lambda: _set(torch.set_default_dtype, dtype, torch.float32)


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="(?!lightning|torch).*")
        yield


STATES: dict[str, State] = {
    "set_default_device": lambda: _set(torch.set_default_device, "meta", None),
    "with_device": lambda: torch.device("meta"),
    "default_float64": _default_dtype(torch.float64),
    "default_float16": _default_dtype(torch.float16),
    "default_bfloat16": _default_dtype(torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad_disabled": lambda: torch.set_grad_enabled(False),
    "autocast_bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", torch.float16),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "warnings_as_errors": _warnings_as_errors,
    "flush_denormal": lambda: _set(torch.set_flush_denormal, True, False),
    "three_threads": lambda: _set(torch.set_num_threads, 3, torch.get_num_threads()),
    "function_mode": _SeesAll,
    "dispatch_mode": _DispatchesAll,
}


def surroundings() -> dict[str, Any]:
    """Return what a door must leave as it finds it."""
    smallest = sys.float_info.min
    return {
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "autocast": [(torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in ("cpu", "cuda")],
        "autocast_cache": torch.is_autocast_cache_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "flush": smallest * 0.5 == 0.0,
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    with using_threads(2):
        yield


def assert_same(after: Any, before: Any) -> None:
    """Check that both agree in types, devices, dtypes and every bit; tensors of inference mode are none the less."""
    assert type(after) is type(before)
    if isinstance(before, Tensor):
        kind = (before.dtype, before.device, before.shape, before.stride())
        assert (after.dtype, after.device, after.shape, after.stride()) == kind
        one, two = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (after, before))
        assert torch.equal(one, two)
    elif isinstance(before, dict):
        assert list(after) == list(before)
        assert_same(list(after.values()), list(before.values()))
    elif isinstance(before, list | tuple):
        assert len(after) == len(before)
        for one, two in zip(after, before, strict=True):
            assert_same(one, two)
    else:
        assert after == before


# What goes through the doors


def _moments(generator: torch.Generator, *shape: int) -> dict[str, Tensor]:
    """Adam's moments of tiny gradients in the first half: the second ones are denormal numbers there."""
    exp_avg = torch.randn(*shape, generator=generator)
    exp_avg[: shape[0] // 2] *= 2.0**-70
    return {"step": torch.tensor(3.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg.square()}


def make_checkpoint() -> dict[str, Any]:
    """Return a checkpoint with tensors of all kinds: encoded and small ones of every float, tied ones, views."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    shared, shared_and_small = randn(2, 70, 70), randn(2, 5)
    state = {
        **{f"weight_{dtype}": randn(70, 70, dtype=dtype) for dtype in floats},
        **{f"bias_{dtype}": randn(7, dtype=dtype) for dtype in (*floats, torch.complex64, torch.int64, torch.bool)},
        "bias_denormal": torch.full((5,), 77, dtype=torch.int32).view(torch.float32),
        "first_view": shared[0],
        "second_view": shared[1],
        "first_small_view": shared_and_small[0],
        "second_small_view": shared_and_small[1],
        "transposed": randn(70, 80).T,
    }
    state["weight_torch.float32"][:8] *= 2.0**-130
    state["tied"] = state["weight_torch.float32"]
    states = {0: _moments(generator, 96, 96), 1: _moments(generator, 9)}
    groups = [{"params": [0, 1], "eps": 1e-8, "lr": 1e-3}]
    return {
        "epoch": 1,
        "state_dict": state,
        "optimizer_states": [{"state": states, "param_groups": groups}],
        "pytorch-lightning_version": "2.6.0",
    }


NAMES = ModelNames(quantized={"weight_torch.float32": WeightCodec("int4", 64, 0)})
"""A weight whose codes are stored beside it, as QAT has them."""


def _io(**options: Any) -> QuantizedCheckpointIO:
    io = QuantizedCheckpointIO(checkpoint="compact", **options)
    io.describe_model = lambda: NAMES
    return io


# The doors: each does what a user does in the state, and returns what must be the same.

Door = Callable[[dict[str, Any], Path, Path], Any]
"""Given a checkpoint, a file that was saved of it, and a folder for new ones."""


def save(content: dict[str, Any], file: Path, folder: Path) -> Any:
    _io().save_checkpoint(content, folder / "a.ckpt")
    return [(folder / "a.ckpt").read_bytes()]


def save_in_the_background(content: dict[str, Any], file: Path, folder: Path) -> Any:
    io = _io(async_save=True)
    for name in "abc":  # the later ones are repeated
        io.save_checkpoint(content, folder / f"{name}.ckpt")
    io.finish()
    return [(folder / f"{name}.ckpt").read_bytes() for name in "abc"]


def load_by_the_io(content: dict[str, Any], file: Path, folder: Path) -> Any:
    return [_io().load_checkpoint(file), _io(verify=False).load_checkpoint(file)]


def load_by_torch(content: dict[str, Any], file: Path, folder: Path) -> Any:
    return [torch.load(file, weights_only=True), torch.load(file, weights_only=True, mmap=True)]


def export(content: dict[str, Any], file: Path, folder: Path) -> Any:
    export_quantized(file, folder / "float.ckpt", "float")
    export_quantized(file, folder / "codes.pt", "codes")
    return [(folder / name).read_bytes() for name in ("float.ckpt", "codes.pt")]


def call_the_functions(content: dict[str, Any], file: Path, folder: Path) -> Any:
    moments = content["optimizer_states"][0]["state"][0]
    results: list[Any] = []
    for x in (moments["exp_avg_sq"], content["state_dict"]["weight_torch.float16"]):
        for code in ("dynamic", "int4", "softsign", [-1.0, -(2.0**-130), 0.0, 0.25, 1.0]):
            codes, absmax = functional.quantize_blockwise(x, code, 64)
            results += [codes, absmax, functional.dequantize_blockwise(codes, absmax, code, 64, dtype=x.dtype)]
        parts = affine.quantize_affine_blockwise(x, 64, 5)
        results += [*parts, affine.dequantize_affine_blockwise(*parts, 64, dtype=x.dtype)]
        values, statistics = functional.fake_quantize(x, "linear", 64, return_statistics=True)
        results += [values, statistics.float(), functional.fake_quantize_rows(x, "int8"), get_codebook("int5").tensor()]
    return results


def measure(content: dict[str, Any], file: Path, folder: Path) -> Any:
    moments = content["optimizer_states"][0]["state"][0]
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    with first.device:  # where the user makes metrics is where they are
        sqnr, direction, usage, ratio = (
            ReconstructionSQNR(),
            UpdateDirectionError(),
            CodebookUsage(),
            CompressionRatio(),
        )
    sqnr.update(second.half(), second)
    direction.update(first, second, first, 1.5 * second)
    usage.update(content["state_dict"]["weight_torch.float16"].view(torch.uint8))
    ratio.update(100, 25)
    return [sqnr.compute(), direction.compute(), usage.compute(), ratio.compute()]


def engage_on_a_ramp(content: dict[str, Any], file: Path, folder: Path) -> Any:
    with content["state_dict"]["first_view"].device:  # the model is the user's
        model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float32), nn.Linear(64, 64, dtype=torch.bfloat16))
    with torch.no_grad():
        for parameter, name in zip(model.parameters(), ("float32", "float32", "bfloat16", "bfloat16"), strict=True):
            values = content["state_dict"][f"weight_torch.{name}"].reshape(-1)
            parameter.copy_(values[: parameter.numel()].view(parameter.shape))
    masters = copy.deepcopy(list(model.parameters()))
    quantizer = FakeQuantizer(model, QATConfig([WeightRule(codebook=[-1.0, 0.0, 0.4, 1.0], block_size=32)], ramp=3))
    results: list[Any] = []
    for step in range(4):
        assert quantizer.engage(step, training=True, measure=True)
        results += [parameter.detach().clone() for parameter in model.parameters()]
        results += [torch.stack(list(each)).float() for each in quantizer.statistics.values()]  # sums, but for order
    quantizer.close()
    assert_same([each.detach() for each in model.parameters()], [each.detach() for each in masters])
    return results


DOORS: dict[str, Door] = {
    each.__name__: each
    for each in (
        save,
        save_in_the_background,
        load_by_the_io,
        load_by_torch,
        export,
        call_the_functions,
        measure,
        engage_on_a_ramp,
    )
}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return make_checkpoint()


@pytest.fixture(scope="module")
def file(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    _io().save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def expected(content: dict[str, Any], file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each door gives where nothing surrounds it."""
    return {name: door(content, file, tmp_path_factory.mktemp(name)) for name, door in DOORS.items()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_same_bits(
    door: str, state: str, content: dict[str, Any], file: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    with STATES[state]():
        before = surroundings()
        result = DOORS[door](content, file, tmp_path)
        after = surroundings()
    assert after == before
    assert_same(result, expected[door])


@pytest.mark.parametrize("load", [load_by_torch, load_by_the_io])
def test_what_loads_in_inference_mode_is_what_torch_loads_there(
    load: Door, content: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "plain.pt")
    for state in (torch.inference_mode, nullcontext):
        with state():
            plain = torch.load(tmp_path / "plain.pt", weights_only=True)["state_dict"]
            for loaded in load(content, file, tmp_path):
                for name, tensor in loaded["state_dict"].items():
                    assert tensor.is_inference() == plain[name].is_inference(), name


def test_what_is_kept_from_inference_mode_serves_training(content: dict[str, Any], tmp_path: Path) -> None:
    memory, levels = HostMemory(), [-1.0, 0.0, 0.123, 1.0]
    with torch.inference_mode():
        memory.take(10)
        book = get_codebook(levels)
        kept = [book.tensor(), book.thresholds, book.cells.first]
    assert not any(each.is_inference() for each in kept)
    memory.take(10).fill_(1)
    weight = torch.ones(4, requires_grad=True)
    (weight * book.tensor()).sum().backward()
    assert weight.grad.tolist() == kept[0].tolist()


# Threads: tensors that are worth sharing out

LARGE = 2**20


@pytest.mark.parametrize("flush", [False, True])
def test_the_number_of_threads_makes_no_difference(flush: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    exp_avg = torch.randn(LARGE + 100, generator=generator) * 2.0**-60
    exp_avg[::3] *= 2.0**-10
    moments = {"step": torch.tensor(1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg.square()}
    weights = {"a": torch.randn(LARGE, generator=generator), "b": torch.randn(5000, generator=generator)}
    group = {"params": [0], "eps": 1e-20}
    large = {"state_dict": weights, "optimizer_states": [{"state": {0: moments}, "param_groups": [group]}]}
    files = []
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            torch.set_flush_denormal(flush and count > 1)
            QuantizedCheckpointIO().save_checkpoint(large, tmp_path / "a.ckpt")
            files.append((tmp_path / "a.ckpt").read_bytes())
            loaded = [QuantizedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt"), torch.load(tmp_path / "a.ckpt")]
            torch.set_flush_denormal(False)
            for each in loaded:
                second = each["optimizer_states"][0]["state"][0]["exp_avg_sq"]
                # Bits, because a thread that was started while small numbers were flushed still takes them for zero.
                assert not ((second.view(torch.int32) == 0) & (moments["exp_avg_sq"].view(torch.int32) != 0)).any()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert files[1] == files[0]
    assert torch.get_num_threads() == before


# Warnings that are errors


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_is_there_before_its_warnings_are_errors(asynchronous: bool, tmp_path: Path) -> None:
    state = {"refused": torch.full((5000,), torch.nan), "guarded": torch.randn(5000)}
    policy = CheckpointPolicy((Rule("state_dict.*", "int2", 256),), min_sqnr_db=30.0)
    io = QuantizedCheckpointIO(checkpoint=policy, async_save=asynchronous)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match=r"stored as they are, not quantized: state_dict\.refused"):  # noqa: PT012
                io.save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
                io.finish()  # in the background, this is where it is known
            io.finish()
            assert_same(torch.load(tmp_path / "a.ckpt")["state_dict"]["refused"], state["refused"])
            (tmp_path / "a.ckpt").unlink()
        state.pop("refused")
        with pytest.raises(UserWarning, match=r"would have lost more than the policy allows: state_dict\."):  # noqa: PT012
            io.save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
            io.finish()
        io.finish()
        assert (tmp_path / "a.ckpt").exists()
        io.save_checkpoint({"state_dict": state}, tmp_path / "b.ckpt")  # named once
        io.finish()
        assert (tmp_path / "b.ckpt").exists()


# The Trainer


class Weighing(pl.LightningModule):
    """A model that writes down which weights its steps saw, and computes the same in every state."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        there: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        self.net = nn.Sequential(nn.Linear(64, 64, **there), nn.Tanh(), nn.Linear(64, 64, **there))
        self.automatic_optimization = not manual
        self.seen: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.net(batch)
        return output

    def loss(self, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            loss = self(batch).square().mean()
        self.seen += [loss.detach(), *(each.detach().clone() for each in self.parameters())]
        return loss

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with torch.autocast("cpu", enabled=False):
            loss.backward(*args, **kwargs)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Batches:
    """The same batches every time, made before; a DataLoader draws numbers, which it cannot on ``meta``."""

    def __init__(self) -> None:
        self._batches = list(batches(4))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)


QAT = QATConfig(
    [WeightRule(codebook=[-1.0, -0.2, 0.0, 0.4, 1.0], block_size=64)],
    ramp=5,
    activations=[ActivationRule("*.2", "int8")],
)


def run(model: Weighing, data: Any, folder: Path, accelerator: str = "cpu") -> list[Any]:
    """Fit, resume, validate and load; return all that was seen and saved."""
    options = {"accelerator": accelerator, "limit_val_batches": 1}
    callback = QuantizationCallback(qat=QAT)
    trainer = quiet_trainer(folder, max_steps=3, val_check_interval=2, callbacks=[callback], **options)
    trainer.fit(model, data, data)
    trainer.save_checkpoint(folder / "a.ckpt")
    resumed = Weighing()
    callback = QuantizationCallback(qat=QAT, async_save=True)
    trainer = quiet_trainer(folder, max_steps=4, callbacks=[callback], **options)
    trainer.fit(resumed, data, data, ckpt_path=folder / "a.ckpt", weights_only=True)
    trainer.validate(resumed, data, ckpt_path=folder / "a.ckpt", verbose=False, weights_only=True)
    trainer.save_checkpoint(folder / "b.ckpt")
    loaded = Weighing.load_from_checkpoint(folder / "a.ckpt", map_location="cpu", weights_only=True)
    checkpoints = [torch.load(folder / f"{name}.ckpt", weights_only=True) for name in "ab"]
    return [
        model.seen,
        resumed.seen,
        [
            {**each["state_dict"], "momentum": each["optimizer_states"], "q8": each["q8lightning"]}
            for each in checkpoints
        ],
        [each.detach() for each in loaded.parameters()],
    ]


WHERE_A_FIT_RUNS = [
    "set_default_device",
    "default_float64",
    "no_grad",
    "autocast_bfloat16",
    "deterministic",
    "warnings_as_errors",
    "flush_denormal",
    "three_threads",
]
"""Not inference mode, in which nothing has gradients."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weighing, list[Any]]:
    """A model, and what a run of it gives where nothing surrounds it."""
    torch.manual_seed(0)
    model = Weighing()
    return copy.deepcopy(model), run(model, Batches(), tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("state", WHERE_A_FIT_RUNS)
def test_a_run_gives_the_same_bits(state: str, trained: tuple[Weighing, list[Any]], tmp_path: Path) -> None:
    model, data = copy.deepcopy(trained[0]), Batches()
    with STATES[state]():
        before = surroundings()
        result = run(model, data, tmp_path)
        after = surroundings()
    assert_same(result, trained[1])
    del before["grad"], after["grad"]  # a Trainer turns it on, with and without us
    assert after == before


class Compiled(Weighing):
    """Whose training step is compiled, in manual optimization the optimizer's step and QAT's windows with it."""

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = self(batch).square().mean()
        return loss


def fit_on_a_ramp(manual: bool, folder: Path, backend: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Return the weights; compiled if there is a backend."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = Compiled(manual)
    qat = QATConfig([WeightRule(codebook="int4", block_size=64)], ramp=6)
    trainer = quiet_trainer(folder, max_steps=4, limit_val_batches=0, callbacks=[QuantizationCallback(None, qat=qat)])
    trainer.fit(torch.compile(model, backend=backend) if backend else model, Batches())
    return dict(model.state_dict())


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_compiled_step_trains_on_a_ramp_as_it_is(manual: bool, tmp_path: Path) -> None:
    """What QAT does between operators is in no graph: neither the step nor the share of the blocks is a constant."""
    targets: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    state = fit_on_a_ramp(manual, tmp_path, collect)
    assert_same(state, fit_on_a_ramp(manual, tmp_path))
    assert any("linear" in target for target in targets)
    assert not [target for target in targets if "q8lightning" in target]


# What keeps the kind away


def test_whatever_makes_a_tensor_names_its_device_and_its_dtype() -> None:
    names = {function.__name__ for function in _device_constructors()}
    unnamed = []
    for path in Path(q8lightning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in names}:
                named = {keyword.arg for keyword in node.keywords}
                if not {"device", "dtype"} <= named:
                    unnamed.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not unnamed


# On a GPU

GPU_STATES: dict[str, State] = {
    "set_default_device": lambda: _set(torch.set_default_device, "cuda", None),
    "with_device": lambda: torch.device("cuda"),
    "default_float64": STATES["default_float64"],
    "inference_mode": torch.inference_mode,
    "autocast_bfloat16": lambda: torch.autocast("cuda", torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cuda", torch.float16),
    "deterministic": STATES["deterministic"],
    "warnings_as_errors": STATES["warnings_as_errors"],
}
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def on_device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint on a device, a file of it, and what each door gives where nothing surrounds it."""
    content = _moved(make_checkpoint(), request.param)
    file = tmp_path_factory.mktemp("saved") / "a.ckpt"
    _io().save_checkpoint(content, file)
    return content, file, {name: door(content, file, tmp_path_factory.mktemp(name)) for name, door in DOORS.items()}


@pytest.mark.parametrize("state", [pytest.param(name, marks=on_gpu) for name in GPU_STATES])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_same_bits_beside_a_gpu(door: str, state: str, on_device: Any, tmp_path: Path) -> None:
    content, file, expected = on_device
    with GPU_STATES[state]():
        before = surroundings()
        result = DOORS[door](content, file, tmp_path)
        after = surroundings()
    assert after == before
    assert_same(result, expected[door])


@pytest.mark.parametrize("accelerator", [pytest.param(name, marks=on_gpu) for name in ("cpu", "gpu")])
def test_a_run_gives_the_same_bits_beside_a_gpu(accelerator: str, tmp_path: Path) -> None:
    results = []
    for state in (nullcontext, *(GPU_STATES[name] for name in ("set_default_device", "with_device"))):
        torch.manual_seed(0)
        model, data = Weighing(), Batches()
        with state():
            results.append(run(model, data, tmp_path, accelerator))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
