"""A bound from above that differs from channel to channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ceiling(nn.Module):
    """Bounds its input from above, each channel (axis 1) by a number of its own.

    Args:
        upper: the bounds, which broadcast against the input: (channels, 1, 1) for images.

    >>> ceiling = Ceiling(torch.tensor([6.0, 4.5]))
    >>> ceiling(torch.tensor([[7.0, 5.0]]))
    tensor([[6.0000, 4.5000]])
    """

    upper: Tensor

    def __init__(self, upper: Tensor) -> None:
        super().__init__()
        self.register_buffer("upper", upper)

    def forward(self, x: Tensor) -> Tensor:
        """``min(x, upper)``"""
        return torch.minimum(x, self.upper)

    def extra_repr(self) -> str:
        """What ``print`` shows: how many bounds, and between which they lie."""
        return f"{self.upper.numel()} bounds from {float(self.upper.min()):.4g} to {float(self.upper.max()):.4g}"
