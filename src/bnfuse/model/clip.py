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
        shape: of the parameters, one axis less than that of the input: (channels, 1, 1) for images.
        lower: whether it has bounds from below, of shape ``shape``.
        upper: whether it has bounds from above.
        bias: whether it has numbers that are added afterwards.
        device, dtype: of the parameters.

    >>> clip = Clip((2,), upper=False)
    >>> _ = nn.init.constant_(clip.lower, -0.5)
    >>> clip(torch.tensor([[-1.0, 1.0]])).tolist()
    [[-0.5, 1.0]]
    """

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

        def numbers(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype)) if wanted else None

        self.lower, self.upper, self.bias = numbers(lower), numbers(upper), numbers(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Works in the dtype of its input, and in place on what it has made itself.

        Raises:
            ValueError: the input has another number of axes; its channels might be broadcast along a wrong one.
        """
        if x.dim() != len(self.shape) + 1:
            raise ValueError(
                f"A clip of shape {self.shape} takes inputs of one axis more, got {tuple(x.shape)}: fuse the model "
                "with an input of as many axes"
            )
        lower, upper, bias = self.lower, self.upper, self.bias
        if lower is None and upper is None:
            return x if bias is None else x + bias.to(x.dtype)
        if lower is not None:
            x = torch.maximum(x, lower.to(x.dtype))
            if upper is not None:
                x = x.clamp_max_(upper.to(x.dtype))
        elif upper is not None:
            x = torch.minimum(x, upper.to(x.dtype))
        return x if bias is None else x.add_(bias.to(x.dtype))

    def extra_repr(self) -> str:
        """What ``print`` shows: the shape, and which of the parameters there are."""
        held = [name for name in ("lower", "upper", "bias") if getattr(self, name) is not None]
        return ", ".join([str(self.shape), *held])
