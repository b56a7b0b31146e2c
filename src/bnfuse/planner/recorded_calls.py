"""All calls that a plan is made from, recorded into one graph, so that a norm goes only if it can go in every call in
which it takes part.

A call that runs the same as an earlier one teaches nothing and is dropped. Calls that nobody has named run without
arithmetic where that is possible; so most cost little. Which calls these are: :mod:`bnfuse.planner.inferred_calls`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnfuse.capture.run import Recording, Run
from bnfuse.capture.shapes_only import FixedSizeError, NeedsContentsError
from bnfuse.graph.graph import Value
from bnfuse.graph.same_run import Counterparts, counterparts
from bnfuse.model import pytree
from bnfuse.model.calls import FORWARD, Call, PipedCall
from bnfuse.model.describe import first_line
from bnfuse.operators import is_dense
from bnfuse.planner.variations import is_complete

log = logging.getLogger("bnfuse")

SMALL = 100
"""So many operators are a small model."""

_RUNS_FOR_REAL = (48, 2)
"""So many further runs are made with arithmetic, where the code looks at contents: of a small model, of a large one."""

_SAME_OPERATORS = 2
"""So many further runs are solved together of the same operators with the same numbers, and more only along axes whose
sizes were the same in those: what depends on the size shows in them."""


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


class _HooksError(Exception):
    """An inferred call puts hooks on layers."""


class CallRecorder:
    """Records further calls beside the first one.

    Attributes:
        recording: holds the first call, and is added to.
        further: the calls that run in another way than those before.
        unseen: what was not seen, in words.
        given: the calls that the caller names, each with its run.
        found: the calls since then whose code asks for something that no call before has asked for.
        last: the first run of the last call that was recorded.
        for_real: so many further runs with arithmetic may be made.
    """

    def __init__(self, recording: Recording, contents: bool) -> None:
        """
        Args:
            contents: whether calls that the caller names are to be computed.
        """
        self.recording, self.contents = recording, contents
        self.further: list[FurtherCall] = []
        self.unseen: list[str] = []
        self.last: Run | None = None
        self.given: list[tuple[Call, Run]] = []
        self.found: list[tuple[Call, Run]] = []
        main = self.main
        self._asked: dict[Any, set[str]] = {_asks_for(main.call): _asked_for(main)}
        self._need_contents: set[str] = set()  # methods that do not run without arithmetic
        self.for_real = _RUNS_FOR_REAL[len(main.nodes) > SMALL]

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
            assert self.last is not None
            self._note(call, self.last)
            self.found.clear()
            self.given.append((call, self.last))

    def say(self, text: str) -> None:
        """Add to what was not seen."""
        if text not in self.unseen:
            self.unseen.append(text)

    def attempt(self, what: str, *calls: Call, pass_on: type[Exception] | tuple[()] = ()) -> bool | None:
        """Record an inferred call.

        Args:
            pass_on: exceptions that are raised.

        Returns:
            None if the model does not take it, False if it does what an earlier one did.
        """
        try:
            found = self._add(what, calls, given=False)
            if len(calls) == 1 and self.last is not None and is_complete(calls[0]):
                self._note(calls[0], self.last)
            return found
        except pass_on:
            raise
        except (NeedsContentsError, Exception) as error:  # noqa: BLE001 (whatever the model raises on a call that it does not take)
            log.debug("%s: not taken, %s", what, first_line(error))
            return None

    def ends_as_main(self, piped: PipedCall) -> bool:
        """Whether a call does what the first call does, or the beginning of that, as far as its second method tells.

        The first call has run the first method already, on the same arguments. So the second is recorded alone; what is
        seen of it is pinned. That is left undone where the code looks at anything, or the model keeps something.
        """
        main = self.main
        returned = main.methods.get(piped.first)
        stand_in = None if returned is None or _asked_for(main) else returned.stand_in()
        if returned is None or returned.value is None or stand_in is None:
            return False
        try:
            (run,) = self.recording.record(piped.second(stand_in), shapes_only=True)
        except (NeedsContentsError, Exception):  # noqa: BLE001 (whatever it raises, the whole of it may tell more)
            return False
        rest = main.nodes[returned.place :]
        same = None if _asked_for(run) else counterparts(rest, [returned.value], run.nodes, run.inputs)
        if same is not None and same.certain and _module_calls(run) <= _module_calls(main):
            self._forget(run, same, piped)
            return True
        self.recording.forget(run)
        return False

    def _note(self, call: Call, run: Run) -> None:
        """Remember a call that asks for what no call before it has asked for under the same arguments."""
        key = _asks_for(call)
        known = self._asked.setdefault(key, set())
        asks = _asked_for(run)
        if len(self.main.nodes) > SMALL and call.method == FORWARD:
            known |= _asked_for(self.main)
        if asks - known:
            known |= asks
            self.found.append((call, run))

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
        if not given and any(run.hooks for run in made):
            # It looks at every layer from outside (a profile), which would keep every norm for nobody's sake.
            self.recording.forget(made[0])
            self.say(f"{what} puts hooks on layers: what they do is not known")
            raise _HooksError(what)
        shapes_only = made[0].start is not None and made[0].start.shapes_only
        outputs = None if shapes_only else [run.output for run in made]
        self.last = made[0]
        made = self._without_repetition(made)
        calls = calls[: len(made)]
        outputs = None if outputs is None else outputs[: len(made)]
        earlier = self._earlier(made)
        if earlier is not None and earlier.certain:
            self._forget(made[0], earlier, calls[0])
        # What ran the same operators needs no proof of its own, which would take as long as the model does.
        proven = earlier is not None and (earlier.certain or len(self.main.nodes) > SMALL)
        if (given or not proven) and all(map(is_complete, calls)):
            self.further.append(FurtherCall(what, calls, outputs, given))
        return earlier is None or not earlier.certain

    def _forget(self, run: Run, earlier: Counterparts, call: Call) -> None:
        """Drop a run that teaches nothing, but for what is seen of it: that is pinned in the earlier run too.

        Args:
            call: what makes this run, also of another model.
        """
        assert run.start is not None
        seen = [(value, other.pinned) for other, value in earlier.same.items()]
        seen += [(leaf, leaf.pinned) for leaf, _ in run.start.pins]
        self.recording.forget(run)
        for value, pinned in seen:
            if value.pinned is None and pinned is not None:
                value.pinned = pinned
                if call not in self.recording.pinning:
                    self.recording.pinning.append(call)

    def _record_for_real(self, calls: tuple[Call, ...], given: bool) -> list[Run]:
        if not given:
            if self.for_real <= 0:
                raise NeedsContentsError("no more runs with arithmetic")
            made = self.recording.record(*calls)
            self.for_real -= 1
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
        sizes: list[Counterparts] = []  # of those, where nothing but sizes may tell the two apart
        axes: set[tuple[int, int]] = set()  # along which those differ
        for earlier in self.recording.runs:
            if earlier is run or earlier.start is None or not earlier.start.begins:
                continue
            same = _counterparts(earlier, run, {})
            if same is None:
                continue
            if same.certain:
                return same
            found.append(same)
            if same.numbers and _asks_for(earlier.call) == _asks_for(run.call):
                sizes.append(same)
                axes |= self._other_axes(earlier.call)
        if len(sizes) > _SAME_OPERATORS and self._other_axes(run.call) <= axes:
            sizes[-1].certain = True
            return sizes[-1]
        return found[-1] if found else None

    def _other_axes(self, call: Call) -> set[tuple[int, int]]:
        """The tensors of a call, by number, and the axes along which their sizes are others than in the first call."""
        pairs = enumerate(zip(self.main.call.tensors, call.tensors, strict=False))
        dense = ((place, a.shape, b.shape) for place, (a, b) in pairs if is_dense(a) and is_dense(b))
        return {
            (place, axis)
            for place, mine, other in dense
            for axis, sizes in enumerate(itertools.zip_longest(mine, other))
            if sizes[0] != sizes[1]
        }


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
    same = counterparts(run.nodes, inputs, other.nodes, other_inputs, before)
    return same if same is not None and _module_calls(other) <= _module_calls(run) else None


def _module_calls(run: Run) -> set[tuple[int, int]]:
    """The modules that ran inside of the model, and of how many tensors: one that is given a number reads none."""
    return {(id(call.module), sum(not value.unseen for value in call.inputs)) for call in run.calls}
