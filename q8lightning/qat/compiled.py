"""Which modules run as compiled code, where nobody can look at single operators."""

import torch
from torch import nn

COMPILED = "_orig_mod"
"""What ``torch.compile`` calls a module inside the one that it puts around it."""


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` put around another one."""
    return COMPILED in module._modules


def compiled_modules(module: nn.Module) -> set[nn.Module]:
    """Return the modules that ``torch.compile``, ``Module.compile`` or TorchScript compiles, and what is in them.

    A LightningModule that Lightning unwrapped from ``torch.compile`` keeps what it needs in ``_compiler_ctx``.
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
