"""Graphs that are prepared for quantisation, or quantised: no norm may go there."""

from __future__ import annotations

import torch
from torch import fx

from bnfuse.errors import InputError
from bnfuse.model.quantisation import is_watcher

_NAMESPACES = ("quantized", "quantized_decomposed", "torchao")


def refuse_quantised(model: fx.GraphModule, kind: str) -> None:
    """Raise if a graph rounds numbers as integers would be, or notes their ranges for that.

    Ranges were measured on the numbers that the graph computes with its norms. Without a norm other numbers pass the
    same place, and what was measured no longer fits, even if the outputs are the same.

    Args:
        kind: what messages call the graph.

    Raises:
        InputError: it does.
    """
    for node in model.graph.nodes:
        found = ""
        if node.op == "call_module" and is_watcher(model.get_submodule(node.target)):
            found = f"{node.target} ({type(model.get_submodule(node.target)).__name__})"
        elif isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name
            namespace, operator = name.split("::")
            found = name if namespace in _NAMESPACES or "fake_quant" in operator else ""
        if found:
            raise InputError(
                f"{kind} is prepared for quantisation: it runs {found}.\n"
                f"What was measured with the norms does not fit without them: fuse first, then prepare the fused model."
            )
