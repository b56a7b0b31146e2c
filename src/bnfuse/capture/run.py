"""Running calls of a model, for real or without arithmetic, and recording every operator that the dispatcher sees.

The parts, each in a file of its own: operators (:mod:`bnfuse.capture.recorder`), the values that tensors hold
(:mod:`bnfuse.capture.values`), module calls (:mod:`bnfuse.capture.module_calls`), contents that leave PyTorch
(:mod:`bnfuse.capture.escapes`) and what is left behind (:mod:`bnfuse.capture.leftovers`). A run leaves no trace on the
model: see :mod:`bnfuse.model.sandbox`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse import reasons
from bnfuse.capture import leftovers, unseen
from bnfuse.capture.escapes import EscapeWatch
from bnfuse.capture.gradients import Gradients
from bnfuse.capture.leaves import Leaves
from bnfuse.capture.lines import LineWatch
from bnfuse.capture.module_calls import ModuleCalls
from bnfuse.capture.recorder import Recorder, Watcher
from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.capture.values import Values
from bnfuse.errors import InputError
from bnfuse.graph.graph import Graph, ModuleCall, Node, Value
from bnfuse.model import pytree, tree
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.sandbox import SavedState, forked_random_state, leave_no_trace, own_input, without_history
from bnfuse.operators import shape_of
from bnfuse.reasons import Reason


@dataclass(frozen=True)
class Returned:
    """What a watched method returned during a run.

    Attributes:
        value: of the one tensor that it returned, None if it was called twice or returned something else.
        place: so many operators of the run came before.
        device: of the tensor.
    """

    value: Value | None
    place: int
    device: torch.device | None = None

    def stand_in(self) -> Tensor | None:
        """A tensor like the one that was returned, without its contents; None if nothing is like it."""
        value = self.value
        if value is None or value.strides is None or value.version != value.storage.version:  # it was written to
            return None
        return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=self.device)


@dataclass(eq=False)
class Run:
    """What one call of a model did.

    Attributes:
        call: the call.
        nodes: the operators that ran, in their order.
        calls: the module calls, in the order of returning.
        inputs: the values of the tensors among the arguments.
        outputs: the values of what it returned.
        output: what it returned, None for a run without arithmetic.
        looks: True if the code looked at a size or an element of a tensor that depends on the input.
        contents: True if it looked at an element, or at something that depends on the elements.
        layout: True if it looked at how a tensor lies in memory.
        modes: True if it asked whether gradients are tracked.
        stateful: True if the run left something behind that depends on the input, or a number.
        traces: True if it left anything behind.
        gradients: True if it asked for gradients, or runs only where they are tracked.
        methods: what those of the watched methods returned that were called with the same arguments, by name.
        hooks: True if the code put hooks on modules that then ran.
    """

    call: Call
    nodes: list[Node] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    output: Any = None
    looks: bool = False
    contents: bool = False
    layout: bool = False
    modes: bool = False
    stateful: bool = False
    traces: bool = False
    gradients: bool = False
    methods: dict[str, Returned] = field(default_factory=dict)
    hooks: bool = False
    start: _Mark | None = None


@dataclass(frozen=True)
class _Mark:
    """How much was recorded at some moment, to go back to.

    Attributes:
        index: of the next value.
        begins: True if the model remembers nothing of an earlier call.
    """

    runs: int
    nodes: int
    calls: int
    exposed: int
    index: int
    pins: list[tuple[Value, Reason | None]]
    begins: bool
    shapes_only: bool


@dataclass(frozen=True)
class _How:
    """How a call is made.

    Attributes:
        shapes_only: without the arithmetic.
        gradients: with gradients tracked.
        begins: the model remembers nothing of an earlier call.
        guessed: the ``id`` of each tensor that stands for an unseen argument.
    """

    shapes_only: bool
    gradients: bool
    begins: bool
    guessed: set[int]


class Recording:
    """What calls of one model did, in one graph: its parameters are the same in all of them.

    Attributes:
        graph: everything that was recorded.
        runs: one for each call, in the order of the calls.
        pinning: calls whose runs were dropped since they teach nothing but what is seen of them, which is pinned.
    """

    def __init__(
        self,
        model: nn.Module,
        known: Container[str] | None = None,
        methods: Sequence[str] = (),
        lines: LineWatch | None = None,
        hooks_may_see: bool = False,
        watcher: Watcher | None = None,
    ) -> None:
        """
        Args:
            known: names of the operators that are recorded as they are. Any other is recorded as the operators that
                it is made of, where PyTorch knows them (``hstack`` is ``cat``). None records all of them as they are.
            methods: names of methods whose results are outputs of the model too, where its forward calls them with
                what it was given itself.
            lines: notes which lines of the model's code run.
            hooks_may_see: whether the caller's own hooks on modules may see other numbers.
            watcher: looks at what operators make, and must neither keep nor change it.
        """
        self.model = model
        self._hooks_may_see = hooks_may_see
        self._watch_lines = contextlib.nullcontext if lines is None else lines.watching
        self.runs: list[Run] = []
        self.pinning: list[Call] = []
        self._known = known
        self._watcher = watcher
        self._methods = [name for name in methods if name != FORWARD]
        self._named = tree.named_modules(model)
        self._modules = tree.distinct(self._named)
        self._indices = _Counter()
        self._leaves = Leaves(self._named, self._indices)
        self.graph = Graph([], [], self._leaves.by_name)

    def record(self, *calls: Call, shapes_only: bool = False) -> list[Run]:
        """Make calls in evaluation mode, one after the other, and record them.

        The model remembers what one call leaves behind until the last is done; then it is as before. The tensors
        among the arguments are cloned first, since a model may write to its input.

        Args:
            shapes_only: without the arithmetic, and without an output: see :mod:`bnfuse.capture.shapes_only`.

        Raises:
            InputError: the model does not take the call.
            NeedsContentsError: ``shapes_only``, and the model looks at contents.
            Exception: ``shapes_only``, and whatever else it raised.
        """
        try:
            made = self._record(calls, shapes_only, False)
            if shapes_only or not any(run.gradients for run in made):
                return made
            self.forget(made[0])
        except InputError as error:
            try:
                return self._record(calls, False, True)
            except InputError:
                raise error from error.__cause__
        try:
            return self._record(calls, False, True)
        except InputError:
            return self._record(calls, False, False)

    def _record(self, calls: Sequence[Call], shapes_only: bool, gradients: bool) -> list[Run]:
        """The same, with gradients tracked or without."""
        mark = self._mark(True, shapes_only)
        guessed: set[int] = set()  # by the ``id`` of the copies, which live as long
        copies = [_own(call, guessed, gradients) for call in calls]
        watch = _MethodWatch(self.model, self._methods)
        try:
            sandbox = leave_no_trace(self._modules, watch_writes=False, gradients=gradients)
            with watch, sandbox as state:  # the recorder sees writes anyway
                values = Values(self._leaves, self._indices, self.graph.exposed, state.held, gradients)
                for call in calls:
                    begins = len(self.runs) == mark.runs
                    own = copies.pop(0)
                    how = _How(shapes_only, gradients, begins, guessed)
                    self.runs.append(self._run(call, own, values, state, watch, how))
                    del own
                made = self.runs[mark.runs :]
                if leftovers.take_care(values, [run.output for run in made], state, shapes_only):
                    made[-1].stateful = made[-1].traces = True
                if shapes_only:
                    for run in made:
                        run.output = None
        except BaseException:
            self._leaves.as_before_a_run()
            self._back_to(mark)
            raise
        self._leaves.as_before_a_run()
        return made

    def _run(
        self,
        call: Call,
        own: Call,
        values: Values,
        state: SavedState,
        watch: _MethodWatch,
        how: _How,
    ) -> Run:
        """Make one call, with tensors of its own."""
        shapes_only, gradients = how.shapes_only, how.gradients
        graph = self.graph
        run = Run(call, start=self._mark(how.begins, shapes_only))
        nodes, done = len(graph.nodes), len(graph.calls)
        calls = ModuleCalls(self._named, values, graph.calls, self._hooks_may_see)
        recorder = Recorder(values, calls, state, self._known, shapes_only, graph.nodes, self._watcher)
        escapes = EscapeWatch(values, calls, state, shapes_only)
        for tensor in own.tensors:
            values.add_input(tensor)
            run.inputs.append(values.of(tensor))
            run.inputs[-1].unseen = id(tensor) in how.guessed
        try:
            with contextlib.ExitStack() as around:
                for context in (
                    watch.of(own, values, run, graph.nodes),
                    forked_random_state(),
                    unseen.pinning(values),
                    calls.recorded(escapes.pause, escapes.resume),
                    recorder,
                    Gradients(recorder, values, calls) if gradients else contextlib.nullcontext(),
                    escapes,
                    self._watch_lines(),
                ):
                    around.enter_context(context)
                run.output = own.run(self.model)
        except Exception as error:
            if shapes_only:
                raise
            refused = InputError(_does_not_run(self.model, call, error))
            refused.call = call
            raise refused from error
        if shapes_only and escapes.gradients:
            raise NeedsContentsError("gradients")
        run.gradients = gradients or escapes.gradients
        run.outputs = values.expose(run.output, reasons.IS_OUTPUT)
        given = set(run.inputs)
        kept = [tensor for tensor in own.tensors if values.of(tensor) not in given]  # in a list that was passed
        run.outputs += values.expose(kept, reasons.IS_HELD)
        run.stateful, run.traces = _expose_stored(values, state)
        run.nodes, run.calls = graph.nodes[nodes:], graph.calls[done:]
        run.contents = escapes.reads_elements or recorder.reads_elements
        run.looks = escapes.looks or recorder.looks or run.contents
        run.layout, run.modes = escapes.reads_layout, escapes.reads_modes
        run.hooks = calls.hooks
        if gradients:
            run.output = without_history(run.output)  # which holds tensors of the run
        return run

    def _mark(self, begins: bool, shapes_only: bool) -> _Mark:
        graph = self.graph
        counts = (len(self.runs), len(graph.nodes), len(graph.calls), len(graph.exposed), self._indices.next)
        return _Mark(*counts, self._leaves.pins(), begins, shapes_only)

    def forget(self, run: Run) -> None:
        """Forget a run and all that were recorded after it, as if they had never been."""
        assert run.start is not None
        self._back_to(run.start)

    def _back_to(self, mark: _Mark) -> None:
        graph = self.graph
        del self.runs[mark.runs :], graph.nodes[mark.nodes :], graph.calls[mark.calls :], graph.exposed[mark.exposed :]
        self._leaves.forget_since(mark.index, mark.nodes)
        for value, pinned in mark.pins:
            value.pinned = pinned
        self._indices.next = mark.index

    @property
    def sequences(self) -> list[list[Run]]:
        """The runs, those together between which the model remembers."""
        found: list[list[Run]] = []
        for run in self.runs:
            assert run.start is not None
            if run.start.begins:
                found.append([])
            found[-1].append(run)
        return found

    def again(self, model: nn.Module | None = None) -> Recording:
        """The same calls, recorded anew on the model as it is now, or on another one.

        Raises:
            Exception: what `record` raises.
        """
        model = self.model if model is None else model
        other = Recording(model, self._known, self._methods, hooks_may_see=self._hooks_may_see)
        for runs in self.sequences:
            assert runs[0].start is not None
            calls = [run.call for run in runs]
            try:
                other.record(*calls, shapes_only=True)
            except (NeedsContentsError, Exception):  # noqa: BLE001 (whatever the unwritten numbers lead to)
                other.record(*calls)
        return other

    def of(self, model: nn.Module) -> Recording:
        """The same calls of another model, and then those whose runs were dropped, but for what is seen of them.

        Raises:
            Exception: what `record` raises.
        """
        other = self.again(model)
        for call in self.pinning:
            try:
                other.record(call, shapes_only=True)
            except (NeedsContentsError, Exception):  # noqa: BLE001 (whatever the unwritten numbers lead to)
                other.record(call)
        return other


class _Counter:
    """Counts values, and can be set back."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.next += 1
        return self.next - 1


class _MethodWatch(contextlib.AbstractContextManager["_MethodWatch"]):
    """Takes what some methods return for outputs of the model, where its forward calls them with its own arguments.

    Then a call of the method from outside is the beginning of the run of the forward, and need not be recorded.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str]) -> None:
        self._model = model
        self._methods = [name for name in methods if name not in model.__dict__]
        self._call: Call | None = None
        self._values: Values | None = None
        self._seen: dict[str, Returned] = {}
        self._nodes: Sequence[Node] = ()
        self._before = 0

    def __enter__(self) -> _MethodWatch:
        for name in self._methods:
            self._model.__dict__[name] = self._watched(name, getattr(self._model, name))
        return self

    def __exit__(self, *raised: Any) -> None:
        for name in self._methods:
            self._model.__dict__.pop(name, None)

    @contextlib.contextmanager
    def of(self, call: Call, values: Values, run: Run, nodes: Sequence[Node]) -> Iterator[None]:
        """Watch during a call.

        Args:
            nodes: the operators, to which those of the run are added.
        """
        self._call, self._values, self._seen = call, values, run.methods
        self._nodes, self._before = nodes, len(nodes)
        try:
            yield
        finally:
            self._call = self._values = None

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            if self._call is not None and self._values is not None and _same_arguments(self._call, args, kwargs):
                exposed = self._values.expose(output, reasons.IS_OUTPUT)
                place = len(self._nodes) - self._before
                alone = isinstance(output, Tensor) and name not in self._seen
                self._seen[name] = Returned(exposed[0], place, output.device) if alone else Returned(None, place)
            return output

        return call


def _own(call: Call, guessed: set[int], gradients: bool) -> Call:
    """The call with copies of its tensors.

    Args:
        guessed: the ``id`` of each tensor that stands for an unseen argument is added.
    """

    def put_in(value: Any) -> Any:
        if isinstance(value, unseen.Guess):
            made = own_input(value.tensor, gradients)
            guessed.add(id(made))
            return made
        if type(value) in (list, tuple):
            return type(value)(map(put_in, value))
        return {name: put_in(item) for name, item in value.items()} if type(value) is dict else value

    own = call.map(functools.partial(own_input, gradients=gradients))
    return own.with_inputs(map(put_in, own.args), {name: put_in(value) for name, value in own.kwargs.items()})


def _same_arguments(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if a method is given the very objects that the call was given."""
    if call.method != FORWARD or len(args) != len(call.args) or kwargs.keys() != call.kwargs.keys():
        return False
    return all(map(is_, args, call.args)) and all(value is call.kwargs[name] for name, value in kwargs.items())


@dataclass(frozen=True)
class Capture:
    """The record of a single run, and what the run returned; the attributes are those of `Run`."""

    graph: Graph
    output: Any
    looks: bool
    stateful: bool
    traces: bool
    gradients: bool = False


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Container[str] | None = None
) -> Capture:
    """Run ``model(*args, **kwargs)`` and record it; see `Recording`.

    Raises:
        InputError: the model does not run on these inputs.
    """
    return _single(model, args, kwargs, known, False)


def capture_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Container[str] | None = None
) -> Capture:
    """The same without the arithmetic, and without an output: see :mod:`bnfuse.capture.shapes_only`.

    Raises:
        NeedsContentsError: the model looks at contents.
        Exception: whatever else it raised.
    """
    return _single(model, args, kwargs, known, True)


def _single(model: nn.Module, args: Any, kwargs: Any, known: Container[str] | None, shapes_only: bool) -> Capture:
    recording = Recording(model, known)
    (run,) = recording.record(Call(*args, **kwargs), shapes_only=shapes_only)
    return Capture(recording.graph, run.output, run.looks, run.stateful, run.traces, run.gradients)


def _expose_stored(values: Values, state: SavedState) -> tuple[bool, bool]:
    """Pin what the run stored in the model; returns whether the model is then stateful, and whether it has traces."""
    state.look_again()
    stateful = bool(state.contents or state.memory)
    traces = False
    for where, stored in state.stored():
        found = pytree.tensors(stored)
        traces = True
        stateful |= not found
        for _, tensor in found:
            value = values.known(tensor)
            if value is not None and not value.independent:
                value.pin(reasons.IS_STORED, place=where)
                values.exposed.append(value.index)
                stateful = True
    for leaf in state.replaced():
        value = values.known(leaf)
        if value is not None:
            value.pin(reasons.IS_REPLACED)
            stateful = True
    return stateful, traces or stateful


def _does_not_run(model: nn.Module, call: Call, error: Exception) -> str:
    given = ", ".join(
        f"{'x'.join(map(str, shape_of(tensor))) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
        for tensor in call.tensors
    )
    name = type(model).__name__ if call.method == FORWARD else f"{type(model).__name__}.{call.method}"
    first_line = str(error).strip().split("\n")[0]
    return (
        f"{name} does not run on the inputs ({given or 'no tensors'}): "
        f"{type(error).__name__}: {first_line}. Pass inputs that it accepts."
    )
