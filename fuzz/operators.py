"""Single operators, one function each: pick operands, draw options, emit a line."""

from __future__ import annotations

from typing import Any

from fuzz.generate import Builder, Unfit, operator

SPATIAL = (3, 4, 5)


# Layers -------------------------------------------------------------------------------------------------------------


def width(g: Builder) -> int:
    return g.one_of(2, 3, 4, 4, 6, 6, 8)


def divisors(a: int, b: int) -> list[int]:
    return [n for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0]


def convolution(g: Builder, x: str, out: int | None = None, keep_size: bool = False, kind: str | None = None) -> str:
    """A convolution of any kind on a variable of rank 3 to 5."""
    shape = g.shape(x)
    n, channels = len(shape) - 2, shape[1]
    out = out or g.one_of(channels, width(g), width(g))
    size = g.one_of(1, 1, 3, 3, 3, 2)
    if keep_size and size == 2:
        size = 3
    options: dict[str, Any] = {}
    groups = g.weighted(one=6, depthwise=1.5, some=1.5)
    if groups == "depthwise" and out % channels == 0:
        options["groups"] = channels
    elif groups == "some":
        options["groups"] = g.random.choice(divisors(channels, out))
    if size == 3:
        padding = g.weighted(one=6, none=2, same=1, two=0.7)
        if keep_size:
            padding = "one" if padding in ("none", "two") else padding
        if padding != "none":
            options["padding"] = {"one": 1, "same": "'same'", "two": 2}[padding]
        if padding != "none" and g.chance(0.15):
            options["padding_mode"] = g.one_of("'reflect'", "'replicate'", "'circular'")
        if g.chance(0.1):
            options["dilation"] = 2
            if options.get("padding") == 1:
                options["padding"] = 2
        if not keep_size and g.chance(0.2) and options.get("padding") != "'same'":
            options["stride"] = 2
    if g.chance(0.6):
        options["bias"] = False
    kind = kind or g.weighted(module=10, function=1.5, computed=1.2, special=1.2, functional_module=0.8)
    if n != 2 and kind == "special":
        kind = "module"
    text = "".join(f", {name}={value}" for name, value in options.items())
    if kind == "module":
        return g.apply(g.layer("c", f"nn.Conv{n}d({channels}, {out}, {size}{text})"), x)
    if kind == "special":
        code = g.weighted(
            StandardisedConv=1,
            ScaledConv=2,
            BiasBlindConv=1,
            weight_norm=2,
            weight_norm_by_hook=1,
            spectral_norm=0.4,
            PartedConv=1,
            SummedConv=1,
        )
        if code in ("PartedConv", "SummedConv"):
            options.pop("groups", None)
            if channels < 2 or out < 2:
                raise Unfit
        plain = "".join(f", {name}={value}" for name, value in options.items() if name != "padding_mode")
        if code.endswith("Conv"):
            made = f"{code}({channels}, {out}, {size}{plain})"
        else:
            made = f"{code}(nn.Conv2d({channels}, {out}, {size}{text}))"
        return g.apply(g.layer("c", made), x)
    options.pop("padding_mode", None)
    biased = options.pop("bias", True)
    text = "".join(f", {name}={value}" for name, value in options.items())
    if kind == "functional_module":
        layer = g.layer(
            "c", f"nn.Conv{n}d({channels}, {out}, {size}, groups={options.get('groups', 1)}, bias={biased})"
        )
        return g.emit(f"F.conv{n}d($0, {layer}.weight, {layer}.bias{text})", x)
    shape_in = channels // options.get("groups", 1)
    kernel = ", ".join([str(size)] * n)
    w = g.layer("w", f"nn.Parameter(torch.empty({out}, {shape_in}, {kernel}))")
    b = f", {g.parameter(out)}" if biased else ""
    if kind == "computed":
        w = computed_weight(g, w, (out, shape_in, *[size] * n))
    return g.emit(f"F.conv{n}d($0, {w}{b}{text})", x)


def computed_weight(g: Builder, w: str, shape: tuple[int, ...]) -> str:
    """An expression for a weight of the same shape."""
    n = len(shape) - 2
    ones = ", 1" * n
    way = g.weighted(
        gain=3, gain_in=1, number=1, standardised=1, halves=1, clone=1, contiguous=0.5, detach=0.5, data=0.3,
        cast=0.3, flip=0.5, added=0.5, transposed=0.5, stored=0.4, masked=0.5, negative=0.5,
    )  # fmt: skip
    if way == "gain":
        return f"{w} * {g.parameter(shape[0], 1, *[1] * n, gain=True)}"
    if way == "gain_in":
        return f"{w} * {g.parameter(1, shape[1], *[1] * n, gain=True)}"
    if way == "standardised":
        return f"({w} - {w}.mean({tuple(range(1, len(shape)))}, keepdim=True)) * {g.parameter(shape[0], 1, *[1] * n, gain=True)}"
    if way == "halves" and shape[0] > 1:
        other = g.layer("w", f"nn.Parameter(torch.empty({(1, *shape[1:])}))")
        return f"torch.cat([{w}[:-1], {other}])"
    if way == "transposed":
        turned = g.layer("w", f"nn.Parameter(torch.empty({(shape[1], shape[0], *shape[2:])}))")
        return f"{turned}.transpose(0, 1)"
    if way == "masked":
        mask = g.layer("k", f"nn.Buffer((torch.arange({shape[0]}) % 3 > 0).reshape(-1, 1{ones}))")
        return f"{w} * {mask}"
    return {
        "number": f"{w} * 0.5", "clone": f"{w}.clone()", "contiguous": f"{w}.contiguous()",
        "detach": f"{w}.detach()", "data": f"{w}.data", "cast": f"{w}.to(torch.float64, copy=True)",
        "flip": f"{w}.flip(-1)", "added": f"{w} + 0.1 * {w}", "stored": f"{w}.view({shape})",
        "negative": f"-{w}",
    }.get(way, w)  # fmt: skip


@operator(5)
def any_convolution(g: Builder) -> None:
    convolution(g, g.pick(*SPATIAL))


@operator(1.5)
def transposed_convolution(g: Builder) -> str:
    return transposed(g, g.pick(*SPATIAL))


def transposed(g: Builder, x: str, out: int | None = None) -> str:
    shape = g.shape(x)
    n, channels = len(shape) - 2, shape[1]
    out = out or g.one_of(channels, width(g), width(g))
    size, stride = g.one_of((1, 1), (3, 1), (2, 2), (3, 2))
    text = ""
    if stride > 1 or g.chance(0.1):
        text += f", stride={stride}"
    if g.chance(0.4):
        text += f", groups={g.random.choice(divisors(channels, out))}"
    if size == 3 and g.chance(0.4):
        text += ", padding=1"
    if g.chance(0.5):
        text += ", bias=False"
    return g.apply(g.layer("d", f"nn.ConvTranspose{n}d({channels}, {out}, {size}{text})"), x)


@operator(3)
def any_linear(g: Builder) -> None:
    linear(g, g.pick(2, 3, 3, 4))


def linear(g: Builder, x: str, out: int | None = None) -> str:
    """A linear map of the last axis, however it is written."""
    shape = g.shape(x)
    channels = shape[-1]
    out = out or g.one_of(channels, width(g))
    way = g.weighted(
        module=10,
        function=1,
        matmul=1,
        at=1,
        einsum=1,
        addmm=0.8,
        bmm=0.8,
        mm=0.5,
        table=0.5,
        tied=0.3,
        weight_norm=0.4,
    )
    bias = ", bias=False" if g.chance(0.5) else ""
    if way == "weight_norm":
        return g.apply(
            g.layer("l", f"{g.one_of('weight_norm', 'weight_norm_by_hook')}(nn.Linear({channels}, {out}{bias}))"),
            x,
        )
    if way == "function":
        return g.emit(f"F.linear($0, {g.parameter(out, channels)}, {g.parameter(out)})", x)
    if way == "matmul":
        return g.emit(f"torch.matmul($0, {g.parameter(channels, out)})", x)
    if way == "at":
        y = g.emit(f"$0 @ {g.parameter(channels, out)}", x)
        return g.emit(f"$0 + {g.parameter(out)}", y) if g.chance(0.5) else y
    if way == "einsum" and len(shape) in (2, 3, 4):
        letters = "nabc"[: len(shape) - 1]
        return g.emit(f"torch.einsum('{letters}i,io->{letters}o', $0, {g.parameter(channels, out)})", x)
    if way == "addmm" and len(shape) == 2:
        return g.emit(f"torch.addmm({g.parameter(out)}, $0, {g.parameter(channels, out)})", x)
    if way == "mm" and len(shape) == 2:
        return g.emit(f"$0.mm({g.parameter(channels, out)})", x)
    if way == "bmm" and len(shape) == 3:
        return g.emit(f"torch.bmm($0, {g.parameter(1, channels, out)}.expand($0.shape[0], -1, -1))", x)
    if way == "table" and len(shape) == 2:
        return g.emit(f"$0 @ ({g.parameter(channels, out)} * {g.parameter(1, out, gain=True)})", x)
    if way == "tied" and channels == out:
        w = g.layer("w", f"nn.Parameter(torch.empty({out}, {channels}))")
        return g.emit(f"F.linear(F.linear($0, {w}), {w}.t())", x)
    return g.apply(g.layer("l", f"nn.Linear({channels}, {out}{bias})"), x)


@operator(0.8)
def channels_by_einsum(g: Builder) -> None:
    x = g.pick(4)
    channels = g.shape(x)[1]
    g.emit(f"torch.einsum('nchw,oc->nohw', $0, {g.parameter(width(g), channels)})", x)


@operator(0.5)
def matrix_from_the_left(g: Builder) -> None:
    x = g.pick(3)
    g.emit(f"{g.parameter(width(g), g.shape(x)[1])} @ $0", x)


@operator(1)
def recurrent(g: Builder) -> None:
    x = g.pick(3)
    channels = g.shape(x)[-1]
    kind = g.one_of("LSTM", "GRU", "RNN")
    text = g.one_of("", "", ", bidirectional=True", ", num_layers=2", ", bias=False")
    first = g.one_of(", batch_first=True", ", batch_first=True", "")
    g.emit(f"{g.layer('r', f'nn.{kind}({channels}, {width(g)}{text}{first})')}($0)[0]", x)


@operator(1.5)
def other_normalisation(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    shape = g.shape(x)
    if len(shape) == 2 or g.chance(0.4):
        layer = g.layer(
            "ln", f"nn.LayerNorm({shape[-1]}{g.one_of('', '', ', elementwise_affine=False', ', bias=False')})"
        )
    elif g.chance(0.6):
        layer = g.layer(
            "gn",
            f"nn.GroupNorm({g.random.choice(divisors(shape[1], shape[1]))}, {shape[1]}{g.one_of('', ', affine=False')})",
        )
    else:
        layer = g.layer("in", f"nn.InstanceNorm{len(shape) - 2}d({shape[1]}, affine={g.one_of(True, False)})")
    g.apply(layer, x)


# Functions of one tensor --------------------------------------------------------------------------------------------

PASSING = (
    "F.relu($0)",
    "F.leaky_relu($0, 0.1)",
    "$0.clamp(min=0)",
    "torch.abs($0)",
    "F.hardtanh($0, 0, 1e9)",
)
SQUASHING = (
    "F.silu($0)", "F.gelu($0)", "torch.sigmoid($0)", "torch.tanh($0)", "F.hardswish($0)", "F.relu6($0)", "F.elu($0)",
    "F.mish($0)", "F.softplus($0)", "F.hardtanh($0, -1, 1)", "F.hardsigmoid($0)", "$0.clamp(-1, 1)", "$0.clamp(max=1)", "F.selu($0)",
    "F.softmax($0, 1)", "F.softmax($0, -1)", "F.log_softmax($0, -1)", "F.threshold($0, 0.1, 0)", "F.celu($0)",
)  # fmt: skip
IN_PLACE = ("F.relu($0, inplace=True)", "F.leaky_relu($0, 0.1, inplace=True)", "F.silu($0, inplace=True)")


@operator(6)
def activation(g: Builder) -> None:
    activate(g, g.pick())


def activate(g: Builder, x: str, passing: float = 0.6) -> str:
    shape = g.shape(x)
    way = g.weighted(passing=10 * passing, squashing=10 * (1 - passing), in_place=1, prelu=0.7, module=1.5)
    if way == "prelu" and len(shape) > 1:
        return g.apply(g.layer("a", f"nn.PReLU({g.one_of(1, shape[1])})"), x)
    if way == "in_place":
        return g.emit(g.one_of(*IN_PLACE), x)
    if way == "module":
        return g.apply(
            g.layer(
                "a",
                g.one_of(
                    "nn.ReLU()",
                    "nn.ReLU(inplace=True)",
                    "nn.SiLU()",
                    "nn.ReLU6()",
                    "nn.LeakyReLU()",
                    "nn.Dropout(0.5)",
                    "nn.Identity()",
                ),
            ),
            x,
        )
    return g.emit(g.one_of(*(PASSING if way == "passing" else SQUASHING)), x)


@operator(3)
def pool(g: Builder) -> None:
    x = g.pick(*SPATIAL)
    n = len(g.shape(x)) - 2
    g.emit(
        g.one_of(
            f"F.max_pool{n}d($0, 2)", f"F.max_pool{n}d($0, 3, 1, 1)", f"F.avg_pool{n}d($0, 2)",
            f"F.avg_pool{n}d($0, 3, 1, 1)", f"F.avg_pool{n}d($0, 3, 2, 1, count_include_pad=False)",
            f"F.avg_pool{n}d($0, 3, 2, ceil_mode=True)", f"F.avg_pool{n}d($0, 3, 1, 1, True)",
            f"F.adaptive_avg_pool{n}d($0, 1)", f"F.adaptive_avg_pool{n}d($0, 2)", f"F.adaptive_max_pool{n}d($0, 2)",
            f"F.adaptive_max_pool{n}d($0, 1)", f"F.lp_pool{min(n, 2)}d($0, 2, 2)" if n < 3 else f"F.avg_pool{n}d($0, 2)",
            f"F.max_pool{n}d($0, 2, return_indices=True)[0]",
        ),
        x,
    )  # fmt: skip


@operator(2)
def reduction(g: Builder) -> None:
    x = g.pick(2, 3, 4, 5)
    rank = len(g.shape(x))
    axes = g.one_of("-1", "1", f"{tuple(range(2, rank)) or 1}", f"{tuple(range(1, rank))}", "(-1,)")
    keep = g.one_of("", ", keepdim=True")
    name = g.weighted(mean=4, sum=2, amax=1, amin=0.5, std=0.4, logsumexp=0.3, norm=0.3, prod=0.1)
    if name in ("prod",):
        axes = "-1"
    g.emit(f"torch.{name}($0, dim={axes}{keep})", x)


@operator(0.5)
def single_extreme(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    g.emit(
        g.one_of(
            "$0.max(dim=1)[0]",
            "$0.max(-1, keepdim=True).values",
            "$0.sort(-1)[0]",
            "$0.topk(1, dim=1)[0]",
            "$0.median(1)[0]",
            "$0.cummax(-1)[0]",
        ),
        x,
    )


@operator(1)
def unusual(g: Builder) -> None:
    """Operators that pass nothing, or next to nothing."""
    x = g.pick()
    g.emit(
        g.one_of(
            "torch.cumsum($0, -1)", "torch.cumsum($0, 0)", "$0 ** 2", "$0.square().mean(-1, keepdim=True)", "torch.exp(-$0.abs())", "$0.abs().sqrt()",
            "torch.where($0 > 0, $0, 0.1 * $0)", "$0 * ($0 > 0)", "torch.sign($0)", "F.normalize($0, dim=-1)",
            "F.normalize($0, dim=1)", "$0.masked_fill($0 < 0, 0)", "torch.tril($0)", "torch.nan_to_num($0)",
            "torch.round($0)", "$0 / ($0.abs() + 1)", "torch.reciprocal($0.abs() + 1)", "torch.lerp($0, $0.flip(-1), 0.3)",
        ),
        x,
    )  # fmt: skip


# Arithmetic ---------------------------------------------------------------------------------------------------------


@operator(4)
def sum_of_two(g: Builder) -> None:
    x = g.pick()
    y = g.alike(x)
    g.emit(
        g.one_of(
            "$0 + $1",
            "$0 + $1",
            "$0 + $1",
            "$0 - $1",
            "torch.add($0, $1, alpha=0.5)",
            "torch.sub($0, $1, alpha=2)",
            "$0.add($1)",
            "torch.rsub($0, $1)",
            "sum([$0, $1])",
            "torch.stack([$0, $1]).sum(0)",
            "torch.lerp($0, $1, 0.25)",
            "$0 + 2 * $1",
        ),
        x,
        y,
    )


@operator(2)
def product_of_two(g: Builder) -> None:
    x = g.pick()
    y = g.alike(x)
    g.emit(
        g.one_of(
            "$0 * $1",
            "$0 * $1",
            "$0 * torch.sigmoid($1)",
            "torch.mul($0, torch.tanh($1))",
            "$0 / ($1.abs() + 1)",
            "torch.maximum($0, $1)",
            "torch.minimum($0, $1)",
            "torch.addcmul($0, $0, $1)",
            "$0 * $1.mean(1, keepdim=True)",
        ),
        x,
        y,
    )


@operator(1)
def broadcast(g: Builder) -> None:
    """Two tensors of unequal shapes that broadcast."""
    import torch

    x = g.pick()
    shape = g.shape(x)

    def fits(tensor: torch.Tensor) -> bool:
        try:
            return torch.broadcast_shapes(shape, tensor.shape) == shape
        except RuntimeError:
            return False

    y = g.pick(where=fits, besides=(x,))
    pair = (x, y) if g.chance(0.7) else (y, x)
    g.emit(g.one_of("$0 + $1", "$0 * $1", "$0 - $1", "$0 * torch.sigmoid($1)"), *pair)


@operator(0.7)
def with_itself(g: Builder) -> None:
    x = g.pick()
    g.emit(
        g.one_of(
            "$0 + $0",
            "$0 * $0",
            "$0 - 0.5 * $0",
            "torch.sub($0, $0, alpha=0.5)",
            "$0 + $0.flip(-1)",
            "torch.cat([$0, $0], -1)",
            "$0 + $0.mean(-1, keepdim=True)",
            "$0 - $0.mean((0, 1), keepdim=True)",
            "$0 * $0.sigmoid()",
        ),
        x,
    )


@operator(4)
def scalar_arithmetic(g: Builder) -> None:
    x = g.pick()
    g.emit(
        g.one_of(
            "$0 * 2",
            "$0 * 0.5",
            "0.5 * $0",
            "$0 / 3",
            "$0 + 1",
            "$0 - 0.5",
            "1 - $0",
            "-$0",
            "torch.neg($0)",
            "2 / ($0.abs() + 1)",
            "$0 * -1.5",
            "$0.mul(0.7)",
            "torch.true_divide($0, 2)",
            "$0.div(2)",
            "torch.rsub($0, 1)",
            "$0 * 1",
            "$0 + 0",
            "$0 * 0.25 + 0.5",
            "$0 / torch.tensor(2.0)",
            "$0 * torch.tensor(0.5, dtype=torch.float64)",
            "torch.add(1, $0, alpha=2)",
            "torch.add($0, 1, alpha=0.5)",
            "$0 // 0.5",
            "torch.div($0, 0.5, rounding_mode='floor')",
        ),
        x,
    )


@operator(0.8)
def scalar_of_the_shape(g: Builder) -> None:
    """A fold that bakes the number in holds at one size only."""
    x = g.pick()
    g.emit(
        g.one_of(
            "$0 / $0.shape[-1]",
            "$0 * $0.shape[0]",
            "$0 + $0.shape[-1]",
            "$0.sum(-1, keepdim=True) / $0.shape[-1]",
            "$0 / $0.shape[0] + 1",
            "$0.sum(0, keepdim=True) / $0.shape[0]",
            "$0 / $0.numel() ** 0.5",
            "$0 * len($0)",
            "$0 * torch.full((), $0.shape[-1], dtype=torch.float64)",
        ),
        x,
    )


@operator(4)
def parameter_arithmetic(g: Builder) -> None:
    """LayerScale, positional embeddings, and their like."""
    x = g.pick(2, 3, 4, 5)
    shape = g.shape(x)
    axis = g.one_of(1, 1, -1, 0)
    if axis == 0:
        size: tuple[int, ...] = g.one_of((), (1,), shape[1:], (1, *shape[1:]))
    elif axis == 1:
        size = (shape[1], *[1] * (len(shape) - 2))
        size = g.one_of(size, (1, *size))
    else:
        size = (shape[-1],)
    multiply = g.chance(0.5)
    if multiply and g.chance(0.3) and size:
        g.apply(g.layer("s", f"Scaling({', '.join(map(str, size))})"), x)
        return
    p = g.parameter(*size, gain=multiply)
    if multiply:
        codes = [
            f"$0 * {p}",
            f"$0 * {p}",
            f"{p} * $0",
            f"$0 / ({p} + 2)" if g.chance(0.3) else f"$0 * {p}",
            f"$0.mul({p})",
            f"$0 * {p}.exp()",
            f"$0 * ({p} * 2)",
            f"$0 * {p}.sigmoid()",
            f"$0 * (1 + {p})",
        ]
    else:
        codes = [
            f"$0 + {p}",
            f"$0 + {p}",
            f"{p} + $0",
            f"$0 - {p}",
            f"{p} - $0",
            f"torch.add($0, {p}, alpha=0.5)",
            f"$0 + 0.5 * {p}",
            f"$0 + {p}.tanh()",
        ]
    g.emit(g.one_of(*codes), x)


@operator(0.7)
def affine_by_function(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    shape = g.shape(x)
    size = (1, shape[1], *[1] * (len(shape) - 2))
    g.emit(f"torch.addcmul({g.parameter(*size)}, $0, {g.parameter(*size, gain=True)})", x)


# Joining and taking apart -------------------------------------------------------------------------------------------


@operator(3)
def join(g: Builder) -> None:
    x = g.pick()
    y = g.alike(x)
    rank = len(g.shape(x))
    axis = g.one_of(1, 1, 1, -1, 0, rank - 1) if rank > 1 else 0
    g.emit(
        g.one_of(
            f"torch.cat([$0, $1], {axis})",
            f"torch.cat([$0, $1], {axis})",
            f"torch.cat(($0, $1, $0), dim={axis})",
            f"torch.stack([$0, $1], {axis})",
            f"torch.stack([$0, $1], {axis}).flatten({axis}, {axis + 1})"
            if axis >= 0
            else f"torch.cat([$0, $1], {axis})",
        ),
        x,
        y,
    )


@operator(1)
def join_unequal(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    shape = g.shape(x)
    y = g.pick(
        where=lambda t: t.dim() == len(shape) and tuple(t.shape[2:]) == shape[2:] and t.shape[0] == shape[0],
        besides=(x,),
    )
    g.emit("torch.cat([$0, $1], 1)", x, y)


@operator(3)
def take_apart(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    shape = g.shape(x)
    axis = g.one_of(1, 1, 1, -1, 0)
    length = shape[axis]
    if length < 2:
        raise Unfit
    way = g.weighted(chunk=3, split=2, slices=3, unbind=0.7, select=0.7, index=1, strided=1, narrow=0.5)
    if way == "chunk":
        pieces = 2 if length < 4 else g.one_of(2, 2, 4)
        got = -(-length // -(-length // pieces))
        names = g.emit(f"$0.chunk({pieces}, {axis})", x, outputs=got)
        g.read.update(name for name in names if g.chance(0.3))
    elif way == "split":
        sizes = [length // 2, length - length // 2]
        g.emit(f"torch.split($0, {sizes}, {axis})", x, outputs=2)
    elif way == "slices":
        where = "$0[:, {}]" if axis == 1 else "$0[..., {}]" if axis == -1 else "$0[{}]"
        middle = length // 2
        g.emit(where.format(f":{middle}"), x)
        if g.chance(0.6):
            g.emit(where.format(g.one_of(f"{middle}:", f"{middle - 1}:", "1:")), x)
    elif way == "unbind":
        names = g.emit(f"$0.unbind({axis})", x, outputs=length)
        g.read.update(names[2:])
    elif way == "select":
        g.emit(g.one_of(f"$0.select({axis}, 0)", f"$0.select({axis}, -1)", "$0[:, 0]", "$0[..., 0]", "$0[0]"), x)
    elif way == "index":
        order = list(range(length))
        g.random.shuffle(order)
        g.emit(
            g.one_of(
                f"torch.index_select($0, {axis}, torch.tensor({order}))",
                f"$0[:, {order}]" if axis == 1 else f"$0[..., {order}]",
                f"$0[:, torch.tensor({order[:2]})]" if axis == 1 else f"$0.flip({axis})",
                f"$0[:, {order + order[:1]}]" if axis == 1 else f"$0.roll(1, {axis})",
                f"$0.take_along_dim(torch.zeros_like($0, dtype=torch.int64), {axis})",
            ),
            x,
        )
    elif way == "strided":
        g.emit(f"$0[:, {g.one_of(0, 1)}::2]", x)
        if g.chance(0.5):
            g.emit("$0[:, ::2]", x)
    else:
        g.emit(f"$0.narrow({axis}, 0, {length - 1})", x)


@operator(4)
def rearrange(g: Builder) -> None:
    x = g.pick()
    shape = g.shape(x)
    rank = len(shape)
    codes = [
        "$0.unsqueeze(-1).squeeze(-1)",
        "$0.contiguous()",
        "$0.clone()",
        "$0.unsqueeze(1).expand(-1, 2, *$0.shape[1:]).flatten(1, 2)",
        "$0.detach()",
    ]
    if rank >= 2:
        codes += [
            "$0.flatten(1)",
            "$0.reshape($0.shape[0], -1)",
            "$0.view($0.size(0), -1)",
            "$0.unsqueeze(1)",
            "$0.unsqueeze(-1)",
            "$0.repeat_interleave(2, 1)",
            f"$0.tile({', '.join(['1', '2'] + ['1'] * (rank - 2))})",
        ]
        if shape[1] % 2 == 0:
            codes += [
                "$0.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)",
                "$0.unflatten(1, (-1, 2))",
                "$0.unflatten(1, (2, -1)).sum(1)",
                "$0.unflatten(1, (2, -1)).mean(2)",
                "$0.unflatten(1, (2, -1))",
            ]
    if rank == 3:
        codes += [
            "$0.transpose(1, 2)",
            "$0.transpose(1, 2).contiguous()",
            "$0.permute(0, 2, 1)",
            "$0.mT",
            "$0.flatten(0, 1)",
            "$0.movedim(1, -1)",
            "$0.transpose(0, 1)",
            "torch.einsum('nac->nca', $0)",
        ]
    if rank == 4:
        codes += [
            "$0.permute(0, 2, 3, 1)",
            "$0.flatten(2).transpose(1, 2)",
            "$0.flatten(2)",
            "$0.transpose(2, 3)",
            "$0.permute(0, 3, 1, 2)",
            "$0.permute(0, 2, 3, 1).reshape(-1, $0.shape[1])",
            "$0.swapaxes(1, 3)",
            "F.channel_shuffle($0, 2)" if shape[1] % 2 == 0 else "$0.movedim(1, 2)",
            "$0.to(memory_format=torch.channels_last)",
            "$0.squeeze(1)",
            "$0.squeeze()",
        ]
        if shape[1] % 4 == 0:
            codes += ["F.pixel_shuffle($0, 2)"]
        if shape[2] % 2 == 0 and shape[3] % 2 == 0:
            codes += [
                "F.pixel_unshuffle($0, 2)",
                f"$0.view($0.shape[0], $0.shape[1], {shape[2] // 2}, 2, {shape[3] // 2}, 2).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)",
                "torch.cat([$0[..., ::2, ::2], $0[..., 1::2, 1::2]], 1)",
            ]
        codes += [
            "F.unfold($0, 2)",
            "$0.unfold(2, 2, 1)",
            "$0.unfold(3, 2, 2).mean(-1)",
            "F.unfold($0, 3, padding=1)",
        ]
    if rank == 5:
        codes += [
            "$0.flatten(1, 2)",
            "$0.flatten(3)",
            "$0.mean(2)",
            "$0[:, :, 0]",
            "$0.transpose(1, 2).flatten(0, 1)",
        ]
    if rank == 1:
        codes += ["$0.unsqueeze(1)", "$0.unsqueeze(0)", "$0[:, None] * torch.ones(1, 3, dtype=torch.float64)"]
    g.emit(g.one_of(*codes), x)


@operator(0.8)
def fixed_view(g: Builder) -> None:
    """A view with the numbers of the example written out: it holds at one size, or at one batch."""
    x = g.pick(2, 3, 4)
    shape = g.shape(x)
    count = 1
    for length in shape:
        count *= length
    g.emit(
        g.one_of(
            f"$0.view({count})",
            f"$0.reshape({shape[0]}, -1)",
            f"$0.reshape(1, {shape[0] * shape[1]}, {', '.join(map(str, shape[2:])) or 1})",
            f"$0.reshape(-1, {shape[-1]})",
            f"$0.flatten().reshape({tuple(shape)})",
        ),
        x,
    )


@operator(1.2)
def across_the_batch(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    rank = len(g.shape(x))
    rest = ", ".join(["-1"] * (rank - 1))
    codes = [
        "$0.flip(0)",
        "$0.roll(1, 0)",
        "$0 - $0.mean(0)",
        "$0 - $0.mean(0, keepdim=True)",
        "torch.cat([$0, $0.flip(0)], 0)",
        "$0[:1]",
        "$0[0]",
        "$0.mean(0, keepdim=True)",
        f"$0[:1].expand($0.shape[0], {rest})",
        "$0.sum(0)",
        "$0.repeat_interleave(2, 0)",
        "$0[torch.arange($0.shape[0] - 1, -1, -1)]",
        "$0.transpose(0, 1)",
        "$0.cumsum(0)",
        "$0.unsqueeze(0).transpose(1, 2).squeeze(0)",
        "$0.max(0)[0]",
    ]
    if rank == 4:
        codes += [
            "$0.reshape(1, -1, *$0.shape[2:]).reshape(-1, *$0.shape[1:])",
            "$0.flatten(0, 1).unsqueeze(1)",
        ]
    g.emit(g.one_of(*codes), x)


@operator(2)
def resize(g: Builder) -> None:
    x = g.pick(3, 4, 5)
    n = len(g.shape(x)) - 2
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
    codes = [
        "F.interpolate($0, scale_factor=2)",
        f"F.interpolate($0, scale_factor=2.0, mode='{smooth}')",
        f"F.interpolate($0, size={[3] * n}, mode='{smooth}', align_corners=True)",
        "F.interpolate($0, scale_factor=0.5, mode='area')",
    ]
    pads = ", ".join(["1"] * (2 * n))
    codes += [
        f"F.pad($0, ({pads}))",
        f"F.pad($0, ({pads}), mode='replicate')",
        f"F.pad($0, ({pads}), mode='circular')",
        f"F.pad($0, ({pads}), mode='reflect')" if n < 3 else f"F.pad($0, ({pads}))",
        f"F.pad($0, ({pads}), value=0.5)",
        "F.pad($0, (0, 1))",
        "F.pad($0, (-1, 0))",
        f"F.pad($0, ({', '.join(['0'] * (2 * n))}, 1, 1))",
    ]
    if n == 2:
        codes += [
            "F.interpolate($0, size=(4, 4), mode='bicubic')",
            "nn.ZeroPad2d(1)($0)",
            "nn.Upsample(scale_factor=2)($0)",
            "F.grid_sample($0, torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 2, 2, 2).expand($0.shape[0], -1, -1, -1), align_corners=False)",
            "F.interpolate($0, size=$0.shape[2:], mode='nearest')",
            "F.interpolate($0, scale_factor=2, mode='nearest-exact')",
            "nn.ReflectionPad2d(1)($0)",
        ]
    g.emit(g.one_of(*codes), x)


@operator(1)
def cast(g: Builder) -> None:
    x = g.pick()
    g.emit(
        g.one_of(
            "$0.to(torch.float64)",
            "$0.double()",
            "$0.type_as($0)",
            "$0.float().double()",
            "$0.to(torch.float32).to(torch.float64)",
            "$0.to($0.dtype, copy=True)",
            "$0.type(torch.float64)",
            "$0.half().double()" if g.chance(0.2) else "$0.double()",
            "torch.complex($0, $0).real" if g.chance(0.3) else "$0.clone()",
            "$0.long().double()" if g.chance(0.2) else "$0.cpu()",
        ),
        x,
    )


@operator(0.6)
def side_output(g: Builder) -> None:
    x = g.pick(2, 3, 4)
    g.emit(
        g.one_of("$0.argmax(1)", "$0.argmax(-1)", "$0 > 0", "$0.argsort(-1)", "torch.tensor($0.shape)", "$0.long()"),
        x,
    )


# Writing ------------------------------------------------------------------------------------------------------------


@operator(2.5)
def write(g: Builder) -> None:
    x = g.pick(where=lambda tensor: tensor.is_contiguous())
    if x.startswith("x") and g.chance(0.8):
        raise Unfit
    shape = g.shape(x)
    code = g.one_of(
        "$0.relu_()", "$0.add_(1)", "$0.mul_(0.5)", "$0.clamp_(min=0)", "$0.neg_()", "$0.sigmoid_()", "$0.tanh_()", "$0.abs_()", "$0.add_($0)",
        "$0[:, :1].mul_(2)", "$0[..., 0].add_(1)", "$0.view($0.shape[0], -1).mul_(0.5)", "$0[:1].zero_()", "$0.flatten()[0] = 0",
        "$0[:, 0] = 0", "$0[:, 0] = $0[:, -1]", "$0[..., -1:] *= 2", "$0.copy_($0.flip(0))", "$0.fill_diagonal_(0)", "$0.zero_()",
        "$0.select(1, 0).copy_($0.select(1, -1))", "$0[$0 < -1] = 0", "$0.squeeze_(1)", "$0.unsqueeze_(0)", "$0.transpose_(1, 2)", "$0.set_($0.clone())", "$0.data.mul_(0.5)", "$0.data = $0.data * 2",
    )  # fmt: skip
    if (".zero_()" in code and g.chance(0.8)) or (len(shape) < 2 and ":" in code):
        raise Unfit
    if ("squeeze_" in code or "transpose_" in code or "set_" in code or ".data" in code) and g.chance(0.7):
        raise Unfit
    g.emit(code, x, outputs=0)


@operator(1.2)
def write_other(g: Builder) -> None:
    """Write one tensor into another."""
    x = g.pick(where=lambda tensor: tensor.is_contiguous())
    if x.startswith("x"):
        raise Unfit
    y = g.alike(x)
    g.emit(
        g.one_of(
            "$0.add_($1)",
            "$0.mul_($1)",
            "$0.copy_($1)",
            "$0 += $1",
            "$0[:, :1] = $1[:, :1]",
            "$0[:, 0] += $1[:, 0]",
            "$0[:1].copy_($1[:1])",
            "$0.sub_($1, alpha=0.5)",
            "torch.add($0, $1, out=$0)",
            "$0[..., :1].add_($1[..., -1:])",
            "$0.lerp_($1, 0.5)",
        ),
        x,
        y,
        outputs=0,
    )


@operator(1)
def fill_by_parts(g: Builder) -> None:
    """A buffer made inside the forward, filled slice by slice."""
    x = g.pick(2, 3, 4)
    y = g.alike(x) if g.chance(0.5) else x
    whole = g.emit(
        g.one_of(
            "torch.empty_like($0).fill_(0.5)",
            "torch.ones_like($0)",
            "$0.new_ones($0.shape)",
            "torch.full_like($0, 0.3)",
        ),
        x,
    )
    channels = g.shape(x)[1]
    middle = max(channels // 2, 1)
    g.emit(f"$0[:, :{middle}] = $1[:, :{middle}]", whole, x, outputs=0)
    if g.chance(0.7) and channels > 1:
        g.emit(f"$0[:, {middle}:] = $1[:, {middle}:]", whole, y, outputs=0)


@operator(2)
def view_then_write(g: Builder) -> None:
    """A view of a tensor, then a write to the tensor or to the view; both are read later."""
    x = g.pick(where=lambda tensor: tensor.is_contiguous() and tensor.dim() > 1)
    if x.startswith("x"):
        raise Unfit
    view = g.emit(
        g.one_of(
            "$0.view($0.shape[0], -1)",
            "$0[:, :1]",
            "$0.transpose(0, 1)",
            "$0.unsqueeze(1)",
            "$0[..., 1:]",
            "$0.view_as($0)",
            "$0.detach()",
            "$0.narrow(1, 0, 1)",
        ),
        x,
    )
    g.emit(g.one_of("$0.add_(1)", "$0.mul_(0.5)", "$0.relu_()"), g.one_of(x, view), outputs=0)
    g.read.discard(x)
    g.read.discard(view)


# Sharing ------------------------------------------------------------------------------------------------------------


@operator(3)
def call_again(g: Builder) -> None:
    """A module that ran before runs on another tensor."""
    if not g.applied:
        raise Unfit
    layer, before = g.random.choice(g.applied)
    x = g.pick(
        before.dim(),
        where=lambda tensor: tensor.shape[1:] == before.shape[1:] or tensor.shape[1] == before.shape[1],
    )
    g.apply(layer, x)


@operator(0.5)
def parameter_in_the_output(g: Builder) -> None:
    weights = [name for name, layer in g.layers.items() if layer.code.startswith(("nn.Conv", "nn.Linear"))]
    if not weights:
        raise Unfit
    g.emit(f"$0 + m.{g.random.choice(weights)}.weight.{g.one_of('sum()', 'mean()', 'flatten()[0]')}", g.pick())


@operator(0.6)
def from_nothing(g: Builder) -> None:
    """A computation that does not depend on the input: an interpolated or looked-up table."""
    x = g.pick(3, 4)
    shape = g.shape(x)
    if len(shape) == 4:
        p = g.parameter(1, shape[1], 2, 2)
        g.emit(
            g.one_of(
                f"$0 + F.interpolate({p}, size=$0.shape[2:], mode='bilinear')",
                f"$0 * F.interpolate({p}, size=$0.shape[2:])",
            ),
            x,
        )
    elif g.chance(0.5):
        table = g.layer("e", f"nn.Embedding({shape[1] + 4}, {shape[2]})")
        g.emit(f"$0 + {table}(torch.arange($0.shape[1]))", x)
    else:
        p = g.parameter(1, 12, shape[2])
        g.emit(f"$0 + {p}[:, : $0.shape[1]]", x)


@operator(0.7)
def number_of_the_data(g: Builder) -> None:
    x = g.pick()
    y = g.pick()
    g.emit(
        g.one_of(
            "$0 * float($1.abs().max() > 100)+ $0",
            "$0 + float($1.detach().numpy().max() > 1e9)",
            "$0 + $1.max().item()",
            "$0 * torch.from_numpy($1.detach().numpy()).abs().mean()",
            "$0 + torch.tensor($1.tolist(), dtype=torch.float64).mean()",
            "$0 * $1.abs().mean()",
            "$0 + $1.sum()",
        ),
        x,
        y,
    )


@operator(0.6)
def stored_in_the_model(g: Builder) -> None:
    x = g.pick()
    g.emit(
        g.one_of(
            "setattr(m, 'last', $0)",
            "m.__dict__.setdefault('seen', []).append($0)",
            "m.__dict__.update(cache={'x': $0})",
        ),
        x,
        outputs=0,
    )
    g.read.add(x)


@operator(0.5)
def branch_on_shape(g: Builder) -> None:
    x = g.pick(3, 4)
    codes = ["$0 * 2 if $0.shape[1] > 1 else $0", "F.relu($0) if $0.dim() == 4 else $0.tanh()"]
    codes += [
        "$0 * 2 if $0.shape[0] > 100 else $0",
        "F.pad($0, (0, $0.shape[-1] % 2))",
        "$0 if $0.requires_grad or not m.training else $0 * 2",
    ]
    g.emit(g.one_of(*codes), x)
