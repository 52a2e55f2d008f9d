"""Keep torch's attention on its fast path in evaluation, which torch leaves while a mode follows its calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from q8lightning.qat.writes.shadow_mode import ShadowMode
from q8lightning.system.private_names import resolve

FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""The modules that have a fast path."""


@contextmanager
def fast_paths(mode: ShadowMode, model: nn.Module) -> Iterator[None]:
    """Stop following inside attention that evaluates, if it runs no code of the user's.

    The fast path rounds differently, and writes zeros where the input is padded. Without it, losses would differ from
    those of a step that is not followed.

    Args:
        mode: The mode that follows, which is active.
        model: The model, which evaluates or trains inside the context.
    """
    if not any(type(each) in FAST for each in model.modules()):
        yield
        return
    left: list[nn.Module] = []

    def leave(module: nn.Module, args: Any) -> None:
        if type(module) not in FAST or module.training or left or torch.compiler.is_compiling():
            return
        modes = resolve("torch.overrides", "_get_current_function_mode_stack")()
        # Beside another mode torch leaves the fast path anyway.
        if modes == [mode] and _is_of_torch(module) and mode.may_leave(args):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            left.append(module)

    def enter(module: nn.Module, args: Any, result: Any) -> None:
        if left and left[-1] is module:
            left.pop()
            mode.__enter__()  # type: ignore[no-untyped-call]

    # A module with hooks of its own does not take the fast path, so the hooks are global.
    handles = [register_module_forward_pre_hook(leave), register_module_forward_hook(enter, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_of_torch(module: nn.Module) -> bool:
    """Tell whether a module and its parts are torch's own, without hooks."""
    parts = list(module.modules())
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in parts)
    return not hooked and all(type(each).__module__.startswith("torch.nn.") for each in parts)
