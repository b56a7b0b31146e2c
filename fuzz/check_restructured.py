"""The property for networks whose structure may change: nothing that they give does, whatever was put in place of what."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import bnfuse
from bnfuse.api import fuse_with_plan
from fuzz.check import Failed, Snapshot, _reported, reason_text
from fuzz.check_calls import CallsOutcome, Run, _compare, _evaluated, _names, _norms, _reset, _ruin, go_back
from fuzz.restructured import RestructuredProgram

IN_PLACE_EVERY, APPLIED_EVERY, TRAINED_EVERY = 5, 2, 7
"""One network in so many is also fused in place, by ``Plan.apply``, or trained afterwards."""


_LOOKS = re.compile(r"\bm\.[a-z]+\d+\.|get_submodule|isinstance|hasattr|type\(|\(m\.[a-z]+\d+\)")
"""Code that does more with a module than call it."""

_TIES = re.compile(r"m\.[\w.]+\.(weight|bias|c) = m\.[\w.]+\.\1\n|m\.\w+ = m\.\w+\n")
"""Lines that give a tensor or a module a second place."""


@dataclass
class RestructuredOutcome(CallsOutcome):
    """What came of one network.

    Attributes:
        plainly: how many norms go without restructuring.
        steps: how many steps of each kind the plan has.
        unchanged: what was asked for and stays, by kind and reason.
        corrected: whether verification took something out of the plan.
        refused: whether verification fails with and without restructuring, so that nothing is handed out.
    """

    plainly: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    corrected: bool = False
    refused: bool = False


class Refused(Exception):
    """Verification fails without restructuring, too, and nothing is handed out: code looks at what fusing changes."""


def looks_at_modules(program: RestructuredProgram) -> bool:
    """Whether the network's code may do more with modules than call them."""
    return _LOOKS.search(_TIES.sub("", program.source)) is not None


def check(program: RestructuredProgram) -> RestructuredOutcome:
    """Fuse and restructure the network on its recorded call, and compare."""
    outcome = RestructuredOutcome(program.kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(program, outcome)
        except Refused:
            outcome.refused = True
        except Failed as failed:
            outcome.failure, outcome.detail = failed.failure, failed.detail
    return outcome


def _check(program: RestructuredProgram, outcome: RestructuredOutcome) -> None:
    model = program.build()
    model.train(program.training)
    outcome.norms = _norms(model)
    arguments, options = _asked(program, model)
    before = Snapshot(model)
    fused, made = _fused(program, model, arguments, options, outcome)
    before.compare("fuse")
    with _reported("the plan's text"):
        json.dumps(made.to_dict()), str(made), made.table()
    outcome.steps.update(step.kind for step in made.steps)
    outcome.unchanged.update(f"{one.kind}: {reason_text(one.reason)}" for one in made.unchanged)
    outcome.removed = outcome.norms - _norms(fused)
    failed = [one for one in made.unchanged if one.reason.code == "layer-is-looked-at"]
    if failed and not looks_at_modules(program):
        raise Failed(f"wrong: a step of kind {failed[0].kind} fails, though no code looks at a module", str(failed[0]))
    if any(module.training for module in fused.modules()):
        raise Failed("decision: the fused model is in training mode")
    if program.seed % APPLIED_EVERY == 0:
        _check_applied(model, arguments, options, fused, made, outcome)
    before.compare("plan.apply")
    _check_plain(program, model, made, outcome)
    _check_work(program, fused)
    usual = Run(program, program.build()).call(program.recorded)
    _check_copies(program, fused)
    if program.seed % IN_PLACE_EVERY == 0:
        _check_in_place(program, fused)
    if program.seed % TRAINED_EVERY == 0:
        _check_gradients(program, model, fused)
    _ruin(model)
    for sequence in ((program.recorded,), *program.further):
        _compare(program, sequence, _copied(program, fused), outcome, usual)


def _copied(program: RestructuredProgram, fused: nn.Module) -> nn.Module:
    """A deep copy; the network itself where PyTorch copies the original neither, as with old-style weight norm."""
    try:
        return copy.deepcopy(fused)
    except RuntimeError as error:
        try:
            copy.deepcopy(program.build())
        except RuntimeError:
            return fused
        raise Failed("crash: the fused network cannot be copied", str(error)) from error


def _asked(program: RestructuredProgram, model: nn.Module, restructured: bool = True) -> tuple[Any, dict[str, Any]]:
    """The inputs and the further arguments that bnfuse is given."""
    _reset(program, model)

    def collected(net: nn.Module, arguments: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        return arguments, options

    names = _names(model) | {"bnfuse": bnfuse, "collected": collected}
    asked: tuple[Any, dict[str, Any]] = eval(f"collected({program.arguments_of_fuse(restructured)})", names)
    return asked


# What the fused network has to be -----------------------------------------------------------------------------------


def _same_contents(what: str, one: nn.Module, other: nn.Module) -> None:
    """Two networks have the same modules and hold the same, to the bit."""
    for place, module in one.named_modules(remove_duplicate=False):
        found = dict(other.named_modules(remove_duplicate=False)).get(place)
        if found is None or type(found).__name__ != type(module).__name__:
            raise Failed(f"wrong: {what} gives other modules", f"{place}: {type(module)} and {type(found)}")
    first, second = one.state_dict(), other.state_dict()
    if first.keys() != second.keys():
        raise Failed(f"wrong: {what} gives other tensors", str(first.keys() ^ second.keys()))
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            raise Failed(f"wrong: {what} gives other contents", name)


def _fused(
    program: RestructuredProgram,
    model: nn.Module,
    arguments: Any,
    options: dict[str, Any],
    outcome: RestructuredOutcome,
) -> tuple[nn.Module, bnfuse.Plan]:
    try:
        return fuse_with_plan(model, arguments, **options)
    except bnfuse.VerificationError as error:
        plain, plainly = _asked(program, model, restructured=False)
        try:
            fuse_with_plan(model, plain, **plainly)
        except bnfuse.VerificationError as again:
            raise Refused from again
        raise Failed("wrong: fuse raises VerificationError, and does not without restructuring", str(error)) from error
    except Exception as error:
        with _reported("fuse"):
            raise error
        raise


def _check_applied(
    model: nn.Module,
    arguments: Any,
    options: dict[str, Any],
    fused: nn.Module,
    made: bnfuse.Plan,
    outcome: RestructuredOutcome,
) -> None:
    """A plan that is carried out gives the same, unless verification took something out of it."""
    with _reported("plan"):
        plan = bnfuse.plan(model, arguments, **options)
    outcome.corrected = [*map(str, plan.steps)] != [*map(str, made.steps)] or plan.fused != made.fused
    with _reported("plan.apply"):
        applied = plan.apply(model)
    if not outcome.corrected:
        _same_contents("plan.apply", fused, applied)


def _check_plain(
    program: RestructuredProgram, model: nn.Module, made: bnfuse.Plan, outcome: RestructuredOutcome
) -> None:
    """No norm stays that goes without restructuring, unless verification took it out for code that looks at modules."""
    arguments, options = _asked(program, model, restructured=False)
    with _reported("plan without restructuring"):
        plain = bnfuse.plan(model, arguments, **options)
    outcome.plainly = len({id(_at(model, one.norm)) for one in plain.fused if _at(model, one.norm) is not None})
    if outcome.plainly > outcome.removed:
        with _reported("fuse without restructuring"):
            fused, plain = fuse_with_plan(model, arguments, **options)
        outcome.plainly = outcome.norms - _norms(fused)
    if outcome.plainly > outcome.removed and not _was_corrected(program, model, made):
        gone = {one.norm for one in plain.fused}
        reasons = [reason_text(one.reasons[0]) for one in made.kept if one.norm in gone]
        why = f" ({reasons[0]})" if reasons else ""
        told = f"{outcome.plainly} go without, {outcome.removed} with"
        raise Failed(f"wrong: more norms stay with restructuring{why}", f"{told}\n{made.table()}")


def _was_corrected(program: RestructuredProgram, model: nn.Module, made: bnfuse.Plan) -> bool:
    arguments, options = _asked(program, model)
    with _reported("plan"):
        plan = bnfuse.plan(model, arguments, **options)
    return len(plan.fused) > len(made.fused)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(name)


def _check_work(program: RestructuredProgram, fused: nn.Module) -> None:
    """No multiply-add more than before."""
    before, after = (_work(program, net) for net in (program.build(), _copied(program, fused)))
    if after > before:
        raise Failed("wrong: the multiply-adds rise", f"from {before} to {after}")


def _work(program: RestructuredProgram, net: nn.Module) -> int:
    _reset(program, net)
    arguments, options = _evaluated(program.recorded, _names(net))
    with _Work() as work, torch.no_grad():
        net(*arguments, **options)
    return work.done


class _Work(TorchDispatchMode):
    """Counts floating point operations, as PyTorch's FlopCounterMode does, which fails on some parametrisations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.done += int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result))
        return result


def _check_copies(program: RestructuredProgram, fused: nn.Module) -> None:
    """A deep copy, and what is saved and loaded into a network that is built anew, give the same to the bit."""
    wanted = _given(program, fused)
    _compare_bits("a deep copy", _given(program, _copied(program, fused)), wanted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fused.safetensors"
        with _reported("save"):
            bnfuse.save(fused, path)
        with _reported("load"):
            loaded = bnfuse.load(program.build(), path)
    _same_contents("load", fused, loaded)
    _compare_bits("what was loaded", _given(program, loaded), wanted)


def _given(program: RestructuredProgram, net: nn.Module) -> dict[str, Any]:
    with _reported("a call"):
        return Run(program, net).call(program.recorded)


def _compare_bits(what: str, got: dict[str, Any], wanted: dict[str, Any]) -> None:
    if got.keys() != wanted.keys():
        raise Failed(f"wrong: {what} has other outputs")
    for path, leaf in wanted.items():
        same = torch.equal(got[path], leaf) if isinstance(leaf, torch.Tensor) else got[path] == leaf
        if not same:
            raise Failed(f"wrong: {what} gives something else", path)


def _check_gradients(program: RestructuredProgram, model: nn.Module, fused: nn.Module) -> None:
    """The original and the fused network can be trained, if the original could before and if it can be fused plainly."""
    plain = program.build()
    arguments, options = _asked(program, plain, restructured=False)
    with contextlib.suppress(bnfuse.VerificationError):  # what rounding alone moves may fail plainly, and not here
        plain, _ = fuse_with_plan(plain, arguments, **options)
    if _goes_back(program, program.build().train()) is None:
        nets = [("original", model.train())]
        nets += [("fused network", _copied(program, fused))] if _goes_back(program, plain) is None else []
        for what, net in nets:
            error = _goes_back(program, net)
            if error is not None:
                raise Failed(f"wrong: the {what} has no gradients, {type(error).__name__}", str(error)) from error


def _goes_back(program: RestructuredProgram, net: nn.Module) -> Exception | None:
    """What backward raises, None if it does not."""
    _reset(program, net)
    arguments, options = _evaluated(program.recorded, _names(net))
    try:
        go_back(net(*arguments, **options))
    except Exception as error:  # noqa: BLE001 (whatever the network raises in training)
        return error
    return None


def _check_in_place(program: RestructuredProgram, fused: nn.Module) -> None:
    model = program.build()
    arguments, options = _asked(program, model)
    with _reported("fuse(inplace=True)"):
        same = bnfuse.fuse(model, arguments, **options, inplace=True)
    if same is not model:
        raise Failed("wrong: inplace returns another model")
    _same_contents("fuse(inplace=True)", fused, model)
