"""Every optimizer of torch and three small ones of other kinds, for tests and ``benchmarks/optimizers.py``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Small(torch.optim.Optimizer):
    """An optimizer whose step is a function of one parameter, its gradient and its state."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(Small):
    """A step of one size for all: the sign of the first moment (arXiv 2302.06675)."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        one, two = group["betas"]
        exp_avg = state.setdefault("exp_avg", torch.zeros_like(parameter))
        parameter.sub_(exp_avg.lerp(grad, 1 - one).sign_(), alpha=group["lr"])
        exp_avg.lerp_(grad, 1 - two)


class Soap(Small):
    """Adam in the eigenbasis ``Q`` of the gradients' second moments ``GG`` (arXiv 2409.11321).

    As in the authors' code, ``exp_avg`` is in the coordinates of the parameter and ``exp_avg_sq`` in those of ``Q``,
    both matrices are in lists, and the first step only looks. Vectors have none, which makes it Adam for them.
    """

    def __init__(self, params: Any, lr: float = 3e-3, every: int = 5) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.95), "shampoo_beta": 0.95, "eps": 1e-8, "every": every})

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        sides = [(grad @ grad.T), (grad.T @ grad)] if grad.ndim == 2 else []
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad), "GG": sides}
            state["Q"] = [torch.linalg.eigh(each)[1].flip(1).contiguous() for each in sides]
            return
        state["step"] += 1
        one, two = group["betas"]
        rotated = self._rotate(grad, state["Q"])
        state["exp_avg"].lerp_(grad, 1 - one)
        state["exp_avg_sq"].lerp_(rotated.square(), 1 - two)
        corrected = (1 - two ** state["step"]) ** 0.5 / (1 - one ** state["step"])
        direction = self._rotate(state["exp_avg"], state["Q"]) / state["exp_avg_sq"].sqrt().add_(group["eps"])
        parameter.sub_(self._rotate(direction, state["Q"], back=True), alpha=group["lr"] * corrected)
        for matrix, side in zip(state["GG"], sides, strict=True):
            matrix.lerp_(side, 1 - group["shampoo_beta"])
        if state["step"] % group["every"] == 0:
            state["Q"] = [torch.linalg.qr(g @ q)[0].contiguous() for g, q in zip(state["GG"], state["Q"], strict=True)]

    @staticmethod
    def _rotate(x: Tensor, basis: list[Tensor], back: bool = False) -> Tensor:
        if not basis:
            return x
        left, right = basis
        return left @ x @ right.T if back else left.T @ x @ right


class ScheduleFree(Small):
    """AdamW with an average of the weights in place of a schedule (arXiv 2405.15682).

    The model holds the point where gradients are taken, between the average and the second set of weights, ``z``.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "z": parameter.clone(), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        (between, two), count = group["betas"], state["step"]
        state["exp_avg_sq"].lerp_(grad.square(), 1 - two)
        scaled = grad / (state["exp_avg_sq"] / (1 - two**count)).sqrt_().add_(group["eps"])
        average = (parameter - (1 - between) * state["z"]) / between
        state["z"].sub_(scaled, alpha=group["lr"])
        parameter.copy_(average.lerp_(state["z"], 1 / (count + 1)).lerp(state["z"], 1 - between))


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of parameters."""

_torch = torch.optim

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: _torch.Adam(p, lr=2e-3),
    "AdamW": lambda p: _torch.AdamW(p, lr=2e-3),
    "AdamW, amsgrad": lambda p: _torch.AdamW(p, lr=2e-3, amsgrad=True),
    "NAdam": lambda p: _torch.NAdam(p, lr=2e-3),
    "RAdam": lambda p: _torch.RAdam(p, lr=2e-3),
    "Adamax": lambda p: _torch.Adamax(p, lr=4e-3),
    "Adafactor": lambda p: _torch.Adafactor(p, lr=2e-2),
    "RMSprop": lambda p: _torch.RMSprop(p, lr=1e-3),
    "RMSprop, momentum": lambda p: _torch.RMSprop(p, lr=5e-4, momentum=0.9),
    "RMSprop, centered": lambda p: _torch.RMSprop(p, lr=5e-4, momentum=0.9, centered=True),
    "Adagrad": lambda p: _torch.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: _torch.Adadelta(p, lr=1.0),
    "Rprop": lambda p: _torch.Rprop(p, lr=1e-4),
    "SGD": lambda p: _torch.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: _torch.SGD(p, lr=0.1, momentum=0.9),
    "ASGD": lambda p: _torch.ASGD(p, lr=0.1, t0=50),
    "LBFGS": lambda p: _torch.LBFGS(p, lr=0.5, max_iter=4, history_size=10),
    "SparseAdam": lambda p: _torch.SparseAdam(p, lr=2e-3),
    "Lion": lambda p: Lion(p, lr=3e-4),
    "SOAP-like": lambda p: Soap(p, lr=2e-3),
    "schedule-free AdamW": lambda p: ScheduleFree(p, lr=2e-3),
}
"""Every optimizer of ``torch.optim``, in the manners that keep different states, and the three above."""

if hasattr(_torch, "Muon"):  # torch 2.9 and later
    OPTIMIZERS["Muon"] = lambda p: _torch.Muon(p, lr=2e-2)
