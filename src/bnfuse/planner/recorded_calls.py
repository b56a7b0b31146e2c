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
from bnfuse.model import pytree
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import first_line
from bnfuse.planner import inferred_calls, resized

log = logging.getLogger("bnfuse")

_MEMORY = 4
"""So many calls follow one another where the model remembers something."""

_MOST_MEMORY = 8
"""So many calls a small model is called at most for the sake of a number in its code."""

_RUNS_FOR_REAL = (48, 2)
"""So many further runs are made with arithmetic, where the code looks at contents: of a small model, of a large one."""

_SURELY_FOR_REAL = 1
"""So many of them are kept for every method and for every argument: each may return what no other call does."""

_SMALL = 100
"""So many operators are a small model."""

_OF_METHODS = ("larger", "batch of one")
"""Other sizes that other methods of a large model are tried at, whose forward goes by sizes too."""

_ARGUMENTS = 16
"""So many arguments are varied."""

_SAME_OPERATORS = 2
"""So many further runs of the same operators are solved together: what depends on the size shows in them."""

_DIFFERENT_SIZES = 8
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
        self._last: Run | None = None  # the first run of the last call that was recorded
        self._given: list[tuple[Call, Run]] = []
        self._found: list[tuple[Call, Run]] = []  # what was inferred and does something of its own
        main = self.main
        self._asked: dict[Any, set[str]] = {_asks_for(main.call): _asked_for(main)}
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
            assert self._last is not None
            self._note(call, self._last)
            self._found.clear()
            self._given.append((call, self._last))

    def infer(self) -> None:
        """Record what can be known without asking: of the first call, of those that the caller names, of the others.

        What is inferred of a call is what its own code asks for. So a flag under which the code goes by sizes or
        contents, or remembers something, is followed by other sizes, contents and calls under the same flag.
        """
        main = self.main
        self._infer_from(main.call, main)
        for call, run in self._given:
            self._infer_from(call, run)
        if main.call.method == FORWARD:
            self._methods(main.call)
        self._resets(main.call)
        self._sequences()
        while self._found:
            call, run = self._found.pop(0)
            self._go_on(call, run, of_main=False)

    def _infer_from(self, call: Call, run: Run) -> None:
        separate = resized.with_separate_inputs(call)
        if separate is not None:
            self._try("other tensors where one was passed twice", separate)
        for other in resized.with_one_input(call):
            self._try("one tensor passed twice", other)
        self._go_on(call, run, of_main=True)
        for what, other in resized.with_other_lists(call):
            self._try(what, other)
        if run.modes:
            self._say("the code asks whether gradients are tracked: it ran without")
        varied = list(itertools.islice(inferred_calls.variations(self.recording.model, call), _ARGUMENTS + 1))
        if len(varied) > _ARGUMENTS:
            del varied[_ARGUMENTS:]
            self._say(f"only {_ARGUMENTS} arguments were given another value")
        for variation in varied:
            self._vary(variation)
        for variation in inferred_calls.together(self.recording.model, call, varied):
            self._try(variation.what, *variation.calls[:1])

    def _go_on(self, call: Call, run: Run, of_main: bool) -> None:
        """Other contents, sizes, layouts and further calls, where the code of a call asks for them."""
        if run.contents:
            self._other_contents(call)
        if run.looks:
            fewer = not of_main and self.main.looks and len(self.main.nodes) > _SMALL
            self._other_sizes(call, _OF_METHODS if fewer else ())
        if run.layout:
            self._say("the code asks how tensors lie in memory: of that only other strides were tried")
            for other in resized.with_other_layouts(call):
                self._try("another layout in memory", other)
        if run.traces or run.stateful:
            self._memory(call, run)

    def _sequences(self) -> None:
        """What the caller names and leaves something behind, before and after the first call, and one another."""
        main = self.main.call
        for call, run in self._given:
            if run.stateful or run.traces:
                self._try(f"{call!r}, and then the first call", call, main)
                self._try(f"the first call, and then {call!r}", main, call, main)
                for other, _ in self._given:
                    if other is not call:
                        self._try(f"{call!r}, and then {other!r}", call, other)

    def _say(self, text: str) -> None:
        if text not in self.unseen:
            self.unseen.append(text)

    def _methods(self, call: Call) -> None:
        """Known methods, with every flag of theirs; what their own code asks for follows."""
        model = self.recording.model
        given = {run.call.method for run in self.recording.runs}
        large = len(self.main.nodes) > _SMALL
        for name in inferred_calls.methods(model):
            if name in given:
                continue
            self._for_real = max(self._for_real, _SURELY_FOR_REAL)
            method = inferred_calls.forward_of(call, name)
            if name not in self.main.methods and self._try(name, method) is None:
                continue
            left = []
            for variation in inferred_calls.variations(model, method):
                if large or not variation.is_flag or self._try(f"{name}, {variation.what}", *variation.calls) is None:
                    left.append(variation.what)
            if left:
                self._say(f"{name} was given no other value of {', '.join(left)}")
        for piped in inferred_calls.pipes(self.recording.model, call, self.main.methods):
            self._for_real = max(self._for_real, _SURELY_FOR_REAL)
            self._try(piped.method, piped)

    def _vary(self, variation: inferred_calls.Variation) -> None:
        """Record the first of some values of an argument that leads somewhere else, or all of them."""
        taken = False
        self._for_real = max(self._for_real, _SURELY_FOR_REAL)
        for place, call in enumerate(variation.calls):
            found = self._try(variation.what, call)
            taken |= found is not None
            if found and not variation.all_of_them and not (self._last is not None and self._last.contents):
                if place == 0:
                    return
                break
        for call in variation.otherwise:
            taken |= self._try(variation.what, call) is not None
        if not taken and not variation.may_fail:
            self._say(f"{variation.what} was never given another value: what that does is not known")
        elif taken and variation.is_text:
            self._say(f"{variation.what} was given only words of the code")

    def _other_sizes(self, call: Call, groups: Sequence[str] = ()) -> None:
        """Other sizes in both directions, of every group the first that the model takes.

        Args:
            groups: only these, if there are any.
        """
        done: set[str] = set()
        fixed: list[frozenset[int]] = []
        varied: frozenset[int] = frozenset()
        before = len(self.recording.runs)
        thresholds = inferred_calls.thresholds(self.recording.model)
        for number, resizing in enumerate(resized.resizings(call, thresholds)):
            alone = resizing.group[-1].isdigit()
            if groups and resizing.group not in groups:
                continue
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
            except FixedSizeError:  # a table of one size fits no other size
                fixed.append(resizing.axes)
            if len(self.recording.runs) - before >= _DIFFERENT_SIZES:
                return

    def _other_contents(self, call: Call) -> None:
        """Other contents, for half of the runs with arithmetic; the other half is for other sizes."""
        left = self._for_real // 2
        self._say("the code goes by contents: of these only some others were tried")
        for number in (1, 2, 3, 4, 0, 5):
            if self._for_real > left:
                self._try("other contents", resized.revalued(call, number))

    def _memory(self, call: Call, run: Run) -> None:
        """Further calls of a model that remembers something, as long as they change something, and after a reset.

        Where it keeps nothing but what does not depend on the input (a table), one more call is enough.
        """
        if not run.stateful:
            self._try("a second call", call, call)
            return
        numbers = inferred_calls.thresholds(self.recording.model) if len(self.main.nodes) <= _SMALL else []
        times = max([_MEMORY, *(number + 2 for number in numbers if number <= _MOST_MEMORY)])
        self._say(f"the model remembers something: only {times} calls followed one another")
        self._for_real += 3
        self._try("further calls", *[call] * times)
        self._try("calls with other inputs in between", call, *self._others(call), call)
        for name in inferred_calls.resets(self.recording.model):
            self._try(f"a call after {name}", call, Call(method=name), call)

    def _resets(self, call: Call) -> None:
        """What the model does once it has forgotten, which it may have remembered since before the first call."""
        for name in inferred_calls.resets(self.recording.model):
            self._try(f"a call after {name}", Call(method=name), call)

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
            found = self._add(what, calls, given=False)
            if len(calls) == 1 and self._last is not None and inferred_calls.is_complete(calls[0]):
                self._note(calls[0], self._last)
            return found
        except pass_on:
            raise
        except (NeedsContentsError, Exception) as error:  # noqa: BLE001 (whatever the model raises on a call that it does not take)
            log.debug("%s: not taken, %s", what, first_line(error))
            return None

    def _note(self, call: Call, run: Run) -> None:
        """Remember a call that asks for what no call before it has asked for under the same arguments."""
        key = _asks_for(call)
        known = self._asked.setdefault(key, set())
        asks = _asked_for(run)
        if len(self.main.nodes) > _SMALL and call.method == FORWARD:
            known |= _asked_for(self.main)
        if asks - known:
            known |= asks
            self._found.append((call, run))

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
        self._last = made[0]
        made = self._without_repetition(made)
        calls = calls[: len(made)]
        outputs = None if outputs is None else outputs[: len(made)]
        earlier = self._earlier(made)
        if earlier is not None and earlier.certain:
            self._forget(made[0], earlier)
        # What ran the same operators needs no proof of its own, which would take as long as the model does.
        proven = earlier is not None and (earlier.certain or len(self.main.nodes) > _SMALL)
        if (given or not proven) and all(map(inferred_calls.is_complete, calls)):
            self.further.append(FurtherCall(what, calls, outputs, given))
        return earlier is None or not earlier.certain

    def _forget(self, run: Run, earlier: Counterparts) -> None:
        """Drop a run that teaches nothing, but for what is seen of it: that is pinned in the earlier run too."""
        assert run.start is not None
        seen = [(value, other.pinned) for other, value in earlier.same.items()]
        seen += [(leaf, leaf.pinned) for leaf, _ in run.start.pins]
        self.recording.forget(run)
        for value, pinned in seen:
            if value.pinned is None:
                value.pinned = pinned

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
        """The counterparts in an earlier run that ran the same operators, or began with them; None if there is none."""
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
            if same.certain:
                return same
            found.append(same)
        if len(found) > _SAME_OPERATORS:
            found[-1].certain = True
        return found[-1] if found else None


def _asks_for(call: Call) -> tuple[str, str]:
    """The method and the arguments that are no tensors."""
    words = [*map(_plain, call.args), *(f"{name}={_plain(value)}" for name, value in sorted(call.kwargs.items()))]
    return call.method, ",".join(words)


def _asked_for(run: Run) -> set[str]:
    return {name for name in ("contents", "looks", "layout", "stateful", "traces") if getattr(run, name)}


def _plain(value: Any) -> str:
    return "tensor" if pytree.tensors(value) else repr(value)


def _counterparts(run: Run, other: Run, before: dict[Value, Value]) -> Counterparts | None:
    inputs, other_inputs = ([value for value in one.inputs if not value.unseen] for one in (run, other))
    return counterparts(run.nodes, inputs, other.nodes, other_inputs, before)
