"""All calls that a plan is made from: the one with the example inputs, those that the caller names, and inferred ones.

Every call is recorded into one graph, so that a norm goes only if it can go in every call in which it takes part. A
call that runs the same as an earlier one teaches nothing and is dropped. Calls that nobody has named run without
arithmetic where that is possible; so most cost little.

What is inferred: methods that take the same inputs by the conventions of the zoos; flags flipped, optional arguments
given; where the code looks at sizes, other sizes; where it looks at elements, other contents; where the model
remembers something, further calls.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bnfuse.capture.run import Recording, Run
from bnfuse.capture.shapes_only import FixedSizeError, NeedsContentsError
from bnfuse.graph.graph import Value
from bnfuse.graph.same_run import Counterparts, counterparts
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import first_line
from bnfuse.planner import inferred_calls, resized
from bnfuse.reasons import IS_OUTPUT

log = logging.getLogger("bnfuse")

_MEMORY = 4
"""So many calls follow one another where the model remembers something."""

_RUNS_FOR_REAL = (12, 2)
"""So many further runs are made with arithmetic, where the code looks at contents: of a small model, of a large one."""

_SMALL = 100
"""So many operators are a small model."""

_OTHER_SIZES_TOO = ("larger", "batch of one")
"""Other sizes at which calls that differ in more than the inputs are tried."""

_ARGUMENTS = 16
"""So many arguments are varied."""

_SAME_OPERATORS = 2
"""So many further runs of the same operators are solved together: what depends on the size shows in them."""

_DIFFERENT_SIZES = 4
"""So many runs at other sizes are solved together, of those that are different."""


@dataclass(frozen=True)
class FurtherCall:
    """A call, or several that follow one another, on which a plan must hold too.

    Attributes:
        what: in words.
        calls: they follow one another, between which the model remembers.
        outputs: what each of them gives, None where that was not computed.
        given: whether the caller has named it.
    """

    what: str
    calls: tuple[Call, ...]
    outputs: list[Any] | None
    given: bool = False


class CallRecorder:
    """Records further calls beside the first one.

    Attributes:
        recording: holds the first call, and is added to.
        further: the calls that run in another way than those before.
        unseen: what was not seen, in words.
    """

    def __init__(self, recording: Recording, contents: bool) -> None:
        """
        Args:
            contents: whether calls that the caller names are to be computed.
        """
        self.recording, self.contents = recording, contents
        self.further: list[FurtherCall] = []
        self.unseen: list[str] = []
        self._looks = False  # whether the code looked in the last call
        self._taken: list[resized.Resizing] = []
        self._need_contents: set[str] = set()  # methods that do not run without arithmetic
        self._for_real = _RUNS_FOR_REAL[len(self.main.nodes) > _SMALL]

    @property
    def main(self) -> Run:
        return self.recording.runs[0]

    def add_given(self, calls: Sequence[Call]) -> None:
        """Record what the caller has named.

        Raises:
            InputError: the model does not take one of the calls.
        """
        for call in calls:
            self._add(f"{call!r}", (call,), given=True)

    def infer(self) -> None:
        """Record what can be known without asking."""
        main = self.main
        call = main.call
        separate = resized.with_separate_inputs(call)
        if separate is not None:
            self._try("other tensors where one was passed twice", separate)
        runs = list(self.recording.runs)
        if any(run.contents for run in runs):
            self._other_contents(call)
        if any(run.looks for run in runs):
            self._other_sizes(call)
        for what, other in resized.with_other_lists(call):
            self._try(what, other)
        if any(run.layout for run in runs):
            self.unseen.append("the code asks how tensors lie in memory: of that only other strides were tried")
            for other in resized.with_other_layouts(call):
                self._try("another layout in memory", other)
        if any(run.modes for run in runs):
            self.unseen.append("the code asks whether gradients are tracked: it ran without")
        if call.method == FORWARD:
            self._methods(call)
        for variation in itertools.islice(inferred_calls.variations(self.recording.model, call), _ARGUMENTS):
            self._vary(variation)
        if main.traces or main.stateful:
            self._memory(call)

    def _methods(self, call: Call) -> None:
        """Known methods that take the same inputs."""
        given = {run.call.method for run in self.recording.runs} | self.main.methods
        for name in inferred_calls.methods(self.recording.model):
            if name not in given:
                self._try_sizes_too(name, inferred_calls.forward_of(call, name))

    def _try_sizes_too(self, what: str, call: Call) -> bool | None:
        """Record an inferred call, and if it looks at sizes, at other sizes too: it may do so in code of its own."""
        found = self._try(what, call)
        if found is not None and self._looks:
            done: set[str] = set()
            for number, resizing in enumerate(self._taken or resized.resizings(call)):
                wanted = resizing.group in _OTHER_SIZES_TOO and resizing.group not in done
                other = resizing.of(call, number) if wanted else None
                if other is not None and self._try(f"{what}, {resizing.what}", other) is not None:
                    done.add(resizing.group)
        return found

    def _vary(self, variation: inferred_calls.Variation) -> None:
        """Record the first of some values of an argument that leads somewhere else, or all of them."""
        taken = False
        for place, call in enumerate(variation.calls):
            found = self._try_sizes_too(variation.what, call)
            taken |= found is not None
            if found and not variation.all_of_them:
                if place == 0:
                    return
                break
        for call in variation.otherwise:
            taken |= self._try_sizes_too(variation.what, call) is not None
        if not taken and variation.exists:
            self.unseen.append(f"{variation.what} was never given another value: what that does is not known")

    def _other_sizes(self, call: Call) -> None:
        """Other sizes in both directions, of every group the first that the model takes."""
        done: set[str] = set()
        fixed: list[frozenset[int]] = []
        varied: frozenset[int] = frozenset()
        before = len(self.recording.runs)
        for number, resizing in enumerate(resized.resizings(call)):
            alone = resizing.group[-1].isdigit()
            if resizing.group in done or (alone and resizing.axes <= varied):
                continue
            if resizing.group == "larger batch" and "larger" in done:
                continue
            if any(axes <= resizing.axes for axes in fixed) and resizing.axes != {1}:  # which may be taken apart
                continue
            other = resizing.of(call, number)
            if other is None:
                continue
            try:
                if self._try(resizing.what, other, pass_on=FixedSizeError) is not None:
                    done.add(resizing.group)
                    if resizing.group in ("larger", "smaller"):
                        varied |= resizing.axes  # single ones teach nothing more
                    if resizing.group in _OTHER_SIZES_TOO:
                        self._taken.append(resizing)
            except FixedSizeError:  # a table of one size fits no other size
                fixed.append(resizing.axes)
            if len(self.recording.runs) - before >= _DIFFERENT_SIZES:
                return

    def _other_contents(self, call: Call) -> None:
        """Other contents, for half of the runs with arithmetic; the other half is for other sizes."""
        left = self._for_real // 2
        self.unseen.append("the code goes by contents: only some others were tried")
        for number in (1, 2, 3, 4, 0, 5):
            if self._for_real > left:
                self._try("other contents", resized.revalued(call, number))

    def _memory(self, call: Call) -> None:
        """Further calls of a model that remembers something, as long as they change something, and after a reset.

        Where it keeps nothing but what does not depend on the input (a table), one more call is enough.
        """
        if not self.main.stateful:
            self._try("a second call", call, call)
            return
        self._for_real += 3
        self._try("further calls", *[call] * _MEMORY)
        self._try("calls with other inputs in between", call, *self._others(call), call)
        for name in inferred_calls.resets(self.recording.model):
            self._try(f"a call after {name}", call, Call(method=name), call)

    def _others(self, call: Call) -> Iterator[Call]:
        """The call with another batch, if the model takes it, and with other contents."""
        for resizing in resized.resizings(call):
            other = resizing.of(call, 1) if resizing.group == "larger batch" else None
            if other is not None and self._try(resizing.what, other) is not None:
                yield other
        yield resized.revalued(call, 1)

    def _try(self, what: str, *calls: Call, pass_on: type[Exception] | tuple[()] = ()) -> bool | None:
        """Record an inferred call.

        Args:
            pass_on: exceptions that are raised.

        Returns:
            None if the model does not take it, False if it does what an earlier one did.
        """
        try:
            return self._add(what, calls, given=False)
        except pass_on:
            raise
        except (NeedsContentsError, Exception) as error:  # noqa: BLE001 (whatever the model raises on a call that it does not take)
            log.debug("%s: not taken, %s", what, first_line(error))
            return None

    def _add(self, what: str, calls: tuple[Call, ...], given: bool) -> bool:
        """Record a call; False if it does what an earlier one did."""
        recording = self.recording
        method = calls[0].method
        try:
            if (given and self.contents) or method in self._need_contents:
                raise NeedsContentsError
            made = recording.record(*calls, shapes_only=True)
        except NeedsContentsError:
            self._need_contents.add(method)
            made = self._record_for_real(calls, given)
        except Exception as error:
            if not given and (isinstance(error, FixedSizeError) or self._takes_main_without_arithmetic):
                raise
            made = self._record_for_real(calls, given)
        shapes_only = made[0].start is not None and made[0].start.shapes_only
        outputs = None if shapes_only else [run.output for run in made]
        self._looks = any(run.looks for run in made)
        made = self._without_repetition(made)
        calls = calls[: len(made)]
        outputs = None if outputs is None else outputs[: len(made)]
        earlier = self._earlier(made)
        if earlier is not None and earlier.certain:
            recording.forget(made[0])
        # What ran the same operators needs no proof of its own, which would take as long as the model does.
        proven = earlier is not None and (earlier.certain or len(self.main.nodes) > _SMALL)
        if (given or not proven) and all(map(inferred_calls.is_complete, calls)):
            self.further.append(FurtherCall(what, calls, outputs, given))
        return earlier is None or not earlier.certain

    def _record_for_real(self, calls: tuple[Call, ...], given: bool) -> list[Run]:
        if not given:
            if self._for_real <= 0:
                raise NeedsContentsError("no more runs with arithmetic")
            made = self.recording.record(*calls)
            self._for_real -= 1
            return made
        return self.recording.record(*calls)

    @property
    def _takes_main_without_arithmetic(self) -> bool:
        """True if a run without arithmetic works on the first call; else its failure tells nothing of another call."""
        if self.main.start is not None and self.main.start.shapes_only:
            return True
        if self._without_arithmetic is None:
            self._without_arithmetic = False
            with contextlib.suppress(NeedsContentsError, Exception):
                (run,) = self.recording.record(self.main.call, shapes_only=True)
                self.recording.forget(run)
                self._without_arithmetic = True
        return self._without_arithmetic

    _without_arithmetic: bool | None = None

    def _without_repetition(self, made: list[Run]) -> list[Run]:
        """The calls up to the last that does something else than the one before it."""
        before: dict[Value, Value] = {}
        needed = 1
        for place in range(1, len(made)):
            previous, run = made[place - 1], made[place]
            same = _counterparts(previous, run, before)
            if same is None or not (same.certain and same.whole and same.gives(previous.outputs, run.outputs)):
                needed = place + 1
            before = {}  # what the next call reads of this one, this one read of the one before
            if same is not None:
                before = same.same
            elif len(run.nodes) == len(previous.nodes):
                for node, other in zip(previous.nodes, run.nodes, strict=True):
                    before.update(zip(other.outputs, node.outputs, strict=False))
        if needed < len(made):
            self.recording.forget(made[needed])
        return made[:needed]

    def _earlier(self, made: list[Run]) -> Counterparts | None:
        """The counterparts in an earlier run that ran the same operators, or began with them; None if there is none.

        What the calls return is pinned there too.
        """
        if len(made) > 1:
            return None
        (run,) = made
        found: list[Counterparts] = []
        for earlier in self.recording.runs:
            if earlier is run or earlier.start is None or not earlier.start.begins:
                continue
            same = _counterparts(earlier, run, {})
            if same is None:
                continue
            for value in run.outputs:
                same.same.get(value, value).pin(IS_OUTPUT)
            same.certain &= all(_same_pins(value, other) for value, other in same.same.items())
            if same.certain:
                return same
            found.append(same)
        if len(found) > _SAME_OPERATORS:
            found[-1].certain = True
        return found[-1] if found else None


def _counterparts(run: Run, other: Run, before: dict[Value, Value]) -> Counterparts | None:
    inputs, other_inputs = ([value for value in one.inputs if not value.unseen] for one in (run, other))
    return counterparts(run.nodes, inputs, other.nodes, other_inputs, before)


def _same_pins(value: Value, counterpart: Value) -> bool:
    """True if what is seen of a value in one call is also seen in the other."""
    return value.pinned is None or counterpart.pinned is not None
