"""The first recorded call as boxes and arrows, and what happens to each norm in it.

Boxes are operators, inputs and outputs. An arrow is a tensor, from the operator that made it to one that reads it.
Parameters are no boxes; they are named by the operator that reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bnfuse.analysis.norms import is_norm
from bnfuse.changes import Decision
from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Kind, ModuleCall, Node, Value
from bnfuse.graph.norms import Norm
from bnfuse.model.describe import dtype_name, shape_text
from bnfuse.planner.problem import Problem
from bnfuse.reasons import CAUSES, Reason
from bnfuse.rules import ABSORBERS
from bnfuse.rules.layers import LAYERS, layer_of
from bnfuse.solve.search import Removal, Solution

_HANDLED = "handled"
_INSIDE = "inside"
"""What `bnfuse.analysis.custom_layers` calls the operator that stands for a layer, and those that it stands for."""

_CONVOLUTIONS = ("conv", "torchvision::deform_conv")


class Dataflow:
    """The run of the original.

    Attributes:
        steps: the operators of the run that have a box, with the number of the box.
        norm_steps: for each decision of the plan, the operators of the norm in this run.
        removals: for each decision of the plan, how the norm goes; None if it stays, or that is not known.
        removed: the operators that no longer run.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        solution: Solution | None,
        decided: Sequence[int] | None = None,
        restructures: bool = False,
    ) -> None:
        """
        Args:
            problem: what ran.
            plan: what is done.
            solution: how the norms go; None if that is not known.
            decided: for each norm of the problem, its place among the decisions, negative for one that has none; None
                where the decisions are those of the norms, in their order.
            restructures: whether the plan names the parameters of another model than that of the problem, since it has
                steps that are not carried out yet.
        """
        self._problem, self._plan = problem, plan
        run = problem.main
        self._inputs = list(dict.fromkeys(value for value in run.inputs if not value.unseen))
        steps = [node for node in run.nodes if node.operator != _INSIDE]
        self.steps = {node: place for place, node in enumerate(steps, len(self._inputs))}
        self._makers = {value: place for place, value in enumerate(self._inputs)}
        for node, place in self.steps.items():
            self._makers.update(dict.fromkeys(node.outputs, place))
        for node in problem.graph.paths:  # what a bias would be added to has the same maker without it
            maker = self._makers.get(node.inputs[0]) if node.inputs else None
            if maker is not None:
                self._makers.update((value, maker) for value in node.outputs if value not in self._makers)
        self.norm_steps: list[list[Node]] = [[] for _ in plan.decisions]
        self.removals: list[Removal | None] = [None for _ in plan.decisions]
        by_norm = {removal.norm: removal for removal in solution.removals} if solution else {}
        places = range(len(problem.norms)) if decided is None else decided
        for norm, nodes, place in zip(problem.norms, _norm_nodes(problem, problem.norms), places, strict=True):
            if place >= 0:
                self.norm_steps[place] += [node for node in nodes if node in self.steps]
                self.removals[place] = by_norm.get(norm)
        self.removed = set(self._removed())
        self._norm_of = {node: place for place, nodes in enumerate(self.norm_steps) for node in nodes}
        self._edited = {} if restructures else {name: edit for edit in plan.edits for name in edit.names}

    def _removed(self) -> Iterator[Node]:
        """The operators of norms that go, and those that do nothing but prepare their scale and shift."""
        gone = set()
        for nodes, decision in zip(self.norm_steps, self._plan.decisions, strict=True):
            if decision.fused:
                gone.update(nodes)
                yield from nodes
        inside = {node.call for node in gone}
        for node in reversed(self.steps):
            prepares = node.call in inside and node.outputs and all(value.independent for value in node.outputs)
            readers = [reader for value in node.outputs for reader in value.consumers]
            if prepares and node not in gone and gone.issuperset(readers):
                gone.add(node)
                yield node

    # Boxes and arrows --------------------------------------------------------------------------------------------

    def graph(self) -> dict[str, Any]:
        """Everything that is drawn."""
        nodes = self._ends("input", self._inputs, 0)
        nodes += [self._node(place, node) for node, place in self.steps.items()]
        outputs = list(dict.fromkeys(value for value in self._problem.main.outputs if value in self._makers))
        first = len(nodes)
        nodes += self._ends("output", outputs, first)
        edges = [edge for node, place in self.steps.items() for edge in self._edges(node, place)]
        edges += [[self._makers[value], first + place, shape_text(value.shape)] for place, value in enumerate(outputs)]
        return {"nodes": nodes, "edges": edges, "modules": self._modules(node["module"] for node in nodes)}

    def _ends(self, kind: str, values: Sequence[Value], first: int) -> list[dict[str, Any]]:
        """The boxes of what goes in, or of what comes out."""
        return [
            {
                "id": place,
                "operator": kind,
                "kind": kind,
                "module": "",
                "class": type(self._problem.model).__name__,
                "label": f"{kind} {place - first + 1}" if len(values) > 1 else kind,
                "shape": list(value.shape),
                "dtype": dtype_name(value.dtype),
                "parameters": [],
                "decision": None,
                "removed": False,
                "changed": False,
                "created": [],
            }
            for place, value in enumerate(values, first)
        ]

    def _node(self, place: int, node: Node) -> dict[str, Any]:
        made = node.outputs[0] if node.outputs else None
        given = [value for value in node.inputs if value.names and value.kind is not Kind.ABSENT]
        names = list(dict.fromkeys(value.names[0] for value in given))
        created = list(
            dict.fromkeys(
                edit.names[0]
                for value in (*node.absent, *node.inputs)
                for name in value.names[:1]
                if (edit := self._edited.get(name)) is not None and edit.created
            )
        )
        call = _held(node.call)
        return {
            "id": place,
            "operator": node.operator,
            "kind": self.kind(node),
            "module": call.path or "",
            "class": type(call.module).__name__,
            "label": label(node),
            "shape": None if made is None else list(made.shape),
            "dtype": None if made is None else dtype_name(made.dtype),
            "parameters": names,
            "decision": self._norm_of.get(node),
            "removed": node in self.removed,
            "changed": node not in self.removed and (bool(created) or any(name in self._edited for name in names)),
            "created": created,
        }

    def kind(self, node: Node) -> str:
        """What a box is: a norm, a layer, what depends on no input, or any other operator."""
        if node in self._norm_of:
            return "norm"
        if node.outputs and all(value.independent for value in node.outputs):
            return "constant"
        return "layer" if is_layer(node) else "operator"

    def _edges(self, node: Node, place: int) -> Iterator[list[Any]]:
        for value in sorted(dict.fromkeys(node.inputs), key=lambda value: value.independent):  # the data comes first
            maker = self._makers.get(value)
            if maker is not None:
                yield [maker, place, shape_text(value.shape)]

    def _modules(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """The modules of the boxes, and those around them, each after the one that holds it."""
        found: dict[str, None] = {"": None}
        for name in names:
            parts = name.split(".") if name else []
            found.update((".".join(parts[: end + 1]), None) for end in range(len(parts)))
        held = dict(self._problem.model.named_modules(remove_duplicate=False))
        return [
            {
                "name": name,
                "class": type(held[name]).__name__ if name in held else "",
                "parent": name.rpartition(".")[0] if name else None,
            }
            for name in found
        ]

    # Norms -------------------------------------------------------------------------------------------------------

    def decisions(self) -> list[dict[str, Any]]:
        """What happens to each norm, with its place among the boxes."""
        entries = zip(self._plan.decisions, self.norm_steps, self.removals, strict=True)
        return [self._decision(*entry) for entry in entries]

    def _decision(self, decision: Decision, nodes: list[Node], removal: Removal | None) -> dict[str, Any]:
        into = [] if removal is None else _readers(removal.edited)
        return {
            "norm": decision.norm,
            "class": decision.kind,
            "channels": decision.channels,
            "removed": decision.fused,
            "direction": decision.direction,
            "into": list(decision.into),
            "into_nodes": sorted(self.steps[node] for node in into if node in self.steps and node not in nodes),
            "norm_nodes": [self.steps[node] for node in nodes],
            "path": [] if removal is None else self._path(removal, nodes),
            "reason": self._reason(decision.reasons) if decision.reasons else None,
        }

    def _path(self, removal: Removal, nodes: list[Node]) -> list[list[int]]:
        """The arrows whose tensors are others without the norm, and those that touch it."""
        values = dict.fromkeys(
            [*removal.units, *(value for node in nodes for value in (*node.inputs, *node.outputs) if _is_data(value))]
        )
        if removal.is_beside:
            values.update(dict.fromkeys(value for node in _readers(removal.edited) for value in node.outputs))
        found: dict[tuple[int, int], None] = {}
        for value in values:
            maker = self._makers.get(value)
            if maker is None or not _is_data(value):
                continue
            touches = value in removal.units or removal.is_beside
            for reader in value.consumers:
                if reader in self.steps and (touches or reader in nodes):
                    found[maker, self.steps[reader]] = None
        return [list(edge) for edge in found]

    def _reason(self, reasons: tuple[Reason, ...]) -> dict[str, Any]:
        first = reasons[0]
        cause = CAUSES.get(first.code)
        refused = (self._step(reason) for reason in reasons)
        return {
            "code": first.code,
            "text": str(replace(first, direction=None)),
            "meaning": None if cause is None else cause.meaning,
            "advice": None if cause is None else cause.advice,
            "refused_by": list(dict.fromkeys(place for place in refused if place is not None)),
            "details": [str(reason) for reason in reasons],
        }

    def _step(self, reason: Reason) -> int | None:
        """The box of the operator that refused; of another call, the same operator in the same module."""
        nodes = self._problem.main.nodes
        if reason.step is None:
            return None
        if 0 <= reason.step < len(nodes) and nodes[reason.step] in self.steps:
            return self.steps[nodes[reason.step]]
        place = (reason.operator, reason.module)
        return next((box for node, box in self.steps.items() if node.place[:2] == place), None)

    def layers_in(self, names: Collection[str]) -> list[int]:
        """The boxes of the layers in some modules."""
        inside = tuple(f"{name}." for name in names)
        paths = ((node, node.call.path or "") for node in self.steps)
        return [
            self.steps[node] for node, path in paths if (path in names or path.startswith(inside)) and is_layer(node)
        ]


def is_layer(node: Node) -> bool:
    """True for an operator with a weight: a parameter, or what is made of parameters alone."""
    if node.operator == _HANDLED:
        return True
    if node.operator in LAYERS:
        layer = layer_of(node)
        return layer is not None and layer.w.independent
    return node.operator in ABSORBERS and any(value.names for value in node.inputs)


def _norm_nodes(problem: Problem, norms: list[Norm]) -> Iterator[list[Node]]:
    """The operators of each norm, in all calls."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in problem.graph.calls:
        calls.setdefault(call.path or "", []).append(call)
    functions = iter([node for node in problem.graph.nodes if node.operator == "batch_norm" and not _of_module(node)])
    for norm in norms:
        if norm.sites:
            yield [node for site in norm.sites for node in site.nodes]
        elif norm.names:
            found = [node for name in norm.names if name for call in calls.get(name, ()) for node in call.all_nodes]
            yield [node for node in found if not (node.outputs and all(value.independent for value in node.outputs))]
        else:
            node = next(functions, None)
            yield [] if node is None else [node]


def _of_module(node: Node) -> bool:
    return is_norm(node.call.module) and node.call.path is not None


def _held(call: ModuleCall) -> ModuleCall:
    """The call of the innermost module that the model holds."""
    while call.path is None and call.parent is not None:
        call = call.parent
    return call


def _readers(values: Iterable[Value]) -> list[Node]:
    """The operators that read parameters, also by way of what is made of them alone."""
    found: dict[Node, None] = {}
    waiting = list(values)
    while waiting:
        for node in waiting.pop().consumers:
            if node in found:
                continue
            found[node] = None
            waiting += [value for value in node.outputs if value.independent]
    return [node for node in found if not (node.outputs and all(value.independent for value in node.outputs))]


def _is_data(value: Value) -> bool:
    return not value.independent


def label(node: Node) -> str:
    """A few words for a box: the operator and its sizes."""
    name = node.operator.rpartition("::")[2]
    if node.operator == _HANDLED:
        return type(node.call.module).__name__
    if node.operator in LAYERS:
        layer = layer_of(node)
        if layer is None:
            return name
        if node.operator == "linear":  # a nested input has no sizes
            return f"{name} {layer.w.shape[1]}→{layer.w.shape[0]}"
        words = [name, f"{layer.channels_in}→{layer.channels_out}"]
        if node.operator.startswith(_CONVOLUTIONS):
            words.append(shape_text(layer.w.shape[2:]))
            words += _steps(node)
            words += [f"groups {layer.groups}"] if layer.groups > 1 else []
        return " ".join(words)
    if "pool" in name and not name.startswith("adaptive"):
        kernel = node.argument("kernel_size")
        return " ".join([name, *([] if kernel is None else [_numbers(kernel)]), *_steps(node)])
    if name == "batch_norm" and node.outputs and len(node.outputs[0].shape) > 1:
        return f"{name} {node.outputs[0].shape[1]}"
    return name


def _steps(node: Node) -> list[str]:
    """Stride and dilation, where they are not 1."""
    found = []
    for name in ("stride", "dilation"):
        given = node.argument(name)
        numbers = [given] if isinstance(given, int) else list(given or ())
        if any(number != 1 for number in numbers):
            found.append(f"{name} {_numbers(numbers)}")
    return found


def _numbers(given: int | Iterable[int]) -> str:
    """A size along each axis; once where all are the same.

    >>> _numbers([2, 2]), _numbers([1, 2]), _numbers(3)
    ('2', '1x2', '3')
    """
    numbers = [given] if isinstance(given, int) else list(given)
    return str(numbers[0]) if len(set(numbers)) == 1 else shape_text(numbers)
