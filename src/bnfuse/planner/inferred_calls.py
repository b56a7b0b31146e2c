"""Calls that a model surely takes too, though nobody has named them.

What is inferred: methods that take the same inputs by the conventions of the zoos; flags flipped, optional arguments
given; where the code looks at sizes, other sizes; where it looks at elements, other contents; where the model
remembers something, further calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from bnfuse.capture.run import Run
from bnfuse.capture.shapes_only import FixedSizeError
from bnfuse.model.calls import FORWARD, Call
from bnfuse.planner import known_methods, resized, variations
from bnfuse.planner.model_code import ModelCode
from bnfuse.planner.recorded_calls import SMALL, CallRecorder
from bnfuse.planner.variations import Variation
from bnfuse.reasons import MEETS_UNSEEN_ARGUMENT

_MEMORY = 4
"""So many calls follow one another where the model remembers something."""

_MOST_MEMORY = 8
"""So many calls a small model is called at most for the sake of a number in its code."""

_SURELY_FOR_REAL = 1
"""So many runs with arithmetic are kept for every method and for every argument: each may return what no other call
does."""

_OF_METHODS = ("larger", "batch of one")
"""Other sizes that other methods of a large model are tried at, whose forward goes by sizes too."""

_ARGUMENTS = 16
"""So many arguments are varied."""

_DIFFERENT_SIZES = 8
"""So many runs at other sizes are solved together, of those that are different."""


class CallInference:
    """Infers calls and records them."""

    def __init__(self, recorder: CallRecorder) -> None:
        """
        Args:
            recorder: has recorded the first call and those that the caller names.
        """
        self._recorder, self._main = recorder, recorder.main
        self._attempt, self._say = recorder.attempt, recorder.say
        self._model = recorder.recording.model
        self._code = ModelCode(self._model)
        self._is_large = len(self._main.nodes) > SMALL

    def infer(self) -> None:
        """Record what can be known without asking: of the first call, of those that the caller names, of the others.

        What is inferred of a call is what its own code asks for. So a flag under which the code goes by sizes or
        contents, or remembers something, is followed by other sizes, contents and calls under the same flag.
        """
        main = self._main
        self._infer_from(main.call, main)
        for call, run in self._recorder.given:
            self._infer_from(call, run)
        if main.call.method == FORWARD:
            self._methods(main.call)
        self._resets(main.call)
        self._sequences()
        while self._recorder.found:
            call, run = self._recorder.found.pop(0)
            self._go_on(call, run, of_main=False)

    def _infer_from(self, call: Call, run: Run) -> None:
        separate = resized.with_separate_inputs(call)
        if separate is not None:
            self._attempt("other tensors where one was passed twice", separate)
        for other in resized.with_one_input(call):
            self._attempt("one tensor passed twice", other)
        self._go_on(call, run, of_main=True)
        for what, other in resized.with_other_lists(call):
            self._attempt(what, other)
        if run.modes or self._code.asks_for_modes:
            self._say("the code asks whether gradients are tracked: it ran without")
        varied = list(itertools.islice(variations.variations(self._code, call), _ARGUMENTS + 1))
        if len(varied) > _ARGUMENTS:
            del varied[_ARGUMENTS:]
            self._say(f"only {_ARGUMENTS} arguments were given another value")
        for variation in varied:
            self._vary(variation)
        for variation in variations.together(self._code, varied):
            self._attempt(variation.what, *variation.calls[:1])

    def _go_on(self, call: Call, run: Run, of_main: bool) -> None:
        """Other contents, sizes, layouts and further calls, where the code of a call asks for them."""
        if run.contents:
            self._other_contents(call)
        if run.looks:
            fewer = not of_main and self._main.looks and self._is_large
            self._other_sizes(call, run, _OF_METHODS if fewer else ())
        if run.layout:
            self._say("the code asks how tensors lie in memory: of that only other strides were tried")
            for other in resized.with_other_layouts(call):
                self._attempt("another layout in memory", other)
        if run.traces or run.stateful:
            self._memory(call, run)

    def _sequences(self) -> None:
        """What the caller names and leaves something behind, before and after the first call, and one another."""
        main = self._main.call
        for call, run in self._recorder.given:
            if run.stateful or run.traces:
                self._attempt(f"{call!r}, and then the first call", call, main)
                self._attempt(f"the first call, and then {call!r}", main, call, main)
                for other, _ in self._recorder.given:
                    if other is not call:
                        self._attempt(f"{call!r}, and then {other!r}", call, other)

    def _methods(self, call: Call) -> None:
        """Known methods, with every flag of theirs; what their own code asks for follows."""
        model = self._model
        given = {run.call.method for run in self._recorder.recording.runs}
        for name in known_methods.methods(model):
            if name in given:
                continue
            self._recorder.for_real = max(self._recorder.for_real, _SURELY_FOR_REAL)
            method = known_methods.forward_of(call, name)
            if name not in self._main.methods and self._attempt(name, method) is None:
                continue
            left = []
            for variation in variations.variations(self._code, method):
                skipped = self._is_large or not variation.is_flag
                if skipped or self._attempt(f"{name}, {variation.what}", *variation.calls) is None:
                    left.append(variation.what)
            if left:
                self._say(f"{name} was given no other value of {', '.join(left)}")
        for piped in known_methods.pipes(self._model, call, self._main.methods):
            self._recorder.for_real = max(self._recorder.for_real, _SURELY_FOR_REAL)
            if not self._recorder.ends_as_main(piped):
                self._attempt(piped.method, piped)

    def _vary(self, variation: Variation) -> None:
        """Record the first of some values of an argument that leads somewhere else, or all of them."""
        taken = ignored = elsewhere = False
        self._recorder.for_real = max(self._recorder.for_real, _SURELY_FOR_REAL)
        for place, call in enumerate(variation.calls):
            found = self._attempt(variation.what, call)
            last = self._recorder.last
            if found is not None and variations.is_no_tensor(call) and last is not None and not _meets_unseen(last):
                ignored, elsewhere = True, found  # the code may ask whether it is a tensor, so that one has to be tried
                continue
            taken |= found is not None
            if variation.all_of_them or (last is not None and last.contents):
                continue
            if elsewhere and found is not None:
                return
            if found:
                if place == 0:
                    return
                break
        if elsewhere:
            return
        for call in variation.otherwise:
            found = self._attempt(variation.what, call)
            taken |= bool(found) or (found is False and not ignored)
        if not taken and not variation.may_fail:
            self._say(f"{variation.what} was never given another value: what that does is not known")
        elif taken and variation.is_text:
            self._say(f"{variation.what} was given only words of the code")

    def _other_sizes(self, call: Call, run: Run, groups: Sequence[str] = ()) -> None:
        """Other sizes in both directions, of every group the first that the model takes.

        Where strides make the same sizes of those as of the first, others of the group follow.

        Args:
            run: what the call did.
            groups: only these, if there are any.
        """
        done: set[str] = set()
        fixed: list[frozenset[int]] = []
        varied: frozenset[int] = frozenset()
        before = len(self._recorder.recording.runs)
        for number, resizing in enumerate(resized.resizings(call, self._code.thresholds, self._code.divisors)):
            alone = resizing.group[-1].isdigit()
            if groups and resizing.group not in groups:
                continue
            if resizing.group in done or (alone and resizing.axes <= varied):
                continue
            if resizing.group == "larger batch" and "larger" in done:
                continue
            if any(axes <= resizing.axes for axes in fixed) and not resizing.anyway:
                continue
            other = resizing.of(call, number)
            if other is None:
                continue
            try:
                if self._attempt(resizing.what, other, pass_on=FixedSizeError) is not None:
                    last = self._recorder.last
                    if last is None or not resized.rounds_away(run.nodes, last.nodes):
                        done.add(resizing.group)
                    if resizing.group in ("larger", "smaller"):
                        varied |= resizing.axes  # single ones teach nothing more
            except FixedSizeError:  # a table of one size fits no other size
                fixed.append(resizing.axes)
            if len(self._recorder.recording.runs) - before >= _DIFFERENT_SIZES:
                return

    def _other_contents(self, call: Call) -> None:
        """Other contents, for half of the runs with arithmetic; the other half is for other sizes."""
        left = self._recorder.for_real // 2
        self._say("the code goes by contents: of these only some others were tried")
        others = [("other contents", resized.revalued(call, number)) for number in (1, 2, 3, 4, 0, 5, 6, 7)]
        for resizing in resized.resizings(call):
            if resizing.group == "many":  # what is counted may be no more than one of a small batch
                larger = [resizing.of(call, number) for number in (4, 5, 3)]
                others += [(f"other contents of {resizing.what}", other) for other in larger if other is not None]
        for what, other in others:
            if self._recorder.for_real > left:
                self._attempt(what, other)

    def _memory(self, call: Call, run: Run) -> None:
        """Further calls of a model that remembers something, as long as they change something, and after a reset.

        Where it keeps nothing but what does not depend on the input (a table), one more call is enough.
        """
        if not run.stateful:
            self._attempt("a second call", call, call)
            return
        numbers = [] if self._is_large else self._code.thresholds
        times = max([_MEMORY, *(number + 2 for number in numbers if number <= _MOST_MEMORY)])
        self._say(f"the model remembers something: only {times} calls followed one another")
        self._recorder.for_real += 3
        self._attempt("further calls", *[call] * times)
        self._attempt("calls with other inputs in between", call, *self._others(call), call)
        for name in known_methods.resets(self._model):
            self._attempt(f"a call after {name}", call, Call(method=name), call)

    def _resets(self, call: Call) -> None:
        """What the model does once it has forgotten, which it may have remembered since before the first call."""
        for name in known_methods.resets(self._model):
            self._attempt(f"a call after {name}", Call(method=name), call)

    def _others(self, call: Call) -> Iterator[Call]:
        """The call with another batch, if the model takes it, and with other contents."""
        for resizing in resized.resizings(call):
            other = resizing.of(call, 1) if resizing.group == "larger batch" else None
            if other is not None and self._attempt(resizing.what, other) is not None:
                yield other
        yield resized.revalued(call, 1)


def _meets_unseen(run: Run) -> bool:
    """Whether anything in a run met an argument of which nothing is known."""
    values = (value for node in run.nodes for value in (*node.inputs, *node.outputs))
    return any(value.pinned is not None and value.pinned.code == MEETS_UNSEEN_ARGUMENT.code for value in values)
