"""A clip whose bounds differ from channel to channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Clip(nn.Module):
    """``min(max(x, lower), upper) + bias`` with numbers for each channel.

    It stands where an activation was whose input comes from a norm that is gone: see `bnfuse.restructuring.clip`.

    Args:
        shape: of the parameters, which broadcasts against the input: (channels, 1, 1) for images.
        lower: whether it has bounds from below, of shape ``shape``.
        upper: whether it has bounds from above.
        bias: whether it has numbers that are added afterwards.
        device, dtype: of the parameters.

    >>> clip = Clip((2,), upper=False)
    >>> _ = nn.init.constant_(clip.lower, -0.5)
    >>> clip(torch.tensor([[-1.0, 1.0]])).tolist()
    [[-0.5, 1.0]]
    """

    lower: Tensor | None
    upper: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        *,
        lower: bool = True,
        upper: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for name, wanted in (("lower", lower), ("upper", upper), ("bias", bias)):
            parameter = nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Works in place on what it has made itself, and in the dtype of its input."""
        y = x
        if self.lower is not None:
            y = torch.maximum(y, self.lower.to(y.dtype))
        if self.upper is not None:
            upper = self.upper.to(y.dtype)
            y = torch.minimum(y, upper) if y is x else y.clamp_max_(upper)
        if self.bias is not None:
            bias = self.bias.to(y.dtype)
            y = y + bias if y is x else y.add_(bias)
        return y

    def extra_repr(self) -> str:
        """What ``print`` shows: the shape, and which of the parameters there are."""
        held = [name for name in ("lower", "upper", "bias") if getattr(self, name) is not None]
        return ", ".join([str(self.shape), *held])
