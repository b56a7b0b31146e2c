"""Methods of a model that are known by name: those that take what its forward takes, and those by which it forgets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Iterator

from torch import nn

from bnfuse.model.calls import Call, PipedCall
from bnfuse.planner.model_code import VARIABLE, parameters_of

METHODS = (
    "forward_features",
    "forward_intermediates",
    "forward_feature",
    "extract_features",
    "extract_feature",
    "extract_endpoints",
    "get_intermediate_layers",
    "forward_dummy",
)
"""Methods that take what forward takes, by the conventions of model zoos (timm, efficientnet_pytorch, DINO)."""

PIPES = (("forward_features", "forward_head"),)
"""Methods of which the second takes what the first returned, by the same conventions."""

RESETS = re.compile(
    r"(reset|clear|flush|forget|(reset|clear|init|flush|forget)_"
    r"(state|states|hidden|memory|cache|caches|buffer|buffers|history|context))"
)
"""The names of methods by which models forget."""


def methods(model: nn.Module) -> list[str]:
    """The known methods that the model has."""
    return [name for name in METHODS if inspect.ismethod(getattr(model, name, None))]


def pipes(model: nn.Module, call: Call, known: Container[str] = ()) -> Iterator[PipedCall]:
    """What the model has cut into two methods, with every flag of the second turned.

    Args:
        known: the first methods that the forward calls itself; it is then taken for both of them, without flags.
    """
    for first, second in PIPES:
        if inspect.ismethod(getattr(model, first, None)) and inspect.ismethod(getattr(model, second, None)):
            flags = [p for p in parameters_of(getattr(model, second)) if isinstance(p.default, bool)]
            whole: list[dict[str, bool]] = [] if first in known else [{}]
            for options in (*whole, *({flag.name: not flag.default} for flag in flags)):
                yield PipedCall(forward_of(call, first), second, **options)


def resets(model: nn.Module) -> list[str]:
    """The methods without required arguments by which the model forgets."""
    found = []
    for name in dir(type(model)):
        if RESETS.fullmatch(name) is None or name in model._modules:
            continue
        method = getattr(type(model), name, None)
        if callable(method):
            required = [p for p in parameters_of(method)[1:] if p.default is p.empty and p.kind not in VARIABLE]
            if not required:
                found.append(name)
    return found


def forward_of(call: Call, method: str) -> Call:
    """Another method with the same arguments."""
    return Call(*call.args, method=method, **call.kwargs)
