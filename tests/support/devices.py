"""Where tensors are, and where kernels run: interpreted on the CPU, compiled on a GPU."""

from importlib.util import find_spec

import pytest
import torch


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: ``TRITON_INTERPRET=1`` was set at the start."""
    if find_spec("triton") is None:
        return False
    from q8lightning.quantization.backends.kernels import launch

    return launch.INTERPRETED


NOT_INTERPRETED = pytest.mark.skipif(
    not interpreted(), reason="CPU tensors need Triton's interpreter; set TRITON_INTERPRET=1 before the start"
)
NOT_COMPILED = pytest.mark.skipif(
    not torch.cuda.is_available() or interpreted(),
    reason="compiled kernels need a GPU, and TRITON_INTERPRET must not be set",
)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])

KERNELS = [
    pytest.param("cpu", marks=NOT_INTERPRETED, id="interpreted"),
    pytest.param("cuda", marks=[pytest.mark.gpu, NOT_COMPILED]),
]
