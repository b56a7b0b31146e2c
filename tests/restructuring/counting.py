"""How much a network does when it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Work(TorchDispatchMode):
    """Counts the layers that run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.operators += 1
        self.layers += name.startswith(("aten::conv", "aten::linear", "aten::avg_pool"))
        return func(*args, **(kwargs or {}))


def work(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """How many layers and how many operators run, and the multiplications of layers."""
    with torch.inference_mode(), Work() as counted:
        model(x)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(x)
    return counted.layers, counted.operators, flops.get_total_flops()
