"""Put the masters in place for code of the user that runs inside a step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from q8lightning.qat.engage.fake_quantizer import open_quantizers


@contextmanager
def masters(module: nn.Module) -> Iterator[None]:
    """Put the masters into the parameters of a module, in the middle of a step that trains with quantized weights.

    The next forward pass quantizes what was written to them. A forward pass inside the context runs in full precision.
    Without QAT nothing happens, so a model may always use it. All quantized weights of the run are released, also
    those outside of ``module``.

    Args:
        module: The model, or a part of it.

    Raises:
        LostWriteError: If a weight was written to before, while it held its quantized values.

    Example:
        >>> import torch
        >>> model = nn.Linear(64, 64)
        >>> with masters(model), torch.no_grad():
        ...     _ = model.weight.clamp_(-0.1, 0.1)
    """
    with ExitStack() as stack:
        for quantizer in open_quantizers():
            if quantizer.has_weights_of(module):
                stack.enter_context(quantizer.masters())
        yield
