"""Load or compile what the first save needs while training goes on: by saves in miniature, which lead nowhere.

A kernel is compiled for the codec, the dtype and the alignment of its tensors, not for their number or sizes. So one
small tensor for each of these takes a save through all that a real one needs: kernels of Triton and of torch, tables
and streams. In a new installation that takes seconds; the first save waits for what is left of it.

What the guard may need comes after that, and no save waits for it: saves whose tensors lose more than is allowed.
"""

import atexit
import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from q8lightning.checkpoint.encode.find import ModelNames
from q8lightning.checkpoint.encode.warn import WarningQueue
from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
from q8lightning.checkpoint.report import SaveReport
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.system.advice import advise
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO

NUMEL = 4096
"""Elements of a miniature: whole blocks of every codec."""

ALIGNED = 16
"""Bytes, and elements, of which kernels that read and write fastest want multiples."""

LEAVE = 5.0
"""Seconds for which the end of the process waits, so that nothing is compiled while the process is torn down."""


class Form(NamedTuple):
    """What a kernel is compiled for, of one tensor.

    Attributes:
        dtype: Its dtype.
        is_whole: Whether its number of elements is a multiple of 16.
        is_aligned: Whether its address is a multiple of 16 bytes.
    """

    dtype: torch.dtype
    is_whole: bool
    is_aligned: bool

    @staticmethod
    def of(tensor: Tensor) -> "Form":
        """Return the form of a tensor."""
        return Form(tensor.dtype, tensor.numel() % ALIGNED == 0, tensor.data_ptr() % ALIGNED == 0)

    def tensor(self, device: torch.device, lossless: bool, row: int | None = None) -> Tensor:
        """Return a tensor of this form.

        Args:
            device: Where.
            lossless: Whether every codec holds it without any loss; otherwise none does, but to store it as it is.
            row: For ``[rows, row]`` instead of one dimension.
        """
        skip = 0 if self.is_aligned else 1
        rows = ALIGNED * max(NUMEL // (ALIGNED * (row or 1)), 1) + (0 if self.is_whole else 1)
        numel = skip + rows * (row or 1)
        values = torch.ones(numel, device=device) if lossless else torch.linspace(0.01, 1.0, numel, device=device)
        flat = values.to(self.dtype)[skip:]
        return flat if row is None else flat.view(rows, row)


class Miniature(NamedTuple):
    """A parameter that stands for all that are saved alike.

    Attributes:
        name: Of the parameter.
        weight: Its form; None if it is stored as it is.
        place: Which optimizer has it, and its number there; None if none has.
        states: What the optimizer keeps for it, or will, and in which form; none if all of it is stored as it is.
        trained: How the weight is trained quantized, if kernels encode that; None otherwise.
        row: Elements of a channel, if that is in blocks which end with channels; None otherwise.
    """

    name: str
    weight: Form | None
    place: tuple[int, int] | None
    states: tuple[tuple[str, Form], ...]
    trained: WeightCodec | None = None
    row: int | None = None

    def checkpoint(self, device: torch.device, lossless: bool = True) -> dict[str, Any]:
        """Return a checkpoint of this parameter alone; see :meth:`Form.tensor`."""
        result: dict[str, Any] = {"state_dict": {}, "optimizer_states": []}
        if self.weight is not None:
            result["state_dict"][self.name] = self.weight.tensor(device, lossless, self.row)
        if self.place is not None and self.states:
            optimizer, index = self.place
            state = {index: {key: form.tensor(device, lossless) for key, form in self.states}}
            groups = [{"eps": 1e-8, "params": [index]}]
            nothing: dict[str, Any] = {"state": {}, "param_groups": []}
            result["optimizer_states"] = [nothing] * optimizer + [{"state": state, "param_groups": groups}]
        return result


def miniatures_of(
    policy: CheckpointPolicy,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    quantized: Mapping[str, WeightCodec] = MappingProxyType({}),
) -> list[Miniature]:
    """Return a miniature for each way in which the policy will encode a parameter and its states.

    Args:
        policy: The policy.
        module: The model.
        optimizers: Its optimizers, which need not have any state yet.
        device: Only parameters there count.
        quantized: How weights that are trained quantized are, by name.
    """
    places = {
        id(parameter): (i, index)
        for i, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(_parameters_of(optimizer))
    }
    found: dict[Any, Miniature] = {}
    for name, parameter in module.named_parameters():
        if parameter.device != device or parameter.numel() < policy.min_numel:
            continue
        place = places.get(id(parameter))
        weight, codec = Form.of(parameter), policy.codec_for(f"state_dict.{name}", name)
        states = () if place is None else tuple(_states_to_come(optimizers[place[0]], parameter))
        path = "" if place is None else "optimizer_states.{}.state.{}".format(*place)
        codecs = tuple(policy.codec_for(f"{path}.{key}", name) for key, _ in states)
        if codec is not None or any(codecs):
            kept = states if any(codecs) else ()
            trained = quantized.get(name)
            if trained is not None and trained.axis:
                trained = None  # no kernel encodes across rows
            row = None if trained is None or trained.axis != 0 else parameter[0].numel()
            way = codec and (codec, weight, trained, row), kept and (codecs, kept)
            found.setdefault(way, Miniature(name, weight if codec else None, place, kept, trained, row))
    return list(found.values())


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _states_to_come(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Form]]:
    """Yield the keys and forms of what an optimizer keeps for a parameter; what it will keep, if it has not begun."""
    state = optimizer.state.get(parameter)
    if state:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield key, Form.of(value)
        return
    options = getattr(optimizer, "defaults", {})
    keys = ["exp_avg", "exp_avg_sq"] if "betas" in options else []
    keys += ["max_exp_avg_sq"] if options.get("amsgrad") else []
    keys += ["momentum_buffer"] if options.get("momentum") else []
    keys += ["square_avg"] if "alpha" in options else []
    for key in keys:
        yield key, Form(parameter.dtype, parameter.numel() % ALIGNED == 0, is_aligned=True)


class WarmUp:
    """Saves in miniature on a thread of their own.

    Args:
        policy: How real saves encode.
        module: The model.
        optimizers: Its optimizers.
        device: The GPU that they are on.
        async_save: Whether real saves go on in the background.
        quantized: How weights that are trained quantized are, by name.
    """

    def __init__(
        self,
        policy: CheckpointPolicy,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        async_save: bool,
        quantized: Mapping[str, WeightCodec] = MappingProxyType({}),
    ) -> None:
        self._device = device
        self._async_save = async_save
        self._miniatures = miniatures_of(policy, module, optimizers, device, quantized)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._names = ModelNames(
            parameters=frozenset(names.values()),
            optimizer_parameters=tuple(
                tuple(names.get(id(parameter), "") for parameter in _parameters_of(optimizer))
                for optimizer in optimizers
            ),
            quantized={each.name: each.trained for each in self._miniatures if each.trained is not None},
        )
        self._policy = replace(policy, min_numel=1)
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        if self._miniatures:
            # Here and not on the thread: a process that is forked meanwhile could never import what is being imported.
            import_module("q8lightning.quantization.backends.kernels.many")

    def start(self) -> None:
        """Begin, once."""
        if self._thread is None and self._miniatures:
            self._thread = threading.Thread(target=self._run, name="q8lightning warm-up", daemon=True)
            atexit.register(self._leave)
            self._thread.start()

    def wait(self) -> None:
        """Wait until everything is there that a save surely needs; what failed is then done by the save itself."""
        while self._thread is not None and self._thread.is_alive() and not self._ready.wait(0.1):
            pass

    def _run(self) -> None:
        try:
            _leave_captures_alone()
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
                for policy, lossless in ((self._policy, True), *guarded(self._policy)):
                    for miniature in self._miniatures:
                        if self._stop.is_set():
                            return
                        self._save(policy, miniature.checkpoint(self._device, lossless))
                    self._ready.set()  # the first policy is the one of real saves
        except BaseException as error:
            advise(
                f"loading the kernels of saves while training goes on failed: {type(error).__name__}: {error}. The"
                " first save loads them while training waits"
            )
        finally:
            self._ready.set()
            atexit.unregister(self._leave)

    def _save(self, policy: CheckpointPolicy, checkpoint: dict[str, Any]) -> None:
        io = _Silent(_Nowhere(), policy, self._async_save)
        io.describe_model = lambda: self._names
        try:
            for _ in range(2):  # the second as all that follow
                io.save_checkpoint(checkpoint, "warm-up.ckpt")
                io.settle("warm-up.ckpt")
        finally:
            io.finish()
            torch.cuda.current_stream().synchronize()  # kept tables are complete before another stream reads them

    def _leave(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(LEAVE)


def guarded(policy: CheckpointPolicy) -> list[tuple[CheckpointPolicy, bool]]:
    """Return policies by which the guard does all that it can, and whether it is to find no loss; none without limits.

    By the first, every tensor has the codec that the guard tries where the rule's loses too much. The second allows
    hardly any loss, so that tensors that lose something are decoded, tried with that codec and stored as they are.
    """
    limits: dict[str, Any] = {}
    if policy.min_sqnr_db is not None:
        limits["min_sqnr_db"] = 500.0
    if policy.max_update_direction_error is not None:
        limits["max_update_direction_error"] = 1e-9
    if not limits:
        return []
    rules = [Rule(**rule) if not isinstance(rule, Rule) else rule for rule in policy.rules]
    held = [_held(rule) for rule in rules]
    return [*([] if held == rules else [(replace(policy, rules=held), True)]), (replace(policy, **limits), False)]


def _held(rule: Rule) -> Rule:
    """Return the rule with the codec that the guard tries where the rule's loses too much, if there is one."""
    codec = rule.resolve()
    finer = None if codec is None else codec.finer
    return rule if finer is None else Rule(**{**asdict(rule), "codec": finer.name, "residual": finer.residual})


def _leave_captures_alone() -> None:
    """Let this thread load kernels while another one captures a CUDA graph, which that would end otherwise."""
    thread_local = ctypes.c_int(1)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(thread_local))


class _Silent(QuantizedCheckpointIO):
    """Warns of nothing: what is saved here is nobody's."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._warnings = _NoWarnings()


class _NoWarnings(WarningQueue):
    def add(self, report: SaveReport) -> None:
        pass


class _Nowhere(CheckpointIO):
    """Takes checkpoints and writes none."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        pass

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        raise FileNotFoundError(path)

    def remove_checkpoint(self, path: Any) -> None:
        pass
