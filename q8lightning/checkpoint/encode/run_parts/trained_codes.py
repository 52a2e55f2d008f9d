"""Encode the codes of weights that are trained quantized, where they do not follow from what is stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.plan import Plan
from q8lightning.quantization.spec.packed_bits import pack_bits


class TrainedCodes:
    """The codes and scales of a save's weights that are trained quantized.

    Args:
        plan: Names these weights in :attr:`Plan.codes`.

    Attributes:
        packed: For each weight, by name, its packed codes and its scales.
    """

    def __init__(self, plan: Plan) -> None:
        self.packed: dict[str, tuple[Tensor, Tensor]] = {}
        self._plan = plan
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def encode(self, device: torch.device, values: Sequence[Tensor]) -> None:
        """Encode the weights of a device, many in one launch where kernels take them; a GPU is not waited for.

        Args:
            device: Where the weights are.
            values: The checkpoint's tensors or copies of them, by number.
        """
        for together in self._plan.codes_together:
            entries = [self._plan.codes[i] for i in together.codes]
            tensors = [values[number] for _, number, _ in entries]
            if tensors[0].device == device:
                data = together.encoding.encode(tensors).data
                for (name, _, codec), tensor, stored, each in zip(
                    entries, tensors, together.encoding.codecs, data, strict=True
                ):
                    codes, scales = stored.split(each, tensor.numel())
                    rows = 1 if codec.axis is None else tensor.shape[codec.axis]
                    self._encoded[name] = codes.view(rows, -1), scales.view(rows, -1)
        for name, number, codec in self._plan.codes:
            tensor = values[number]
            if tensor.device == device and name not in self._encoded:
                self._encoded[name] = codec.encode(tensor)

    def pack(self, device: torch.device) -> None:
        """Pack the codes of a device's weights into their bits; see :meth:`let_go`."""
        for name, _, codec in self._plan.codes:
            if name in self._encoded and self._encoded[name][0].device == device:
                codes, scales = self._encoded[name]
                # A file holds whole memories; scales that were encoded together share one with all codes.
                self.packed[name] = pack_bits(codes, codec.bits), scales.clone()

    def let_go(self) -> None:
        """Free what was encoded, once the stream that packed it was waited for.

        It is memory of training's stream, which could hand it out again while another stream still reads it.
        """
        self._encoded.clear()
