"""Load the kernels of the first save while training goes on, by saves in miniature that write nothing.

They take one small tensor of each kind (``miniatures.py``) through a whole save, so that kernels of Triton and of
torch, tables and streams are there. In a new installation that takes seconds. The first save waits for what is left.

After that come saves whose tensors lose more than is allowed, for the kernels of the guard. No save waits for these.
"""

import atexit
import ctypes
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.encode.warn import WarningQueue
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, path_of
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy, Rule
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.checkpoint.tree import tensors
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.system.advice import advise
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.lightning_api.internals import saves_in_shards
from q8lightning.trainer.lightning_api.strategies import encoding_device
from q8lightning.trainer.prepare.miniatures import Miniature, miniatures_of, parameters_of

LEAVE = 5.0
"""Seconds that the end of the process waits, so that nothing is compiled while the process is torn down."""


_NAME = "warm-up.ckpt"


class WarmUp:
    """Saves miniatures on a thread of its own.

    Args:
        policy: The policy of real saves.
        module: The model.
        optimizers: Its optimizers.
        device: The GPU of the model and the optimizers.
        async_save: Whether real saves go on in the background.
        quantized: The codecs of weights that are trained quantized, by name.
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
                tuple(names.get(id(parameter), "") for parameter in parameters_of(optimizer))
                for optimizer in optimizers
            ),
            quantized={each.name: each.trained for each in self._miniatures if each.trained is not None},
        )
        self._policy = replace(policy, min_numel=1)
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        if self._miniatures:
            # Not on the thread: a process forked during an import could never import that module.
            import_module("q8lightning.quantization.backends.kernels.many")

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None and self._miniatures:
            self._thread = threading.Thread(target=self._run, name="q8lightning warm-up", daemon=True)
            atexit.register(self._leave)
            self._thread.start()

    def wait(self) -> None:
        """Wait until everything that every save needs is there, or the thread has failed."""
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
                        self._save(policy, miniature, lossless)
                    self._ready.set()  # the first policy is the one of real saves
                for miniature in self._miniatures:
                    if self._stop.is_set():
                        return
                    self._decode_moments(miniature)
        except BaseException as error:
            advise(
                f"loading the kernels of saves while training goes on failed: {type(error).__name__}: {error}. The"
                " first save loads them while training waits"
            )
        finally:
            self._ready.set()
            atexit.unregister(self._leave)

    def _save(self, policy: CheckpointPolicy, miniature: Miniature, lossless: bool) -> None:
        checkpoint = miniature.checkpoint(self._device, lossless)
        io = _Silent(checkpoint=policy, async_save=self._async_save)
        try:
            for _ in range(2):  # the second save runs the plan of the first, as all later ones do
                io.save_shards(checkpoint, miniature.shards(checkpoint), _NAME, self._names, Ranks(), _write_nothing)
                io.settle(_NAME)
        finally:
            io.finish()
            torch.cuda.current_stream().synchronize()  # kept tables are complete before another stream reads them

    def _decode_moments(self, miniature: Miniature) -> None:
        """Decode as the guard does to judge a pair of moments, whose codecs it may then leave as they are."""
        for keys, tensor in tensors(miniature.checkpoint(self._device).get(OPTIMIZER_STATES)):
            path = path_of((OPTIMIZER_STATES, *keys))
            codec = self._policy.codec_for(path, miniature.name)
            if codec is not None:
                QuantizedTensor.encode(tensor, codec, path).decode()

    def _leave(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(LEAVE)


def warm_up_for(trainer: pl.Trainer, quantized: Mapping[str, WeightCodec]) -> WarmUp | None:
    """Return what loads the kernels of a Trainer's saves; None if this process needs none.

    Args:
        trainer: The Trainer.
        quantized: How weights that are trained quantized are, by name.
    """
    installed, strategy = find_quantized_io(trainer.strategy.checkpoint_io), trainer.strategy
    device = encoding_device(strategy)
    if installed is None or device is None or device.type != "cuda":
        return None
    encodes = trainer.is_global_zero or saves_in_shards(strategy)
    if trainer.fast_dev_run or not encodes:  # type: ignore[attr-defined]
        return None
    module, optimizers = trainer.lightning_module, strategy.optimizers
    return WarmUp(installed.policy, module, optimizers, device, installed.async_save, quantized)


def _write_nothing(save: Save, memory: HostMemory) -> SaveReport:
    with save.fetch(memory):
        return save.report


def guarded(policy: CheckpointPolicy) -> list[tuple[CheckpointPolicy, bool]]:
    """Return policies that make the guard do all that it can, each with whether tensors must be lossless.

    The first policy gives every tensor the codec that the guard tries when a rule's codec loses too much. The second
    allows hardly any loss, so that tensors are decoded, tried with that codec and stored as they are. A policy without
    limits needs neither.
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
    """Return the rule with the codec that the guard tries when the rule's own loses too much, if there is one."""
    codec = rule.resolve()
    finer = None if codec is None else codec.finer
    if finer is None:
        return rule
    options = {name: getattr(finer, name) for name in ("bits", "residual_bits", "scale_dtype")}
    return Rule(**{**asdict(rule), "codec": finer.name, **options})


def _leave_captures_alone() -> None:
    """Let this thread load kernels while another thread captures a CUDA graph, without breaking that capture."""
    thread_local = ctypes.c_int(1)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(thread_local))


class _Silent(QuantizedCheckpointIO):
    """Gives no warnings, because nothing of the user's is saved."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._warnings = _NoWarnings()


class _NoWarnings(WarningQueue):
    def add(self, report: SaveReport) -> None:
        pass
