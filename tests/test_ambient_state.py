"""The world around is as we found it, and makes no difference: the same bits through every door, whatever surrounds it.

| what surrounds a door | a save, load, export, metric | a fit with QAT on a ramp |
|---|---|---|
| ``torch.set_default_device`` and ``with torch.device`` (``meta`` here, ``cuda`` on a GPU) | every door | there on a GPU |
| a default dtype of float64, float16, bfloat16 | every door | float64, bfloat16 |
| inference mode | every door | a validation in the middle |
| ``no_grad``, ``set_grad_enabled(False)`` | every door | both |
| autocast in bfloat16 and float16 | every door | bfloat16 |
| deterministic algorithms, which fill new memory | every door | yes |
| warnings that are errors | every door; the file is there before what it warns of | yes |
| denormal numbers flushed to zero | every door, on several threads too | yes |
| other numbers of threads | every door | yes |
| a function mode and a dispatch mode of the user's | every door | - |
| ``torch.compile`` around module or training step | - | yes |

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
from lightning.pytorch.callbacks import Callback
from models import batches, quiet_trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import q8lightning
from q8lightning import QuantizationCallback, QuantizedCheckpointIO, export_quantized
from q8lightning.checkpoint.host_memory import PinnedMemory
from q8lightning.checkpoint.leaves import ModelNames
from q8lightning.metrics import CodebookUsage, CompressionRatio, ReconstructionSQNR, UpdateDirectionError
from q8lightning.qat.config import ActivationRule, QATConfig, WeightRule
from q8lightning.qat.fake_quantizer import FakeQuantizer
from q8lightning.quantization import functional
from q8lightning.quantization.codebook import get_codebook
from q8lightning.quantization.weight_codec import WeightCodec

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
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
    shared = randn(2, 70, 70)
    state = {
        **{f"weight_{dtype}": randn(70, 70, dtype=dtype) for dtype in floats},
        **{f"bias_{dtype}": randn(7, dtype=dtype) for dtype in (*floats, torch.complex64, torch.int64, torch.bool)},
        "bias_denormal": torch.full((5,), 77, dtype=torch.int32).view(torch.float32),
        "first_view": shared[0],
        "second_view": shared[1],
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
        values, statistics = functional.fake_quantize(x, "linear", 64, return_statistics=True)
        results += [values, statistics.float(), functional.fake_quantize_rows(x, "int8"), get_codebook("int5").tensor()]
    return results


def measure(content: dict[str, Any], file: Path, folder: Path) -> Any:
    moments = content["optimizer_states"][0]["state"][0]
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    sqnr, direction, usage, ratio = (
        kind().to("cpu") if torch.get_default_device().type == "cpu" else _made_on_the_cpu(kind)
        for kind in (ReconstructionSQNR, UpdateDirectionError, CodebookUsage, CompressionRatio)
    )
    sqnr.update(second.half(), second)
    direction.update(first, second, first, 1.5 * second)
    usage.update(content["state_dict"]["weight_torch.float16"].view(torch.uint8))
    ratio.update(100, 25)
    return [sqnr.compute(), direction.compute(), usage.compute(), ratio.compute()]


def _made_on_the_cpu(kind: Callable[[], Any]) -> Any:
    with torch.device("cpu"):
        return kind()


def engage_on_a_ramp(content: dict[str, Any], file: Path, folder: Path) -> Any:
    with torch.device("cpu"):  # the model is the user's
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
