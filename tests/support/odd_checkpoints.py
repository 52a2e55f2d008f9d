"""Checkpoints that torch can save and that no rule was written for."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ODD: dict[str, Callable[[], Any]] = {
    "lazy layer, not yet used": lambda: {"state_dict": nn.LazyLinear(64).state_dict()},
    "nested": lambda: {"state_dict": {"x": torch.nested.nested_tensor([torch.ones(64, 64), torch.ones(9, 64)])}},
    "jagged": lambda: {
        "state_dict": {"x": torch.nested.nested_tensor([torch.ones(64, 64), torch.ones(9, 64)], layout=torch.jagged)}
    },
    "quantized by torch": lambda: {"x": torch.quantize_per_tensor(torch.ones(64, 64), 0.1, 0, torch.qint8)},
    "sparse rows": lambda: {"state_dict": {"x": torch.eye(64).to_sparse_csr()}},
    "meta": lambda: {"state_dict": {"x": torch.ones(64, 64, device="meta")}},
    "keys that are no words": lambda: {"state_dict": {1: torch.ones(64, 64), (2, None): torch.ones(64, 64)}, 3: 4},
    "default dict": lambda: {"state_dict": defaultdict(list, {"x": torch.ones(64, 64)})},
    "no tensors": lambda: {"state_dict": {"x": None, "y": {1, 2}, "z": "word"}, "optimizer_states": [None, 3]},
    "no state dict": lambda: {},
    "optimizers by name": lambda: {"optimizer_states": {"generator": {"state": {0: {"exp_avg": torch.ones(64, 64)}}}}},
}
