"""A module that adds nothing to a sum, at next to no cost."""

from __future__ import annotations

from torch import Tensor, nn


class Nothing(nn.Module):
    """Gives one zero, of the dtype and on the device of its input, which adds nothing to a tensor like it.

    It stands in the place of a branch that another branch has taken up, where the code that adds them stays.

    >>> import torch
    >>> Nothing()(torch.ones(2, 3))
    tensor(0.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """0"""
        return x.new_zeros(())
