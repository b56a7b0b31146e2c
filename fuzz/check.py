"""The property: fusing changes no output, leaves the caller's model alone, and does what its plan says."""

from __future__ import annotations

import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfuse
from bnfuse.changes import Decision
from bnfuse.fusion_plan import Plan
from bnfuse.planner.trying_plans import Trials
from bnfuse.reasons import Reason
from fuzz.program import Program

EXACT = 1e-9
"""Largest difference, relative to the largest element of the output, in float64."""

ROUNDED = {"float()": 1e-4, "float32": 1e-4, "half()": 1e-1}
"""The same for networks whose program casts to fewer digits on its way."""

NOISE, MOVED = 1e-15, 1e-11
"""A network is ill-conditioned if relative noise NOISE on every operator's result moves an output by more than MOVED."""

AMPLIFIED = 1e6
"""An ill-conditioned network is skipped only if the difference is less than this multiple of what the noise moves."""

STORED = ("last", "seen", "cache")
"""Attributes in which generated networks store tensors as they run."""

SIZES = {"the same size": (0, 0), "another batch size": (1, 0), "another image size": (0, 1), "both": (2, 2)}


@dataclass
class Outcome:
    """What came of one network.

    Attributes:
        failure: a class of failure that is stable under shrinking, empty if all is well.
        detail: the failure in full.
        skipped: True if the outputs differ, but no more than rounding alone would make them.
        steps: how many changes of the structure were made.
        reasons: how many norms stayed, by reason.
    """

    norms: int = 0
    removed: int = 0
    failure: str = ""
    detail: str = ""
    skipped: bool = False
    sizes: int = 0
    steps: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class Failed(Exception):
    def __init__(self, failure: str, detail: str = "") -> None:
        super().__init__(failure, detail)
        self.failure, self.detail = failure, detail


def check(program: Program, thorough: bool = False, restructure: Sequence[str] = ()) -> Outcome:
    """Fuse the network and see.

    Args:
        program: the network.
        thorough: also fuse with verification, in place, and by ``Plan.apply``.
        restructure: kinds of restructuring.
    """
    outcome = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(program, thorough, outcome, restructure)
        except Failed as failed:
            outcome.failure, outcome.detail = failed.failure, failed.detail
    return outcome


def _check(program: Program, thorough: bool, outcome: Outcome, restructure: Sequence[str]) -> None:
    model = program.build()
    model.train(program.seed % 3 == 0)
    inputs = program.arguments(0)
    before = Snapshot(model)
    with _reported("plan"):
        plan = bnfuse.plan(model, inputs, restructure=restructure)
    before.compare("plan")
    with _reported("fuse"):
        fused = bnfuse.fuse(model, inputs, verify=False, restructure=restructure)
    before.compare("fuse")
    outcome.steps += len(plan.steps)
    outcome.norms, outcome.removed = len(plan.decisions), len(plan.fused)
    for decision in plan.kept:
        outcome.reasons[reason_class(decision)] += 1
    _check_decisions(model, fused, plan)
    model.eval()
    _check_outputs(program, model, fused, outcome)
    if thorough:
        _forget(model)
        with _reported("fuse(verify=True)"):
            verified = bnfuse.fuse(model, inputs, restructure=restructure)
        _check_left_behind(model, verified)
        before = Snapshot(model)
        with _reported("plan.apply"):
            applied = plan.apply(model)
        before.compare("plan.apply")
        _check_decisions(model, applied, plan)
        _check_outputs(program, model, applied, outcome)
        identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        with _reported("fuse(inplace=True)"):
            verify = program.seed % 2 == 0
            same = bnfuse.fuse(model, inputs, inplace=True, verify=verify, restructure=restructure)
        _forget(model)
        if same is not model:
            raise Failed("inplace returns another model")
        changed = [n for n, p in model.named_parameters(remove_duplicate=False) if identities.get(n, id(p)) != id(p)]
        if changed and not plan.steps:
            raise Failed("inplace changes the identity of a parameter", str(changed))
        _check_outputs(program, program.build(), model, outcome)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except bnfuse.VerificationError as error:
        raise Failed(f"wrong: {what} raises VerificationError", str(error)) from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "bnfuse" in f.filename]
        place = own[-1].name if own else frame.name
        raise Failed(f"crash: {what} raises {type(error).__name__} in {place}", traceback.format_exc()) from error


@contextmanager
def bare_algebra() -> Iterator[None]:
    """Plans are not tried on further calls inside, so that this cannot hide a mistake of the rules."""
    failure = Trials.failure
    Trials.failure = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trials.failure = failure  # type: ignore[method-assign]


# What must not change -----------------------------------------------------------------------------------------------


class Snapshot:
    """Everything about a model that the caller could see, and the random state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = self._state()
        self.tensors = {name: tensor.detach().clone() for name, tensor in _held(model)}
        self.random = (torch.get_rng_state(), random.getstate())

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for place, module in self.model.named_modules(remove_duplicate=False):
            attributes: dict[str, tuple[Any, Any]] = {}
            for name, value in module.__dict__.items():
                if isinstance(value, (dict, list)):
                    items = value.items() if isinstance(value, dict) else enumerate(value)
                    attributes[name] = (id(value), [(key, id(item)) for key, item in items])
                else:
                    attributes[name] = (
                        id(value) if not isinstance(value, (bool, int, float, str)) else value,
                        None,
                    )
            state[place] = (id(module), type(module), attributes)
        for place, p in self.model.named_parameters(remove_duplicate=False):
            state[f"parameter {place}"] = (
                id(p),
                p.data_ptr(),
                p.requires_grad,
                p.grad is None,
                p.dtype,
                p.stride(),
            )
        return state

    def compare(self, what: str) -> None:
        after = self._state()
        for place, value in self.state.items():
            if after.get(place) != value:
                raise Failed(f"touched: {what} changes the caller's model", f"{place}: {value} -> {after.get(place)}")
        if after.keys() != self.state.keys():
            raise Failed(f"touched: {what} changes the caller's model", str(after.keys() ^ self.state.keys()))
        for name, tensor in _held(self.model):
            if not _identical(tensor, self.tensors[name]):
                raise Failed(f"touched: {what} changes the contents of a tensor", name)
        if not torch.equal(self.random[0], torch.get_rng_state()) or self.random[1] != random.getstate():
            raise Failed(f"touched: {what} changes the random state")


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for place, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                yield f"{place}.{name}", value


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# What must have happened --------------------------------------------------------------------------------------------


def _check_decisions(model: nn.Module, fused: nn.Module, plan: Plan) -> None:
    if type(fused) is not type(model):
        raise Failed("decision: the class changed")
    before, after = (
        dict(model.named_modules(remove_duplicate=False)),
        dict(fused.named_modules(remove_duplicate=False)),
    )
    if any(module.training for module in after.values()):
        raise Failed("decision: the fused model is in training mode")
    decided = [decision.norm for decision in plan.decisions if decision.norm in before]
    if len(set(map(id, (before[name] for name in decided)))) != len(decided):
        raise Failed("decision: a norm is decided twice", str(decided))
    missing = {id(m) for m in before.values() if _is_norm(m)} - {id(before[name]) for name in decided}
    if missing:
        raise Failed("decision: a norm is not decided", str([n for n, m in before.items() if id(m) in missing]))
    for decision in plan.decisions:
        if decision.fused:
            if decision.reasons:
                raise Failed("decision: a fused norm has reasons", str(decision))
            there = after.get(decision.norm)  # a norm may go together with the module that holds it
            if decision.norm not in before or (not plan.steps if there is None else _is_norm(there)):
                raise Failed("decision: a norm that should be gone is there", str(decision))
        elif not decision.reasons or not all(reason.text for reason in decision.reasons):
            raise Failed("decision: a kept norm has no reason", str(decision))
        elif decision.norm in before and not (
            _is_same_kind(after.get(decision.norm), before[decision.norm])
            or _is_same_kind(after.get(f"{decision.norm}.norm"), before[decision.norm])  # behind a layer of its own
        ):
            raise Failed("decision: a norm that should be there is gone", str(decision))


def _is_same_kind(module: nn.Module | None, other: nn.Module) -> bool:
    return type(module) is type(other)


def _is_norm(module: nn.Module) -> bool:
    held = module._buffers.keys() | module._parameters.keys()
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "running_var" in held


# What must be equal -------------------------------------------------------------------------------------------------


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in an output, by where it stands."""
    if isinstance(value, Tensor):
        return {path: value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= tensors_of(item, f"{path}[{key!r}]")
    return found


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            results = tensors_of(model(*(tensor.clone() for tensor in inputs)))
    except Exception:
        _forget(model)  # what it stored before it failed, which another network has not
        raise
    results = {path: tensor.clone() for path, tensor in results.items()}
    for place, module in model.named_modules():
        for name in STORED:
            if name in module.__dict__:
                found = tensors_of(module.__dict__.pop(name))
                results |= {f"{place}.{name}{path}": tensor for path, tensor in found.items()}
    return results


def _forget(model: nn.Module) -> None:
    """Drop what the forward stored."""
    for module in model.modules():
        for name in STORED:
            module.__dict__.pop(name, None)


def _check_left_behind(model: nn.Module, fused: nn.Module) -> None:
    """Fusing runs the model; what its forward stores must not stay in what is returned."""
    before = dict(model.named_modules())
    for place, module in fused.named_modules():
        for name in STORED:
            if name in module.__dict__ and name not in before[place].__dict__:
                raise Failed("touched: fuse leaves what the forward stored", f"{place}.{name}")


def _check_outputs(program: Program, model: nn.Module, fused: nn.Module, outcome: Outcome) -> None:
    source = program.source
    tolerance = max([EXACT, *(loss for cast, loss in ROUNDED.items() if cast in source)])
    for seed, (what, (batch, size)) in enumerate(SIZES.items()):
        if size and not any(argument.sizes for argument in program.inputs):
            continue
        inputs = program.arguments(1000 + seed, batch, size)
        try:
            expected = _run(model, inputs)
        except Exception:
            if not batch and not size:
                raise
            continue
        if not all(bool(result.isfinite().all()) for result in expected.values()):
            continue
        outcome.sizes += 1
        try:
            got = _run(fused, inputs)
        except Exception as error:
            raise Failed(f"wrong: the fused network does not run at {what}", traceback.format_exc()) from error
        if got.keys() != expected.keys():
            raise Failed("wrong: other outputs", f"got {list(got)}, expected {list(expected)}")
        for path, result in expected.items():
            difference = distance(got[path], result)
            if difference <= tolerance:
                continue
            moved = _moved_by_noise(model, inputs, path, result)
            if moved > MOVED and difference < AMPLIFIED * moved:
                outcome.skipped = True
                return
            raise Failed(
                f"wrong: the outputs differ at {what}",
                f"output {path or '0'} by {difference:.3g} (noise {moved:.1g})",
            )


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest element of b; for whole numbers 0 or infinity."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if b.numel() == 0:
        return 0.0
    largest = float(b.abs().max())
    difference = float((a - b).abs().max())
    if difference != difference:
        return float("inf")
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))


class _Noise(TorchDispatchMode):
    """Every operator's result is off by a relative error; views and copies are exact."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float64 or _view(func):
            return result
        noise = 1 + NOISE * torch.randn(result.shape, generator=self.generator, dtype=torch.float64)
        if any(result is argument for argument in args):
            return result.mul_(noise)
        return result * noise


def _view(func: Any) -> bool:
    return any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)


def _moved_by_noise(model: nn.Module, inputs: tuple[Tensor, ...], path: str, expected: Tensor) -> float:
    """How far relative noise on every operator's result moves an output."""
    moved = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noisy = tuple(
            x * (1 + NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)) if x.is_floating_point() else x
            for x in inputs
        )
        try:
            with _Noise(generator):
                moved = max(moved, distance(_run(model, noisy)[path], expected))
        except RuntimeError:
            continue
    return moved


def reason_class(decision: Decision) -> str:
    """The last reason of a kept norm, without names and numbers."""
    return reason_text(decision.reasons[-1])


def reason_text(reason: Reason) -> str:
    """A reason without names and numbers."""
    text = re.sub(r"\b(m\.)?[a-z]+\d+(\.\w+)*( = )?|(?<=[ (])[\w.]+\.(weight|bias)\b", "_", reason.text)
    text = re.sub(r"\d+(x\d+)*", "#", text)
    text = text.partition(": see")[0].partition(", and not every")[0]
    return f"{reason.operator or '-'}: {text}"
