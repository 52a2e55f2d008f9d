"""What a codec lost of a CPU tensor, measured in cache-sized chunks: decoded, compared and forgotten.

The same numbers as :func:`reference.measure` of the tensor and its decoded form, but for the order of the float64 sums,
in a tenth of the time: nothing of the tensor's size is allocated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2**18
"""Elements per chunk: two megabytes of float64, so that what is decoded is still in the caches when it is compared."""

Decode = Callable[[slice, slice], Tensor]
"""Given the elements of the flattened tensor and their blocks, returns the decoded elements."""


def measure(x: Tensor, block_size: int, decode: Decode) -> Tensor:
    """Return :func:`reference.measure` of ``x`` and what ``decode`` makes of it, ``[5]`` float64.

    Args:
        x: ``[*shape]`` of any float dtype, on the CPU.
        block_size: Elements that share a scale; chunks hold whole blocks.
        decode: What is stored of ``x``, decoded to its dtype.
    """
    flat = x.detach().reshape(-1)
    step = max(CHUNK // block_size, 1) * block_size
    squared_error = squares = max_error = zeros = zeroed = torch.zeros((), dtype=torch.float64, device="cpu")
    for start in range(0, flat.numel(), step):
        elements = slice(start, min(start + step, flat.numel()))
        part, decoded = flat[elements], decode(elements, slice(start // block_size, (start + step) // block_size))
        original = part.double()
        error = torch.sub(decoded.double(), original)
        squared_error = squared_error + torch.dot(error, error)
        squares = squares + torch.dot(original, original)
        max_error = torch.maximum(max_error, error.abs_().amax())
        nonzero = torch.count_nonzero(part)
        zeros = zeros + (part.numel() - nonzero)
        # Every codec decodes zero to zero, unless it is in a block with no numbers.
        if bool(max_error.isfinite()):
            zeroed = zeroed + (nonzero - torch.count_nonzero(decoded))
        else:
            zeroed = zeroed + torch.count_nonzero((part != 0) & (decoded == 0))
    return torch.stack([squared_error, squares, max_error, zeros, zeroed])
