"""Publish what quantized weights lose in training, without waiting for their device."""

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from q8lightning.metrics.recorder import PREFIX, Loss, Recorder
from q8lightning.quantization.spec.reference import ErrorStatistics
from q8lightning.trainer.record.publish import harmless, publish, step_of

QAT_PREFIX = f"{PREFIX}/qat"
"""The prefix of values that are measured in training, not when a checkpoint is saved."""


class _Measured(NamedTuple):
    """What was measured in one step and is on its way to the host.

    Attributes:
        step: The step at which Lightning logged then.
        parts: For each device the names of its weights, and ``[weights, 5]`` float64 on the host.
        copies: For each GPU the event that its copy is complete.
    """

    step: int
    parts: list[tuple[list[str], Tensor]]
    copies: list[Any]


class WeightLosses:
    """Publishes what quantized weights lost, in the order of the steps; it is measured at steps that are logged.

    Args:
        recorder: Computes what is published.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._last: Mapping[str, ErrorStatistics] = {}
        self._pending: deque[_Measured] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is pending: a copy has measured nothing."""
        return self.__dict__ | {"_last": {}, "_pending": deque()}

    def take(self, trainer: pl.Trainer, statistics: Mapping[str, ErrorStatistics]) -> None:
        """Begin to copy what was measured in the step that ended; a GPU is not waited for."""
        if statistics is self._last or not statistics:
            return
        self._last = statistics
        with harmless(self._recorder, "measuring what quantized weights lose"):
            self._pending.append(_copy(statistics, step_of(trainer)))

    def publish(self, trainer: pl.Trainer, wait: bool = False) -> None:
        """Publish what has arrived; with ``wait`` wait for everything."""
        while self._pending and (wait or all(copy.query() for copy in self._pending[0].copies)):
            measured = self._pending.popleft()
            with harmless(self._recorder, "computing what quantized weights lose"):
                for copy in measured.copies:
                    copy.synchronize()
                losses = [
                    Loss("weights", name, row)
                    for names, rows in measured.parts
                    for name, row in zip(names, rows.tolist(), strict=True)
                ]
                publish(trainer, self._recorder, self._recorder.losses(losses, QAT_PREFIX), measured.step)


def _copy(statistics: Mapping[str, ErrorStatistics], step: int) -> _Measured:
    devices: dict[torch.device, list[str]] = {}
    for name, each in statistics.items():
        devices.setdefault(each[0].device, []).append(name)
    measured = _Measured(step, [], [])
    for device, names in devices.items():
        rows = torch.stack([number for name in names for number in statistics[name]]).view(len(names), -1)
        if device.type == "cuda":
            host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
            rows = host.copy_(rows, non_blocking=True)
            measured.copies.append(torch.cuda.current_stream(device).record_event())
        measured.parts.append((names, rows.cpu()))
    return measured
