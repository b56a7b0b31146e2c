"""Merging: parallel linear branches that read one tensor, and linear layers one after the other, become one layer.

What counts is what ran, in all calls that were recorded, and not how a class is called. First whole blocks are looked
at, from the outermost on (:mod:`bnfuse.restructuring.blocks`), then sums in code that stays
(:mod:`bnfuse.restructuring.branches`), then what is left one after the other (:mod:`bnfuse.restructuring.sequences`).
Norms in evaluation are linear too, so this comes before fusing, and what is merged takes up those inside of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from bnfuse.changes import Former, ModuleSpec, NewLayer, Placement, Row, Source, Step, Unchanged
from bnfuse.graph.graph import Node
from bnfuse.graph.norms import Norm
from bnfuse.planner.problem import Problem
from bnfuse.reasons import Reason
from bnfuse.restructuring import blocks, branches, sequences
from bnfuse.restructuring.kinds import MERGE
from bnfuse.restructuring.linear_maps import LinearMap, NotOneLayerError
from bnfuse.restructuring.ownership import Owners, StaysError
from bnfuse.restructuring.recipes import Held, Steps
from bnfuse.restructuring.regions import Region

_NOTHING = NewLayer("Nothing")
_IDENTITY = NewLayer("Identity")


def merged(problem: Problem) -> tuple[list[Step], list[Unchanged]]:
    """Steps that merge layers, and the blocks that would gain from it but for which there is none.

    Args:
        problem: the model with its norms.
    """
    search = _Search(problem)
    search.find_blocks()
    search.find_branches()
    search.find_sequences()
    return search.found, [Unchanged(MERGE, name, reason) for name, reason in search.stays.items()]


class _Search:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.model, self.graph = problem, problem.model, problem.graph
        self.steps = Steps()
        self.owners = Owners(self.model, self.graph)
        self.found: list[Step] = []
        self.stays: dict[str, Reason] = {}
        self._gone: set[Node] = set()
        self._keep = {node for norm in problem.kept for site in norm.sites for node in site.nodes}

    def find_blocks(self) -> None:
        """Whole blocks, from the outermost on."""
        waiting = _children(self.model)[::-1]
        seen: set[int] = set()
        while waiting:
            module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            inside = _children(module)
            try:
                block = blocks.block(module, self.owners, self.steps)
            except StaysError as error:
                self._stays(module, error.reason)
                block = None
            if block is not None and self._add(block.regions, block.nodes, [(module, block.parts)]):
                inside = [module.get_submodule(part) for part in block.parts if isinstance(part, str)]
            waiting += reversed(inside)

    def find_branches(self) -> None:
        """Sums in code that stays."""
        search = branches.Search(self.owners, self.steps)
        left = [node for node in self.graph.nodes if node not in self._gone]
        everything = [made for last in branches.sums(left) for made in search.of(last)]
        done: set[tuple[object, ...]] = set()
        for made in everything:
            if made.key in done or made.together.nodes & self._gone:
                continue
            done.add(made.key)
            holder, *others = [[call.module for call in term.calls] for term in made.terms]
            try:
                nodes = branches.check(made, everything, self.owners)
            except StaysError as error:
                self._stays(holder[0], error.reason)
            else:
                places: list[tuple[nn.Module, tuple[blocks.Part, ...]]] = [(holder[0], (made.together,))]
                places += [(other[0], (_NOTHING,)) for other in others]
                places += [(module, (_IDENTITY,)) for term in (holder, *others) for module in term[1:]]
                self._add([made.together], nodes, places)

    def find_sequences(self) -> None:
        """Layers one after the other."""
        everything = list(sequences.Search(self.owners, self.steps, self._gone).find())
        done: set[tuple[object, ...]] = set()
        for made in reversed(everything):
            if made.key in done or made.together.nodes & self._gone:
                continue
            done.add(made.key)
            first, *others = [call.module for call in made.calls]
            try:
                nodes = sequences.check(made, everything, self.owners)
            except StaysError as error:
                self._stays(first, error.reason)
            else:
                rest = [(other, (_IDENTITY,)) for other in others]
                self._add([made.together], nodes, [(first, (made.together,)), *rest], "in turn")

    def _stays(self, module: nn.Module, reason: Reason) -> None:
        """Note why a module stays, unless it is in a block of which that is said already."""
        name = self.owners.name(module)
        if not name.startswith(tuple(f"{other}." for other in self.stays)):
            self.stays.setdefault(name, reason)

    def _add(
        self,
        regions: Sequence[Region],
        nodes: set[Node],
        places: Iterable[tuple[nn.Module, tuple[blocks.Part, ...]]],
        how: str = "and their sum",
    ) -> bool:
        """Add a step; False if there is none after all.

        Args:
            nodes: all operators that it takes away, of all calls.
            places: the modules that are replaced, and what stands there then.
            how: what was done with the layers.
        """
        if nodes & self._keep:
            return False
        try:
            placements = tuple(
                Placement(tuple(self.owners.names[id(module)]), self._spec(parts)) for module, parts in places
            )
        except NotOneLayerError:
            return False
        self._gone |= nodes
        norms = tuple(norm.label for norm in self.problem.norms if _goes(norm, nodes, placements))
        layers = sum(
            node.operator != "batch_norm" and "weight" in node.bound for each in regions for node in each.nodes
        )
        kinds = ", ".join(dict.fromkeys(_kind(each.shape) for each in regions))
        there = f"{layers} layers {how}" if layers > 1 else "1 layer and what is added to it"
        what = f"{there}, as one {kinds}"
        self.found.append(
            Step(kind=MERGE, subject=placements[0].names[0], what=what, placements=placements, norms=norms)
        )
        return True

    def _spec(self, parts: Sequence[blocks.Part | NewLayer]) -> NewLayer | Row:
        """What stands in a place."""
        taken = {part.partition(".")[0] for part in parts if isinstance(part, str)}
        named: list[tuple[str, ModuleSpec]] = []
        for part in parts:
            if isinstance(part, str):  # under the name that it had
                first, *inner = part.split(".")
                spec: ModuleSpec = Former(part)
                for name in reversed(inner):
                    spec = Row(((name, spec),))
                named.append((first, spec))
            else:
                name = "merged" if isinstance(part, Region) else "activation"
                named.append((_free(name, taken), self._layer(part) if isinstance(part, Region) else part))
        if len(named) == 1 and isinstance(named[0][1], NewLayer):
            return named[0][1]
        return Row(tuple(named))

    def _layer(self, region: Region) -> NewLayer:
        """A region as one layer."""
        made = region.recipe.follow(self._contents).with_padding_of_a_layer()
        largest = max(region.recipe.held(), key=lambda each: len(each.shape))
        like = largest.names[0]
        sources = {"weight": Source(like, made.weight)}
        if made.bias is not None:
            sources["bias"] = Source(like, made.bias)
        return NewLayer(_kind(made), _settings(made), sources)

    def _contents(self, held: Held) -> Tensor:
        tensor = self.graph.leaves[held.names[0]].tensor
        assert tensor is not None
        return tensor


def _goes(norm: Norm, nodes: set[Node], placements: Sequence[Placement]) -> bool:
    """Whether a norm goes with what is replaced.

    Args:
        nodes: the operators that go.
        placements: what stands where then.
    """
    if norm.names:
        return any(all(_is_lost(name, placement) for name in norm.names) for placement in placements)
    return bool(norm.sites) and all(node in nodes for site in norm.sites for node in site.nodes)


def _is_lost(name: str, placement: Placement) -> bool:
    """Whether a module goes with what stood in a place."""
    for place in placement.names:
        if f"{name}.".startswith(f"{place}."):
            kept = [f"{place}.{path}." for path in _kept(placement.module)]
            return not f"{name}.".startswith(tuple(kept))
    return False


def _kept(spec: ModuleSpec) -> list[str]:
    """What of a module stays, by its names in that."""
    if isinstance(spec, Former):
        return [spec.path]
    return [path for _, part in spec.parts for path in _kept(part)] if isinstance(spec, Row) else []


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module._modules.values() if child is not None]


def _free(name: str, taken: set[str]) -> str:
    """A name that is not taken, which then is."""
    found = next(
        each for number in range(len(taken) + 1) if (each := f"{name}_{number}" if number else name) not in taken
    )
    taken.add(found)
    return found


def _kind(made: LinearMap) -> str:
    return f"Conv{len(made.taps)}d" if made.taps else "Linear"


def _settings(made: LinearMap) -> dict[str, object]:
    """The arguments of the constructor of a layer that does a map which pads both sides alike."""
    if not made.taps:
        return {"in_features": made.channels_in, "out_features": made.channels_out, "bias": made.bias is not None}
    return {
        "in_channels": made.channels_in,
        "out_channels": made.channels_out,
        "kernel_size": made.taps,
        "stride": made.stride,
        "padding": tuple(before for before, _ in made.padding),
        "dilation": made.step,
        "groups": made.groups,
        "bias": made.bias is not None,
    }
