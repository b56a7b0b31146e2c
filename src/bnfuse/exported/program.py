"""An ``ExportedProgram`` made to fit its changed graph: the state, and the signature, which explains placeholders."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from bnfuse.exported.rewriting import Difference, Reader, rewritten


def rewritten_program(program: ExportedProgram, difference: Difference, state: nn.Module) -> ExportedProgram:
    """A new program with the difference in it.

    Args:
        state: a module that holds all tensors of the new program under their names.
    """
    specs: dict[fx.Node, InputSpec] = {}

    def reader(graph: fx.Graph) -> Reader:
        specs.update(zip(_placeholders(graph), program.graph_signature.input_specs, strict=True))
        known: dict[str, fx.Node] = {}

        def read(name: str, node: fx.Node) -> fx.Node:
            if name not in known:
                known[name] = _add_placeholder(graph, specs, name, state.get_parameter(name))
            return known[name]

        return read

    graph, names = rewritten(program.graph, difference, reader)
    for node, spec in list(specs.items()):
        if spec.target in difference.unread and not node.users:
            graph.erase_node(node)
            del specs[node]
    signature = program.graph_signature
    inputs = [replace(specs[node], arg=replace(specs[node].arg, name=node.name)) for node in _placeholders(graph)]
    outputs = [_renamed(spec, names) for spec in signature.output_specs]
    held = {spec.target for spec in inputs}
    lost = ({spec.target for spec in signature.input_specs} | difference.unread) - held
    new = {name: state.get_parameter(name) for _, _, name in difference.added}
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={**_of(program.state_dict, lost, state), **new},
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=_calls(program, graph, names),
        example_inputs=program.example_inputs,
        constants=_of(program.constants, lost, state),
        verifiers=program.verifiers,
    )


def _placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")


def _add_placeholder(graph: fx.Graph, specs: dict[fx.Node, InputSpec], name: str, parameter: Tensor) -> fx.Node:
    """Add a parameter to what the graph is given, behind the last one."""
    parameters = [node for node, spec in specs.items() if spec.kind is InputKind.PARAMETER]
    label = f"p_{name.replace('.', '_')}"
    first = next(_placeholders(graph))
    with graph.inserting_after(parameters[-1]) if parameters else graph.inserting_before(first):
        node = graph.placeholder(label)
    node.target = node.name
    node.meta["val"] = _without_contents(parameter, specs)
    specs[node] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name)
    return node


def _without_contents(tensor: Tensor, specs: Mapping[fx.Node, InputSpec]) -> Any:
    """A tensor of the same sizes in the mode in which the program was made, as every placeholder has one."""
    like = next(node.meta["val"] for node in specs if isinstance(node.meta.get("val"), Tensor))
    mode = getattr(like, "fake_mode", None)
    return tensor if mode is None else mode.from_tensor(tensor.detach(), static_shapes=True)


def _renamed(spec: OutputSpec, names: Mapping[str, str]) -> OutputSpec:
    of_input = spec.kind is OutputKind.USER_INPUT_MUTATION  # whose target is a node, too
    target = names.get(spec.target, spec.target) if of_input and spec.target is not None else spec.target
    return replace(spec, arg=replace(spec.arg, name=names.get(spec.arg.name, spec.arg.name)), target=target)


def _calls(program: ExportedProgram, graph: fx.Graph, names: Mapping[str, str]) -> list[ModuleCallEntry]:
    """What the program knows of the modules that it was made of; nothing of those that do no work any more."""
    working = {path for node in graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    calls: list[ModuleCallEntry] = copy.deepcopy(program.module_call_graph)
    for entry in calls:
        if entry.signature is None:
            continue
        for argument in (*entry.signature.inputs, *entry.signature.outputs):
            argument.name = names.get(argument.name, argument.name)
        if entry.fqn and entry.fqn.partition("@")[0] not in working:
            entry.signature = None
    return calls


def _of(tensors: Mapping[str, Any], lost: set[str | None], state: nn.Module) -> dict[str, Any]:
    """Those that are still there, with new contents."""
    found = {}
    for name, old in tensors.items():
        if name in lost:
            continue
        held: Any = state
        for place in name.split("."):
            held = getattr(held, place, None)
        found[name] = held if isinstance(held, torch.Tensor) else old
    return found
