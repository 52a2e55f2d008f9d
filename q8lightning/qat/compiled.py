"""Find the modules that run as compiled code, in which single operators cannot be followed."""

import sys

import torch
from torch import nn

COMPILED = "_orig_mod"
"""The name under which the module that ``torch.compile`` returns holds the original one."""


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether ``torch.compile`` put this module around another one."""
    return COMPILED in module._modules


def compiled_modules(module: nn.Module) -> set[nn.Module]:
    """Return the modules compiled by ``torch.compile``, ``Module.compile`` or TorchScript, with all their parts.

    Lightning unwraps a LightningModule from ``torch.compile``; such a module has a ``_compiler_ctx``.
    """
    found: set[nn.Module] = set()
    for each in module.modules():
        compiled = (
            isinstance(each, torch.jit.ScriptModule)
            or is_compiled_wrapper(each)
            or getattr(each, "_compiled_call_impl", None) is not None
        )
        if compiled or getattr(each, "_compiler_ctx", None) is not None:
            found.update(each.modules())
    return found


def forget_compiled_code() -> None:
    """Let torch compile all code again: code that was compiled before a hook was registered runs without the hook."""
    if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
        torch.compiler.reset()
