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
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnfuse.capture.run import Recording, Run
from bnfuse.capture.shapes_only import FixedSizeError, NeedsContentsError
from bnfuse.graph.graph import Value
from bnfuse.graph.same_run import counterparts
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import first_line
from bnfuse.planner import inferred_calls, resized
from bnfuse.reasons import IS_OUTPUT

log = logging.getLogger("bnfuse")

_MEMORY = 4
"""So many calls follow one another where the model remembers something."""

_RUNS_FOR_REAL = (8, 2)
"""So many further runs are made with arithmetic, where the code looks at contents: of a small model, of a large one."""

_SMALL = 100
"""So many operators are a small model."""

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
        model, call = self.recording.model, main.call
        separate = resized.with_separate_inputs(call)
        if separate is not None:
            self._try("other tensors where one was passed twice", separate)
        given = {run.call.method for run in self.recording.runs}
        for name in inferred_calls.methods(model) if call.method == FORWARD else ():
            if name not in main.methods and name not in given:
                self._try(name, inferred_calls.forward_of(call, name))
        for name, what, variants in inferred_calls.varied(model, call):
            if any(name in run.call.kwargs for run in self.recording.runs):
                continue
            if not any(self._try(what, variant) for variant in variants) and name != "*args":
                self.unseen.append(f"{call.method}({what}) was never run: what it does is not known")
        for what, other in resized.with_other_lists(call):
            self._try(what, other)
        if any(run.contents for run in self.recording.runs):
            self._other_contents(call)
        if any(run.looks for run in self.recording.runs):
            self._other_sizes(call)
        if main.traces or main.stateful:
            self._memory(call)

    def _other_sizes(self, call: Call) -> None:
        """Other sizes in both directions, of every group the first that the model takes."""
        done: set[str] = set()
        fixed: list[frozenset[int]] = []
        different = len(self.further)
        for number, resizing in enumerate(resized.resizings(call)):
            grows = resizing.group.startswith("larger")
            alone = resizing.group.partition(" ")[0] in ("larger", "smaller") and " " in resizing.group
            if resizing.group in done or (alone and "larger" in done):
                continue
            if grows and any(axes <= resizing.axes for axes in fixed):
                continue
            other = resizing.of(call, number)
            if other is None:
                continue
            try:
                if self._try(resizing.what, other, pass_on=FixedSizeError):
                    done.add(resizing.group)
            except FixedSizeError:
                if grows:  # an even larger input makes a tensor that fits no better
                    fixed.append(resizing.axes)
            if len(self.further) - different >= _DIFFERENT_SIZES:
                return

    def _other_contents(self, call: Call) -> None:
        """Other contents, for half of the runs with arithmetic; the other half is for other sizes."""
        left = self._for_real // 2
        for number in (1, 0, 2):
            if self._for_real > left:
                self._try("other contents", resized.revalued(call, number))

    def _memory(self, call: Call) -> None:
        """Further calls of a model that remembers something, as long as they change something, and after a reset."""
        self._for_real += 1
        self._try("further calls", *[call] * _MEMORY)
        for name in inferred_calls.resets(self.recording.model):
            self._for_real += 1
            self._try(f"a call after {name}", call, Call(method=name), call)

    def _try(self, what: str, *calls: Call, pass_on: type[Exception] | tuple[()] = ()) -> bool:
        """Record an inferred call; False if the model does not take it.

        Args:
            pass_on: exceptions that are raised.
        """
        try:
            self._add(what, calls, given=False)
        except pass_on:
            raise
        except (NeedsContentsError, Exception) as error:  # noqa: BLE001 (whatever the model raises on a call that it does not take)
            log.debug("%s: not taken, %s", what, first_line(error))
            return False
        return True

    def _add(self, what: str, calls: tuple[Call, ...], given: bool) -> None:
        recording = self.recording
        try:
            if given and self.contents:
                raise NeedsContentsError
            made = recording.record(*calls, shapes_only=True)
        except NeedsContentsError:
            made = self._record_for_real(calls, given)
        except FixedSizeError:
            raise
        except Exception:
            if not given and self._takes_main_without_arithmetic:
                raise
            made = self._record_for_real(calls, given)
        shapes_only = made[0].start is not None and made[0].start.shapes_only
        outputs = None if shapes_only else [run.output for run in made]
        made = self._without_repetition(made)
        calls = calls[: len(made)]
        outputs = None if outputs is None else outputs[: len(made)]
        known = self._is_known(made)
        if known:
            recording.forget(made[0])
        if (given or not known) and all(map(inferred_calls.is_complete, calls)):
            self.further.append(FurtherCall(what, calls, outputs, given))

    def _record_for_real(self, calls: tuple[Call, ...], given: bool) -> list[Run]:
        if not given:
            if self._for_real <= 0:
                raise NeedsContentsError("no more runs with arithmetic")
            self._for_real -= 1
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
            same = len(run.nodes) == len(previous.nodes)
            if not same or _counterparts(previous, run, before) is None:
                needed = place + 1
            before = {}
            if same:  # what the next call reads of this one, this one read of the one before
                for node, other in zip(previous.nodes, run.nodes, strict=True):
                    before.update(zip(other.outputs, node.outputs, strict=False))
        if needed < len(made):
            self.recording.forget(made[needed])
        return made[:needed]

    def _is_known(self, made: list[Run]) -> bool:
        """True if the calls do what an earlier call does, or how that begins; then the results are pinned there."""
        if len(made) > 1:
            return False
        (run,) = made
        for earlier in self.recording.runs:
            if earlier is run or earlier.start is None or not earlier.start.begins:
                continue
            same = _counterparts(earlier, run, {})
            if same is None:
                continue
            for value in run.outputs:
                counterpart = same.get(value, value)
                counterpart.pin(IS_OUTPUT)
            return all(_same_pins(value, other) for value, other in same.items())
        return False


def _counterparts(run: Run, other: Run, before: dict[Value, Value]) -> dict[Value, Value] | None:
    return counterparts(run.nodes, run.inputs, other.nodes, other.inputs, before)


def _same_pins(value: Value, counterpart: Value) -> bool:
    """True if what is seen of a value in one call is also seen in the other."""
    return value.pinned is None or counterpart.pinned is not None
