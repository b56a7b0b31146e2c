"""The forms in which a graph is given: what is fused in its place, and what comes back."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree

from bnfuse.changes import Changes
from bnfuse.errors import InputError, VerificationError
from bnfuse.exported.lifting import Lifted, has_norms, lift
from bnfuse.exported.program import rewritten_program
from bnfuse.exported.quantised import refuse_quantised
from bnfuse.exported.rewriting import drop, getting, rewritten, settle
from bnfuse.model import tree
from bnfuse.model.calls import Call
from bnfuse.model.inputs import candidates
from bnfuse.model.sandbox import run
from bnfuse.transaction import rewrite
from bnfuse.verify.equivalence import same_outputs
from bnfuse.verify.reference import Reference

_HIDDEN = ("train", "eval")
"""Methods that a graph of ``torch.export`` hides behind ones that refuse."""


class GraphForm:
    """A graph that somebody has made of a model.

    Attributes:
        module: the graph laid out as modules, to be fused like any model.
    """

    def __init__(self, given: fx.GraphModule | ExportedProgram, inplace: bool = False) -> None:
        """
        Args:
            inplace: whether it is to be changed itself.

        Raises:
            InputError: the graph was made in training mode, or is prepared for quantisation, or is to be changed in
                place and is an ``ExportedProgram``.
        """
        self._given = given
        if isinstance(given, ExportedProgram):
            if inplace:
                raise InputError("An ExportedProgram is not changed in place: leave out inplace=True.")
            self._graph_module, kind = given.module(), "ExportedProgram"
        else:
            self._graph_module, kind = given, type(given).__name__
        if has_norms(self._graph_module):
            refuse_quantised(self._graph_module, kind)
        self._lifted = lift(self._graph_module, kind)

    @property
    def module(self) -> nn.Module:
        return self._lifted.module

    def inputs(self, example_inputs: Any) -> Any:
        """The inputs of the caller; else those that the graph was made with, or others that it takes; else None."""
        if example_inputs is not None:
            return example_inputs
        if isinstance(self._given, ExportedProgram) and self._given.example_inputs is not None:
            args, kwargs = self._given.example_inputs
            return Call(*args, **kwargs)
        noted = _noted(self._graph_module)
        if noted is not None:
            return noted
        for candidate in candidates(self.module):
            try:
                run(self.module, candidate.args, candidate.kwargs)
            except Exception:  # noqa: BLE001 (whatever the model raises on what it does not take)
                continue
            return Call(*candidate.args, **candidate.kwargs)
        return None

    def put_back(
        self, fused: nn.Module, changes: Changes | None = None, inputs: Any = None
    ) -> fx.GraphModule | ExportedProgram:
        """The fused model in the form that was given.

        Args:
            fused: `module` after fusing, or a copy of it.
            changes: what was done to it, and the inputs on which what comes back is compared with what was given; None
                for no comparison.

        Raises:
            VerificationError: the outputs differ.
        """
        given = self._given
        result: fx.GraphModule | ExportedProgram
        if isinstance(given, ExportedProgram):
            result = rewritten_program(given, settle(self._lifted, fused), fused)
            runnable = result.module() if changes is not None else fused
        else:
            result = runnable = _lowered(self._graph_module.graph, self._lifted, fused)
            _show(result, given)
        if changes is not None and inputs is not None:
            self._compare(runnable, changes, Call.of(inputs))
        return result

    def change(self, changes: Changes) -> None:
        """Make changes that were verified on a copy in the given graph module itself."""
        given = self._graph_module
        lifted = lift(given, type(given).__name__)
        rewrite(changes, lifted.module)
        result = _lowered(given.graph, lifted, lifted.module)
        for registry in ("_modules", "_parameters", "_buffers"):
            setattr(given, registry, getattr(result, registry))
        given.graph = result.graph
        for module in tree.modules(given):
            module.training = False

    def _compare(self, result: nn.Module, changes: Changes, call: Call) -> None:
        def in_float64(model: nn.Module) -> nn.Module:
            assert isinstance(model, fx.GraphModule)
            lifted = lift(model, type(model).__name__)
            rewrite(changes, lifted.module)
            return _lowered(model.graph, lifted, lifted.module)

        verdict = same_outputs(Reference(self._graph_module, *call.inputs), result, in_float64)
        if not verdict.equal:
            raise VerificationError(verdict.message) from verdict.error


def graph_form(model: object, inplace: bool = False) -> GraphForm | None:
    """A program, or a graph module with norms that are no modules, in a form to be fused; None for anything else.

    Raises:
        InputError: as for :class:`GraphForm`.
    """
    if isinstance(model, ExportedProgram) or (isinstance(model, fx.GraphModule) and has_norms(model)):
        return GraphForm(model, inplace)
    return None


def _lowered(graph: fx.Graph, lifted: Lifted, fused: nn.Module) -> fx.GraphModule:
    """A fused module with the given graph, as far as that has not changed."""
    assert isinstance(fused, fx.GraphModule)
    difference = settle(lifted, fused)
    fused.graph, _ = rewritten(graph, difference, getting)
    drop(fused, difference.unread)
    fused.recompile()
    return fused


def _show(result: fx.GraphModule, given: fx.GraphModule) -> None:
    """Let what comes back look as what was given."""
    type(result).__name__ = type(given).__name__
    for name in _HIDDEN:
        method = vars(given).get(name)
        if isinstance(method, types.MethodType):
            vars(result)[name] = types.MethodType(method.__func__, result)


def _noted(model: fx.GraphModule) -> Call | None:
    """Inputs of the sizes that the graph has noted, None if it has not."""
    nodes = [node for node in model.graph.nodes if node.op == "placeholder"]
    if not nodes or not all("val" in node.meta for node in nodes):
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        values = [_like(node.meta["val"], generator) for node in nodes]
    except Exception:  # noqa: BLE001 (whatever PyTorch raises for a size that is never known)
        return None
    codegen = model.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return Call(*values)
    args, kwargs = _pytree.tree_unflatten(values, codegen.pytree_info.in_spec)
    return Call(*args, **kwargs)


def _like(noted: Any, generator: torch.Generator) -> Any:
    """A random tensor of the size, type and device that was noted; anything else as it is."""
    if not isinstance(noted, Tensor):
        return _number(noted)
    sizes: Sequence[int] = [_number(size) for size in noted.shape]
    if noted.is_floating_point():
        return torch.randn(sizes, generator=generator, device="cpu").to(noted.device, noted.dtype)
    return torch.randint(2, sizes, generator=generator, device="cpu").to(noted.device, noted.dtype)


def _number(value: Any) -> Any:
    """A number that stands for any, as the one that the graph was made with."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value
