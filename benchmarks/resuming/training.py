"""A training in a few lines, whose state is a checkpoint as Lightning has it."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resuming.scenarios import Settings, Task

Checkpoint = dict[str, Any]
"""What a Trainer would save: ``state_dict`` and ``optimizer_states``."""


class Training:
    """AdamW with a cosine schedule and clipped gradients.

    Args:
        task: What is trained.
        settings: Schedule, precision and device.
        beta2: Of AdamW.
    """

    def __init__(self, task: Task, settings: Settings, beta2: float) -> None:
        self._task, self._settings = task, settings
        self._parameters = list(task.model.parameters())
        matrices = [each for each in self._parameters if each.dim() > 1]
        vectors = [each for each in self._parameters if each.dim() <= 1]
        self._device = torch.device(settings.device)
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, beta2),
            fused=self._device.type == "cuda",
        )

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(each.numel() for each in self._parameters)

    def checkpoint(self) -> Checkpoint:
        """Return the state as Lightning would save it; its tensors are those that the next step changes."""
        return {"state_dict": self._task.model.state_dict(), "optimizer_states": [self._optimizer.state_dict()]}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which stays as it is.

        It is copied because ``Optimizer.load_state_dict`` keeps the tensors that it is given, and steps change them.
        """
        own = copy_of(checkpoint)
        self._task.model.load_state_dict(own["state_dict"])
        self._optimizer.load_state_dict(own["optimizer_states"][0])

    def run(
        self,
        first: int,
        steps: int,
        restore: Callable[[Checkpoint], Checkpoint] | None = None,
        every: int = 0,
    ) -> Tensor:
        """Train, and return the loss of each step, ``[steps]`` float64 on the CPU. Only the end waits for a GPU.

        Args:
            first: The number of the first step; decides batches and learning rates.
            steps: How many steps.
            restore: Returns a checkpoint as a file would bring it back.
            every: Restore the state before every so many steps, the first one included; 0 for never.
        """
        losses = []
        for step in range(first, first + steps):
            if restore is not None and every and (step - first) % every == 0:
                self.load(restore(self.checkpoint()))
            losses.append(self._step(step))
        return torch.stack(losses).double().cpu()

    def _step(self, step: int) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self._optimizer.zero_grad()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.mixed):
            loss = self._task.loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return loss.detach()

    def _learning_rate(self, step: int) -> float:
        s = self._settings
        progress = min(step / s.schedule, 1.0)
        return s.learning_rate * min(1.0, (step + 1) / s.warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


def copy_of(checkpoint: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint whose tensors have memory of their own; tied ones stay tied."""
    return copy.deepcopy(dict(checkpoint))
