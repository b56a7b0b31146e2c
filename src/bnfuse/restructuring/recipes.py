"""A linear part of a recorded run as a recipe: what it does to one tensor, and which parameters it reads for that.

A recipe is data. It says nothing of numbers, so it is the same for two calls of one module, at whatever size; the
numbers come in when it is followed, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.restructuring.borders import PADS, Border, Borders, sides
from bnfuse.restructuring.linear_maps import LinearMap, NotOneLayerError, identity, total

# Contents of parameters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A parameter or buffer.

    Attributes:
        names: all of its names.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that the code holds elsewhere; the same only as itself."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True)
class Computed:
    """What an operator makes of other contents.

    Attributes:
        operator: an overload of ATen.
        arguments: by name; contents in place of tensors.
        result: which of its results.
    """

    operator: Any
    arguments: tuple[tuple[str, Any], ...]
    result: int


Contents = Held | Constant | Computed

Source = Callable[[Held], Tensor]
"""Gives the numbers of a parameter or buffer."""


def contents_of(value: Value, given: Mapping[Value, Contents] | None = None) -> Contents:
    """Where a value comes from that does not depend on the inputs.

    Raises:
        NotOneLayerError: that cannot be told, or it is another thing each time.
    """
    if not value.independent:
        raise NotOneLayerError("a factor depends on the input")
    if value.tensor is not None:
        if value.version or value.storage.version:
            raise NotOneLayerError("a parameter is written to")
        if value.names:
            return Held(value.names, value.shape)
        if value.kind is Kind.CONSTANT:
            return Constant(value.tensor)
    node = value.producer
    if node is None or node.written or torch.Tag.nondeterministic_seeded in node.overload.tags:
        raise NotOneLayerError("a parameter is computed in a way that is not known")
    arguments = tuple((name, _argument(item)) for name, item in node.bound.items())
    return Computed(node.overload, arguments, node.outputs.index(value))


def _argument(item: Any) -> Any:
    if isinstance(item, Value):
        return contents_of(item)
    return tuple(map(_argument, item)) if isinstance(item, (list, tuple)) else item


def numbers(contents: Contents, source: Source, shapes_only: bool = False) -> Tensor:
    """The contents in float64, where they are floating-point numbers, on the CPU.

    Args:
        shapes_only: without numbers, on the meta device.
    """
    if isinstance(contents, Held):
        return _wide(source(contents))
    if isinstance(contents, Constant):
        return _wide(contents.tensor.to("meta") if shapes_only else contents.tensor)
    arguments = {name: _given(item, source, shapes_only) for name, item in contents.arguments}
    schema = [argument.name for argument in contents.operator._schema.arguments if not argument.kwarg_only]
    positional = []
    for name in schema:
        if name not in arguments:
            break
        positional.append(arguments.pop(name))
    try:
        made = contents.operator(*positional, **arguments)
    except Exception as error:
        raise NotOneLayerError("a parameter is computed in a way that cannot be repeated") from error
    return _wide(made if isinstance(made, Tensor) else made[contents.result])


def _given(item: Any, source: Source, shapes_only: bool) -> Any:
    if isinstance(item, (Held, Constant, Computed)):
        return numbers(item, source, shapes_only)
    if isinstance(item, torch.device):  # of the model
        return torch.device("meta" if shapes_only else "cpu")
    return [_given(part, source, shapes_only) for part in item] if isinstance(item, tuple) else item


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor if tensor.is_meta else tensor.cpu()
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


# Steps --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """The tensor itself."""


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer.

    Attributes:
        padding: before and behind, for each axis.
    """

    of: Step
    weight: Contents
    bias: Contents | None
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Normalised:
    """A batch norm in evaluation."""

    of: Step
    mean: Contents
    variance: Contents
    weight: Contents | None
    bias: Contents | None
    eps: float


@dataclass(frozen=True)
class Scaled:
    """A product with a number or a number for each channel.

    Attributes:
        divided: by it.
    """

    of: Step
    by: Contents | float
    divided: bool = False


@dataclass(frozen=True)
class Shifted:
    """A number, or one for each channel, times ``factor``, is added."""

    of: Step
    by: Contents | float
    factor: float = 1.0


@dataclass(frozen=True)
class Pooled:
    """The mean over places, those of the padding counted, or the tensor padded with zeros, or every so many places.

    Attributes:
        divisor: the sum of the places is divided by it.
    """

    of: Step
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    divisor: int


@dataclass(frozen=True)
class Padded:
    """The tensor padded with numbers, one or one for each channel, that have to be what it is where zeros come in.

    Attributes:
        by: each is in a part of the border.
    """

    of: Step
    padding: tuple[tuple[int, int], ...]
    by: tuple[Contents | float, ...]


@dataclass(frozen=True)
class Sum:
    """A sum of steps, each times a number."""

    terms: tuple[tuple[Step, float], ...]


Step = Whole | Layer | Normalised | Scaled | Shifted | Pooled | Padded | Sum


@dataclass(frozen=True)
class Recipe:
    """What is done to one tensor.

    Attributes:
        step: the last step.
        axes: over which a convolution goes; 0 for linear layers.
        channels: of the tensor.
    """

    step: Step
    axes: int
    channels: int

    def follow(self, source: Source) -> LinearMap:
        """The map in float64.

        Raises:
            NotOneLayerError: no single layer does this.
        """
        return _Following(self, source, False).map(self.step)

    def follow_shapes(self) -> LinearMap:
        """The map without numbers, on the meta device."""

        def source(held: Held) -> Tensor:
            return torch.empty(held.shape, dtype=torch.float64, device="meta")

        return _Following(self, source, True).map(self.step)

    def check_borders(self, source: Source) -> None:
        """Raise NotOneLayerError if it pads with something else than what zeros become."""
        following = _Following(self, source, False)
        for padded in _padded_in(self.step):
            following.map(padded)

    def held(self) -> dict[Held, None]:
        """The parameters and buffers that it reads."""
        found: dict[Held, None] = {}
        _note_held(self.step, found)
        return found


def _padded_in(step: Step) -> list[Padded]:
    """The paddings with numbers in a step, each once."""
    found: list[Padded] = []
    waiting, seen = [step], {id(step)}
    while waiting:
        each = waiting.pop()
        if isinstance(each, Padded):
            found.append(each)
        for part in _before(each):
            if id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)
    return found


def _before(step: Step) -> list[Step]:
    """The steps that a step begins with."""
    if isinstance(step, Sum):
        return [term for term, _ in step.terms]
    return [] if isinstance(step, Whole) else [step.of]


def _note_held(item: Any, found: dict[Held, None]) -> None:
    if isinstance(item, Held):
        found[item] = None
    elif isinstance(item, tuple):
        for part in item:
            _note_held(part, found)
    elif isinstance(item, (*_STEPS, Computed)):
        for part in vars(item).values():
            _note_held(part, found)


@dataclass
class _Following:
    recipe: Recipe
    source: Source
    shapes_only: bool
    known: dict[int, LinearMap] = field(default_factory=dict)

    def map(self, step: Step) -> LinearMap:
        """Of a step; one that several others begin with is followed once."""
        if id(step) not in self.known:
            self.known[id(step)] = self._map(step)
        return self.known[id(step)]

    def _map(self, step: Step) -> LinearMap:
        if isinstance(step, Whole):
            return identity(self.recipe.channels, self.recipe.axes, self.shapes_only)
        if isinstance(step, Sum):
            return total([self.map(term) if factor == 1 else self.map(term).scaled(factor)
                          for term, factor in step.terms])  # fmt: skip
        before = self.map(step.of)
        if isinstance(step, Layer):
            return before.then(self._layer(step))
        if isinstance(step, Pooled):
            return before.then(_pool(step, before))
        if isinstance(step, Padded):
            return self._padded(step, before)
        if isinstance(step, Normalised):
            if before.weight.is_meta:
                return before.shifted(0.0)
            mean, variance = self._channels(step.mean), self._channels(step.variance)
            scale = (variance + step.eps).rsqrt()
            scale = scale if step.weight is None else scale * self._channels(step.weight)
            shift = -mean * scale
            return before.scaled(scale).shifted(shift if step.bias is None else shift + self._channels(step.bias))
        if before.weight.is_meta:
            return before if isinstance(step, Scaled) else before.shifted(0.0)
        by = step.by if isinstance(step.by, float) else self._channels(step.by)
        if isinstance(step, Scaled):
            return before.scaled(1 / by if step.divided else by)
        return before.shifted(by * step.factor)

    def _padded(self, step: Padded, before: LinearMap) -> LinearMap:
        """Padding what comes in with zeros gives the same, if the numbers are what these become: the bias."""
        ones = (1,) * len(step.padding)
        pool = _pool(Pooled(step.of, ones, ones, step.padding, 1), before)
        made = replace(before, bias=None).then(pool)
        if not self.shapes_only:
            for by in step.by:
                number = before.weight.new_tensor(by) if isinstance(by, float) else self._channels(by)
                if not _is_bias(number, before):
                    raise NotOneLayerError("it is padded with something else than what zeros become")
        return replace(made, bias=before.bias)

    def _layer(self, step: Layer) -> LinearMap:
        weight = self._numbers(step.weight)
        bias = None if step.bias is None else self._numbers(step.bias)
        return _convolution(weight, bias, step.stride, step.padding, step.dilation, step.groups)

    def _numbers(self, contents: Contents) -> Tensor:
        return numbers(contents, self.source, self.shapes_only)

    def _channels(self, contents: Contents) -> Tensor:
        found = self._numbers(contents)
        return found.reshape(()) if found.numel() == 1 else found.reshape(-1)


_ROUNDING = 1e-12
"""So much of the largest two ways to compute the same numbers may differ."""


def _is_bias(number: Tensor, of: LinearMap) -> bool:
    """Whether a number, or one for each channel, is what a map makes of zeros."""
    if number.is_meta or of.weight.is_meta:
        return False
    bias = of.weight.new_zeros(of.channels_out) if of.bias is None else of.bias
    largest = torch.maximum(number.abs().max(), bias.abs().max())
    return bool(largest.isfinite() and ((number - bias).abs() <= _ROUNDING * largest).all())


def _convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> LinearMap:
    axes = zip(padding, dilation, weight.shape[2:], strict=True)
    excess = tuple(sum(sides) - step * (taps - 1) for sides, step, taps in axes)
    return LinearMap(weight, bias, groups, stride, tuple(-before for before, _ in padding), dilation, excess)


def _pool(step: Pooled, before: LinearMap) -> LinearMap:
    channels = before.channels_out
    weight = before.weight.new_full((channels, 1, *step.kernel), 1 / step.divisor)
    return _convolution(weight, None, step.stride, step.padding, (1,) * len(step.kernel), channels)


# From operators to steps ---------------------------------------------------------------------------------------------

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_POOLS = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}
_SUMS = frozenset({"add", "sub", "rsub"})
_NOTHING = frozenset({"detach", "clone", "contiguous", "dropout", "feature_dropout", "alpha_dropout"})
_BY_CHANNEL = frozenset({"mul", "div", "neg"})
LINEAR = frozenset({*_CONVOLUTIONS, *_POOLS, *_SUMS, *_NOTHING, *_BY_CHANNEL, "linear", "batch_norm",
                    *PADS, "slice"})  # fmt: skip
"""The operators that may be a step."""


def axes_of(node: Node) -> int | None:
    """Over how many axes an operator goes besides that of the channels, None if it does not tell."""
    if node.operator in _CONVOLUTIONS:
        return _CONVOLUTIONS[node.operator]
    if node.operator in _POOLS:
        return _POOLS[node.operator]
    if node.operator == "linear":
        return 0
    if node.operator == "batch_norm":
        return max(len(node.inputs[0].shape) - 2, 0)
    return None


def data_inputs(node: Node) -> list[Value]:
    """The inputs of an operator that depend on those of the model."""
    return [value for value in dict.fromkeys(node.inputs) if not value.independent]


def _present(node: Node, name: str) -> Value | None:
    """A weight or bias, None if there is none, also if one could be created."""
    value: Value | None = node.argument(name)
    return None if value is None or value.kind is Kind.ABSENT else value


class Steps:
    """All steps that were read, each once: two that do the same are one object, however much lies behind them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Step] = {}
        self._misfits: dict[tuple[int, int, int], str | None] = {}

    def check_borders(self, recipe: Recipe, source: Source) -> None:
        """`Recipe.check_borders` of one whose steps are among these, each once."""
        key = id(recipe.step), recipe.axes, recipe.channels
        if key not in self._misfits:
            try:
                recipe.check_borders(source)
                self._misfits[key] = None
            except NotOneLayerError as error:
                self._misfits[key] = str(error)
        misfit = self._misfits[key]
        if misfit is not None:
            raise NotOneLayerError(misfit)

    def one(self, made: Step) -> Step:
        """The step that does the same as this one, which is made of such steps."""
        key = (type(made), *(_key(part) for part in vars(made).values()))
        return self._known.setdefault(key, made)


def _key(part: Any) -> Any:
    if isinstance(part, _STEPS):
        return id(part)
    return tuple(map(_key, part)) if isinstance(part, tuple) else part


_STEPS = (Whole, Layer, Normalised, Scaled, Shifted, Pooled, Padded, Sum)


class Reader:
    """Reads operators as steps from one tensor on.

    Attributes:
        nodes: the operators that were read.
    """

    def __init__(self, root: Value, axes: int, steps: Steps, borders: Borders) -> None:
        self.root, self.axes, self._borders = root, axes, borders
        self.axis = len(root.shape) - 1 - axes
        self.nodes: dict[Node, None] = {}
        self._steps = steps
        self._known: dict[Value, Step] = {root: steps.one(Whole())}
        if self.axis < 0 or (axes and self.axis != 1) or not root.dtype.is_floating_point:
            raise NotOneLayerError("it is not a batch of images or vectors")

    @property
    def values(self) -> list[Value]:
        """The values of which it was read what makes them, the first one included."""
        return list(self._known)

    def step(self, value: Value) -> Step:
        """The step that makes a value.

        Raises:
            NotOneLayerError: it is no step.
        """
        if value not in self._known:
            node, border = self._borders.maker(value), self._borders.of(value)
            if node is None or node.operator not in LINEAR or len(node.outputs) != 1:
                raise NotOneLayerError("an operator is not linear")
            if value.dtype != self.root.dtype or len(value.shape) != len(self.root.shape):
                raise NotOneLayerError("the type or the axes change")
            self.nodes.update(dict.fromkeys((node,) if border is None else border.nodes))
            self._known[value] = self._steps.one(self._padded(node, border) if border else self._read(node))
        return self._known[value]

    def _read(self, node: Node) -> Step:
        name = node.operator
        if name in _CONVOLUTIONS or name == "linear":
            return self._layer(node)
        if name in _POOLS:
            return self._pool(node)
        if name in _SUMS:
            return self._sum(node)
        if name in _BY_CHANNEL:
            return self._product(node)
        if name == "batch_norm":
            return self._norm(node)
        if name in PADS:
            return self._padded(node)
        if name == "slice":
            return self._slice(node)
        if node.argument("train", False) or node.argument("training", False):
            raise NotOneLayerError("it is random")
        return self.step(self._data(node))

    def _data(self, node: Node) -> Value:
        data = node.data
        if data is None:
            raise NotOneLayerError("an operator has several inputs")
        return data

    def _layer(self, node: Node) -> Step:
        x, weight, bias = node.bound["input"], node.bound["weight"], _present(node, "bias")
        if x.independent or axes_of(node) != self.axes or len(weight.shape) != self.axes + 2:
            raise NotOneLayerError("layers over different axes")
        added = None if bias is None else contents_of(bias)
        if not self.axes:
            return Layer(self.step(x), contents_of(weight), added)
        kernel = weight.shape[2:]
        dilation = self._each(node.argument("dilation", 1))
        padding: Any = node.argument("padding", 0)
        if padding == "same":
            spans = [step * (taps - 1) for step, taps in zip(dilation, kernel, strict=True)]
            sides = tuple((span // 2, span - span // 2) for span in spans)
        else:
            sides = tuple((each, each) for each in self._each(0 if padding == "valid" else padding))
        stride = self._each(node.argument("stride", 1))
        groups = node.argument("groups", 1)
        return Layer(self.step(x), contents_of(weight), added, stride, sides, dilation, groups)

    def _each(self, numbers: Any) -> tuple[int, ...]:
        """A number for each axis."""
        if isinstance(numbers, int):
            return (numbers,) * self.axes
        return tuple(numbers) if len(numbers) == self.axes else tuple(numbers) * self.axes

    def _pool(self, node: Node) -> Step:
        if axes_of(node) != self.axes:
            raise NotOneLayerError("layers over different axes")
        kernel = self._each(node.bound["kernel_size"])
        stride = node.argument("stride") or kernel
        padding = self._each(node.argument("padding", 0))
        if node.argument("ceil_mode", False):
            raise NotOneLayerError("a pool has places that stand over the border")
        if any(padding) and not node.argument("count_include_pad", True):
            raise NotOneLayerError("a pool does not count the padding")
        divisor = node.argument("divisor_override") or math.prod(kernel)
        sides = tuple((each, each) for each in padding)
        return Pooled(self.step(self._data(node)), kernel, self._each(stride), sides, divisor)

    def _sum(self, node: Node) -> Step:
        x, y, alpha = node.bound["self"], node.bound["other"], node.argument("alpha", 1)
        if any(isinstance(number, complex) for number in (x, y, alpha)):
            raise NotOneLayerError("it is complex")
        alpha = float(alpha)
        factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[node.operator]
        terms: list[tuple[Step, float]] = []
        shifts: list[tuple[Contents | float, float]] = []
        for operand, factor in zip((x, y), factors, strict=True):
            if isinstance(operand, Value) and not operand.independent:
                if operand.shape != node.outputs[0].shape:
                    raise NotOneLayerError("a term is repeated along an axis")
                terms.append((self.step(operand), factor))
            else:
                shifts.append((self._by_channel(operand, node), factor))
        made: Step = Sum(tuple(terms)) if len(terms) > 1 else terms[0][0]
        if len(terms) == 1 and terms[0][1] != 1:
            made = Scaled(made, terms[0][1])
        for by, factor in shifts:
            if by != 0.0:
                made = Shifted(self._steps.one(made), by, factor)
        return made

    def _product(self, node: Node) -> Step:
        x, y = node.bound["self"], node.argument("other", -1.0)
        if node.argument("rounding_mode") is not None:
            raise NotOneLayerError("it rounds")
        if isinstance(x, Value) and not x.independent:
            data, by = x, y
        elif node.operator == "mul" and isinstance(y, Value) and not y.independent:
            data, by = y, x
        else:
            raise NotOneLayerError("an operator is not linear")
        if isinstance(by, complex):
            raise NotOneLayerError("it is complex")
        if data.shape != node.outputs[0].shape:
            raise NotOneLayerError("a term is repeated along an axis")
        return Scaled(self.step(data), self._by_channel(by, node), node.operator == "div")

    def _by_channel(self, operand: Any, node: Node) -> Contents | float:
        """A number, or contents that have one for each channel."""
        if not isinstance(operand, Value):
            return float(operand)
        axes = len(node.outputs[0].shape)
        offset = axes - len(operand.shape)
        if any(size != 1 and place + offset != self.axis for place, size in enumerate(operand.shape)):
            raise NotOneLayerError("a factor or a shift is not the same at all places")
        return contents_of(operand)

    def _norm(self, node: Node) -> Step:
        bound = node.bound
        mean, variance = bound.get("running_mean"), bound.get("running_var")
        if mean is None or variance is None or bound.get("training") or self._data(node) is not bound["input"]:
            raise NotOneLayerError("a norm takes its statistics from the input")
        if self.axis != 1:
            raise NotOneLayerError("layers over different axes")
        given = (_present(node, name) for name in ("weight", "bias"))
        weight, bias = (None if value is None else contents_of(value) for value in given)
        eps = float(node.argument("eps", 1e-5))
        return Normalised(self.step(bound["input"]), contents_of(mean), contents_of(variance), weight, bias, eps)

    def _padded(self, node: Node, border: Border | None = None) -> Step:
        """A padding, or one whose border is written to."""
        if node.argument("mode", "constant") != "constant":
            raise NotOneLayerError("it is padded with what is there")
        around = sides(node.bound["pad"], len(self.root.shape))
        beyond, around = around[: -self.axes or None], around[len(around) - self.axes :]
        if any(map(any, beyond)) or any(min(side) < 0 for side in around):
            raise NotOneLayerError("it is padded along another axis, or cut off")
        of, ones = self.step(self._data(node)), (1,) * self.axes
        by = (float(node.argument("value") or 0.0),) if border is None else border.by
        if any(by):
            given = (contents_of(each) if isinstance(each, Value) else each for each in by)
            return Padded(of, tuple(around), tuple(given))
        return Pooled(of, ones, ones, tuple(around), 1)

    def _slice(self, node: Node) -> Step:
        """Every so many places from the first on."""
        axis = node.argument("dim", 0) % len(self.root.shape) - self.axis - 1
        start, end = node.argument("start") or 0, node.argument("end")
        if axis < 0 or start or (end is not None and end < 2**63 - 1):
            raise NotOneLayerError("it leaves out the border of the image")
        ones = (1,) * self.axes
        stride = tuple(node.argument("step", 1) if place == axis else 1 for place in range(self.axes))
        return Pooled(self.step(self._data(node)), ones, stride, ((0, 0),) * self.axes, 1)
