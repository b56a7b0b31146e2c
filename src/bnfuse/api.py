"""What bnfuse does: capture, solve, rewrite, verify."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from bnfuse.absent import add_absent
from bnfuse.capture import Capture, capture
from bnfuse.errors import FusionError, InputError, NoNormError, VerificationError
from bnfuse.inputs import candidates, normalise
from bnfuse.judge import judge
from bnfuse.norms import Norm, find_norms
from bnfuse.plan import Plan, Reason, total
from bnfuse.rehearse import needed_in_place, varying
from bnfuse.rewrite import rewrite
from bnfuse.solve import solve
from bnfuse.verify import compare_outputs, run
from bnfuse.wrappers import copy_model, unwrap

log = logging.getLogger("bnfuse")


def fuse(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    keep: str | Sequence[str] = (),
    verify: bool = True,
) -> nn.Module:
    """Remove every batch norm whose work other parameters can take up, without changing the outputs.

    Args:
        model: any module. What counts is its behaviour in evaluation mode, whatever its training flag.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, of any batch size.
            Inferred from the model if None.
        inplace: change ``model`` itself instead of a copy; its parameters keep their identity.
        keep: module names or glob patterns (``"backbone.*"``) of norms to leave alone.
        verify: compare the outputs before and after on the inputs, and raise if they differ.

    Returns:
        A module of the same class with the same submodule names, in evaluation mode. Every removed norm is
        ``nn.Identity``, or its activation if it has one built in.

    Raises:
        InputError: no inputs could be inferred, or the model does not run on them, or ``keep`` matches no norm.
        NoNormError: the model holds no batch norm.
        VerificationError: the outputs differ; the model is as it was.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> fuse(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    inner, wrap = _unwrapped(model)
    target = inner if inplace else copy_model(inner)
    flags = [(module, module.training) for module in target.modules()]
    try:
        if target.training:
            log.info("%s is in training mode; its evaluation behaviour is fused", type(inner).__name__)
            target.eval()
        made, before, args, kwargs = _make_plan(target, example_inputs, keep)
        undo = rewrite(made, target)
        if verify and made.fused:
            try:
                _verify(made, inner, target, before, args, kwargs, undo if inplace else None)
            except BaseException:
                undo()
                raise
    except BaseException:
        for module, flag in flags:
            module.training = flag
        raise
    target.eval()
    return model if inplace else wrap(target)


def plan(model: nn.Module, example_inputs: Any = None, *, keep: str | Sequence[str] = ()) -> Plan:
    """Decide what :func:`fuse` would do, and change nothing.

    Args:
        model, example_inputs, keep: as for :func:`fuse`.

    Returns:
        The plan. ``print(plan)`` shows one line for each norm; ``plan.apply(model)`` carries it out.

    Raises:
        InputError: no inputs could be inferred, or the model does not run on them, or ``keep`` matches no norm.
        NoNormError: the model holds no batch norm.
    """
    inner, _ = _unwrapped(model)
    if inner.training and any(type(module).train is not nn.Module.train for module in inner.modules()):
        inner = copy_model(inner).eval()  # its own train() may do more than set flags
    return _make_plan(inner, example_inputs, keep, witness=True)[0]


def apply_plan(plan: Plan, model: nn.Module, inplace: bool = False) -> nn.Module:
    """See :meth:`bnfuse.plan.Plan.apply`."""
    inner, wrap = _unwrapped(model)
    if type(inner).__name__ != plan.model:
        raise FusionError(
            f"The plan was made for another model:\n  got:      {type(inner).__name__}\n  expected: {plan.model}"
        )
    for name, expected in plan.witness.items():
        path, _, place = name.rpartition(".")
        try:
            tensor = getattr(inner.get_submodule(path), place)
        except AttributeError:
            raise FusionError(f"The plan does not fit the model: it holds no {name}. Make a new plan.") from None
        if tensor is None or total(tensor) != expected:
            raise FusionError(f"{name} has changed since the plan was made. Make a new plan for the model as it is.")
    target = inner if inplace else copy_model(inner)
    rewrite(plan, target)
    target.eval()
    return model if inplace else wrap(target)


def _unwrapped(model: object) -> tuple[nn.Module, Any]:
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, dict):
            hint = " A state dict holds weights only: build the model, load_state_dict into it, and pass the model."
        raise InputError(f"The model must be a torch.nn.Module; got {type(model).__name__}.{hint}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{name} is not initialised yet: run the model once on real inputs, then fuse it.")
    return unwrap(model)


def _make_plan(
    model: nn.Module, example_inputs: Any, keep: str | Sequence[str], witness: bool = False
) -> tuple[Plan, Any, tuple[Any, ...], dict[str, Any]]:
    captured, args, kwargs = _captured(model, example_inputs)
    graph = captured.graph
    norms = find_norms(model, graph)
    if not norms:
        raise NoNormError(f"{type(model).__name__} holds no batch norm, so there is nothing to fuse.")
    add_absent(model, graph)
    made = _solved(model, captured, norms, _kept(norms, keep), args, kwargs)
    if witness:
        read = {
            name
            for norm in norms
            for site in norm.sites
            for node in site.nodes
            for value in node.inputs
            for name in value.names[:1]
        }
        read |= {edit.names[0] for edit in made.edits if not edit.created}
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        made.witness.update((name, total(tensors[name])) for name in sorted(read))
    for decision in made.decisions:
        if decision.fused:
            log.info("%s: fused %s into %s", decision.norm, decision.direction, ", ".join(decision.into))
        else:
            log.info("%s: kept, %s", decision.norm, "; ".join(map(str, decision.reasons)))
    return made, captured.output, args, kwargs


def _solved(
    model: nn.Module,
    captured: Capture,
    norms: list[Norm],
    kept: dict[Norm, Reason],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan:
    """Solve, look at what the plan takes for granted, and solve again without what does not hold."""
    name, graph = type(model).__name__, captured.graph
    made, assumed = solve(name, graph, norms, kept)
    different = varying(model, graph, assumed.numbers, args, kwargs) if assumed.numbers else set()
    forbidden = needed_in_place(model, graph, assumed.out_of_place, args, kwargs)
    if different or forbidden:
        made, assumed = solve(name, graph, norms, kept, different, forbidden)
    names = {id(module): name for name, module in model.named_modules()}
    return replace(made, out_of_place=tuple(names[id(module)] for module in assumed.out_of_place))


def _captured(model: nn.Module, example_inputs: Any) -> tuple[Capture, tuple[Any, ...], dict[str, Any]]:
    if example_inputs is not None:
        args, kwargs = normalise(example_inputs)
        return capture(model, args, kwargs), args, kwargs
    tried = []
    for candidate in candidates(model):
        try:
            return capture(model, candidate.args, candidate.kwargs), candidate.args, candidate.kwargs
        except InputError as error:
            cause = error.__cause__
            what = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
            tried.append(f"  {candidate.description}: {what}")
    name = type(model).__name__
    listing = "\n".join(["Tried:", *tried]) if tried else "Nothing in the model tells what it takes."
    raise InputError(
        f"No inputs for {name} could be inferred. {listing}\n"
        f"Pass inputs that it accepts: bnfuse.fuse(model, torch.randn(1, 3, 224, 224)), "
        f"a tuple for several arguments, a dict for keyword arguments."
    )


def _kept(norms: list[Norm], keep: str | Sequence[str]) -> dict[Norm, Reason]:
    patterns = [keep] if isinstance(keep, str) else list(keep)
    kept: dict[Norm, Reason] = {}
    names = [name for norm in norms for name in norm.names]
    for pattern in patterns:
        matching = [norm for norm in norms if any(fnmatch.fnmatchcase(name, pattern) for name in norm.names)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" They are named like {names[0]!r}." if names else ""
            raise InputError(f"keep={pattern!r} matches no batch norm of the model.{hint}")
        kept.update(dict.fromkeys(matching, Reason(f"the caller asked to keep {pattern!r}")))
    return kept


def _verify(
    plan: Plan,
    original: nn.Module,
    fused: nn.Module,
    before: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    undo: Any,
) -> None:
    """Raise VerificationError unless the fused model does what the original did; ``undo`` is given when in place."""
    try:
        after = run(fused, args, kwargs)
    except Exception as error:
        raise VerificationError(
            f"The fused {plan.model} does not run: {type(error).__name__}: {error}. Please report this model."
        ) from error
    comparison = compare_outputs(before, after)
    if comparison.within_tolerance():
        return
    if undo is not None:  # the original lives on in place of the fused model only while it is judged
        changed = copy_model(fused)
        undo()
        original, fused, in_place = fused, changed, fused
    else:
        in_place = None

    def fuse_in_float64(model64: nn.Module) -> nn.Module:
        rewrite(plan, model64)
        return model64

    verdict = judge(comparison, original, fused, fuse_in_float64, args, kwargs)
    if not verdict.equal:
        raise VerificationError(verdict.message)
    log.info("%s", verdict.message)
    if in_place is not None:
        rewrite(plan, in_place)
