"""What bnfuse does: capture, solve, rewrite, verify."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from bnfuse.checkpoint.original import keep_original
from bnfuse.errors import InputError, NothingFusedWarning, VerificationError
from bnfuse.exported.forms import graph_form
from bnfuse.fusion_plan import Plan
from bnfuse.model import tree
from bnfuse.model.alone import one_at_a_time
from bnfuse.model.calls import Call, checked_calls
from bnfuse.model.copying import copy_model
from bnfuse.model.wrappers import checked, unwrap
from bnfuse.planner.budget import within_budget
from bnfuse.planner.misfits import without_misfits
from bnfuse.planner.nothing_fused import nothing_fused
from bnfuse.planner.options import Options, checked_options, patterns
from bnfuse.planner.planner import Planner, report
from bnfuse.planner.problem import Problem
from bnfuse.restructuring.kinds import checked_kinds
from bnfuse.restructuring.planning import Restructuring
from bnfuse.transaction import InPlace, fused_copy, rewrite
from bnfuse.verify.equivalence import same_outputs
from bnfuse.verify.reference import Reference

log = logging.getLogger("bnfuse")

AnyModel = TypeVar("AnyModel", bound=nn.Module | ExportedProgram)

Observer = Callable[[Planner, Plan, nn.Module, nn.Module | None], None]
"""``observer(planner, plan, original, fused)``: looks at what was done while the recorded calls are still there."""


def fuse(
    model: AnyModel,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    keep: str | Sequence[str] = (),
    calls: Sequence[Call] = (),
    verify: bool = True,
    restructure: bool | str | Sequence[str] = (),
    options: Options | None = None,
) -> AnyModel:
    """Remove every batch norm whose work other parameters can take up, without changing the outputs.

    Args:
        model: any module, or a ``torch.export.ExportedProgram``. What counts is its behaviour in evaluation mode,
            whatever its training flag.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, of any batch size.
            Inferred from the model if None; a program knows those that it was exported with.
        inplace: change ``model`` itself instead of a copy; its parameters keep their identity.
        keep: module names or glob patterns (``"backbone.*"``) of norms to leave alone.
        calls: further calls that the fused model is to take: with other arguments, or of other methods
            (``[Call(x, mask=m), Call(x, method="forward_features")]``). Many are inferred; ``print(plan)`` says what
            was not seen.
        verify: compare the outputs before and after on the inputs, and raise if they differ, or if the copy runs on
            parameters of the original.
        restructure: what may change in the structure of the model, so that more norms can go: ``"untie"`` gives each
            use of a shared layer weights of its own, ``"bake"`` makes a weight that is computed from parameters its
            result, ``"merge"`` makes one layer of parallel ones, ``"clip"`` makes a norm beside an activation the
            bounds of a clip; several of them, or True for all. Not for graphs.
        options: what few need: further modules to fold, the only layers that may change, handlers for layers of your
            own, a budget of precision; see :class:`bnfuse.Options`.

    Returns:
        A module of the same class with the same submodule names, in evaluation mode. Every removed norm is
        ``nn.Identity``, or its activation if it has one built in. A program becomes a new program; from a graph, norms
        that are function calls are taken out.

    Raises:
        InputError: no inputs could be inferred, or the model does not run on them, or ``keep`` or
            ``options.also`` matches nothing, or ``restructure`` names something else, or no copy can be made that runs
            on parameters of its own; or the model is scripted, sharded, offloaded, without contents, a graph that was
            made in training mode, or one that is prepared for quantisation.
        FusionError: a handler failed.
        VerificationError: the outputs differ; the model is as it was.

    Warns:
        NothingFusedWarning: no norm goes, or there is none; the text says why, and what to do.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> fuse(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    fused, made = fuse_with_plan(
        model, example_inputs, inplace=inplace, keep=keep, calls=calls, verify=verify, restructure=restructure,
        options=options,
    )  # fmt: skip
    warning = nothing_fused(made, unwrap(model)[0] if isinstance(model, nn.Module) else model)
    if warning:
        warnings.warn(warning, NothingFusedWarning, stacklevel=2)
    return fused


@one_at_a_time
def fuse_with_plan(
    model: AnyModel,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    keep: str | Sequence[str] = (),
    calls: Sequence[Call] = (),
    verify: bool = True,
    restructure: bool | str | Sequence[str] = (),
    options: Options | None = None,
    observer: Observer | None = None,
) -> tuple[AnyModel, Plan]:
    """What :func:`fuse` does, with the plan that was carried out, which has no witness.

    Args:
        observer: is called when the plan is carried out; not for ``inplace``, where no original is left.
    """
    form = graph_form(model, inplace)
    if form is None:
        kinds = checked_kinds(restructure)
        return _fused(model, example_inputs, inplace, keep, calls, verify, options, kinds, observer)
    _refuse_graph(restructure)
    if checked_options(options).reversible:
        raise InputError("A graph keeps nothing of what it was (reversible=): keep the graph that is given.")
    example_inputs = form.inputs(example_inputs)
    fused, made = _fused(form.module, example_inputs, False, keep, calls, verify, options, (), observer)
    result: Any = form.put_back(fused, made if verify and made.fused else None, example_inputs)
    if inplace:
        form.change(made)
    return model if inplace else result, made


def _fused(
    model: Any,
    example_inputs: Any,
    inplace: bool,
    keep: str | Sequence[str],
    calls: Sequence[Call],
    verify: bool,
    options: Options | None,
    kinds: tuple[str, ...],
    observer: Observer | None,
) -> tuple[Any, Plan]:
    """The same for a model whose norms are modules, as far as it has any."""
    options, keep = checked_options(options), patterns("keep", keep)
    inner, wrap = unwrap(checked(model))
    if inner.training:
        log.info("%s is in training mode; its evaluation behaviour is fused", type(inner).__name__)
    flags = [(module, module.training) for module in tree.modules(inner)]
    try:
        source = inner.eval() if inplace else _in_evaluation(inner)
        with _uncollected(), contextlib.nullcontext() if inplace else tree.unchanging(source):
            contents = verify or options.budget is not None
            problem = Problem.of(source, example_inputs, options, keep, contents, checked_calls(calls, source))
            original = copy_model(source) if options.reversible and inplace else source
            if kinds:
                planner, made, target = _restructured(problem, kinds, options, verify, inplace)
            else:
                planner = Planner(problem)
                made, target = carry_out(_made(planner, options), source, planner, verify, inplace)
            if observer is not None and not inplace:
                observer(planner, made, source, target)
            planner.release()
            del planner, problem
        if options.reversible:
            keep_original(target, original)
        report(made)
    except BaseException:
        for module, flag in flags:
            module.training = flag
        raise
    if any(module.training for module in tree.modules(target)):
        target.eval()
    return (model if inplace else wrap(target)), made


def _made(planner: Planner, options: Options) -> Plan:
    return planner.plan() if options.budget is None else within_budget(planner, options.budget)


def _restructured(
    problem: Problem, kinds: tuple[str, ...], options: Options, verify: bool, inplace: bool
) -> tuple[Planner, Plan, nn.Module]:
    """Carry a plan with steps out; steps with which the outputs differ are dropped, and it is planned again."""
    restructuring = Restructuring(problem, kinds)
    while True:
        planner, made = restructuring.plan(lambda planner: _made(planner, options))
        try:
            made, target = carry_out(made, problem.model, planner, verify, inplace)
        except VerificationError:
            if not restructuring.drop_failing():
                raise
        else:
            return planner, restructuring.complete(made), target


def carry_out(
    made: Plan, source: nn.Module, planner: Planner, verify: bool = True, inplace: bool = False
) -> tuple[Plan, nn.Module]:
    """Carry a plan out on a copy of ``source``, or on ``source`` itself, and verify the result.

    Returns:
        The plan that was carried out, without the norms that the code around them looks at as objects; and the model.

    Raises:
        VerificationError: the outputs differ; ``source`` is as it was.
    """
    if verify and inplace:
        planner.trials.references  # noqa: B018 (what the original gives, while it is there)
    while True:
        if not verify or not (made.fused or made.steps):
            if inplace:
                rewrite(made, source, undoable=False)
            return made, source if inplace else fused_copy(made, source)
        change = InPlace(made, source) if inplace else None
        target = source if inplace else fused_copy(made, source)
        try:
            _verify(made, source, target, planner.original, change)
            failure = planner.trials.failure(made, target, change)
        except VerificationError:
            if change is not None:
                change.undo()
            better = without_misfits(planner, made)
            if better is None:
                raise
        except BaseException:
            if change is not None:
                change.undo()
            raise
        else:
            if failure is None:
                return made, target
            if change is not None:
                change.undo()
            log.info("fails on %s: %s", failure[0].what, failure[1].message)
            better = planner.without_failing(made)
            if better is None:
                raise VerificationError(f"On {failure[0].what}: {failure[1].message}") from failure[1].error
        made = better


def plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    keep: str | Sequence[str] = (),
    calls: Sequence[Call] = (),
    restructure: bool | str | Sequence[str] = (),
    options: Options | None = None,
) -> Plan:
    """Decide what :func:`fuse` would do, and change nothing.

    Args:
        model, example_inputs, keep, calls, restructure, options: as for :func:`fuse`.

    Returns:
        The plan. ``print(plan)`` shows what goes and why the rest stays; ``plan.apply(model)`` carries it out.

    Raises:
        InputError, FusionError: as for :func:`fuse`.
    """
    return plan_observed(model, example_inputs, keep=keep, calls=calls, restructure=restructure, options=options)


@one_at_a_time
def plan_observed(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    keep: str | Sequence[str] = (),
    calls: Sequence[Call] = (),
    restructure: bool | str | Sequence[str] = (),
    options: Options | None = None,
    observer: Observer | None = None,
) -> Plan:
    """What :func:`plan` does, with somebody who looks on."""
    form = graph_form(model)
    if form is not None:
        _refuse_graph(restructure)
        model, example_inputs = form.module, form.inputs(example_inputs)
    kinds = checked_kinds(restructure)
    options, keep = checked_options(options), patterns("keep", keep)
    inner, _ = unwrap(checked(model))
    source = _in_evaluation(inner)
    with _uncollected(), tree.unchanging(source):
        contents = options.budget is not None
        named = checked_calls(calls, source)
        problem = Problem.of(source, example_inputs, options, keep, contents, named, lines=options.infer_calls)
        witness = problem.witness()
        planner = Planner(problem)
        if kinds:
            restructuring = Restructuring(problem, kinds)
            planner, made = restructuring.plan(lambda planner: _made(planner, options))
            made = restructuring.complete(made)
        else:
            made = _made(planner, options)
        if observer is not None:
            observer(planner, made, source, None)
        made = replace(made, witness=witness)
        planner.release()
    report(made)
    return made


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """The garbage collector off: it would look again and again through a graph of objects that are all in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _in_evaluation(model: nn.Module) -> nn.Module:
    """The model, or a copy in evaluation mode where its own ``train()`` may do more than set flags."""
    if model.training and any(type(module).train is not nn.Module.train for module in tree.modules(model)):
        return copy_model(model).eval()
    return model


def _verify(plan: Plan, original: nn.Module, fused: nn.Module, problem: Problem, change: InPlace | None) -> None:
    """Raise VerificationError unless the fused model does on the first call what the original did.

    Args:
        change: where ``fused`` is the original, changed in place.
    """

    def fuse_in_float64(model64: nn.Module) -> nn.Module:
        rewrite(plan, model64)
        return model64

    main = problem.main
    verdict = same_outputs(
        Reference(original, *main.call.inputs, output=main.output, gradients=main.gradients),
        fused,
        fuse_in_float64,
        traces=main.traces or change is not None,
        writes=problem.stateful,
        separate=None if change is None else change.separate,
        copied=change is None,
    )
    if not verdict.equal:
        raise VerificationError(verdict.message + _suspects(plan, original)) from verdict.error
    if not verdict.comparison.within_tolerance():
        log.info("%s", verdict.message)
    if change is not None:
        change.redo()


def _refuse_graph(restructure: Any) -> None:
    if checked_kinds(restructure):
        raise InputError(
            "restructure= changes the modules of a model, and a graph has none: fuse the model that it was made of."
        )


def _suspects(plan: Plan, model: nn.Module) -> str:
    """What an error adds where the plan used the caller's handlers: they are looked at first."""
    layers = [edit.names[0] for edit in plan.edits if edit.handler is not None]
    if not layers:
        return ""
    used = ", ".join(f"{type(model.get_submodule(name)).__name__} at {name!r}" for name in layers)
    return (
        f"\nThe plan used your handlers for {used}. Check first that each makes its layer give scale*y + shift "
        f"instead of y."
    )
