"""Blocks of several steps, as they stand in real networks, around batch norms of every kind."""

from __future__ import annotations

from fuzz.generate import Builder, Unfit, block
from fuzz.operators import SPATIAL, activate, convolution, divisors, linear, transposed, width
from fuzz.passing import pass_through


def begin(g: Builder) -> None:
    """The inputs, and the first layer."""
    batch = g.one_of(1, 2, 2, 2, 2, 3)
    count = g.one_of(1, 1, 1, 1, 2)
    kind = g.weighted(image=10, vector=2, sequence=2, volume=1, tokens=3, indices=1.5)
    for index in range(count):
        channels, size = g.one_of(2, 3, 4, 6), g.one_of(4, 5, 6, 7, 8)
        if kind == "image":
            other = size if g.chance(0.6) else g.one_of(5, 6)
            g.input((batch, channels, size, other), (2, 3))
        elif kind == "vector":
            g.input((batch, channels))
        elif kind == "sequence":
            g.input((batch, channels, size), (2,))
        elif kind == "volume":
            g.input((batch, channels, 4, 4, 4), (2, 3, 4))
        elif kind == "tokens":
            g.input((batch, size, channels), (1,))
        else:
            x = g.input((batch, size), (1,), high=7)
            table = g.layer("e", f"nn.Embedding(7, {channels}{g.one_of('', '', ', padding_idx=0', ', max_norm=1.0')})")
            y = g.emit(f"{table}($0)", x) if g.chance(0.8) else g.emit(f"F.embedding($0, {table}.weight)", x)
            if g.chance(0.5):
                norm_of_tokens(g, y)
        if index and g.chance(0.5):
            break


# Norms --------------------------------------------------------------------------------------------------------------


def dressing(g: Builder) -> str:
    hint, g.hint = g.hint, ""
    if hint and g.chance(0.7):
        return hint
    weights = {
        "positive": 55,
        "mixed": 22,
        "zeros": 5,
        "tiny": 2,
        "huge": 2,
        "small variance": 3,
        "large variance": 2,
        "unit": 2,
        "dead": 0.7,
    }
    weights |= {"one tiny": 2, "one huge": 2, "far mean": 2, "equal": 1}
    return str(g.random.choices(list(weights), list(weights.values()))[0])


def norm(g: Builder, x: str) -> str:
    """A batch norm of any kind on a variable of rank 2 to 5."""
    shape = g.shape(x)
    rank = len(shape)
    if rank < 2 or rank > 5:
        raise Unfit
    channels = shape[1]
    name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[rank]
    eps = g.one_of("", "", "", ", eps=0.001", ", eps=0.3", ", eps=1e-07")
    numbers = dressing(g)
    kind = g.weighted(plain=60, sync=4, lazy=4, functional=1.2, affine=6, untracked=1, image=16 if rank == 4 else 0)
    if kind == "image":
        code = g.weighted(
            FrozenBatchNorm2d=5, DetectronFrozenNorm=3, BatchNormAct2d=5, FrozenBatchNormAct2d=3, NormWithActivation=3,
            DoublingNorm=3, SquashingNorm=1,
        )  # fmt: skip
        act = g.one_of("", ", apply_act=False", ", act_layer=nn.SiLU") if "Act2d" in code else ""
        return g.apply(g.layer("n", f"{code}({channels}{eps}{act})", numbers), x)
    if kind == "sync":
        name = "SyncBatchNorm"
    if kind == "lazy":
        return g.apply(g.layer("n", f"lazy_norm({rank}, {channels}{eps})", numbers), x)
    options = {"affine": ", affine=False", "untracked": ", track_running_stats=False"}.get(kind, "")
    layer = g.layer("n", f"nn.{name}({channels}{eps}{options})", numbers)
    if kind == "functional":
        return g.emit(f"functional_norm($0, {layer})", x)
    return g.apply(layer, x)


def norm_of_tokens(g: Builder, x: str) -> str:
    """A norm over the last axis of (batch, tokens, features), as people write it."""
    way = g.one_of("flatten", "transpose", "permute", "wrong axis")
    if len(g.shape(x)) != 3 or way == "wrong axis":
        return norm(g, x)
    if way == "flatten":
        y = norm(g, g.emit("$0.flatten(0, 1)", x))
        return (
            g.emit("$0.reshape($1.shape)", y, x)
            if g.chance(0.5)
            else g.emit(f"$0.reshape(-1, $1.shape[1], {g.shape(x)[2]})", y, x)
        )
    turn = g.one_of("$0.transpose(1, 2)", "$0.permute(0, 2, 1)", "$0.mT.contiguous()")
    return g.emit(turn, norm(g, g.emit(turn, x)))


def layer_on(g: Builder, x: str, out: int | None = None, keep_size: bool = False) -> str:
    rank = len(g.shape(x))
    if rank == 2:
        return linear(g, x, out)
    if rank not in SPATIAL:
        raise Unfit
    if not keep_size and g.chance(0.1):
        return transposed(g, x, out)
    return convolution(g, x, out, keep_size)


# Blocks -------------------------------------------------------------------------------------------------------------


@block(15)
def layer_and_norm(g: Builder) -> None:
    y = norm(g, layer_on(g, g.pick(2, 3, 4, 4, 5)))
    if g.chance(0.6):
        activate(g, y, 0.7)


@block(3)
def linear_and_norm_of_tokens(g: Builder) -> None:
    y = norm_of_tokens(g, linear(g, g.pick(3)))
    if g.chance(0.5):
        activate(g, y)


@block(5)
def norm_and_layer(g: Builder) -> None:
    x = activate(g, g.pick(2, 3, 4, 5), 0.3)
    y = norm(g, x)
    way = g.weighted(layer=5, pool=2, flat=2, relu=2)
    if way == "layer":
        layer_on(g, y)
    elif way == "pool" and len(g.shape(y)) == 4:
        linear(
            g,
            g.emit(
                g.one_of(
                    "F.adaptive_avg_pool2d($0, 1).flatten(1)",
                    "$0.mean((2, 3))",
                    "F.adaptive_max_pool2d($0, 1).flatten(1)",
                ),
                y,
            ),
        )
    elif way == "flat":
        linear(g, g.emit("$0.flatten(1)", y))
    else:
        layer_on(g, activate(g, y, 1.0))


@block(22)
def norm_between(g: Builder) -> None:
    """A layer, something that passes units, a norm: the norm may fold backward."""
    x = source(g, g.pick(2, 3, 4, 4, 5))
    for _ in range(g.one_of(1, 1, 1, 2, 3)):
        x = branch_out(g, x) if g.chance(0.2) else pass_through(g, x)
    rank = len(g.shape(x))
    y = norm_of_tokens(g, x) if rank == 3 and g.chance(0.6) else norm(g, x)
    if g.chance(0.3):
        activate(g, y)


@block(16)
def norm_before(g: Builder) -> None:
    """Something that pins, a norm, something that passes units, a layer: the norm may fold forward."""
    x = g.pick(2, 3, 4, 4, 5)
    if not x.startswith("x"):
        x = g.emit(g.one_of("F.silu($0)", "torch.tanh($0)", "F.gelu($0)", "$0.abs().sqrt()"), x)
    rank = len(g.shape(x))
    g.hint = "scale" if g.chance(0.4) else ""
    x = norm_of_tokens(g, x) if rank == 3 and g.chance(0.5) else norm(g, x)
    for _ in range(g.one_of(0, 1, 1, 1, 2)):
        x = branch_out(g, x) if g.chance(0.2) else pass_through(g, x)
    target(g, x)


@block(3)
def write_between(g: Builder) -> None:
    """A layer, a write to its output or to a part of it, a norm."""
    x = source(g, g.pick(2, 3, 4, 4))
    view = ""
    if g.chance(0.4):
        view = g.emit(g.one_of("$0.view($0.shape[0], -1)", "$0[:, :1]", "$0.unsqueeze(1)", "$0.flatten(1)"), x)
    way = g.one_of(
        "$0[:, :1].mul_(2)", "$0[..., 0].add_(1)", "$0.view($0.shape[0], -1).mul_(0.5)", "$0[:, 0] = 0", "$0.mul_(2)",
        "$0[:, 0] = $0[:, -1]", "$0.add_(1)", "$0.relu_()", "$0.copy_($0.flip(1))", "$0.neg_()", "$0[:, 1:] += 1",
    )  # fmt: skip
    g.emit(way, x, outputs=0)
    norm(g, x)
    if view and g.chance(0.7):
        g.emit("torch.sigmoid($0)", view)


def source(g: Builder, x: str) -> str:
    """A layer whose output can take units."""
    rank = len(g.shape(x))
    if rank > 2 and g.chance(0.12):
        name = g.one_of(
            f"nn.LayerNorm({g.shape(x)[-1]})", f"nn.GroupNorm(1, {g.shape(x)[1]})",
            f"nn.InstanceNorm{rank - 2}d({g.shape(x)[1]}, affine=True)", f"nn.RMSNorm({g.shape(x)[-1]})",
        )  # fmt: skip
        return g.apply(g.layer("ln", name), x)
    if rank == 3 and g.chance(0.4):
        return linear(g, x)
    return layer_on(g, x)


def target(g: Builder, x: str) -> str:
    """A layer whose input can take units."""
    rank = len(g.shape(x))
    if rank == 3 and g.chance(0.25):
        kind = g.one_of("LSTM", "GRU", "RNN", "RNN")
        options = g.one_of("", ", bidirectional=True", ", num_layers=2", ", bias=False")
        options += ", nonlinearity='relu'" if kind == "RNN" and g.chance(0.5) else ""
        return str(
            g.emit(f"{g.layer('r', f'nn.{kind}({g.shape(x)[2]}, {width(g)}, batch_first=True{options})')}($0)[0]", x)
        )
    if rank in SPATIAL and g.chance(0.6):
        n, channels = rank - 2, g.shape(x)[1]
        out = width(g)
        groups = g.random.choice(divisors(channels, out))
        size = g.one_of(1, 2, 3)
        if g.chance(0.2):
            return g.apply(g.layer("d", f"nn.ConvTranspose{n}d({channels}, {out}, 1, groups={groups})"), x)
        return g.apply(
            g.layer("c", f"nn.Conv{n}d({channels}, {out}, {size}, groups={groups}, bias={g.chance(0.5)})"), x
        )
    return linear(g, x)


def branch_out(g: Builder, x: str) -> str:
    """Two operators on one tensor, put together again; or a second layer whose output joins."""
    shape = g.shape(x)
    if g.chance(0.5):
        try:
            y = pass_through(g, x)
        except Unfit:
            y = x
    else:
        fitting = g.random.choice(g.order)
        y = source(g, fitting) if len(g.shape(fitting)) > 1 and g.variables[fitting].is_floating_point() else x
    if g.shape(y) == shape:
        codes = [
            "$0 + $1",
            "$0 - $1",
            "torch.add($0, $1, alpha=0.5)",
            "torch.cat([$0, $1], 1)",
            "torch.stack([$0, $1], 1).flatten(1, 2)",
            "torch.maximum($0, $1)",
            "$0 * torch.sigmoid($1)",
            "torch.cat([$0, $1], 0)",
            "0.5 * ($0 + $1)",
            "torch.lerp($0, $1, 0.3)",
            "$0 * $1",
            "torch.sub($1, $0, alpha=2)",
        ]
        return str(g.emit(g.one_of(*codes), x, y))
    if len(g.shape(y)) == len(shape):
        return str(g.emit(g.one_of("torch.cat([$0, $1], 1)", "$0 + $1", "$0 * $1"), x, y))
    return x


@block(4)
def residual(g: Builder) -> None:
    x = g.pick(3, 4, 4, 5)
    channels = g.shape(x)[1]
    y = norm(g, convolution(g, x, channels if g.chance(0.6) else None, keep_size=True, kind="module"))
    if g.chance(0.5):
        y = norm(g, convolution(g, activate(g, y, 0.8), channels, keep_size=True, kind="module"))
    if g.shape(x) != g.shape(y):
        x = norm(g, convolution(g, x, g.shape(y)[1], keep_size=True, kind="module"))
    z = g.emit(
        g.one_of("$0 + $1", "$1 + $0", "$0.add_($1)" if not y.startswith("x") else "$0 + $1", "torch.add($0, $1)"),
        y,
        x,
    )
    if g.chance(0.6):
        activate(g, z, 0.8)


@block(3)
def stream(g: Builder) -> None:
    """A residual stream that several norms read."""
    x = g.pick(4, 4, 3)
    x = convolution(g, x, None, keep_size=True, kind="module")
    channels = g.shape(x)[1]
    for _ in range(g.one_of(1, 2, 3)):
        y = norm(g, x)
        if g.chance(0.7):
            y = activate(g, y, 0.8)
        y = convolution(g, y, channels, keep_size=True, kind="module")
        if g.chance(0.3):
            y = g.emit(f"$0 * {g.parameter(channels, *[1] * (len(g.shape(y)) - 2), gain=True)}", y)
        x = g.emit(g.one_of("$0 + $1", "$0 + $1", "torch.cat([$0, $1], 1)[:, -$0.shape[1]:]"), x, y)
    norm(g, x)


@block(2.5)
def dense(g: Builder) -> None:
    x = g.pick(4, 4, 3)
    for _ in range(g.one_of(1, 2)):
        y = norm(g, x)
        y = convolution(g, activate(g, y, 0.9), 2, keep_size=True, kind="module")
        x = g.emit("torch.cat([$0, $1], 1)", x, y)
    if g.chance(0.6):
        y = activate(g, norm(g, x), 0.9)
        convolution(g, y, None, keep_size=True)


@block(2)
def joined_branches(g: Builder) -> None:
    """Branches that are concatenated before or after their norms."""
    x = g.pick(4, 4, 3, 2)
    names = []
    for _ in range(2):
        y = layer_on(g, x, keep_size=True)
        if g.chance(0.5):
            y = norm(g, y)
        if g.chance(0.3):
            y = activate(g, y)
        names.append(y)
    joined = g.emit("torch.cat([$0, $1], 1)", *names)
    if g.chance(0.7):
        joined = norm(g, joined)
    if g.chance(0.5):
        layer_on(g, activate(g, joined))


@block(2)
def summed_branches(g: Builder) -> None:
    """RepVGG's block: several linear branches, each with its norm."""
    x = g.pick(4)
    channels = g.shape(x)[1]
    names = [norm(g, convolution(g, x, channels, keep_size=True, kind="module")) for _ in range(2)]
    if g.chance(0.6):
        names.append(norm(g, x))
    y = g.emit(" + ".join(f"${index}" for index in range(len(names))), *names)
    if g.chance(0.4):
        y = norm(g, y)
    activate(g, y)


@block(3)
def norm_beside(g: Builder) -> None:
    """A layer and a norm on one tensor, added up; now and then something is in the way."""
    x = g.pick(2, 3, 4, 4, 4, 5)
    if g.chance(0.6):
        x = g.emit(g.one_of("F.relu($0)", "F.silu($0)"), x)
    other = x
    if g.chance(0.2):
        other = g.emit(g.one_of("$0.clone()", "$0.contiguous()", "$0.detach()", "$0.flip(1)", "F.relu($0)"), x)
    layers = [layer_beside(g, other) for _ in range(g.one_of(1, 1, 2))]
    if g.chance(0.5):
        layers = [norm(g, y) for y in layers]
    if g.chance(0.15):
        layers[0] = g.emit(g.one_of("F.gelu($0)", "F.dropout($0, 0.5, False)", "$0.clone()", "$0.flip(-1)"), layers[0])
    if g.chance(0.1):
        g.emit(g.one_of("$0.mul_(2)", "$0.relu_()"), x, outputs=0)
    beside = [norm(g, x) for _ in range(g.one_of(1, 1, 1, 2))]
    z, *rest = g.random.sample([*layers, *beside], len(layers) + len(beside))
    for y in rest:
        code = g.one_of(
            "$0 + $1", "$0 + $1", "$1 + $0", "$0.add_($1)", "$1.add_($0)", "$0 - $1", "$1 - $0", "sum([$0, $1])",
            "torch.add($0, $1, alpha=0.5)", "torch.sub($0, $1, alpha=2)", "torch.rsub($0, $1)", "1 - $0 - $1",
            "$0 + F.silu($1)" if g.chance(0.3) else "$0 + $1",
        )  # fmt: skip
        z = g.emit(code, z, y)
    activate(g, z, 0.8)


def layer_beside(g: Builder, x: str) -> str:
    """A layer that keeps the shape, as people write it and as they seldom do."""
    channels, n = g.shape(x)[1], len(g.shape(x)) - 2
    if n == 0:
        return linear(g, x, channels)
    if g.chance(0.5):
        return convolution(g, x, channels, keep_size=True)
    groups = g.random.choice(divisors(channels, channels))
    kind = g.one_of("even", "gap", "wide", "transposed", "side", "one")
    options = {
        "even": f"{g.one_of(2, 4)}, padding='same', dilation={g.one_of(1, 2)}",
        "gap": "2, padding=1, dilation=2",
        "wide": f"{g.one_of(3, 5)}, padding='same', dilation=2",
        "transposed": g.one_of("3, padding=1", "1", "3, padding=2, dilation=2", "2, padding=1, dilation=2"),
        "side": "3",
        "one": "1",
    }[kind]
    if kind == "side":
        margins = g.one_of("(2, 0)", "(0, 2)", "(1, 1)"), g.one_of("(2, 0)", "(0, 2)", "(1, 1)"), "(1, 1)"
        mode = "" if n == 3 else g.one_of("", "", ", mode='reflect'", ", mode='circular'")
        x = g.emit(f"F.pad($0, {' + '.join(margins[:n])}{mode})", x)
    name = "ConvTranspose" if kind == "transposed" else "Conv"
    layer = g.layer("c", f"nn.{name}{n}d({channels}, {channels}, {options}, groups={groups}, bias={g.chance(0.5)})")
    return g.apply(layer, x)


@block(2)
def gate(g: Builder) -> None:
    """Squeeze and excite."""
    x = g.pick(4)
    if g.chance(0.7):
        x = norm(g, convolution(g, x, None, keep_size=True, kind="module"))
        if g.chance(0.5):
            x = activate(g, x, 0.8)
    channels = g.shape(x)[1]
    way = g.one_of("conv", "linear", "spatial")
    if way == "conv":
        y = convolution(
            g,
            g.emit(g.one_of("F.adaptive_avg_pool2d($0, 1)", "$0.mean((2, 3), keepdim=True)"), x),
            channels,
            keep_size=True,
            kind="module",
        )
        y = norm(g, y) if g.chance(0.3) else y
    elif way == "linear":
        y = linear(g, g.emit("$0.mean((2, 3))", x), channels)
        y = norm(g, y) if g.chance(0.3) else y
        y = g.emit("$0[:, :, None, None]", y)
    else:
        y = norm(g, convolution(g, x, 1, keep_size=True, kind="module"))
    y = g.emit(g.one_of("torch.sigmoid($0)", "F.hardsigmoid($0)", "F.relu($0)", "$0.tanh()", "F.softmax($0, 1)"), y)
    z = g.emit(g.one_of("$0 * $1", "$1 * $0", "$0 * $1.expand_as($0)", "$0.mul($1)", "$0.mul_($1)"), x, y)
    if g.chance(0.7):
        norm(g, convolution(g, z, None, kind="module") if g.chance(0.7) else z)


@block(2)
def attention(g: Builder) -> None:
    x = g.pick(3)
    features = g.shape(x)[2]
    if features % 2:
        x, features = linear(g, x, 4), 4
    if g.chance(0.3):
        x = norm_of_tokens(g, x)
    if g.chance(0.4):
        qkv = g.apply(g.layer("l", f"nn.Linear({features}, {3 * features})"), x)
        q, k, v = g.emit("$0.chunk(3, -1)", qkv, outputs=3)
    else:
        q, k, v = (linear(g, x, features) for _ in range(3))
        if g.chance(0.5):
            v = norm_of_tokens(g, v)
        if g.chance(0.2):
            k = norm_of_tokens(g, k)
    heads = 2 if features % 2 == 0 and g.chance(0.6) else 1
    split = f"$0.unflatten(-1, ({heads}, -1)).transpose(1, 2)"
    q, k, v = (g.emit(split, name) for name in (q, k, v))
    way = g.one_of("function", "softmax", "einsum", "baddbmm" if heads == 1 else "softmax")
    if way == "function":
        y = g.emit(f"F.scaled_dot_product_attention($0, $1, $2{g.one_of('', '', ', is_causal=True')})", q, k, v)
    elif way == "einsum":
        scores = g.emit("torch.einsum('bhqd,bhkd->bhqk', $0, $1).softmax(-1)", q, k)
        y = g.emit("torch.einsum('bhqk,bhkd->bhqd', $0, $1)", scores, v)
    else:
        scores = g.emit(
            g.one_of(
                "($0 @ $1.transpose(-1, -2) * 0.5).softmax(-1)",
                "torch.softmax($0 @ $1.mT, dim=-1)",
                "F.softmax($0 @ $1.mT, -1).clone()",
                "torch.softmax($0 @ $1.mT, dim=-2)",
            ),
            q,
            k,
        )
        y = g.emit("$0 @ $1", scores, v)
    y = g.emit(
        g.one_of(
            "$0.transpose(1, 2).flatten(2)",
            "$0.transpose(1, 2).reshape($0.shape[0], -1, $0.shape[1] * $0.shape[3])",
        ),
        y,
    )
    if g.chance(0.5):
        y = norm_of_tokens(g, y)
    y = linear(g, y, features)
    if g.chance(0.5):
        y = norm_of_tokens(g, y)
    if g.shape(x) == g.shape(y):
        g.emit("$0 + $1", x, y)


@block(1.5)
def linear_attention(g: Builder) -> None:
    """Attention with the convolution's map as tokens, or with a product in the other order."""
    x = g.pick(4)
    y = norm(g, convolution(g, x, 4, keep_size=True, kind="module"))
    v = norm(g, convolution(g, x, 4, keep_size=True, kind="module"))
    scores = g.emit(g.one_of("F.softmax($0.flatten(2), -1)", "F.relu($0).flatten(2)"), y)
    z = g.emit(g.one_of("($0 @ $1.flatten(2).mT) @ $0", "$0.mT @ ($0 @ $1.flatten(2).mT)"), scores, v)
    norm_of_tokens(g, z) if g.chance(0.5) else linear(g, z)


@block(1)
def self_attention_module(g: Builder) -> None:
    x = g.pick(3, where=lambda tensor: tensor.shape[2] % 2 == 0)
    if g.chance(0.6):
        x = norm_of_tokens(g, x)
    layer = g.layer("t", f"nn.MultiheadAttention({g.shape(x)[2]}, 2, batch_first=True)")
    y = g.emit(f"{layer}($0, $0, $0{g.one_of('', ', need_weights=False')})[0].contiguous()", x)
    if g.chance(0.6):
        norm_of_tokens(g, y)


@block(1.5)
def norm_and_recurrence(g: Builder) -> None:
    x = norm_of_tokens(g, g.pick(3))
    layer = g.layer(
        "r",
        f"nn.{g.one_of('LSTM', 'GRU', 'RNN')}({g.shape(x)[2]}, {width(g)}, batch_first=True{g.one_of('', ', bidirectional=True', ', num_layers=2', ', bias=False')})",
    )
    y = g.emit(f"{layer}($0)[0]", x)
    if g.chance(0.5):
        linear(g, norm_of_tokens(g, y))


@block(1.5)
def mobile(g: Builder) -> None:
    x = g.pick(4)
    channels = g.shape(x)[1]
    wide = g.apply(g.layer("c", f"nn.Conv2d({channels}, {2 * channels}, 1, bias=False)"), x)
    wide = activate(g, norm(g, wide), 0.6)
    deep = g.apply(
        g.layer("c", f"nn.Conv2d({2 * channels}, {2 * channels}, 3, padding=1, groups={2 * channels}, bias=False)"),
        wide,
    )
    deep = norm(g, deep)
    if g.chance(0.5):
        deep = activate(g, deep, 0.6)
    y = norm(g, g.apply(g.layer("c", f"nn.Conv2d({2 * channels}, {channels}, 1, bias=False)"), deep))
    g.emit(g.one_of("$0 + $1", "$0.add_($1)", f"$0 * {g.parameter(channels, 1, 1, gain=True)} + $1"), y, x)


@block(1.5)
def shuffle(g: Builder) -> None:
    x = g.pick(4, where=lambda tensor: tensor.shape[1] % 2 == 0)
    half = g.shape(x)[1] // 2
    a, b = g.emit("$0.chunk(2, 1)", x, outputs=2)
    b = norm(g, convolution(g, b, half, keep_size=True, kind="module"))
    y = g.emit("torch.cat([$0, $1], 1)", a, b)
    y = g.emit(
        g.one_of(
            "F.channel_shuffle($0, 2)",
            "$0.view($0.shape[0], 2, -1, *$0.shape[2:]).transpose(1, 2).flatten(1, 2)",
            "$0.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)",
        ),
        y,
    )
    if g.chance(0.5):
        norm(g, y)


@block(2)
def head_on_two(g: Builder) -> None:
    """One layer and one norm, or two norms, on two inputs."""
    x = g.pick(3, 4, 4)
    y = (
        g.alike(x)
        if g.chance(0.5)
        else g.emit(
            g.one_of("$0.flip(-1)", "$0 * 0.5", "F.avg_pool2d($0, 2)" if len(g.shape(x)) == 4 else "$0.flip(-1)"),
            x,
        )
    )
    n, channels = len(g.shape(x)) - 2, g.shape(x)[1]
    conv = g.layer("c", f"nn.Conv{n}d({channels}, {width(g)}, {g.one_of(1, 3)}, padding=1)")
    first = norm(g, g.apply(conv, x))
    second = g.apply(conv, y)
    layer = g.steps[-2].code.partition("(")[0]
    way = g.weighted(same=6, other=2, none=1, swapped=1)
    if way == "same" and layer.startswith("m.n"):
        second = g.apply(layer, second)
    elif way == "other":
        second = norm(g, second)
    elif way == "swapped" and layer.startswith("m.n"):
        second = g.apply(layer, activate(g, second))
    if g.shape(first) == g.shape(second) and g.chance(0.6):
        g.emit("$0 + $1", first, second)


@block(1)
def norm_of_norm(g: Builder) -> None:
    x = norm(g, layer_on(g, g.pick(2, 3, 4, 5)))
    if g.chance(0.3):
        x = activate(g, x)
    norm(g, x)


@block(1.5)
def groups_of_the_batch(g: Builder) -> None:
    """Groups of samples folded into the channels, or channels into the samples, around a norm."""
    x = g.pick(4, where=lambda tensor: tensor.shape[1] % 2 == 0)
    if g.chance(0.5):
        x = convolution(g, x, 4, keep_size=True, kind="module")
    y = g.emit(
        g.one_of(
            "$0.unflatten(1, (2, -1)).flatten(0, 1)",
            "$0.reshape(-1, 2, *$0.shape[2:])",
            f"$0.reshape(1, {g.shape(x)[0] * g.shape(x)[1]}, *$0.shape[2:])",
            "torch.cat($0.chunk(2, 1), 0)",
            "$0.transpose(0, 1)",
        ),
        x,
    )
    y = norm(g, y)
    if g.chance(0.5):
        g.emit("$0.reshape(-1, *$1.shape[1:])", y, x)


@block(2)
def classifier(g: Builder) -> None:
    x = g.pick(4, 3, 5)
    y = g.emit(
        g.one_of(
            "$0.mean(-1)",
            "$0.flatten(2).mean(-1)",
            "F.adaptive_avg_pool2d($0, 1).flatten(1)" if len(g.shape(x)) == 4 else "$0.flatten(1)",
            "$0.flatten(1)",
            "$0.amax(-1)",
        ),
        x,
    )
    if len(g.shape(y)) > 2:
        y = g.emit("$0.flatten(1)", y)
    if g.chance(0.5):
        y = norm(g, y)
    y = linear(g, y)
    if g.chance(0.4):
        linear(g, activate(g, norm(g, y)))


@block(1)
def statistics(g: Builder) -> None:
    """Mean and deviation over all positions, as in networks that tell speakers apart."""
    x = g.pick(3, 4, 5)
    if g.chance(0.7):
        x = norm(g, x)
    deviation = g.one_of("std(-1, correction=0)", "var(-1, correction=0)")
    y = g.emit(f"torch.cat([$0.flatten(2).mean(-1), $0.flatten(2).{deviation}], 1)", x)
    linear(g, y)


@block(3)
def messages(g: Builder) -> None:
    """What some of the batch hand to others, added up or averaged, as in a graph network."""
    x = g.pick(3, 4)
    if g.chance(0.7):
        x = layer_on(g, x)
    to = g.one_of("torch.arange($0.shape[0]) // 2", "torch.zeros($0.shape[0], dtype=torch.int64)")
    each = f"({to}).view(-1, *[1] * ($0.dim() - 1)).expand_as($0)"
    y = g.emit(
        g.one_of(
            f"$0.new_zeros($0.shape).index_add_(0, {to}, $0)",
            f"torch.zeros_like($0).scatter_add(0, {each}, $0)",
            f"$0.index_add(0, {to}, $0.flip(0), alpha=0.5)",
            f"torch.zeros_like($0).scatter_reduce(0, {each}, $0, 'mean', include_self=False)",
            f"$0.scatter_reduce(0, {each}, $0, 'amax')",
            "$0[torch.arange($0.shape[0]).flip(0)[:, None], :, torch.arange($0.shape[2])].transpose(1, 2)",
        ),
        x,
    )
    if g.chance(0.5):
        y = g.emit(f"$0 + {g.parameter(g.shape(y)[1], *[1] * (len(g.shape(y)) - 2))}", y)
    norm(g, y)


@block(1.5)
def containers(g: Builder) -> None:
    """Submodules with children of their own."""
    x = g.pick(4)
    channels = g.shape(x)[1]
    kind = g.one_of(
        "nn.Sequential", "Combined", "nn.Sequential", "torch.jit.script" if g.chance(0.1) else "nn.Sequential"
    )
    out = channels if kind == "Combined" else width(g)
    bias = g.one_of("", ", bias=False")
    middle = g.one_of(
        "",
        "nn.ReLU(), ",
        "nn.Dropout(0.3), ",
        "nn.ReLU(inplace=True), ",
        f"nn.Conv2d({out}, {out}, 1), ",
        "nn.PReLU(), ",
    )
    code = f"{kind}(nn.Conv2d({channels}, {out}, 3, padding=1{bias}), {middle}nn.BatchNorm2d({out}), {g.one_of('nn.ReLU()', 'nn.Identity()', 'nn.Hardswish()')})"
    if kind == "torch.jit.script":
        code = f"torch.jit.script(nn.Sequential(nn.Conv2d({channels}, {out}, 3), nn.BatchNorm2d({out})))"
    g.apply(g.layer("q", code, "positive"), x)


@block(0.7)
def shared_norm(g: Builder) -> None:
    """One norm at two places that have different producers."""
    x = g.pick(4)
    first = norm(g, convolution(g, x, 4, keep_size=True, kind="module"))
    layer = g.steps[-1].code.partition("(")[0]
    if not layer.startswith("m.n"):
        raise Unfit
    y = convolution(g, x, 4, keep_size=True, kind="module")
    if g.chance(0.3):
        y = activate(g, y)
    second = g.apply(layer, y)
    if g.chance(0.5) and g.shape(first) == g.shape(second):
        g.emit("$0 + $1", first, second)


@block(1)
def tied_convolutions(g: Builder) -> None:
    """Two layers that hold one weight."""
    x = g.pick(4)
    channels = g.shape(x)[1]
    code = f"nn.Conv2d({channels}, {channels}, 3, padding=1{g.one_of('', ', bias=False')})"
    first, second = g.layer("c", code), g.layer("c", code)
    g.setup.append(
        g.one_of(
            f"{second}.weight = {first}.weight", f"{second}.weight = {first}.weight", f"{second}.weight.data = {first}.weight.data",
            f"{second}.weight.data = {first}.weight.data.transpose(0, 1)", f"{second}.bias = {first}.bias",
            f"{second}._parameters = {first}._parameters", f"{second}.weight = nn.Parameter({first}.weight.data)",
        )
    )  # fmt: skip
    y = norm(g, g.apply(first, x))
    if g.chance(0.5):
        y = activate(g, y)
    z = g.apply(second, y if g.chance(0.6) else x)
    if g.chance(0.5):
        norm(g, z)


@block(1.2)
def parts_of_parameters(g: Builder) -> None:
    """Two operators that read parts of one weight and of one bias: the same part, others, or some of each."""
    x = g.pick(2, 3, 4)
    channels = g.shape(x)[1]
    n = len(g.shape(x)) - 2
    function = f"F.conv{n}d" if n else "F.linear"
    out = 2 * width(g)
    w = g.layer("w", f"nn.Parameter(torch.empty({(out, channels, *[1] * n)}))")
    b = g.layer("p", f"nn.Parameter(torch.empty({out}))")
    half = out // 2
    parts = (f"[:{half}]", f"[:{half}]", f"[{half}:]", f"[1:{half + 1}]", f".chunk(2)[{g.one_of(0, 1)}]")
    made = []
    for operand in ("$0", g.one_of("$0", "2 * $0", "-$0", "$0.flip(0)")):
        bias = g.one_of(", " + b + g.one_of(*parts), ", " + b + g.one_of(*parts), "")
        y = g.emit(f"{function}({operand}, {w}{g.one_of(*parts)}{bias})", x)
        made.append(y)
    if g.chance(0.4):
        made = [g.emit(g.one_of("$0 + $1", "$0 - $1", "torch.cat([$0, $1], 1)", "torch.add($0, $1, alpha=2)"), *made)]
    for y in made:
        if g.chance(0.8):
            y = norm(g, y)
        if g.chance(0.5):
            activate(g, y)


@block(0.8)
def several_calls_summed(g: Builder) -> None:
    """One layer at several inputs, whose results are added before the norm."""
    x = g.pick(4)
    y = convolution(g, x, g.shape(x)[1] if g.chance(0.5) else None, keep_size=True, kind="module")
    layer = g.steps[-1].code.partition("(")[0]
    for _ in range(g.one_of(1, 1, 2)):
        other = g.apply(layer, g.emit(g.one_of("-$0", "$0.flip(0)", "2 * $0", "F.relu($0)"), x))
        y = g.emit(g.one_of("$0 + $1", "$0 + $1", "$0 - $1", "$0 + 3 * $1", "torch.add($0, $1, alpha=0.5)"), y, other)
    activate(g, norm(g, y))


HOOKS = (
    "register_forward_hook(lambda mod, args, out: None)",
    "register_forward_hook(lambda mod, args, out: out * 1.5)",
    "register_forward_hook(lambda mod, args, out: out.clone())",
    "register_forward_pre_hook(lambda mod, args: None)",
    "register_forward_pre_hook(lambda mod, args: (args[0] * 2,))",
    "register_forward_hook(lambda mod, args, out: setattr(mod, 'seen', out))",
    "register_forward_hook(lambda mod, args, out: mod.__dict__.update(seen=args[0]))",
    "register_forward_hook(lambda mod, args, out: out * float(out.detach().numpy().max() < 1e9))",
)


def disturb(g: Builder) -> None:
    """Hooks and the like, on layers that are there; seldom, since they keep norms where they are."""
    modules = [layer for layer, _ in g.applied]
    if modules and g.chance(0.1):
        g.setup.append(f"{g.random.choice(modules)}.{g.one_of(*HOOKS)}")
    norms = [layer for layer in modules if layer.startswith("m.n")]
    convolutions = [layer for layer in modules if layer.startswith("m.c")]
    if norms and g.chance(0.02):
        g.setup.append(f"m.__dict__['norms'] = [{g.random.choice(norms)}]")
    if norms and g.chance(0.02):
        g.setup.append(f"m.again = {g.random.choice(norms)}")
    if convolutions and g.chance(0.02):
        g.setup.append(f"m.again = {g.random.choice(convolutions)}")
    if norms and g.chance(0.02):
        g.setup.append(f"{g.random.choice(norms)}.weight.requires_grad_(False)")
    if g.chance(0.03):
        g.setup.append("m.requires_grad_(False)")
    if len(norms) > 1 and g.chance(0.02):
        a, b = g.random.sample(norms, 2)
        g.setup.append(f"{b}.weight = {a}.weight")
    if len(norms) > 1 and g.chance(0.01):
        a, b = g.random.sample(norms, 2)
        g.setup.append(f"{b}.running_mean = {a}.running_mean")


__all__ = ["begin", "disturb", "divisors"]
