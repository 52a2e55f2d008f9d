"""Notice when code asks an engaged weight for its ``data``: torch does not count what is written there in place.

``nn.Parameter`` has a property of that name while a model trains with quantized weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from q8lightning.qat.engage.fake_quantizer import open_quantizers

_plain: Any = torch.Tensor.data  # the descriptor, not a tensor


class DataAccess:
    """Notices accesses to ``data`` until it is closed. Several may be open at once."""

    _open = 0

    def __init__(self) -> None:
        if DataAccess._open == 0:
            nn.Parameter.data = property(_read, _plain.__set__)  # type: ignore[assignment]
        DataAccess._open += 1
        self._closed = False

    def close(self) -> None:
        """Stop noticing accesses. The last one that is closed restores ``nn.Parameter``."""
        if self._closed:
            return
        self._closed = True
        DataAccess._open -= 1
        if DataAccess._open == 0:
            del nn.Parameter.data


def _read(parameter: nn.Parameter) -> Tensor:
    for quantizer in open_quantizers():
        quantizer.note_access(id(parameter))
    return _plain.__get__(parameter)  # type: ignore[no-any-return]
