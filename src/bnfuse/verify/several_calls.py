"""Calls of a model that follow one another, as one module: what is judged is what they give together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bnfuse.model import pytree
from bnfuse.model.calls import Call
from bnfuse.model.sandbox import forked_random_state


class SeveralCalls(nn.Module):
    """Makes calls of a model, between which it remembers what it remembers.

    Attributes:
        model: the model.
        calls: the calls, without their arguments.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        super().__init__()
        self.model = model
        self.calls = [call.with_inputs((), {}) for call in calls]
        self.training = model.training

    def forward(self, inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """What the calls give.

        Args:
            inputs: (args, kwargs) of each call.
        """
        outputs = []
        for made, (args, kwargs) in zip(self.calls, inputs, strict=True):
            call = made.with_inputs(args, kwargs).map(torch.clone)
            with forked_random_state():
                outputs.append(_kept(call.run(self.model)))
        return outputs


def _kept(output: Any) -> Any:
    """What a call returned, safe from being overwritten by the next one."""
    return pytree.map_tensors(output, torch.clone)
