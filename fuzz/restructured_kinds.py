"""What a change of the structure is about: one function for each kind of network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fuzz import generate
from fuzz.blocks import HOOKS, dressing, norm
from fuzz.calls import Variation
from fuzz.generate import Unfit
from fuzz.operators import activate, divisors, width
from fuzz.restructured import Kind, RestructuredBuilder

KINDS: dict[str, Kind] = {}

SPATIAL = ("image", "image", "image", "image", "sequence", "volume")


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


# Parts --------------------------------------------------------------------------------------------------------------


def begin(g: RestructuredBuilder, *kinds: str) -> str:
    """An input, and perhaps an ordinary block behind it; what comes next reads what this returns."""
    batch, channels, size = g.one_of(1, 2, 2, 3), g.one_of(2, 3, 4, 4, 6), g.one_of(5, 6, 7)
    shape, sizes = {
        "image": ((batch, channels, size, g.one_of(size, size, 5)), (2, 3)),
        "sequence": ((batch, channels, size), (2,)),
        "volume": ((batch, min(channels, 4), 3, 4, 4), (2, 3, 4)),
        "vector": ((batch, channels), ()),
    }[g.one_of(*(kinds or (*SPATIAL, "vector")))]
    g.input(shape, sizes)
    rank = len(shape)
    if g.chance(0.3):
        g.take(generate.BLOCKS if g.chance(0.7) else generate.OPERATORS)
    if g.chance(0.6):
        with_norm(g, plain_layer(g, g.inputs[0].name), 0.7)
    return g.pick(rank, where=lambda tensor: tensor.shape[1] > 1 and tensor[0, 0].numel() >= (9 if rank > 2 else 1))


def with_norm(g: RestructuredBuilder, y: str, chance: float = 1.0, active: float = 0.5) -> str:
    y = norm_module(g, y) if g.chance(chance) else y
    return activate(g, y, 0.6) if g.chance(active) else y


def norm_module(g: RestructuredBuilder, y: str) -> str:
    """A plain norm, now and then one of another kind."""
    if g.chance(0.12):
        return norm(g, y)
    return g.apply(plain_norm(g, y), y)


def plain_norm(g: RestructuredBuilder, y: str) -> str:
    return g.layer("n", norm_code(g, g.shape(y)), dressing(g))


def norm_code(g: RestructuredBuilder, shape: Sequence[int]) -> str:
    options = g.one_of("", "", "", "", ", eps=0.01", ", affine=False")
    return f"nn.BatchNorm{max(len(shape) - 2, 1)}d({shape[1]}{options})"


def plain_layer(g: RestructuredBuilder, x: str, out: int | None = None) -> str:
    return g.apply(g.layer("c", layer_code(g, g.shape(x), out)), x)


def layer_code(
    g: RestructuredBuilder,
    shape: Sequence[int],
    out: int | None = None,
    size: int | None = None,
    stride: int = 1,
    bias: bool | None = None,
    plain: bool = False,
    other: bool = True,
) -> str:
    """A layer that keeps the size, or divides it by the stride, as source.

    Args:
        shape: of what it is given.
        plain: without groups, dilation and padding modes.
        other: whether it may be a transposed convolution.
    """
    out = out or g.one_of(shape[1], shape[1], width(g))
    bias = g.chance(0.4) if bias is None else bias
    text = "" if bias else ", bias=False"
    n = len(shape) - 2
    if n <= 0:
        return f"nn.Linear({shape[-1] if n < 0 else shape[1]}, {out}{text})"
    size = size or g.one_of(1, 3, 3, 3, 5 if n < 3 else 3)
    groups, dilation, mode = 1, 1, ""
    if not plain:
        groups = g.random.choice(divisors(shape[1], out)) if g.chance(0.35) else 1
        dilation = 2 if size > 1 and g.chance(0.15) else 1
        mode = g.one_of("reflect", "replicate", "circular") if size > 1 and g.chance(0.1) else ""
    padding = dilation * (size - 1) // 2
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    if stride == 1 and padding and not plain and g.chance(0.1):
        options["padding"] = "'same'"
    named = "".join(f", {name}={value}" for name, value in options.items() if value != defaults[name])
    if other and not plain and stride == 1 and dilation == 1 and not mode and "same" not in named and g.chance(0.08):
        return f"nn.ConvTranspose{n}d({shape[1]}, {out}, {size}{named}{text})"
    if mode and max(shape[2:]) and min(shape[2:]) > padding:
        named += f", padding_mode='{mode}'"
    if n == 2 and size > 1 and "same" not in named and g.chance(0.05) and dilation == 1 and not mode:
        return f"nn.Conv2d({shape[1]}, {out}, ({size}, 1){named.replace(f'padding={padding}', f'padding=({padding}, 0)')}{text})"
    return f"nn.Conv{n}d({shape[1]}, {out}, {size}{named}{text})"


def views(g: RestructuredBuilder, x: str, count: int) -> list[str]:
    """Several tensors of as many channels: other sizes of one, or others."""
    found = [x]
    for _ in range(count - 1):
        codes = ["$0 * 0.5", "-$0", "$0.flip(0)", "F.relu($0)", "torch.tanh($0)"]
        n = len(g.shape(x)) - 2
        if n and min(g.shape(x)[2:]) > 3:
            codes += [f"F.avg_pool{n}d($0, 2)", f"F.max_pool{n}d($0, 2)", "$0[..., :-1]", "$0.flip(-1)"] * 2
        found.append(g.emit(g.one_of(*codes), found[-1] if g.chance(0.7) else x))
    return found


def join(g: RestructuredBuilder, names: Sequence[str]) -> None:
    """Now and then, what came of several places is put together."""
    if len(names) > 1 and len({g.shape(name) for name in names}) == 1 and g.chance(0.6):
        codes = ["torch.cat([$0, $1], 1)", "$0 + $1", "torch.stack([$0, $1])", "$0 - $1", "$0 * torch.sigmoid($1)"]
        g.emit(g.one_of(*codes), names[0], names[-1])


def maybe_wrapped(g: RestructuredBuilder, first: int, chance: float = 0.4) -> None:
    if g.chance(chance):
        g.wrapped(first)


# Shared layers ------------------------------------------------------------------------------------------------------


@kind
def untie_levels(g: RestructuredBuilder) -> None:
    """Layers that all levels share, and a norm for each level and depth."""
    x = begin(g)
    levels = views(g, x, g.one_of(2, 2, 3, 4))
    first = len(g.steps)
    active = g.one_of("F.relu($0)", "F.silu($0)", "$0", "torch.sigmoid($0)", "F.leaky_relu($0, 0.1)")
    for _ in range(g.one_of(1, 1, 2, 3)):
        shape = g.shape(levels[0])
        if g.chance(0.3) and len(shape) > 2:  # separable
            n = len(shape) - 2
            code = f"nn.Conv{n}d({shape[1]}, {shape[1]}, 3, padding=1, groups={shape[1]}, bias=False)"
            row = f"nn.Sequential({code}, {layer_code(g, shape, size=1, plain=True)})"
            layer = g.layer("q", row)
        else:
            layer = g.layer("c", layer_code(g, shape))
        made = [g.apply(layer, level) for level in levels]
        if g.chance(0.4):
            codes = ", ".join(norm_code(g, g.shape(y)) for y in made)
            numbers = ", ".join(f"{place}={dressing(g)}" for place in range(len(made)))
            norms = g.layer("ns", f"nn.ModuleList([{codes}])", numbers)
            levels = [g.emit(f"{norms}[{place}]($0)", y) for place, y in enumerate(made)]
        else:
            levels = [norm_module(g, y) if g.chance(0.95) else y for y in made]
        if active != "$0":
            levels = [g.emit(active, level) for level in levels]
    if g.chance(0.3):
        predict = g.layer("c", layer_code(g, g.shape(levels[0])))
        levels = [g.apply(predict, level) for level in levels]
    join(g, levels)
    maybe_wrapped(g, first)


@kind
def untie_twice(g: RestructuredBuilder) -> None:
    """One layer called several times, one call after the other or beside it, with a norm of its own behind each."""
    x = begin(g)
    first = len(g.steps)
    layer = g.layer("c", layer_code(g, g.shape(x), g.shape(x)[1]))
    made = []
    for _ in range(g.one_of(2, 2, 2, 3)):
        y = norm_module(g, g.apply(layer, x))
        y = activate(g, y, 0.5) if g.chance(0.7) else y
        made.append(y)
        if g.chance(0.75):
            x = y
        if g.chance(0.3):
            x = g.emit("$0 + $1", x, y)
    join(g, made)
    maybe_wrapped(g, first)


@kind
def untie_tied(g: RestructuredBuilder) -> None:
    """Layers that hold one weight, each with a norm of its own."""
    x = begin(g)
    first = len(g.steps)
    channels = g.shape(x)[1]
    code = layer_code(g, g.shape(x), channels)
    layers = [g.layer("c", code)]
    made = []
    for _ in range(g.one_of(1, 1, 2)):
        other = code
        if "Conv" in code and g.chance(0.2):
            other = code.replace(", padding=1", "") if g.chance(0.5) else code.replace(", dilation=2", "")
        layers.append(g.layer("c", other))
        way = g.weighted(both=5, weight=4, bias=0.5, module=1.5, memory=0.3)
        if way == "module":
            g.set_up(f"{layers[-1]} = {layers[0]}")
        elif way == "memory":
            g.set_up(f"{layers[-1]}.weight.data = {layers[0]}.weight.data")
        else:
            if way in ("both", "weight"):
                g.set_up(f"{layers[-1]}.weight = {layers[0]}.weight")
            if way in ("both", "bias") and "bias=False" not in code:
                g.set_up(f"{layers[-1]}.bias = {layers[0]}.bias")
    for layer in layers:
        for _ in range(g.one_of(1, 1, 1, 1, 2)):
            y = norm_module(g, g.apply(layer, x))
            y = activate(g, y, 0.5) if g.chance(0.6) else y
            made.append(y)
            if g.chance(0.5) and g.shape(y)[1] == channels:
                x = y
    join(g, made)
    maybe_wrapped(g, first)


@kind
def untie_uneven(g: RestructuredBuilder) -> None:
    """A shared layer whose uses are not alike: one without a norm, one norm for two, a use that is read elsewhere."""
    x = begin(g)
    first = len(g.steps)
    layer = g.layer("c", layer_code(g, g.shape(x), g.shape(x)[1]))
    levels = views(g, x, g.one_of(2, 3, 3))
    made = [g.apply(layer, level) for level in levels]
    normed = []
    way = g.weighted(bare=2, shared=2, same=1, read=2, between=2, returned=1, twice=1, raw=1)
    norms = [plain_norm(g, y) for y in made]
    if way == "shared":
        norms[-1] = norms[0]
    if way == "same":
        norms = norms[:1] * len(norms)
    for place, (y, behind) in enumerate(zip(made, norms, strict=True)):
        if way == "bare" and place == 0:
            normed.append(y)
            continue
        if way == "between" and place == 0:
            y = activate(g, y, 0.8)
        z = g.apply(behind, y)
        if way == "read" and place == 0:
            z = g.emit(g.one_of("$0 + $1", "$0 * torch.sigmoid($1)", "torch.maximum($0, $1)"), z, y)
        if way == "twice" and place == 0:
            z = g.emit("$0 + $1", z, g.apply(behind, g.emit("F.relu($0)", z)))
        normed.append(activate(g, z, 0.5) if g.chance(0.5) else z)
    if way == "raw":
        g.emit(f"$0 * {layer}.weight.abs().max()", normed[0])
    join(g, normed)
    maybe_wrapped(g, first)


@kind
def untie_before(g: RestructuredBuilder) -> None:
    """A shared layer with a norm of its own before each use, and perhaps one behind."""
    x = begin(g)
    levels = views(g, x, g.one_of(2, 2, 3))
    first = len(g.steps)
    layer = g.layer("c", layer_code(g, g.shape(x)))
    made = []
    for level in levels:
        pinned = g.emit(g.one_of("F.silu($0)", "torch.tanh($0)", "F.gelu($0)"), level) if g.chance(0.6) else level
        g.hint = "scale" if g.chance(0.4) else ""
        y = norm_module(g, pinned)
        if g.chance(0.2):
            y = g.emit(g.one_of("F.relu($0)", "0.5 * $0", "F.dropout($0, 0.5, m.training)"), y)
        y = g.apply(layer, y) if g.chance(0.9) else functionally(g, layer, y)
        made.append(with_norm(g, y, 0.3))
    join(g, made)
    maybe_wrapped(g, first)


def functionally(g: RestructuredBuilder, layer: str, x: str) -> str:
    """A layer whose tensors are handed to the function by the code around it."""
    module = g.live.get_submodule(layer[2:])
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return str(g.apply(layer, x))
    options = ", ".join(f"{layer}.{name}" for name in ("stride", "padding", "dilation", "groups"))
    return str(g.emit(f"F.conv{len(g.shape(x)) - 2}d($0, {layer}.weight, {layer}.bias, {options})", x))


@kind
def untie_modules(g: RestructuredBuilder) -> None:
    """Modules with a norm of their own each, that hold one layer."""
    x = begin(g)
    shape = g.shape(x)
    code = layer_code(g, shape, shape[1])
    forward = g.one_of(
        "F.relu(m.n(m.c(x)))", "m.n(m.c(x))", "x + m.n(m.c(x))", "F.silu(m.n(m.c(x)))", "m.n(m.c(F.relu(x)))"
    )
    blocks = [
        g.layer("b", f"module('x', '{forward}', c={code}, n={norm_code(g, shape)})", f"n={dressing(g)}")
        for _ in range(g.one_of(2, 2, 3))
    ]
    for block in blocks[1:]:
        if g.chance(0.9):
            g.set_up(f"{block}.c = {blocks[0]}.c" if g.chance(0.6) else f"{block}.c.weight = {blocks[0]}.c.weight")
    made = []
    for block in blocks:
        y = g.apply(block, x)
        made.append(y)
        if g.chance(0.6):
            x = y
    if g.chance(0.15):
        g.apply(g.one_of(*blocks), x)
    join(g, made)


# Computed weights ---------------------------------------------------------------------------------------------------

COMPUTED = (
    "{w} - {w}.mean({axes}, keepdim=True)", "F.normalize({w}, dim=1)", "{w} * {gain}", "torch.tanh({w})", "{w} * {mask}",
    "0.5 * ({w} + {w}.flip(-1))", "torch.where({w}.abs() > 0.1, {w}, 0.0)", "{w} * torch.sigmoid({w})", "{w} / {w}.norm()",
    "({w} - {w}.mean({axes}, keepdim=True)) / ({w}.std({axes}, keepdim=True) + 1e-5)", "{w}.softmax(0)", "{w} * 0.5",
    "{w}.abs()", "{w} + 0.1 * {w}.flip(0)", "{w} * {gain}.exp()", "{w} / (1 + {w}.abs().amax({axes}, keepdim=True))",
    "({w} + 0.1 * torch.randn_like({w}) if m.training else {w})", "{w}.clone()", "{w}.detach()", "{w}.roll(1, 0)",
    "torch.stack([{w}, {w}.flip(-1)]).mean(0)", "F.dropout({w}, 0.3, m.training)", "{w}.contiguous()", "{w}.to(torch.float64)",
    "{w} - {w}.mean(0)", "{w}.clamp(-0.5, 0.5)", "torch.lerp({w}, {w}.abs(), 0.2)", "{w}.view_as({w})", "-{w}",
)  # fmt: skip
"""How a weight is computed; all of it gives a tensor of the same shape."""


def computed(g: RestructuredBuilder, w: str, rank: int, gain: str = "m.gain", mask: str = "m.mask") -> str:
    axes = str(tuple(range(1, rank))) if rank > 2 else "1"
    code = w
    for _ in range(g.one_of(1, 1, 1, 2)):
        code = g.one_of(*COMPUTED).format(w=f"({code})" if code != w else w, gain=gain, mask=mask, axes=axes)
    return code


def computed_layer(g: RestructuredBuilder, shape: Sequence[int], out: int | None = None, way: str = "") -> str:
    """A layer whose weight is computed, as source."""
    out = out or g.one_of(shape[1], width(g))
    code = layer_code(g, shape, out, other=g.chance(0.5))
    way = way or g.weighted(torch=4, parametrised=3, forward=4, own=3, raw=2, standard=1)
    rank = len(shape) if len(shape) > 2 else 2
    if way == "torch":
        wrapper = g.weighted(
            weight_norm=4, weight_norm_by_hook=3, spectral_norm=2, spectral_norm_by_hook=2, pruned=3, orthogonal=1
        )
        if g.chance(0.1):
            return f"{wrapper}({g.one_of('spectral_norm', 'weight_norm')}({code}))"
        return f"{wrapper}({code})"
    if way == "parametrised":
        codes = ", ".join(repr(computed(g, "w", rank, mask="(w > -0.3)")) for _ in range(g.one_of(1, 1, 1, 2)))
        place = ", place='bias'" if "bias=False" not in code and g.chance(0.1) and "mean(" not in codes else ""
        return (
            f"parametrised({code}, {codes}{place})"
            if not place
            else f"parametrised({code}, 'w * 2', 'torch.tanh(w)'{place})"
        )
    if way == "standard" and len(shape) == 4 and "Transpose" not in code and "padding_mode" not in code:
        name = g.one_of("StandardisedConv", "ScaledConv", "MaskedConv", "BatchConv")
        return code.replace("nn.Conv2d", name)
    if "Transpose" in code:
        code, way = layer_code(g, shape, out, other=False), "forward"
    if way == "own" and rank > 2 and "padding_mode" not in code:
        weight = computed(g, "m.weight", rank)
        forward = f"m._conv_forward(x, {weight}, m.bias)"
        return f"with_forward({code}, {forward!r}{_extras(weight, out, rank)})"
    weight = computed(g, "m.weight", rank)
    options = "".join(f", m.{name}" for name in ("stride", "padding", "dilation", "groups")) if rank > 2 else ""
    function = f"F.conv{rank - 2}d" if rank > 2 else "F.linear"
    if way == "raw":
        n = rank - 2
        size = g.one_of(1, 3) if n else 1
        parts, weight = raw_weight(g, out, shape[1], size, n)
        padding = f", padding={size // 2}" if n else ""
        bias = g.one_of("None", "m.shift")
        extra = f", shift=nn.Parameter(torch.empty({out}))" if bias != "None" else ""
        return f"module('x', {f'{function}(x, {weight}, {bias}{padding})'!r}, {parts}{extra})"
    code = (
        code.replace(", padding_mode='reflect'", "")
        .replace(", padding_mode='replicate'", "")
        .replace(", padding_mode='circular'", "")
    )
    forward = g.one_of(f"{function}(x, {weight}, m.bias{options})", f"w = {weight}; {function}(x, w, m.bias{options})")
    if g.chance(0.1):
        forward = g.one_of(
            f"F.relu({function}(x, {weight}, m.bias{options}))", f"{function}(F.relu(x), {weight}, m.bias{options})",
            f"{function}(x, {weight}, m.bias{options}) + x.mean()", f"{function}(x, {weight} * x.mean(), m.bias{options})",
            f"{function}(x, {weight}, m.bias{options}) * m.scale",
        )  # fmt: skip
    scale = ", scale=nn.Parameter(torch.ones(()))" if "m.scale" in forward else ""
    return f"with_forward({code}, {forward!r}{_extras(weight, out, rank)}{scale})"


def _extras(code: str, out: int, rank: int) -> str:
    ones = ", 1" * (rank - 1)
    text = f", gain=nn.Parameter(torch.empty({out}{ones}))" if "m.gain" in code else ""
    return text + (f", mask=nn.Buffer((torch.arange({out}) % 3 > 0).reshape(-1{ones}))" if "m.mask" in code else "")


def raw_weight(g: RestructuredBuilder, out: int, channels: int, size: int, n: int) -> tuple[str, str]:
    """Parameters that are no weight of a layer, and an expression of them that is one."""
    kernel = "".join(f", {size}" for _ in range(n))
    ones = ", 1" * n
    flat = channels * size**n
    shape = f"({out}, {channels}{kernel})"
    made = {
        "factors": (
            f"a=nn.Parameter(torch.empty({out}, 2)), b=nn.Parameter(torch.empty(2, {flat}))", f"(m.a @ m.b).view{shape}",
        ),
        "rank_one": (
            f"a=nn.Parameter(torch.empty({out}, 1{ones})), b=nn.Parameter(torch.empty(1, {channels}{kernel}))", "m.a * m.b",
        ),
        "added": (
            f"w=nn.Parameter(torch.empty{shape}), a=nn.Parameter(torch.empty({out}, 1)), b=nn.Parameter(torch.empty(1, {flat}))",
            f"m.w + 0.5 * (m.a @ m.b).view{shape}",
        ),
        "expanded": (f"w=nn.Parameter(torch.empty({out}, 1{kernel}))", f"m.w.expand{shape}"),
        "turned": (f"w=nn.Parameter(torch.empty({channels}, {out}{kernel}))", "m.w.transpose(0, 1)"),
        "joined": (
            f"a=nn.Parameter(torch.empty(1, {channels}{kernel})), b=nn.Parameter(torch.empty({out - 1}, {channels}{kernel}))",
            "torch.cat([m.a, m.b])",
        ),
        "mixed": (
            f"a=nn.Parameter(torch.empty(3)), w=nn.Parameter(torch.empty(3, {out}, {channels}{kernel}))",
            "torch.einsum('k,k...->...', m.a.softmax(0), m.w)",
        ),
    }  # fmt: skip
    parts, code = made[g.one_of(*made)]
    return parts, code if g.chance(0.7) else f"({code}) * 0.7"


@kind
def bake_layers(g: RestructuredBuilder) -> None:
    """Layers with computed weights, each with a norm."""
    x = begin(g)
    first = len(g.steps)
    for _ in range(g.one_of(1, 1, 2, 3)):
        y = g.apply(g.layer("c", computed_layer(g, g.shape(x))), x)
        x = with_norm(g, y, 0.85)
        if len(g.shape(x)) != len(g.shape(y)):
            break
    maybe_wrapped(g, first)


@kind
def bake_forward(g: RestructuredBuilder) -> None:
    """The weight is computed amid other work."""
    x = begin(g, *SPATIAL)
    first = len(g.steps)
    shape = g.shape(x)
    n, out, size = len(shape) - 2, width(g), g.one_of(1, 3)
    w = g.layer("w", f"nn.Parameter(torch.empty({(out, shape[1], *[size] * n)}))")
    gain = g.layer("gain", f"nn.Parameter(torch.empty({(out, *[1] * (n + 1))}))")
    mask = g.layer("mask", f"nn.Buffer((torch.arange({out}) % 3 > 0).reshape({(-1, *[1] * (n + 1))}))")
    code = computed(g, w, len(shape), gain, mask).replace("m.training", "False")
    y = g.emit(f"F.conv{n}d($0, {code}, padding={size // 2})", x)
    with_norm(g, y)
    if g.chance(0.3):
        with_norm(g, g.emit(f"F.conv{n}d($0, {code}, padding={size // 2})", g.emit("$0.flip(-1)", x)))
    maybe_wrapped(g, first, 0.7)


@kind
def bake_shared(g: RestructuredBuilder) -> None:
    """A layer with a computed weight that is called several times, with a norm of its own behind each."""
    x = begin(g)
    first = len(g.steps)
    layer = g.layer("c", computed_layer(g, g.shape(x), g.shape(x)[1]))
    made = []
    for level in views(g, x, g.one_of(2, 2, 3)):
        made.append(with_norm(g, g.apply(layer, level), 0.9))
    join(g, made)
    maybe_wrapped(g, first)


@kind
def bake_read_elsewhere(g: RestructuredBuilder) -> None:
    """Somebody else reads what the weight is computed of, or the result."""
    x = begin(g, *SPATIAL)
    first = len(g.steps)
    way = g.weighted(torch=2, parametrised=2, forward=2, own=1)
    code = computed_layer(g, g.shape(x), g.shape(x)[1], way)
    layer = g.layer("c", code)
    y = with_norm(g, g.apply(layer, x))
    reads = [
        f"$0 * {layer}.weight.abs().max()", f"$0 + {layer}.weight.mean()", f"$0 * next({layer}.parameters()).abs().max()",
        f"$0 * len(list({layer}.parameters()))", f"$0 * {layer}.weight.shape[0]", f"$0 + {layer}.weight.std()",
    ]  # fmt: skip
    if "by_hook" in code:
        reads += [f"$0 * [*{layer}._parameters.values()][-1].abs().max()"]
    if code.startswith(("parametrised", "weight_norm(", "spectral_norm(")):
        reads += [
            f"$0 * {layer}.parametrizations.weight.original.abs().max()",
            f"$0 + {layer}.parametrizations.weight.original0.mean()",
        ] * 2
        reads += [f"$0 * nn.utils.parametrize.is_parametrized({layer})"]
    z = g.emit(g.one_of(*reads), y)
    if g.chance(0.4):
        tied = g.layer("c", code)
        names = [name for name in ("weight", "gain", "weight_v", "weight_orig") if _holds(g, layer, name)]
        if names:
            g.set_up(f"{tied}.{names[0]} = {layer}.{names[0]}")
        with_norm(g, g.apply(tied, x))
    maybe_wrapped(g, first)
    del z


def _holds(g: RestructuredBuilder, layer: str, name: str) -> bool:
    return name in g.variables["m"].get_submodule(layer[2:])._parameters


# Parallel branches --------------------------------------------------------------------------------------------------


def linear_branch(g: RestructuredBuilder, x: str, out: int, stride: int, depth: int = 0) -> str:
    """A linear map of x to as many channels and the size divided by the stride."""
    shape = g.shape(x)
    n, channels = len(shape) - 2, shape[1]
    same = channels == out and stride == 1
    ways = {"layer": 8.0, "row": 2.0}
    if n > 0:
        ways["pool"] = 1.2 if channels == out and shape[2] > 2 else 0
    if same:
        ways |= {"identity": 2, "norm": 2, "scale": 0.6}
    if depth < 2:
        ways["sum"] = 1.2
    way = g.weighted(**ways)
    if way == "identity":
        y = x if g.chance(0.5) else g.apply(g.layer("i", g.one_of("nn.Identity()", "nn.Dropout(0.3)")), x)
    elif way == "norm":
        return g.apply(plain_norm(g, x), x)
    elif way == "scale":
        y = g.emit(f"$0 * {gain(g, channels, n)}", x)
    elif way == "sum":
        return add_up(g, [linear_branch(g, x, out, stride, depth + 1) for _ in range(2)])
    elif way == "row":
        middle = g.one_of(channels, out, width(g))
        first_size, second_size = g.one_of((1, 3), (1, 3), (3, 1), (1, 1), (3, 3)) if n > 0 else (1, 1)
        if stride > 1:
            first_size = 1
        y = g.apply(g.layer("c", layer_code(g, shape, middle, first_size, 1, plain=g.chance(0.8), other=False)), x)
        if g.chance(0.5):
            y = g.apply(plain_norm(g, y), y)
        y = g.apply(
            g.layer("c", layer_code(g, g.shape(y), out, second_size, stride, plain=g.chance(0.7), other=False)), y
        )
    elif way == "pool":
        text = g.one_of("", ", count_include_pad=False")
        if g.chance(0.5):
            y = g.apply(g.layer("pool", f"nn.AvgPool{n}d(3, {stride}, 1{text})"), x)
        else:
            y = g.emit(f"F.avg_pool{n}d($0, 3, {stride}, 1{text})", x)
        if g.chance(0.3):
            y = g.apply(g.layer("c", layer_code(g, g.shape(y), out, 1, plain=True)), y)
    else:
        y = g.apply(g.layer("c", layer_code(g, shape, out, None, stride, plain=g.chance(0.5), other=False)), x)
    if g.chance(0.6):
        y = norm_module(g, y) if way == "layer" else g.apply(plain_norm(g, y), y)
    if g.chance(0.12):
        y = g.emit(f"$0 * {gain(g, out, n)}" if g.chance(0.7) else g.one_of("0.5 * $0", "-$0", "$0 / 2"), y)
    if g.chance(0.08):
        y = g.apply(g.layer("dp", "nn.Dropout(0.2)"), y)
    if g.chance(0.06):
        y = activate(g, y, 0.7)
    return y


def gain(g: RestructuredBuilder, channels: int, n: int) -> str:
    return g.layer("gain", f"nn.Parameter(torch.empty({(channels, *[1] * n)}))")


def add_up(g: RestructuredBuilder, terms: Sequence[str]) -> str:
    """The sum of several tensors of one shape, in some way of writing it."""
    if len({g.shape(term) for term in terms}) > 1:
        raise Unfit
    numbers = [f"${index}" for index in range(len(terms))]
    forms = [" + ".join(numbers)] * 4 + [f"sum([{', '.join(numbers)}])", f"torch.stack([{', '.join(numbers)}]).sum(0)"]
    if len(terms) == 2:
        forms += [
            "torch.add($0, $1)",
            "$0 - $1",
            "$1 + $0",
            "torch.add($0, $1, alpha=0.5)",
            "$0 + 2 * $1",
            "0.5 * ($0 + $1)",
        ]
    if len(terms) == 3:
        forms += ["$0 + ($1 + $2)", "($0 + $1) - $2", "($0 + $1) / 2 + $2"]
    if len(terms) == 2 and g.chance(0.05):
        return str(g.emit("$0.clone().add_($1)", *terms))
    return str(g.emit(g.one_of(*forms), *terms))


@kind
def merge_branches(g: RestructuredBuilder) -> None:
    """A sum of linear branches."""
    x = begin(g)
    first = len(g.steps)
    for _ in range(g.one_of(1, 1, 2)):
        x = branches(g, x)
    maybe_wrapped(g, first, 0.5)


def branches(g: RestructuredBuilder, x: str, read_elsewhere: bool = False) -> str:
    n = len(g.shape(x)) - 2
    stride = g.one_of(1, 1, 1, 2) if n > 0 else 1
    out = g.shape(x)[1] if g.chance(0.6) else width(g)
    first = len(g.steps)
    terms = [linear_branch(g, x, out, stride) for _ in range(g.one_of(2, 2, 3, 3, 4))]
    y = add_up(g, terms)
    if read_elsewhere:
        made = [name for step in g.steps[first:] for name in step.outputs][:-1]
        g.emit(g.one_of("torch.sigmoid($0)", "$0.mean(1, keepdim=True)", "$0 * 2"), g.one_of(*(made or [y])))
    if g.chance(0.25):
        y = norm_module(g, y)
    return activate(g, y, 0.7) if g.chance(0.7) else y


@kind
def merge_read_elsewhere(g: RestructuredBuilder) -> None:
    """A sum of linear branches, one of which somebody else reads."""
    x = begin(g)
    first = len(g.steps)
    y = branches(g, x, read_elsewhere=True)
    if g.chance(0.5):
        branches(g, y)
    maybe_wrapped(g, first)


@kind
def merge_rows(g: RestructuredBuilder) -> None:
    """Linear layers one after the other."""
    x = begin(g)
    first = len(g.steps)
    y = x
    for _ in range(g.one_of(2, 2, 3)):
        n = len(g.shape(y)) - 2
        size = g.one_of(1, 1, 3) if n > 0 else None
        stride = g.one_of(1, 1, 1, 2) if n > 0 else 1
        y = g.apply(
            g.layer("c", layer_code(g, g.shape(y), None, size, stride, plain=g.chance(0.6), other=g.chance(0.3))), y
        )
        if g.chance(0.4):
            y = norm_module(g, y)
        if g.chance(0.1):
            y = g.emit(
                g.one_of("0.5 * $0", "F.dropout($0, 0.5, m.training)", "$0.contiguous()", "F.relu($0)", "$0 + 1"), y
            )
    if len(g.shape(x)) == len(g.shape(y)) and g.shape(x) == g.shape(y) and g.chance(0.5):
        g.emit("$0 + $1", x, y)
    maybe_wrapped(g, first)


@kind
def merge_lists(g: RestructuredBuilder) -> None:
    """Branches in a ModuleList that a forward loops over, as in MobileOne and RepVGG."""
    x = begin(g)
    shape = g.shape(x)
    n = len(shape) - 2
    stride = g.one_of(1, 1, 2) if n > 0 else 1
    out = shape[1] if g.chance(0.6) else width(g)
    after = (shape[0], out, *[-1] * n)
    codes, numbers = [], []
    for place in range(g.one_of(1, 2, 2, 3)):
        layer = layer_code(g, shape, out, None, stride, plain=g.chance(0.7), other=False)
        if g.chance(0.8):
            codes.append(f"nn.Sequential({layer}, {norm_code(g, after)})")
            numbers.append(f"bs.{place}.1={dressing(g)}")
        else:
            codes.append(layer)
    if out == shape[1] and stride == 1 and g.chance(0.6):
        way = g.one_of("norm", "norm", "identity", "scale")
        if way == "norm":
            numbers.append(f"bs.{len(codes)}={dressing(g)}")
        codes.append(
            {"norm": norm_code(g, after), "identity": "nn.Identity()", "scale": f"Scaling({out}{', 1' * n})"}[way]
        )
    forward = g.one_of(
        "m.act(sum(b(x) for b in m.bs))", "m.act(sum([b(x) for b in m.bs]))", "y = 0; y = sum((b(x) for b in m.bs), y); m.act(y)",
        "m.act(torch.stack([b(x) for b in m.bs]).sum(0))", "m.n(m.act(sum(b(x) for b in m.bs)))", "m.act(m.n(sum(b(x) for b in m.bs)))",
    )  # fmt: skip
    parts = f"bs=nn.ModuleList([{', '.join(codes)}]), act={g.one_of('nn.ReLU()', 'nn.Identity()', 'nn.SiLU()', 'nn.ReLU(inplace=True)')}"
    if "m.n(" in forward:
        parts += f", n={norm_code(g, after)}"
        numbers.append(f"n={dressing(g)}")
    block = g.layer("b", f"module('x', {forward!r}, {parts})", ", ".join(numbers))
    y = g.apply(block, x)
    if g.chance(0.15):
        g.apply(block, g.emit("-$0", x))
    if g.chance(0.3):
        branches(g, y)


@kind
def merge_padded(g: RestructuredBuilder) -> None:
    """Branches that pad with what zeros become, as in the Diverse Branch Block, or with something near it."""
    x = begin(g, *SPATIAL)
    stride = g.one_of(1, 1, 1, 2)
    out = g.shape(x)[1] if g.chance(0.6) else width(g)
    first = len(g.steps)
    terms = [padded_branch(g, x, out, stride) for _ in range(g.one_of(1, 1, 2))]
    terms += [linear_branch(g, x, out, stride) for _ in range(g.one_of(0, 1, 1, 2))]
    g.random.shuffle(terms)
    y = add_up(g, terms) if len(terms) > 1 else terms[0]
    if g.chance(0.7):
        activate(g, y, 0.7)
    maybe_wrapped(g, first, 0.7)


def padded_branch(g: RestructuredBuilder, x: str, out: int, stride: int) -> str:
    """A layer of one tap with a norm or a bias, a padding whose border is written to, and a larger layer or a pool."""
    shape = g.shape(x)
    n, channels = len(shape) - 2, shape[1]
    size = g.one_of(3, 3, 3, 5) if n < 3 else 3
    side, middle = size // 2, g.one_of(channels, out, out, width(g))
    normed = g.chance(0.8)
    parts = [f"c={layer_code(g, shape, middle, 1, bias=not normed or g.chance(0.2), other=False)}"]
    numbers, lines = [], ["y = m.c(x)"]
    if normed:
        after = (shape[0], middle, *shape[2:])
        parts.append(f"n={norm_code(g, after)}")
        numbers.append(f"n={dressing(g)}")
        eps = g.one_of(*["m.n.eps"] * 6, "1e-3")
        gain, bias = ("", "0.0") if "affine" in parts[-1] else (" * m.n.weight.detach()", "m.n.bias.detach()")
        before = "m.n.running_mean" if "bias=False" in parts[0] else "(m.n.running_mean - m.c.bias.detach())"
        lines += ["y = m.n(y)", f"b = {bias} - {before}{gain} / torch.sqrt(m.n.running_var + {eps})"]
    else:
        lines.append("b = m.c.bias" + g.one_of("", ".detach()", " * 1"))
    lines[-1] += g.one_of(*[""] * 8, " * 1.0001", " + 0.5")
    lines.append(f"b = b.view({', '.join(['1', '-1', *['1'] * n])})")
    lines.append(f"y = F.pad(y, {[side] * 2 * n}{g.one_of('', '', ', value=0.3')})")
    sides = [(axis, end) for axis in range(2, n + 2) for end in (0, 1)]
    if g.chance(0.08):
        sides.pop(g.random.randrange(len(sides)))
    lines += [padding_side(g, axis, end, side) for axis, end in sides]
    if g.chance(0.04):
        lines.append("y = y * y[:, :, :1].sigmoid()")
    if middle == out and g.chance(0.35):
        lines.append(f"F.avg_pool{n}d(y, {size}, {stride})")
    else:
        groups = g.random.choice(divisors(middle, out)) if g.chance(0.3) else 1
        padding = g.one_of(*[0] * 12, 1)
        options = f"groups={groups}, bias={g.chance(0.4)}"
        parts.append(f"d=nn.Conv{n}d({middle}, {out}, {size}, {stride}, {padding}, {options})")
        lines.append("m.d(y)" if not padding else f"m.d(y)[{', '.join([':', ':', *['1:-1'] * n])}]")
    block = g.layer("pd", f"module('x', {'; '.join(lines)!r}, {', '.join(parts)})", ", ".join(numbers))
    y = g.apply(block, x)
    return g.apply(plain_norm(g, y), y) if g.chance(0.5) else y


def padding_side(g: RestructuredBuilder, axis: int, end: int, side: int) -> str:
    """A line that writes ``b`` to a side of the border of ``y``."""
    before = ":, " * axis
    part = f"-{side}:" if end else g.one_of(f"0:{side}", f":{side}")
    ways = [f"y[{before}{part}] = b"] * 4 + [f"_ = y[{before}{part}].copy_(b)"]
    ways.append(f"_ = y.narrow({axis}, {-side if end else 0}, {side}).copy_(b)")
    if side == 1:
        ways.append(f"y[{before}{-end}] = b[{before}0]")
    return str(g.one_of(*ways))


@kind
def merge_conditional(g: RestructuredBuilder) -> None:
    """Branches, or uses of a layer, that are there only at some sizes, or with a flag."""
    x = begin(g)
    shape = g.shape("x0")
    size = shape[-1]
    conditions = [f"x0.shape[0] > {shape[0] - 1}", f"x0.shape[0] <= {shape[0]}", "flag", "not flag"]
    if len(shape) > 2:
        conditions += [
            f"x0.shape[-1] > {size - 1}",
            f"x0.shape[-1] <= {size}",
            f"x0.shape[-1] == {size}",
            "$0.shape[-1] > 4",
        ] * 2
    condition = g.one_of(*conditions)
    if "flag" in condition:
        g.parameter_of_forward("flag=False", "True" if g.chance(0.5) else None)
        g.vary(Variation(options={"flag": "False"}))
        g.vary(Variation(options={"flag": "True"}))
    for change in (1, 2, -1):
        g.vary(Variation(size=change))
    for batch in (1, 5):
        g.vary(Variation(batch))
    channels = g.shape(x)[1]
    layers = [g.layer("c", layer_code(g, g.shape(x), channels, other=False)) for _ in range(g.one_of(2, 2, 3))]
    if g.chance(0.5):
        layers[-1] = layers[0]
    if g.chance(0.3):
        layers[0] = g.layer("c", computed_layer(g, g.shape(x), channels))
    norms = [plain_norm(g, x) for _ in layers]
    terms = [f"{n}({c}($0))" if g.chance(0.7) else f"{c}($0)" for n, c in zip(norms, layers, strict=True)]
    if g.chance(0.3):
        terms.append(g.one_of("$0", f"{plain_norm(g, x)}($0)"))
    whole, part = " + ".join(terms), " + ".join(terms[: g.one_of(1, len(terms) - 1)])
    way = g.weighted(terms=4, order=1, behind=1, other=1)
    if way == "order":
        part = " + ".join(reversed(terms))
    elif way == "behind":
        part = f"F.relu({whole})"
    elif way == "other":
        part = f"({whole}) * 2"
    y = g.choose(condition, whole, part, x)
    with_norm(g, y, 0.4)
    if g.chance(0.3):
        branches(g, y)


@kind
def mixed(g: RestructuredBuilder) -> None:
    """Several of them in one network."""
    x = begin(g)
    makers: list[Callable[[], object]] = [
        lambda: branches(g, x),
        lambda: with_norm(g, g.apply(g.layer("c", computed_layer(g, g.shape(x))), x)),
        lambda: [with_norm(g, g.apply(layer, level)) for layer in [g.layer("c", layer_code(g, g.shape(x)))] for level in views(g, x, 2)],
        lambda: [with_norm(g, g.apply(layer, level)) for layer in [g.layer("c", computed_layer(g, g.shape(x)))] for level in views(g, x, 2)],
        lambda: add_up(g, [with_norm(g, g.apply(g.layer("c", computed_layer(g, g.shape(x), g.shape(x)[1])), x), 0.8, 0), x]),
        lambda: g.take(generate.BLOCKS),
    ]  # fmt: skip
    for _ in range(g.one_of(2, 2, 3)):
        first = len(g.steps)
        g.one_of(*makers)()
        maybe_wrapped(g, first, 0.3)
        x = g.pick(len(g.shape(x)), where=lambda tensor: tensor.shape[1] > 1)
    if g.chance(0.3):
        g.wrapped(0)


# What the code around may do ----------------------------------------------------------------------------------------

LOOKS = (
    "$0 * {c}.weight.shape[0]", "$0 * {c}.out_channels", "$0 * (2 if {c}.bias is None else 3)", "$0 * len(list({c}.parameters()))",
    "$0.to({c}.weight.dtype)", "$0 * isinstance({c}, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))", "$0 * {c}.weight.abs().max()",
    "$0 + {c}.weight.mean()", "$0 * {c}.stride[0]", "$0 if hasattr({c}, 'weight') else -$0", "$0 * (type({c}) is not nn.Identity)",
    "$0 * {c}.in_channels", "$0 if {c}.weight.requires_grad else $0",
)  # fmt: skip
NORM_LOOKS = (
    "$0 * (2 if isinstance({n}, nn.modules.batchnorm._BatchNorm) else 3)", "$0 * {n}.num_features", "$0 * (1 + {n}.eps)",
    "$0 if hasattr({n}, 'running_mean') else -$0", "$0 + {n}.bias.mean()", "$0 * {n}.weight.abs().max()", "$0 * (not {n}.training)",
)  # fmt: skip

# Activations between bounds -----------------------------------------------------------------------------------------


def bounded(g: RestructuredBuilder) -> str:
    """An activation that keeps its input between bounds, or another, as source."""
    place = g.one_of("", "", "inplace=True")
    return g.weighted(
        **{
            f"nn.ReLU({place})": 6.0,
            f"nn.ReLU6({place})": 1.5,
            "nn.Hardtanh(-1.5, 0.5)": 0.7,
            "nn.Hardtanh(0.25, 2.0)": 0.7,
            "nn.LeakyReLU(0.1)": 0.7,
            "nn.Sequential(nn.ReLU())": 0.3,
            "nn.PReLU()": 0.3,
        }
    )


def unyielding(g: RestructuredBuilder, x: str) -> str:
    """What no norm passes, or no scale that is negative, or what every norm passes."""
    codes = ["torch.sigmoid($0)", "torch.tanh($0)", "F.relu($0)", "F.leaky_relu($0, 0.1)", "torch.sin($0)", "$0"]
    n = len(g.shape(x)) - 2
    if n > 0 and min(g.shape(x)[2:]) > 3:
        codes.append(f"F.max_pool{n}d($0, 2)")
    return g.emit(g.one_of(*codes), x)


@kind
def clip_between(g: RestructuredBuilder) -> None:
    """A norm beside activations that only clip, between what it cannot pass."""
    x = unyielding(g, begin(g))
    first = len(g.steps)
    for _ in range(g.one_of(1, 1, 2)):
        order = g.one_of("na", "na", "na", "an", "ana", "nan", "naa")
        for part in order:
            if part == "n":
                x = norm_module(g, x)
            else:
                y = g.apply(g.layer("a", bounded(g)), x)
                x = g.emit("$0 + $1", x, y) if g.chance(0.07) else y
        if g.chance(0.8):
            x = plain_layer(g, x)
        x = unyielding(g, x)
    maybe_wrapped(g, first)


@kind
def clip_dense(g: RestructuredBuilder) -> None:
    """Norms and activations that all read what is concatenated or added up, as before the layers of a dense block."""
    x = unyielding(g, begin(g))
    first = len(g.steps)
    shared = g.layer("a", bounded(g)) if g.chance(0.2) else None
    dense = g.chance(0.6)
    for _ in range(g.one_of(1, 2, 2, 3)):
        y = norm_module(g, x)
        y = g.apply(shared or g.layer("a", bounded(g)), y)
        channels = g.shape(x)[1]
        y = plain_layer(g, y, g.one_of(2, 3) if dense else channels)
        if g.shape(y)[2:] != g.shape(x)[2:]:
            raise Unfit
        if g.chance(0.4):
            y = unyielding(g, y) if dense else g.emit("torch.tanh($0)", y)
        if g.shape(y)[2:] != g.shape(x)[2:]:
            raise Unfit
        x = g.emit("torch.cat([$0, $1], 1)" if dense else "$0 + $1", x, y)
    x = g.apply(g.layer("a", bounded(g)), norm_module(g, x))
    plain_layer(g, x)
    maybe_wrapped(g, first)


@kind
def clip_shared(g: RestructuredBuilder) -> None:
    """One activation behind several norms, one norm with several readers, an activation that is read twice."""
    x = unyielding(g, begin(g))
    first = len(g.steps)
    way = g.weighted(activation=2, norm=2, result=2, seen=1, written=1)
    activation = g.layer("a", bounded(g))
    y = norm_module(g, x)
    z = g.apply(activation, y)
    if way == "activation":
        z = g.apply(activation, norm_module(g, plain_layer(g, z, g.shape(x)[1])))
    elif way == "norm":
        g.emit(g.one_of("$0 * torch.sigmoid($1)", "$0 + $1", "torch.maximum($0, $1)"), y, z)
    elif way == "result":
        z = g.emit(g.one_of("$0 + $1", "torch.cat([$0, $1], 1)"), z, g.emit(g.one_of("$0 * 0.5", "-$0"), z))
    elif way == "seen":
        z = g.emit(f"$0 * (2.0 if isinstance({activation}, nn.ReLU) else 1.0)", z)
    else:
        z = g.emit("$0 * 0.5", y)  # of what works in place, the result of the activation
    unyielding(g, plain_layer(g, z))
    maybe_wrapped(g, first)


def disturb(g: RestructuredBuilder) -> None:
    """Code that looks at modules, hooks on them, norms that the caller keeps."""
    layers = [f"m.{name}" for name in g.layers if name.startswith("c") and isinstance(g.layers[name].code, str)]
    norms = [f"m.{name}" for name in g.layers if name.startswith("n") and not name.startswith("ns")]
    inner = [
        f"{place}"
        for place, module in g.live.named_modules()
        if "." in place and not list(module.children()) and list(module.parameters())
    ]
    y = g.pick()
    try:
        if layers and g.chance(0.12):
            g.emit(g.one_of(*LOOKS).format(c=g.one_of(*layers)), y)
        if norms and g.chance(0.07):
            g.emit(g.one_of(*NORM_LOOKS).format(n=g.one_of(*norms)), y)
        if inner and g.chance(0.06):
            place = g.one_of(*inner)
            name = f"m.get_submodule('{place}')"
            g.emit(g.one_of(*(NORM_LOOKS if ".n" in place else LOOKS)).format(c=name, n=name), y)
    except Unfit:
        pass
    everything = [
        *layers,
        *norms,
        *(
            f"m.{place}"
            for place in inner
            if place.replace(".", "").isidentifier() and not any(part.isdigit() for part in place.split("."))
        ),
    ]
    if everything and g.chance(0.12):
        hook = g.one_of(*HOOKS)
        g.setup.append(f"{g.one_of(*everything)}.{hook}")
        if "None" in hook and g.chance(0.5):
            g.fuse_options.append("options=bnfuse.Options(hooks='ignore')")
    if norms and g.chance(0.06):
        name = g.one_of(*norms)[2:]
        g.fuse_options.append(f"keep=['{name}']")
    if g.chance(0.04):
        g.setup.append(
            g.one_of(
                "m.requires_grad_(False)",
                "m.to(memory_format=torch.channels_last)" if len(g.shape("x0")) == 4 else "m.requires_grad_(False)",
            )
        )
