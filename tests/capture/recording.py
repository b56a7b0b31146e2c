"""What the tests of recorded runs share: a network that is a function, and its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.capture.run import capture
from bnfuse.graph.graph import Graph

X = torch.ones(2, 3, 4, 4)


class Net(nn.Module):
    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layers, *args, **kwargs)


def graph_of(function: Any, *args: Tensor, **layers: nn.Module) -> Graph:
    return capture(Net(function, **layers), args, {}).graph


def operators(graph: Graph) -> list[str]:
    return [node.operator for node in graph.nodes]
