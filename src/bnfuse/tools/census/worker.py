"""From one model to one row: build, randomise, fuse, verify, and check again in float64 on other inputs.

What is checked is independent of what `bnfuse.fuse` verifies: other values, another batch and another size where the
model takes them, everything in float64, and no tolerance but 1e-9. A model that multiplies its own rounding by more
than that is held against it.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.analysis.norms import is_norm
from bnfuse.api import carry_out, fuse_with_plan
from bnfuse.changes import Decision
from bnfuse.errors import SpecError, VerificationError
from bnfuse.fusion_plan import Plan
from bnfuse.graph.graph import Graph, Value
from bnfuse.model import pytree
from bnfuse.model.copying import copy_model
from bnfuse.model.describe import one_line
from bnfuse.model.sandbox import run
from bnfuse.planner.options import Options
from bnfuse.planner.planner import Planner
from bnfuse.planner.problem import Problem
from bnfuse.reasons import DID_NOT_RUN
from bnfuse.restructuring.kinds import KINDS
from bnfuse.tools import zoo
from bnfuse.tools.census import rivals
from bnfuse.tools.census.ledger import (
    CRASHED,
    FUSED,
    NO_NORMS,
    NOT_BUILT,
    NOT_RUN,
    SAME,
    TOO_LARGE,
    WRONG,
    Kept,
    KeptReason,
    Restructured,
    Row,
)
from bnfuse.tools.zoo import inputs as zoo_inputs
from bnfuse.tools.zoo.inputs import Sample
from bnfuse.transaction import rewrite
from bnfuse.verify.equivalence import NOISE_FACTOR
from bnfuse.verify.float64 import InFloat64, float64_copy
from bnfuse.verify.measure import compare_outputs
from bnfuse.verify.reference import noise

EXACT = 1e-9
"""Relative L2 error of the outputs that is allowed in float64."""

_ROUNDING = 1e-6
"""No larger error is excused by the rounding of the model itself."""

_NEARLY = 1e-3
"""An error below this may be that of a cast to float32 in the code of a model."""

_FLOOR = 1.0
"""Least variance of a channel, as a share of its norm's mean variance: statistics of two samples are rough."""

NOT_OURS = {"build": NOT_BUILT, "run": NOT_RUN, "forward": NOT_RUN}
"""What a failure is called in the phases in which only the zoo's own code runs."""

_ERROR_LENGTH = 400


@dataclass(frozen=True)
class Job:
    """A model to visit: its SPEC and the family that it belongs to."""

    spec: str
    family: str

    @property
    def zoo(self) -> str:
        return self.spec.rpartition(":")[0]

    @property
    def name(self) -> str:
        return self.spec.rpartition(":")[2]


@dataclass(frozen=True)
class Settings:
    """What a visit may cost.

    Attributes:
        max_parameters: a model with more is not visited.
        seconds: after so long a visit is ended.
        memory: bytes that a visit may allocate.
        rivals: whether other tools are run beside.
        infer_calls: whether calls count that nobody named.
        restructure: whether the structure of the model may change, in every way that there is.
    """

    max_parameters: int = 150_000_000
    seconds: float = 300.0
    memory: int = 10 * 2**30
    rivals: bool = False
    infer_calls: bool = True
    restructure: bool = False


class Stop(Exception):
    """A visit ends here, with the row as it is: not an error."""


class Visit:
    """One visit: the row as far as it is known, and what is going on, which is told to whoever watches."""

    def __init__(self, job: Job, settings: Settings, tell: Callable[[str], None]) -> None:
        self.job, self.settings, self.tell = job, settings, tell
        self.seed = zlib.crc32(job.spec.encode())
        self.row = Row(job.name, job.family, FUSED)
        self.seconds: dict[str, float] = {}
        self.phase = "build"

    def note(self, **known: Any) -> None:
        """Put into the row what is known by now."""
        self.row = replace(self.row, **known)

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Time a phase; after an error it goes on being the phase, so that the row can name it."""
        outer, self.phase = self.phase, phase
        self.tell(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.phase = outer
        self.tell(outer)


def _nobody(phase: str) -> None:
    pass


def _unknown(fingerprint: str) -> str | None:
    return None


def visit(
    job: Job,
    settings: Settings = Settings(),
    tell: Callable[[str], None] = _nobody,
    known: Callable[[str], str | None] = _unknown,
) -> Row:
    """Make the row of one model, in this process.

    Args:
        job: the model.
        settings: what it may cost; time and memory are up to the caller.
        tell: is called with each phase as it begins.
        known: is asked with the fingerprint of the graph for the name of a model that has the same.

    Returns:
        The row; whatever goes wrong is in it.
    """
    here = Visit(job, settings, tell)
    start = time.perf_counter()
    try:
        _visit(here, known)
    except Stop:
        pass
    except Exception as error:  # noqa: BLE001 (a visit ends with a row, whatever happens)
        outcome = WRONG if isinstance(error, VerificationError) else NOT_OURS.get(here.phase, CRASHED)
        here.note(outcome=outcome, phase=here.phase, error=_short(error))
    here.seconds["total"] = time.perf_counter() - start
    here.note(seconds={phase: round(seconds, 3) for phase, seconds in here.seconds.items()})
    return here.row


def _visit(here: Visit, known: Callable[[str], str | None]) -> None:
    form = zoo_inputs.form(here.job.zoo, here.job.family)
    with here.measure("build"):
        model = built(here, form.options if form is not None else {})
    with here.measure("run"):
        zoo.wake_(zoo.randomise_(model, here.seed, dead=0.0), here.seed)
        sample = running(here, model, form)
    plan, fused = (_restructured if here.settings.restructure else _fused)(here, model, sample, known)
    _decided(here, plan)
    with here.measure("check"):
        wide, others, exact = _checked(here, model, fused, plan, sample)
    if here.settings.rivals and here.row.outcome == FUSED:
        with here.measure("rivals"):
            here.note(rivals=rivals.run_all(wide, others, exact, here.row.widened))


def _fused(here: Visit, model: nn.Module, sample: Sample, known: Callable[[str], str | None]) -> tuple[Plan, nn.Module]:
    with here.measure("fuse"):
        problem = Problem.of(model, sample.args, Options(infer_calls=here.settings.infer_calls))
        planner = Planner(problem)
        here.note(fingerprint=fingerprint(model, problem.graph))
        assert here.row.fingerprint is not None
        same_as = known(here.row.fingerprint)
        if same_as is not None:
            here.note(outcome=SAME, same_as=same_as)
            raise Stop
        plan = planner.plan()
    with here.measure("verify"):
        plan, fused = carry_out(plan, model, planner)
        fused.eval()
    return plan, fused


def _restructured(
    here: Visit, model: nn.Module, sample: Sample, known: Callable[[str], str | None]
) -> tuple[Plan, nn.Module]:
    """The same with every kind of restructuring; what is the same as another model is known from the plain rows."""
    options = Options(infer_calls=here.settings.infer_calls)

    def beside_plain(planner: Planner, made: Plan, source: nn.Module, fused: nn.Module | None) -> None:
        with here.measure("plain"):
            planner = Planner(planner.original)
            plain, _ = carry_out(planner.plan(), source, planner)
        here.note(restructured=restructured(plain, made))

    with here.measure("fuse"):
        fused, plan = fuse_with_plan(model, sample.args, restructure=True, options=options, observer=beside_plain)
    return plan, fused


def restructured(plain: Plan, plan: Plan) -> Restructured:
    """What the steps of a plan did, beside the plan of the same model without any."""
    gone_plainly = {decision.norm for decision in plain.fused}
    gone = Counter(_kind(decision, plan) for decision in plan.fused if decision.norm not in gone_plainly)
    steps = Counter(step.kind for step in plan.steps)
    return Restructured(KINDS, len(plain.fused), dict(steps), dict(gone), sum(step.parameters for step in plan.steps))


def _kind(decision: Decision, plan: Plan) -> str:
    """The kind of the step that lets a norm go: one that takes it along, one that is done for it, or one that makes
    what it goes into."""
    kinds = {step.kind for step in plan.steps}
    if decision.direction in kinds:
        return decision.direction or ""
    for step in plan.steps:
        if decision.norm in step.norms:
            return step.kind
    for step in plan.steps:
        places = [*(name for placement in step.placements for name in placement.names), step.subject]
        inside = tuple(f"{place}." for place in places)
        if any(name in places or name.startswith(inside) for name in decision.into):
            return step.kind
    return kinds.pop() if len(kinds) == 1 else ""


def built(here: Visit, options: Mapping[str, Any]) -> nn.Module:
    """The model of a visit, as its zoo builds it; raises `Stop` where there is nothing to fuse, or too much."""
    torch.manual_seed(here.seed)
    try:
        with torch.device("meta"):
            outline = zoo.build(here.job.spec, options=options)
    except SpecError:  # some constructors compute with the numbers of their parameters
        pass
    else:
        _count(here, outline)
        del outline
    model = zoo.build(here.job.spec, options=options).eval()
    _count(here, model)
    return model


def _count(here: Visit, model: nn.Module) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norms = sum(map(is_norm, model.modules()))
    here.note(parameters=parameters, norms=norms)
    if parameters > here.settings.max_parameters:
        here.note(outcome=TOO_LARGE)
        raise Stop
    if not norms:
        here.note(outcome=NO_NORMS)
        raise Stop


# Inputs --------------------------------------------------------------------------------------------------------------


def running(here: Visit, model: nn.Module, form: zoo_inputs.Form | None) -> Sample:
    """The first inputs that the model runs on; its statistics come from them afterwards if it can be calibrated."""
    failures = []
    for sample in zoo_inputs.samples(model, form, here.seed):
        here.note(input=sample.shapes)
        trial = copy_model(model)  # the run may leave caches behind
        try:
            output = zoo.calibrate_(trial, *pytree.map_tensors(sample.several, torch.clone), floor=_FLOOR)
        except Exception:  # noqa: BLE001 (one value per channel, or a size that the model does not take)
            pass
        else:
            for norm, calibrated in zip(model.modules(), trial.modules(), strict=True):
                if is_norm(norm):
                    norm.load_state_dict(calibrated.state_dict())
            here.note(calibrated=True, alive=_alive(output))
            return sample
        try:
            output = run(model, sample.args, {})
        except Exception as error:  # noqa: BLE001 (a size that the model does not take)
            failures.append(f"{sample.shapes}: {_short(error)}")
        else:
            here.note(calibrated=False, alive=_alive(output))
            return sample
    raise SpecError("; ".join(failures) or "nothing in the model tells what it takes")


def _alive(output: object) -> bool | None:
    """Whether the samples of a batch differ in some output; None if no output tells."""
    found = None
    for _, tensor in pytree.tensors(output):
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[0] > 1:
            found = bool(found) or not torch.equal(tensor[0], tensor[1])
    return found


# Checks --------------------------------------------------------------------------------------------------------------


def _checked(
    here: Visit, model: nn.Module, fused: nn.Module, plan: Plan, sample: Sample
) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """Compare on other inputs.

    Returns:
        The model in float64, other inputs, and what it gives for them.
    """
    others, own = _other_run(here, model, sample)
    ours = run(fused, others, {})
    exact_inputs = pytree.map_tensors(others, _double)
    wide = float64_copy(model)
    exact_fused = copy_model(wide)
    rewrite(plan, exact_fused)
    exact, error64, widened = _in_float64(wide, exact_fused, exact_inputs)
    here.note(error64=error64, widened=widened, own32=_error(exact, own), error32=_error(exact, ours))
    if not _tells(exact) or not _tells(own):
        here.note(alive=False)
    limit = EXACT
    if error64 is not None and EXACT < error64 < _ROUNDING:
        noise64 = _noise(copy_model(wide), exact_inputs, exact)
        here.note(noise64=noise64)
        limit = max(EXACT, NOISE_FACTOR * noise64)
    if error64 is None or not error64 <= limit:
        found = "no tensors" if error64 is None else f"a relative error of {error64:.1e}"
        error = f"in float64, on {here.row.other}: {found}, where {limit:.0e} is allowed"
        here.note(outcome=WRONG, phase="check", error=error, error64=None)
    return wide, exact_inputs, exact


def _noise(model: nn.Module, inputs: tuple[Any, ...], exact: object) -> float:
    """Relative L2 error that one unit in the last place of every parameter makes in float64; the model is changed."""
    moved = noise(model, exact, lambda model: run(model, inputs, {}, 0, InFloat64()))
    return max(output.relative_l2 for comparison in moved for output in comparison.outputs)


def _other_run(here: Visit, model: nn.Module, sample: Sample) -> tuple[tuple[Any, ...], Any]:
    """The first of the other inputs that the model takes, and its outputs in float32."""
    errors = []
    for others in sample.others(here.seed + 1):
        here.seconds.pop("forward", None)
        here.note(other=zoo_inputs.shapes(others))
        try:
            with here.measure("forward"):
                return others, run(model, others, {})
        except Exception as error:  # noqa: BLE001 (another size or batch than the model takes)
            errors.append(_short(error))
    raise SpecError(f"the model runs on one input of shape {sample.shapes} and not on another: {errors[-1]}")


def _in_float64(model: nn.Module, fused: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, float | None, bool]:
    """The model's output, the error of the fused one, and whether casts in the code had to be widened."""
    try:
        exact = run(model, inputs, {})
        error = _error(exact, run(fused, inputs, {}), strict=True)
    except Exception:  # noqa: BLE001 (code that makes float32 by itself may not run in float64)
        pass
    else:
        if error is None or not EXACT < error < _NEARLY:
            return exact, error, False
    exact = run(model, inputs, {}, 0, InFloat64())
    found = run(fused, inputs, {}, 0, InFloat64())
    return exact, _error(exact, found, strict=True), True


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _error(exact: object, found: object, strict: bool = False) -> float | None:
    """Relative L2 error of the worst output; of whole numbers, the share that differs.

    Args:
        strict: infinite for other tensors than expected, and for whole numbers that differ; else these are left out,
            and None is returned if nothing is left.
    """
    errors = []
    for output in compare_outputs(pytree.map_tensors(exact, _double), pytree.map_tensors(found, _double)).outputs:
        if output.problem or output.exact:
            if strict:
                errors.append(float("inf") if output.problem or output.differing else 0.0)
        else:
            errors.append(output.relative_l2)
    return max(errors, default=None)


def _tells(output: object) -> bool:
    """Whether an error would show: there are numbers, and they are finite."""
    found = [tensor for _, tensor in pytree.tensors(output) if tensor.is_floating_point() and tensor.numel()]
    return bool(found) and all(bool(tensor.isfinite().all()) for tensor in found)


# What became of the norms --------------------------------------------------------------------------------------------


def _decided(here: Visit, plan: Plan) -> None:
    ran = [decision for decision in plan.decisions if not _idle(decision)]
    groups: dict[tuple[KeptReason, ...], list[Decision]] = {}
    for decision in ran:
        if not decision.fused:
            reasons = tuple(KeptReason(r.direction, r.operator, r.code) for r in decision.reasons)
            groups.setdefault(reasons, []).append(decision)
    kept = tuple(
        Kept(len(found), reasons, found[0].norm, "; ".join(map(str, found[0].reasons)))
        for reasons, found in groups.items()
    )
    here.note(executed=len(ran), removed=len(plan.fused), kept=kept)


def _idle(decision: Decision) -> bool:
    return any(reason.code == DID_NOT_RUN.code for reason in decision.reasons)


# The same model under another name -----------------------------------------------------------------------------------


def fingerprint(model: nn.Module, graph: Graph) -> str:
    """A text that two models share only if they hold the same kinds of modules and ran the same operators, on the same
    values of the same shapes with the same numbers, in the same kinds of modules."""
    digest = hashlib.sha256()
    for module in model.modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        digest.update(f"{type(module).__module__}.{type(module).__qualname__} {shapes}\n".encode())
    for node in graph.nodes:
        arguments = {name: _described(argument) for name, argument in node.bound.items()}
        outputs = [_described(value) for value in node.outputs]
        digest.update(f"{node.overload} in {type(node.call.module).__qualname__}: {arguments} {outputs}\n".encode())
    return digest.hexdigest()[:16]


def _described(argument: Any) -> Any:
    if isinstance(argument, Value):
        fixed = argument.pinned and argument.pinned.text
        return f"#{argument.index} {argument.kind.value} {argument.shape} {argument.dtype} {fixed}"
    if isinstance(argument, (list, tuple)):
        return [_described(item) for item in argument]
    return str(argument)


def _short(error: BaseException) -> str:
    return one_line(error)[:_ERROR_LENGTH]
