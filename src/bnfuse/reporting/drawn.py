"""Both pictures of a report: the run of the original, and that of the restructured model where there is one.

Without steps one picture is enough: after fusing, the same operators run without those that are removed. Steps put
other modules in old places, so there the run of the model behind them is drawn after, again without what is removed.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from bnfuse.changes import Decision, Step
from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Node
from bnfuse.planner.planner import Planner
from bnfuse.planner.steps import exact_contents
from bnfuse.reporting.activations import Measured, Origin, looked_at, measured
from bnfuse.reporting.cost import multiply_adds
from bnfuse.reporting.counterparts import counterparts
from bnfuse.reporting.dataflow import Dataflow
from bnfuse.reporting.leaving_out import left_out
from bnfuse.solve.search import Solution


class Drawn:
    """The runs of a plan.

    Attributes:
        before: the run of the original.
        after: the run of the model behind the steps, with the norms that are taken from it; the same without steps, and
            None if it cannot be had.
    """

    def __init__(self, planner: Planner, plan: Plan) -> None:
        self._planner, self._plan = planner, plan
        self._solution: Solution | None = None
        with left_out("where norms go"):
            self._solution = planner.solution(plan)
        self._origin: Origin | None = None
        self._boxes: dict[int, int] = {}
        if planner.steps:
            self.before = Dataflow(planner.original, plan, None, self._decided_before(), restructures=True)
            self.after: Dataflow | None = None
            with left_out("what the network looks like after the steps"):
                self._restructured()
        else:
            self.before = self.after = Dataflow(planner.problem, plan, self._solution)

    def _restructured(self) -> None:
        planner = self._planner
        places = {id(decision): place for place, decision in enumerate(self._plan.decisions)}
        own = planner.own_decisions(self._plan)
        decided = [-1 if decision is None else places[id(decision)] for decision in own]
        self.after = Dataflow(planner.problem, self._plan, self._solution, decided)
        nodes = planner.original.main.nodes
        found = counterparts(nodes, planner.problem.main.nodes, planner.steps)
        self._origin = Origin(self.before, nodes, found)
        self._boxes = {
            box: self.before.steps[found[node]]
            for node, box in self.after.steps.items()
            if node in found and found[node] in self.before.steps
        }

    def _decided_before(self) -> list[int]:
        """The place of the decision on each norm of the original; of several on one norm, that which keeps it."""
        places: dict[str, list[int]] = {}
        for place, decision in enumerate(self._plan.decisions):
            places.setdefault(decision.norm, []).append(place)
        labels = [norm.label for norm in self._planner.original.norms]
        found = []
        for label in labels:
            waiting = places.get(label, [])
            if labels.count(label) == 1:
                waiting.sort(key=lambda place: self._plan.decisions[place].fused)
            found.append(waiting.pop(0) if waiting else -1)
        return found

    # What is drawn -------------------------------------------------------------------------------------------------

    def pictures(self) -> dict[str, Any]:
        """Both pictures and the decisions, as a report holds them."""
        found: dict[str, Any] = {"graph": self.before.graph(), "graph_after": None}
        found["decisions"] = [decision | {"step": None, "after": None} for decision in self.before.decisions()]
        if self._origin is not None:
            with left_out("what becomes of the network"):
                found = {"graph": self.graph(), "graph_after": self.graph_after(), "decisions": self.decisions()}
        return found

    def graph(self) -> dict[str, Any]:
        """The picture before."""
        graph = self.before.graph()
        drawn = {node["id"]: node for node in self._graph_of_after()["nodes"]}
        twins = {before: drawn[after] for after, before in self._boxes.items()}
        for node in graph["nodes"]:
            twin = twins.get(node["id"])
            if node["kind"] == "layer":
                node["changed"] = twin is None or twin["changed"]
                node["created"] = [] if twin is None else twin["created"]
        return graph

    def graph_after(self) -> dict[str, Any]:
        """The picture after.

        What it has beyond that before: for each node its box before ("before"), None if it does the work of several.
        """
        graph = self._graph_of_after()
        boxes = {**self._boxes, **_ends(graph["nodes"], self.before.graph()["nodes"])}
        for node in graph["nodes"]:
            node["before"] = boxes.get(node["id"])
        return graph

    def _graph_of_after(self) -> dict[str, Any]:
        assert self.after is not None
        graph = self.after.graph()
        exact = exact_contents(self._planner.steps)
        for node in graph["nodes"]:
            node["changed"] = node["changed"] or any(name in exact for name in node["parameters"])
        return graph

    def decisions(self) -> list[dict[str, Any]]:
        """What happens to each norm, with its place in both pictures: that after under "after" where there are two, and
        the number of the step that took it along under "step"."""
        found = self.before.decisions()
        edges = {(start, end) for start, end, _ in self.before.graph()["edges"]}
        assert self.after is not None
        pairs = zip(self._plan.decisions, found, self.after.decisions(), strict=True)
        return [self._decision(decision, before, after, edges) for decision, before, after in pairs]

    def _decision(
        self, decision: Decision, before: dict[str, Any], after: dict[str, Any], edges: set[tuple[int, int]]
    ) -> dict[str, Any]:
        step = self._step(decision)
        into, refused = after["into_nodes"], (after["reason"] or {}).get("refused_by", [])
        if step is not None and self.after is not None:
            into = self.after.layers_in(_places(self._planner.steps[step]))
        both = {"norm_nodes": after["norm_nodes"], "into_nodes": into, "path": after["path"], "refused_by": refused}
        path = [[self._boxes.get(start), self._boxes.get(end)] for start, end in after["path"]]
        if before["reason"] is not None:
            before["reason"]["refused_by"] = self._before(refused)
        return before | {
            "into_nodes": self._before(into),
            "path": [edge for edge in path if tuple(edge) in edges],
            "step": step,
            "after": both,
        }

    def _before(self, boxes: list[int]) -> list[int]:
        return [self._boxes[box] for box in boxes if box in self._boxes]

    def _step(self, decision: Decision) -> int | None:
        """The number of the step that took a norm along."""
        pairs = enumerate(self._plan.steps)
        found = (
            number for number, step in pairs if step.kind == decision.direction and (step.subject,) == decision.into
        )
        return next(found, None)

    # What is measured ----------------------------------------------------------------------------------------------

    def measured(self, original: nn.Module, fused: nn.Module | None) -> Measured:
        """Run the models. Of a plan alone with steps, only the original runs."""
        planner = self._planner
        if self.after is None or (self._origin is not None and fused is None):
            return measured(planner.original, self.before, None, original, None)
        return measured(planner.problem, self.after, self._solution, original, fused, self._origin)

    def left_out(self, found: Measured) -> int:
        """How many layers of the original have no counterpart."""
        return len(set(looked_at(self.before)) - {layer.step for layer in found.layers})

    def multiply_adds(self) -> tuple[int, int | None]:
        """Those before and after."""
        before = multiply_adds(self.before.steps, _last(self.before))
        if self.after is None:
            return before, None
        staying = [node for node in self.after.steps if node not in self.after.removed]
        return before, multiply_adds(staying, _last(self.after))


def _last(dataflow: Dataflow) -> set[Node]:
    """The last operator of each norm, which counts for all of them."""
    return {nodes[-1] for nodes in dataflow.norm_steps if nodes}


def _places(step: Step) -> list[str]:
    return list(itertools.chain.from_iterable(placement.names for placement in step.placements))


def _ends(after: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[int, int]:
    """The boxes before of inputs and outputs, which both models have alike."""
    found: dict[int, int] = {}
    for kind in ("input", "output"):
        one, other = ([node["id"] for node in nodes if node["kind"] == kind] for nodes in (after, before))
        if len(one) == len(other):
            found.update(zip(one, other, strict=True))
    return found
