"""Biases and gains that layers were made without and that can be created: they enter the graph as values.

A layer that was made with ``bias=False`` can be given one, provided that its ``forward`` reads it. That is known of
PyTorch's own layers. Any other class is asked: its forward runs once on zeros with a bias in place, and the bias must
arrive at the operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from bnfuse import tree
from bnfuse.capture import WriteWatch, eager, evaluation_mode, forked_random_state, untouched
from bnfuse.graph import Graph, Kind, Node, Storage, Value

_BIASED = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip

_KNOWN_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        _BatchNorm, nn.SyncBatchNorm,
    )
}  # fmt: skip


def add_absent(model: nn.Module, graph: Graph) -> list[Value]:
    """Give every operator whose layer has an empty place for a bias (or gain) a value for it; returns these values."""
    names: dict[int, list[str]] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module), []).append(name)
    created: dict[tuple[int, str], Value] = {}
    answers: dict[type[nn.Module], bool] = {}
    for node in graph.nodes:
        for place in _empty_places(node):
            module = node.call.module
            if id(module) not in names or not _reads(node, place, answers):
                continue
            key = (id(module), place)
            if key not in created:
                like = node.bound["weight"] if place == "bias" and node.argument("weight") else node.inputs[0]
                channels = node.outputs[0].shape[_channel_axis(node)]
                dtype = like.dtype
                value = Value(-1 - len(created), Kind.ABSENT, (channels,), dtype, Storage(), independent=True)
                value.names = tuple(f"{name}.{place}" if name else place for name in names[id(module)])
                created[key] = value
            node.bound[place] = created[key]
            created[key].consumers.append(node)
    return list(created.values())


def _channel_axis(node: Node) -> int:
    if node.operator == "linear":
        return -1
    rank = len(node.outputs[0].shape)
    return 1 if node.operator == "batch_norm" else rank - int(node.operator[-2]) - 1


def _empty_places(node: Node) -> list[str]:
    if node.operator in _BIASED:
        places = ["bias"]
    elif node.operator == "batch_norm":
        places = ["weight", "bias"]
    else:
        return []
    parameters = node.call.module._parameters
    return [
        place for place in places if node.argument(place) is None and place in parameters and parameters[place] is None
    ]


def _reads(node: Node, place: str, answers: dict[type[nn.Module], bool]) -> bool:
    """True if the module's forward hands what stands in the place to the operator."""
    module = node.call.module
    kind = type(module)
    if "forward" not in module.__dict__ and kind.forward in _KNOWN_FORWARDS:
        return True
    if kind not in answers or "forward" in module.__dict__:
        answers[kind] = _ask(node, place)
    return answers[kind]


class _Witness(TorchDispatchMode):
    """Looks for a tensor among the arguments of an operator."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensor = tensor
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(argument is self.tensor for argument in (*args, *(kwargs or {}).values())):
            self.seen.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def _ask(node: Node, place: str) -> bool:
    module, call = node.call.module, node.call
    reference = next(module.parameters(recurse=False), None)
    device = reference.device if reference is not None else None
    if call.plain and len(call.inputs) == 1:
        value = call.inputs[0]
        args: tuple[Any, ...] = (torch.zeros(value.shape, dtype=value.dtype, device=device),)
        kwargs: dict[str, Any] = {}
    elif call.arguments is not None:
        args, kwargs = tree.map_tensors(
            call.arguments, lambda t: torch.zeros_like(t, device=device) if t.is_meta else t
        )
    else:
        return False
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(forked_random_state())
        watch = stack.enter_context(untouched(module))
        parameter = stack.enter_context(_placed(module, place, node.outputs[0].shape[_channel_axis(node)], device))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(eager())
        stack.enter_context(WriteWatch(module, watch))
        witness = stack.enter_context(_Witness(parameter))
        try:
            module.forward(*args, **kwargs)
        except Exception:  # noqa: BLE001 (whatever it raises, the answer is no)
            return False
    return bool(witness.seen == [node.operator])


@contextlib.contextmanager
def _placed(module: nn.Module, place: str, channels: int, device: torch.device | None) -> Iterator[Tensor]:
    weight = module._parameters.get("weight")
    parameter = nn.Parameter(torch.zeros(channels, device=device, dtype=None if weight is None else weight.dtype))
    module._parameters[place] = parameter
    try:
        yield parameter
    finally:
        module._parameters[place] = None
