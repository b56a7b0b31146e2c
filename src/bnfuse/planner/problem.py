"""Recorded calls of a model, made ready to solve: their graph, the norms, and what must stay as it is."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from bnfuse.analysis.clips import open_clips
from bnfuse.analysis.custom_layers import add_custom_layers
from bnfuse.analysis.missing_parameters import add_missing_parameters
from bnfuse.analysis.norms import find_norms
from bnfuse.analysis.pins import pin_others, pin_shared_with_idle, pin_what_idle_norms_may_read
from bnfuse.capture.lines import LineWatch
from bnfuse.capture.run import Recording
from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.errors import InputError
from bnfuse.graph.graph import Graph
from bnfuse.graph.norms import Norm
from bnfuse.model import tree
from bnfuse.model.calls import Call
from bnfuse.model.describe import first_line
from bnfuse.model.inputs import candidates
from bnfuse.model.witness import Witness
from bnfuse.planner.assumptions import varying
from bnfuse.planner.inferred_calls import CallInference
from bnfuse.planner.known_methods import methods as known_methods
from bnfuse.planner.options import Options
from bnfuse.planner.recorded_calls import CallRecorder, FurtherCall
from bnfuse.printing.alike import NUMBERS, alike, shortened
from bnfuse.printing.text import wrapped
from bnfuse.reasons import CALLER_KEEPS, Reason
from bnfuse.rules import RULES

IN_PYTHON = (
    "Pass inputs that it accepts as example_inputs: bnfuse.fuse(model, torch.randn(1, 3, 224, 224)), "
    "a tuple for several arguments, a dict for keyword arguments."
)
"""What to write in Python where no inputs can be inferred."""

_TRIES_NAMED = 2


class Problem:
    """Recorded calls of a model, ready to solve.

    Attributes:
        recording: the calls; the first is the one with the example inputs.
        main: the run of the first call.
        further: calls that run in another way than the first, on which a plan must hold too.
        unseen: what was not seen, in words.
        idle: the outermost modules that did not run.
        norms: the norms of the model.
        kept: those that the caller wants to keep, with the reason.
        varying: operators whose numbers are others in another call.
        stateful: whether a second call may differ from the first.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        recording: Recording,
        keep: Sequence[str] = (),
        further: Sequence[FurtherCall] = (),
        unseen: Sequence[str] = (),
        clips: Collection[str] = (),
    ) -> None:
        """
        Args:
            clips: the names of clips whose bounds are to be found.
        """
        self.model, self.options, self._clips = model, options, clips
        self.recording, self.main, self.graph = recording, recording.runs[0], recording.graph
        self.further, self.unseen = list(further), list(unseen)
        self.varying = varying(recording.runs)
        self.prepare(model, self.graph)
        self.norms = find_norms(model, self.graph, options.also, options.hooks == "ignore")
        _check_also(model, options.also)
        self.kept = _kept(self.norms, keep)
        created, _ = add_missing_parameters(model, self.graph)
        pin_shared_with_idle(model, self.graph)
        self.idle = pin_what_idle_norms_may_read(model, self.graph)
        if options.layers is not None:
            pin_others(model, [*self.graph.leaves.values(), *created], tuple(options.layers))
        self.stateful = self.main.stateful

    def prepare(self, model: nn.Module, graph: Graph) -> None:
        """Make one operator of what is one for the rules, in what was recorded of the model or of another like it."""
        add_custom_layers(model, graph, self.options.handlers or {})
        open_clips(graph, self._clips)

    @staticmethod
    def of(
        model: nn.Module,
        example_inputs: Any,
        options: Options,
        keep: Sequence[str] = (),
        contents: bool = True,
        calls: Sequence[Call] = (),
        lines: bool = False,
    ) -> Problem:
        """Run the model.

        Args:
            contents: False for runs without arithmetic, where the model allows it.
            lines: say which lines of its code did not run.
        """
        watch = LineWatch(tree.modules(model)) if lines else None
        may_see = options.hooks == "ignore"
        recording = captured(model, example_inputs, contents, options.infer_calls, watch, hooks_may_see=may_see)
        recorder = CallRecorder(recording, contents)
        recorder.add_given(calls)
        if options.infer_calls:
            CallInference(recorder).infer()
        unseen = [*recorder.unseen, *filter(None, [str(watch or "")])]
        return Problem(model, options, recording, keep, recorder.further, unseen)

    def witness(self) -> Witness:
        """What tells whether the model has changed: its layers, and all tensors that the run read.

        What the run itself writes to is left out, since it is another thing after every call; plans for such models are
        tried on two calls.
        """
        read = {id(value.tensor) for node in self.graph.nodes for value in node.inputs if value.tensor is not None}
        written = {
            id(other.tensor)
            for node in self.graph.nodes
            for value in node.written
            for other in value.storage.values
            if other.tensor is not None
        }
        return Witness.of(self.model, read - written)


def captured(
    model: nn.Module,
    example_inputs: Any,
    contents: bool = True,
    infer_calls: bool = True,
    lines: LineWatch | None = None,
    advice: str = IN_PYTHON,
    hooks_may_see: bool = False,
) -> Recording:
    """Run the model on the inputs, or on the first of the inferred ones that it takes.

    Args:
        advice: what the caller can write instead where none can be inferred.
        hooks_may_see: whether the caller's own hooks on modules may see other numbers.
    """
    methods = known_methods(model) if infer_calls else []

    def run(call: Call) -> Recording:
        recording = Recording(model, RULES, methods, lines, hooks_may_see)
        if not contents:
            with contextlib.suppress(NeedsContentsError, Exception):  # then it runs for real, and fails if it must
                recording.record(call, shapes_only=True)
                return recording
        recording.record(call)
        return recording

    if example_inputs is not None:
        return run(Call.of(example_inputs))
    tried, failures = [], []
    for candidate in candidates(model):
        try:
            return run(Call(*candidate.args, **candidate.kwargs))
        except InputError as error:
            tried.append(candidate.description)
            failures.append(first_line(error.__cause__ or error))
    name = type(model).__name__
    listing = [
        wrapped(f"{shortened([tried[place] for place in places], _TRIES_NAMED)}: {failure}", indent=2)
        for failure, places in alike(failures, NUMBERS)
    ]
    why = "\n".join(["Tried:", *listing]) if tried else "Nothing in the model tells what it takes."
    raise InputError(f"No inputs for {name} could be inferred. {why}\n{advice}")


def _kept(norms: list[Norm], patterns: Sequence[str]) -> dict[Norm, Reason]:
    kept: dict[Norm, Reason] = {}
    names = [name for norm in norms for name in norm.names]
    for pattern in patterns:
        matching = [norm for norm in norms if any(fnmatch.fnmatchcase(name, pattern) for name in norm.names)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" They are named like {names[0]!r}." if names else ""
            raise InputError(f"keep={pattern!r} matches no batch norm of the model.{hint}")
        kept.update(dict.fromkeys(matching, CALLER_KEEPS.reason(pattern=pattern)))
    return kept


def _check_also(model: nn.Module, patterns: Sequence[str]) -> None:
    kinds = {type(module).__name__ for module in model.modules()} if patterns else set()
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(kind.lower(), pattern.lower()) for kind in kinds):
            near = difflib.get_close_matches(pattern.lower(), {kind.lower(): kind for kind in kinds}, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"also={pattern!r} matches the class of no module of the model.{hint}")
