"""Blocks in which norms stay for the structure of the network: shared layers, and weights that are computed; branches.

They are drawn only where networks are fused with restructuring, so that the networks of all other seeds stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz.blocks import layer_on, norm, tied_convolutions
from fuzz.generate import BRANCHES, STRUCTURES, Action, Builder, Choice, Unfit
from fuzz.operators import activate, convolution, linear, width

VARIANTS = ("-$0", "2 * $0", "$0.flip(0)", "$0 + 0.5", "torch.tanh($0)", "F.silu($0)", "$0.roll(1, -1)", "$0.abs()")
"""What the uses of a shared layer are given."""

COMPUTED = (
    "StandardisedConv({0})", "ScaledConv({0})", "MaskedConv({0})", "FactoredConv({0})", "BatchConv({0})",
    "weight_norm(nn.Conv2d({0}))", "spectral_norm(nn.Conv2d({0}))", "orthogonal(nn.Conv2d({0}))",
    "weight_norm_by_hook(nn.Conv2d({0}))", "pruned(nn.Conv2d({0}))", "weight_norm(spectral_norm(nn.Conv2d({0})))",
)  # fmt: skip
"""Convolutions that compute their weights."""


def structure(weight: float, choices: list[Choice] = STRUCTURES) -> Callable[[Action], Action]:
    def register(action: Action) -> Action:
        choices.append(Choice(action.__name__, weight, action))
        return action

    return register


def _module(g: Builder) -> str:
    """The module that the last step calls."""
    layer = g.steps[-1].code.partition("(")[0]
    if not layer.startswith("m.") or g.steps[-1].code != f"{layer}($0)":
        raise Unfit
    return layer


def _uses(g: Builder, layer: str, x: str, y: str) -> None:
    """Further uses of a layer, most of them with a norm of their own behind them."""
    made = [y]
    for _ in range(g.one_of(1, 1, 2, 3)):
        source = g.one_of(x, x, made[-1]) if g.shape(made[-1]) == g.shape(x) else x
        made.append(g.apply(layer, g.emit(g.one_of(*VARIANTS), source) if g.chance(0.9) else source))
    for y in made:
        behind = norm(g, y) if g.chance(0.9) else y
        if g.chance(0.05):
            g.emit("$0 + 1", y)
        if g.chance(0.7):
            activate(g, behind)


@structure(4)
def levels(g: Builder) -> None:
    """A layer that several levels share, with a norm for each."""
    x = g.pick(2, 3, 4, 4, 5)
    y = linear(g, x) if len(g.shape(x)) == 2 else convolution(g, x, keep_size=g.chance(0.7), kind="module")
    _uses(g, _module(g), x, y)


@structure(1)
def norms_before(g: Builder) -> None:
    """A layer that several levels share, with a norm before each use."""
    x = g.pick(3, 4)
    n, channels = len(g.shape(x)) - 2, g.shape(x)[1]
    padding = g.one_of("", "", ", padding=1, padding_mode='circular'", ", padding=1")
    layer = g.layer("c", f"nn.Conv{n}d({channels}, {width(g)}, {g.one_of(1, 3)}{padding})")
    for _ in range(g.one_of(2, 2, 3)):
        y = g.emit(g.one_of("F.silu($0)", "torch.sin($0)", "F.gelu(-$0)", "$0.cos()"), x)
        y = g.apply(layer, norm(g, y) if g.chance(0.9) else y)
        if g.chance(0.5):
            activate(g, y)


@structure(4)
def computed_by_a_layer(g: Builder) -> None:
    """A convolution that computes its weight, called once or more."""
    x = g.pick(4)
    channels = g.shape(x)[1]
    size = g.one_of(1, 3)
    options = g.one_of("", ", padding=1", ", stride=2", ", bias=False", ", padding=1, bias=False")
    if size == 1:
        options = options.replace(", padding=1", "")
    layer = g.layer("c", g.one_of(*COMPUTED).format(f"{channels}, {width(g)}, {size}{options}"))
    y = g.apply(layer, x)
    if g.chance(0.08):
        g.emit(f"$0 * {layer}.weight.abs().sum()", x)
    if g.chance(0.4):
        _uses(g, layer, x, y)
        return
    y = norm(g, y)
    if g.chance(0.7):
        activate(g, y)


@structure(1)
def tied(g: Builder) -> None:
    """Two layers that hold one weight."""
    tied_convolutions(g)


@structure(0.7)
def looked_at(g: Builder) -> None:
    """Code that goes by a layer or a norm as an object."""
    y = layer_on(g, g.pick(2, 4))
    layer = _module(g)
    x = g.steps[-1].operands[0]
    z = norm(g, y)
    g.emit(
        g.one_of(
            f"F.silu($0) if type({layer}).__name__ == '{type(g.live.get_submodule(layer[2:])).__name__}' else $0",
            f"torch.sin($0) if hasattr({layer}, 'weight') else $0",
            f"$0 * {layer}.weight.abs().sum()",
            f"$0 + {layer}.weight.shape[0]",
        ),
        z,
    )
    if g.chance(0.7):
        norm(g, g.apply(layer, g.emit("-$0", x)))


def _branch(g: Builder, channels: int, rank: int) -> str:
    """The code of a linear branch that keeps size and channels."""
    size, step = g.one_of(1, 3, 3, 5), g.one_of(1, 1, 1, 2)
    groups = g.one_of(1, 1, *(each for each in (2, 3, 4, channels) if channels % each == 0))
    options = f"padding={step * (size - 1) // 2}, dilation={step}, groups={groups}, bias={g.chance(0.5)}"
    if g.chance(0.1):
        options += ", padding_mode='circular'"
    code = f"nn.Conv{rank - 2}d({channels}, {channels}, {size}, {options})"
    if g.chance(0.2):
        code = f"nn.AvgPool{rank - 2}d(3, 1, 1{', count_include_pad=False' if g.chance(0.2) else ''})"
    behind = [f"nn.BatchNorm{rank - 2}d({channels})"] if g.chance(0.6) else []
    if g.chance(0.3):
        scaling = f"Scaling({channels}{', 1' * (rank - 2)})"
        behind.append(g.one_of("nn.Dropout(0.5)", "nn.Identity()", scaling, scaling, "nn.ReLU()"))
    if g.chance(0.15):
        behind.append(f"nn.Conv{rank - 2}d({channels}, {channels}, {g.one_of(1, 3)}, padding='same')")
    return f"nn.Sequential({', '.join([code, *behind])})" if behind else code


@structure(5, BRANCHES)
def branched(g: Builder) -> None:
    """A block that adds up branches, called once or twice."""
    x = g.pick(3, 4, 4, 5)
    if g.chance(0.7):
        x = activate(g, x)
    rank, channels = len(g.shape(x)), g.shape(x)[1]
    branches = [_branch(g, channels, rank) for _ in range(g.one_of(1, 2, 2, 3))]
    branches += ["None"] * g.one_of(0, 0, 1)
    g.random.shuffle(branches)
    factors = tuple(g.one_of(1, 1, 1, -1, 0.5) for _ in branches)
    act = g.one_of("", "relu", "silu", "gelu", "softplus")
    block = g.layer("b", f"Branched({', '.join(branches)}, factors={factors}, in_place={g.chance(0.3)}, act={act!r})")
    y = g.apply(block, x)
    if g.chance(0.3):
        y = g.apply(block, g.emit("torch.sin($0)", y))
    if g.chance(0.6):
        norm(g, y)


@structure(4, BRANCHES)
def branches_in_the_code(g: Builder) -> None:
    """Branches that the network itself adds up, one of which may be read elsewhere too."""
    x = g.pick(3, 4, 4, 5)
    rank, channels = len(g.shape(x)), g.shape(x)[1]
    made = []
    for _ in range(g.one_of(2, 2, 3)):
        y = g.apply(g.layer("c", _branch(g, channels, rank)), x)
        made.append(norm(g, y) if g.chance(0.3) else y)
    if g.chance(0.3):
        made.append(x)
    if g.chance(0.1):
        g.emit("$0.abs()", made[0])
    total = made[0]
    for y in made[1:]:
        total = g.emit(
            g.one_of("$0 + $1", "$1 + $0", "$0 - $1", "$0 + 2 * $1", "torch.add($0, $1, alpha=-0.5)"), total, y
        )
    if g.chance(0.7):
        activate(g, total)
