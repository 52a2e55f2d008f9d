"""The masters, for code that runs while the weights are quantized."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from q8lightning.qat.fake_quantizer import open_quantizers


@contextmanager
def masters(module: nn.Module) -> Iterator[None]:
    """Put the masters into the parameters of a module, in the middle of a step that trains with quantized weights.

    What is written to them there is what the next forward pass quantizes. A forward pass in there runs in full
    precision. Where nothing is quantized, as without QAT, nothing happens, so a model may always use it. All quantized
    weights of the run are released, also those outside of ``module``.

    Args:
        module: The model, or a part of it.

    Raises:
        LostWriteError: If somebody wrote to a weight before, while it held its quantized values.

    Example:
        >>> import torch
        >>> model = nn.Linear(64, 64)
        >>> with masters(model), torch.no_grad():
        ...     _ = model.weight.clamp_(-0.1, 0.1)
    """
    parameters = {id(parameter) for parameter in module.parameters()}
    with ExitStack() as stack:
        for quantizer in open_quantizers():
            if not parameters.isdisjoint(quantizer.places):
                stack.enter_context(quantizer.masters())
        yield
