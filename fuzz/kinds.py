"""What makes a network depend on more than one call: one function for each kind.

Each builds a layer, a norm and what stands between or behind them so that on the recorded call the norm looks as if it
could go, and lists calls on which that is not so. Many of them share :func:`fork`, which is given a condition.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz.blocks import dressing, layer_on, norm, source, target
from fuzz.calls import CallBuilder, Pack, Shape, Variation, around, begin
from fuzz.generate import Unfit
from fuzz.operators import width
from fuzz.passing import pass_through

Kind = Callable[[CallBuilder], None]
KINDS: dict[str, Kind] = {}

ALIKE = ("$0", "$0", "$0", "$0", "$0.clone()", "2 * $0", "$0 + 0.5", "-$0")
"""What passes units, for the way that the recorded call takes."""

UNLIKE = (
    "F.silu($0)", "F.relu($0)", "$0.flip(1)", "$0 + 1", "3 * $0", "$0.abs()", "torch.tanh($0)", "$0 * $0", "-$0",
    "$0.roll(1, 1)", "F.relu6($0 + 0.3)", "$0 * 0", "F.softmax($0, 1)", "$0 - $0.mean(1, keepdim=True)",
)  # fmt: skip
"""What passes none of them, or others, for another way."""


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


# Parts --------------------------------------------------------------------------------------------------------------


def features(g: CallBuilder) -> str:
    """What a layer gives, perhaps passed on."""
    x = source(g, g.pick(2, 3, 4))
    if g.chance(0.25):
        shape = g.shape(x)
        y = pass_through(g, x)
        x = y if len(g.shape(y)) == len(shape) else x
    return x


def pinned(g: CallBuilder) -> str:
    """What takes no units."""
    return str(g.emit(g.one_of("F.silu($0)", "torch.tanh($0)", "F.gelu($0)"), g.pick(2, 3, 4)))


def plain_norm(g: CallBuilder, x: str) -> str:
    """The module of a norm for a variable, not yet called."""
    shape = g.shape(x)
    return g.layer("n", f"nn.BatchNorm{max(len(shape) - 2, 1)}d({shape[1]})", dressing(g))


def same_size(g: CallBuilder, x: str) -> str:
    """A layer that gives the same shape, not yet called."""
    shape = g.shape(x)
    if len(shape) == 2:
        return g.layer("l", f"nn.Linear({shape[1]}, {shape[1]})")
    size, padding = g.one_of((1, 0), (3, 1))
    return g.layer("c", f"nn.Conv{len(shape) - 2}d({shape[1]}, {shape[1]}, {size}, padding={padding})")


def fork(g: CallBuilder, condition: str) -> str:
    """A layer and a norm, where something goes another way once the condition comes out otherwise.

    Args:
        condition: an expression; ``$0`` stands for the activation at the fork.
    """
    way = g.weighted(between=5, norm=3, norms=2, forward=3, layers=1.5, beside=2, instead=1)
    if way == "forward":
        y = norm(g, pinned(g))
        return target(g, g.choose(condition, g.one_of(*ALIKE), g.one_of(*UNLIKE), y))
    if way in ("layers", "instead"):
        x = g.pick(2, 3, 4)
        now, other = f"{same_size(g, x)}($0)", f"{same_size(g, x)}($0)" if way == "layers" else "$0"
        return norm(g, g.choose(condition, now, other, x))
    y = features(g)
    if way == "between":
        y = g.choose(condition, g.one_of(*ALIKE), g.one_of(*UNLIKE), y)
        return norm(g, y)
    if way == "norm":
        return g.choose(condition, f"{plain_norm(g, y)}($0)", "$0", y)
    if way == "norms":
        return g.choose(condition, f"{plain_norm(g, y)}($0)", f"{plain_norm(g, y)}($0)", y)
    z = norm(g, y)
    return g.choose(condition, "$1", g.one_of("$0", "$1 + $0", "$1 * torch.sigmoid($0)"), y, z)


def reach(g: CallBuilder, *forms: str) -> None:
    """Further calls with other values."""
    for form in forms:
        g.vary(Variation(form=form))


# Sizes --------------------------------------------------------------------------------------------------------------


@kind
def batch_size(g: CallBuilder) -> None:
    begin(g)
    around(g)
    b = g.inputs[0].shape[0]
    fork(
        g,
        g.one_of(
            "x0.shape[0] > 1", f"len(x0) == {b}", f"x0.size(0) < {b + 1}", f"$0.shape[0] <= {b}", "len($0) > 1",
            f"$0.size()[0] % 2 == {b % 2}", f"{b} == x0.shape[0]", "not x0.shape[0] == 1", f"x0.shape[0] in ({b}, 9)",
            f"max(x0.shape[0], 3) == {max(b, 3)}", f"'[{b},' in str($0.shape)", f"[*range(len(x0))][-1] == {b - 1}",
            f"len([*x0]) == {b}", f"sum(1 for _ in x0) == {b}", f"len($0.unbind()) == {b}", f"min(len(x0), 4) > {b - 1}",
        ),
    )  # fmt: skip
    for batch in (1, 2, 5):
        g.vary(Variation(batch))


@kind
def image_size(g: CallBuilder) -> None:
    begin(g, "image", "image", "sequence", "tokens")
    around(g)
    axis = g.inputs[0].sizes[-1]
    size = g.inputs[0].shape[axis]
    x = f"x0.shape[{axis}]"
    fork(
        g,
        g.one_of(
            f"{x} > {size - 1}", f"{x} == {size}", f"{x} % 2 == {size % 2}", f"{x} <= {size}", f"{x} * 2 < {2 * size + 1}",
            f"x0[0].numel() == {g.variables['x0'][0].numel()}", f"x0[0].nbytes > {g.variables['x0'][0].nbytes - 1}",
            f"str({x}) == '{size}'", f"f'{{{x}:03d}}' == '{size:03d}'", f"'%d' % {x} == '{size}'",
            f"len(x0.unbind({axis})) == {size}", f"len(x0.split(2, {axis})) == {(size + 1) // 2}",
            f"len(x0[0].T) == {g.variables['x0'][0].T.shape[0]}", f"x0[0].shape.numel() < {g.variables['x0'][0].numel() + 1}",
            f"repr(x0[0].shape) == '{g.variables['x0'][0].shape}'", f"x0.stride(0) == {g.variables['x0'].stride(0)}",
            f"{x} // 2 == {size // 2}", f"[*$0[0].shape] == {[*g.shape('x0')[1:]]}" if g.chance(0.1) else f"{x} in range({size + 1})",
            f"$0[0].numel() > {g.variables['x0'][0].numel()}", f"round({x} / 2) == {round(size / 2)}",
        ),
    )  # fmt: skip
    for change in (1, 2, -1, -2, size):
        g.vary(Variation(size=change))


@kind
def literal_size(g: CallBuilder) -> None:
    """Numbers where the shape was meant; it runs on some other sizes, and means something else there."""
    begin(g, "columns", "columns", "image", "sequence", "vector", "tokens")
    around(g)
    x = g.pick(2, 3, 4)
    y = layer_on(g, x, keep_size=True) if g.chance(0.8) else source(g, x)
    shape = g.shape(y)
    each = ", ".join(map(str, shape[1:]))
    codes = [
        f"$0.reshape(-1, {each})", f"$0.view({shape[0]}, -1, {', '.join(map(str, shape[2:])) or 1})", f"$0.reshape(-1, {shape[1]})",
        f"$0.reshape({shape[1]}, -1).t()", f"$0.reshape({shape[0]}, -1)", f"$0[:{shape[0]}]", f"$0[..., :{shape[-1]}]",
        f"$0.narrow(-1, 0, {shape[-1]})", f"$0.transpose(0, 1).reshape({shape[0]}, {each})", f"$0.split({shape[0]})[0]",
        f"$0.split({shape[-1]}, -1)[-1]", f"$0.chunk({shape[0]})[-1]", f"$0.unflatten(0, ({shape[0]}, -1))[:, 0]",
        f"$0.unflatten(0, ({shape[0]}, -1)).sum(1)", f"$0.unflatten(-1, (-1, {shape[-1]})).sum(-2)", f"$0.flatten()[:{_count(shape)}].view({shape})",
        f"torch.as_strided($0, {shape}, {g.variables[y].stride()})", f"$0.reshape(-1, {shape[1]}, {', '.join(map(str, shape[2:])) or 1})",
        f"$0[:{shape[0]}].expand({shape[0]}, {each})", f"$0 * torch.ones({shape[-1]})[:$0.shape[-1]].sum()",
        f"$0 * ($0.shape[-1] / {shape[-1]})", f"$0 + (len($0) - {shape[0]})", f"$0.roll(len($0) - {shape[0]}, 1)", f"$0.flatten(1)[:, :{_count(shape[1:])}]",
        f"$0.swapaxes(0, 1)[:, :{shape[0]}].swapaxes(0, 1)", f"F.pad($0, (0, {shape[-1]} - $0.shape[-1]))",
    ]  # fmt: skip
    z = g.emit(g.one_of(*codes), y)
    norm(g, z)
    for batch, size in ((2 * shape[0], 0), (0, shape[-1]), (0, 1), (1, 0), (4 * shape[0], 0), (0, 2), (1, 1), (0, 3)):
        g.vary(Variation(batch, size))


def _count(shape: Shape) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


@kind
def number_of_frames(g: CallBuilder) -> None:
    """As many terms as there are along an axis."""
    begin(g, "frames", "frames", "image", "tokens", "sequence")
    x = "x0"
    axis = g.inputs[0].sizes[0]
    batch = g.chance(0.2)
    if batch:
        axis = 0
    frame = g.variables[x].select(axis, 0)
    if frame.dim() == 1:
        frame = frame[None]
    rank, channels, out = frame.dim(), frame.shape[1], width(g)
    c = g.layer("c", f"nn.Conv{rank - 2}d({channels}, {out}, 1)" if rank > 2 else f"nn.Linear({channels}, {out})")
    n = g.layer("n", f"nn.BatchNorm{max(rank - 2, 1)}d({out})", dressing(g))
    frames = g.one_of(
        f"x0.unbind({axis})", f"x0.unbind({axis})", f"[f.squeeze({axis}) for f in x0.split(1, {axis})]", f"x0.movedim({axis}, 0)",
        f"[x0.select({axis}, i) for i in range(x0.shape[{axis}])]", f"[f.squeeze({axis}) for f in x0.chunk(x0.shape[{axis}], {axis})]",
        f"torch.unbind(x0, {axis})", f"list(x0.transpose(0, {axis}))",
    )  # fmt: skip
    g.preamble.append("import functools, operator")
    g.execute(g.preamble[0])
    f = "(t[None])" if len(g.shape(x)) - 1 == 1 else "(t)"
    code = g.one_of(
        f"sum({c}{f} for t in {frames})", f"sum([{c}{f} for t in {frames}])", f"torch.stack([{c}{f} for t in {frames}]).sum(0)",
        f"functools.reduce(operator.add, [{c}{f} for t in {frames}])", f"functools.reduce(lambda h, t: 0.5 * h + {c}{f}, {frames}, 0)",
        f"functools.reduce(lambda h, t: F.relu(h) + {c}{f}, {frames}, 0)", f"torch.cat([{c}{f} for t in {frames}], -1).sum(-1, keepdim=True)",
        f"functools.reduce(torch.maximum, [{c}{f} for t in {frames}])", f"{c}(sum(t{'[None]' if f != '(t)' else ''} for t in {frames}))",
        f"[{c}{f} * i for i, t in enumerate({frames})][-1]", f"[{c}{f} for t in {frames}][-1] * len({frames})",
    )  # fmt: skip
    if g.chance(0.7):
        y = g.emit(code)
        g.emit(f"{n}($0)", y)
    else:
        g.emit(
            code.replace(f"{c}(", f"{n}({c}(", 1).replace("for t", ") for t", 1) if "for t" in code else f"{n}({code})"
        )
    if batch:
        for count in (1, 2, 3, 5):
            g.vary(Variation(count))
    for size in (1, 2, -1):
        g.vary(Variation(size=size))


@kind
def layout(g: CallBuilder) -> None:
    """Strides, storage and address."""
    begin(g, "image", "sequence", "tokens")
    around(g)
    fork(
        g,
        g.one_of(
            "x0.is_contiguous()", f"x0.stride() == {g.variables['x0'].stride()}", "x0.stride(-1) == 1", "x0._base is None",
            "x0.stride(-1) < x0.stride(-2)", "x0.storage_offset() == 0", "x0.untyped_storage().nbytes() == x0.nbytes",
            "x0.stride(1) > 1", "str(x0.stride()).endswith(' 1)')", "x0.contiguous().data_ptr() == x0.data_ptr()",
            "x0.is_contiguous() or x0.shape[0] > 9", "not x0.requires_grad" if g.chance(0.2) else "x0.stride(-1) == 1",
        ),
    )  # fmt: skip
    reach(
        g, "{}.mT.contiguous().mT", "{}.transpose(0, 1).contiguous().transpose(0, 1)", "{}.repeat_interleave(2, -1)[..., ::2]",
        "torch.cat([{}] * 2)[-x0.shape[0]:]".replace("x0.shape[0]", str(g.inputs[0].shape[0])), "{}[..., :1].expand(" + ", ".join(map(str, g.shape("x0"))) + ")",
    )  # fmt: skip


@kind
def grad_mode(g: CallBuilder) -> None:
    """Whether gradients are wanted."""
    begin(g)
    around(g)
    condition = g.one_of(
        "torch.is_grad_enabled()",
        "$0.requires_grad",
        "torch.is_inference_mode_enabled()",
        "$0.is_inference()",
        "$0.grad_fn is None",
    )
    fork(g, condition)
    for mode in ("enable_grad", "inference_mode"):
        g.vary(Variation(mode=mode))
        g.vary(Variation(5, mode=mode))


# Contents -----------------------------------------------------------------------------------------------------------

LOOKS = (
    "X.sum() > 0", "X.mean() < 0", "(X > 2).any()", "bool((X < -9).any())", "torch.equal(X, X.abs())",
    "torch.is_nonzero((X > 9).sum())", "X.max().item() < 4", "X.flatten()[0].item() > 0", "float(X.min()) > -5",
    "X.flatten().tolist()[0] < 0", "int(X.flatten().argmax()) % 2 == 0", "torch.allclose(X, X.flip(-1))",
    "f'{float(X.sum()):.2f}'.startswith('-')", "len(X.nonzero()) == X.numel()", "X.count_nonzero() == X.numel()",
    "torch.all(X > -10)", "X.norm() < 1e2", "X.std() > 1", "X.unique().numel() > 1", "X.any()", "not X.all()",
    "X.abs().max() > 20", "X.cpu().numpy().sum() > 0", "'%.1f' % X.sum() > '0'", "'-' in str(X.flatten()[0].item())",
    "X.eq(0).any()", "(X * X).sum().item() > 5", "X.flatten()[0] > X.flatten()[-1]", "X.isfinite().all() and X.amax() < 30",
    "torch.equal(X, torch.zeros_like(X))", "X.detach().numpy().max() > 5", "complex(X.sum()).real > 0", "'e' in repr(X)",
    "X.sort(0).values.flatten()[0].item() < 0", "sum(X.flatten().tolist()) < 0", "int(X.sum()) in (0, 1, -1)",
    "torch.isclose(X.max(), X.max().abs())", "bool(torch.any(X.abs() > 50))", "X.flatten()[0].sign().item() == 1",
)  # fmt: skip

VALUES = ("-{}", "0 * {}", "9 * {}", "{}.abs()", "{} + 5", "100 * {}", "-{}.abs()", "torch.ones_like({})", "0.01 * {}")


@kind
def contents_of_an_input(g: CallBuilder) -> None:
    begin(g)
    around(g)
    fork(g, g.one_of(*LOOKS).replace("X", "x0"))
    reach(g, "{}", *g.random.sample(VALUES, 5))


@kind
def contents_of_an_activation(g: CallBuilder) -> None:
    begin(g)
    around(g)
    fork(g, g.one_of(*LOOKS).replace("X", "$0"))
    reach(g, "{}", *g.random.sample(VALUES, 5))


@kind
def contents_of_a_mask(g: CallBuilder) -> None:
    """A mask without holes is left out of account."""
    begin(g, "image", "sequence", "tokens")
    around(g)
    rank = len(g.shape("x0"))
    shape: Callable[[Shape], str] = lambda s: f"({s[0]}{', 1' * (rank - 1)})"  # noqa: E731
    g.parameter_of_forward("mask", lambda s: f"torch.ones{shape(s)}.double()")
    y = features(g)
    if len(g.shape(y)) != rank:
        raise Unfit
    condition = g.one_of(
        "torch.equal(mask, torch.ones_like(mask))", "mask.all()", "bool(mask.min() > 0)", "not (mask == 0).any()",
        "mask.sum() == mask.numel()", "torch.allclose(mask, torch.ones(1).double())", "mask.mean().item() == 1.0",
        "torch.is_nonzero(mask.prod())", "0 not in mask", "len(mask.unique()) == 1", "min(mask.flatten().tolist()) == 1",
    )  # fmt: skip
    holes = g.one_of(
        "$0 * mask",
        "$0.masked_fill(mask == 0, 0.0)",
        "$0 + mask - 1",
        "F.relu($0) * mask",
        "torch.where(mask > 0, $0, -1.0)",
    )
    norm(g, g.choose(condition, "$0", holes, y))
    for form in (
        "(drawn({}, S) > 0).double()",
        "torch.zeros(S).double()",
        "drawn({}, S).abs()",
        "torch.ones(S).double()",
    ):
        code = form.format(g.random.randrange(1000))
        g.vary(Variation(options={"mask": lambda s, code=code: code.replace("S", shape(s))}))  # type: ignore[misc]


@kind
def selected_by_contents(g: CallBuilder) -> None:
    """How many elements there are depends on the numbers."""
    begin(g)
    around(g)
    x = "x0"
    rows = g.one_of(
        "x0.flatten(1).sum(1) > 0",
        "x0.flatten(1)[:, 0] < 0",
        "x0.flatten(1).abs().amax(1) < 30",
        "x0.flatten(1).any(1)",
    )
    y = features(g) if g.chance(0.6) else source(g, x)
    if g.shape(y)[0] != g.shape("x0")[0]:
        raise Unfit
    code = g.one_of(
        "torch.cat([$0[R], F.silu($0[~(R)])])", "torch.cat([$0[R], $0[~(R)] * 3])", "$0[R] if (R).any() else F.silu($0)",
        "$0[(R).nonzero().squeeze(1)].sum(0, keepdim=True)", "$0[:int((R).sum()) + 1].sum(0, keepdim=True)",
        "$0.index_select(0, torch.where(R)[0]).sum(0, keepdim=True)", "$0[(R).long().argsort()[-1:]] * (R).sum()",
        "$0.repeat(int((R).sum()) + 1, *[1] * ($0.dim() - 1))", "$0 * int((R).sum())", "$0 + float((R).sum())", "$0 / max(1, int((R).sum()))",
        "sum([$0] * (int((R).sum()) + 1))", "$0.masked_fill(~(R).view(-1, *[1] * ($0.dim() - 1)), 0.0)",
        "torch.where((R).view(-1, *[1] * ($0.dim() - 1)), $0, F.silu($0))",
    ).replace("R", rows)  # fmt: skip
    norm(g, g.emit(code, y))
    reach(g, "{}", *g.random.sample(VALUES, 4))
    g.vary(Variation(5))


# Arguments ----------------------------------------------------------------------------------------------------------


def _masks(g: CallBuilder, y: str) -> list[Callable[[Shape], str]]:
    """Shapes that a mask for a variable may have, as functions of the shape of the first input."""
    shape, x = g.shape(y), g.shape("x0")
    ones = ", 1" * (len(shape) - 1)
    found: list[Callable[[Shape], str]] = []
    if shape[0] == x[0]:
        found.append(lambda s: f"({s[0]}{ones})")
    if (
        shape[0] == x[0]
        and len(shape) > 2
        and len(shape) == len(x)
        and shape[2:] == x[2:]
        and 1 not in g.inputs[0].sizes
    ):
        found += [lambda s: f"({s[0]}, 1, {', '.join(map(str, s[2:]))})"] * 2
    found.append(lambda s: f"(1, {shape[1]}{', 1' * (len(shape) - 2)})")
    return found


@kind
def optional_mask(g: CallBuilder) -> None:
    begin(g)
    around(g)
    y = features(g) if g.chance(0.7) else norm(g, pinned(g))
    mask = g.one_of(*_masks(g, y))
    logical = g.chance(0.5)
    code = (
        g.one_of("$0.masked_fill(mask, 0.0)", "$0.masked_fill(~mask, -1.0)", "torch.where(mask, $0, 0.0)", "$0 * mask", "$0 * ~mask")
        if logical
        else g.one_of("$0 * mask", "$0 + mask", "$0 - mask", "$0 * (1 - mask)", "$0 + mask * 3", "$0 * torch.sigmoid(mask)", "torch.maximum($0, mask)")
    )  # fmt: skip
    seed = g.random.randrange(1000)
    given: Callable[[Shape], str] = lambda s: f"drawn({seed}, {mask(s)}){' > 0' if logical else ''}"  # noqa: E731
    name = g.parameter_of_forward("mask=None", given if g.chance(0.15) else None)
    condition = g.one_of(
        f"{name} is None", f"not isinstance({name}, torch.Tensor)", f"{name} is None or {name}.numel() == 0"
    )
    y = g.choose(condition, "$0", code, y)
    norm(g, y) if g.steps[-2].outputs == () or not g.steps[-2].code.startswith("m.n") else target(g, y)
    for variation in (Variation(), Variation(5), Variation(size=1), Variation(1)):
        variation.options = {"mask": given}
        g.vary(variation)
    g.vary(Variation(options={"mask": "None"}))


@kind
def optional_scale(g: CallBuilder) -> None:
    begin(g)
    around(g)
    text = g.one_of("scale=None", "scale=None", "scale=1.0", "scale=0.0", "scale=1", "shift=0", "scale=True")
    recorded = "0.5" if g.chance(0.15) else None
    name = g.parameter_of_forward(text, recorded)
    default = text.partition("=")[2]
    code = g.one_of(
        f"$0 * {name}", f"$0 + {name}", f"$0 - {name} * 2", f"F.relu($0) * {name}", f"torch.add($0, 1, alpha={name})"
    )
    way = g.weighted(between=4, forward=2, fork=3)
    condition = f"{name} {g.one_of('is', '==') if default == 'None' else '=='} {default}"
    plain = default != "None" and g.chance(0.5)
    if way == "fork" and recorded is None:
        fork(g, condition)
    else:
        y = norm(g, pinned(g)) if way == "forward" else features(g)
        y = g.emit(code, y) if plain else g.choose(condition, "$0", code, y)
        target(g, y) if way == "forward" else norm(g, y)
    values = ("0.5", "-2.0", "3", "torch.tensor(1.5).double()", "0.0", "True")
    for value in g.random.sample(values, 3):
        g.vary(Variation(options={name: value}))
    g.vary(Variation(5, 1, options={name: "2.5"}))
    g.vary(Variation(options={name: default}))


@kind
def optional_input(g: CallBuilder) -> None:
    """A second input that the recorded call leaves out."""
    begin(g)
    around(g)
    name = g.one_of("other", "memory", "residual", "context")
    g.parameter_of_forward(f"{name}=None")
    argument = g.inputs[0]
    x = g.pick(2, 3, 4, where=lambda tensor: tuple(tensor.shape) == argument.shape)
    c, d = same_size(g, x), same_size(g, x)
    y = g.emit(f"{c}($0)", x)
    code = g.one_of(
        f"$0 + {name}", f"$0 + {d}({name})", f"$0 + {c}({name})", f"F.relu($0 + {name})", f"$0 * {name}", f"torch.cat([$0, {name}])",
        f"torch.maximum($0, {name})", f"$0 - 2 * {c}({name})", f"{c}({name})", name, f"torch.cat([$0, {d}({name})])",
        f"$0 * torch.sigmoid({c}({name}))", f"F.silu({c}({name})) + $0",
    )  # fmt: skip
    y = g.choose(f"{name} is None", "$0", code, y)
    norm(g, y)
    for index, variation in enumerate((Variation(), Variation(5), Variation(size=1))):
        seed = 900 + index
        variation.options = {name: lambda s, seed=seed: f"drawn({seed}, {s})"}  # type: ignore[misc]
        g.vary(variation)


@kind
def keyword_arguments(g: CallBuilder) -> None:
    """Further arguments by name that no signature lists."""
    begin(g)
    around(g)
    g.signature.append("**options")
    g.variables["options"] = {}
    mask = g.one_of(
        "'mask' not in options",
        "options.get('mask') is None",
        "not options",
        "options.get('mask', None) is None",
        "len(options) == 0",
    )
    y = features(g)
    if g.chance(0.5):
        y = g.choose(mask, "$0", g.one_of("$0 * options['mask']", "$0 + options['mask']", "F.relu($0)"), y)
        norm(g, y)
    else:
        g.order.remove(y)
        fork(g, mask)
    for variation in (Variation(), Variation(5)):
        variation.options = {"mask": "torch.tensor(-0.5).double()"}
        g.vary(variation)


@kind
def optional_key(g: CallBuilder) -> None:
    """One argument, a dictionary that may hold more than it did."""
    begin(g)
    key = g.one_of("image", "pixel_values", "x")
    g.positional = ("batch",)
    g.variables["batch"] = {key: g.variables["x0"]}
    x = g.emit(f"batch['{key}']")
    g.order = [x]
    around(g)
    shape = g.inputs[0].shape
    y = features(g)
    missing = g.one_of(
        "'mask' not in batch", "batch.get('mask') is None", "len(batch) == 1", f"set(batch) == {{'{key}'}}"
    )
    other = g.one_of("$0 * batch['mask']", "$0 + batch['mask']", "$0.masked_fill(batch['mask'] > 0, 0.0)")
    norm(g, g.choose(missing, "$0", other, y))
    g.pack = lambda codes: [f"{{'{key}': {codes[0]}}}"]
    ones = ", 1" * (len(shape) - 1)
    for batch in (0, 5):
        pack: Pack = lambda codes, n=batch or shape[0]: [f"{{'{key}': {codes[0]}, 'mask': drawn(3, ({n}{ones}))}}"]  # type: ignore[misc] # noqa: E731
        g.vary(Variation(batch, pack=pack))


@kind
def flag(g: CallBuilder) -> None:
    """A boolean parameter that changes what runs."""
    begin(g)
    around(g)
    default = g.one_of("True", "False")
    recorded = g.one_of("True", "False") if g.chance(0.3) else None
    name = g.parameter_of_forward(
        f"{g.one_of('use_norm', 'fast', 'refine', 'return_dict', 'augment')}={default}", recorded
    )
    fork(g, g.one_of(name, name, f"not {name}", f"{name} is True", f"{name} and len(x0) > 0", f"[False, True][{name}]"))
    for value in ("True", "False"):
        g.vary(Variation(options={name: value}))
        g.vary(Variation(5, 1, options={name: value}))


@kind
def flag_returns(g: CallBuilder) -> None:
    """A boolean parameter that returns what stands in the middle as well."""
    begin(g)
    around(g)
    text = g.one_of(
        "return_features=False", "return_features=False", "output_hidden_states=None", "features_only=False", "return_mask=0", "stop=True"
    )  # fmt: skip
    name = g.parameter_of_forward(text)
    y = features(g)
    shown = g.one_of(
        "{y}",
        "({z}, {y})",
        "{{'out': {z}, 'features': {y}}}",
        "[{y}, {y}.mean()]",
        "({z}, {y}[:, :1])",
        "{y}.flatten(1)",
    )
    if g.chance(0.3):
        y = norm(g, pinned(g))
        z = target(g, y)
    else:
        z = norm(g, y)
    for _ in range(g.one_of(0, 0, 1)):
        z = layer_on(g, g.emit("F.relu($0)", z))
    now = f"not {name}" if text != "stop=True" else name
    g.final = (f"$0 if {now} else {shown.format(y='$1', z='$0')}", (z, y))
    for value in ("True", "False"):
        g.vary(Variation(options={name: value}))
    g.vary(Variation(5, 1, options={name: "True" if text != "stop=True" else "False"}))


@kind
def index(g: CallBuilder) -> None:
    """A norm or a layer chosen by an argument: one for each domain, task or resolution."""
    begin(g)
    around(g)
    way = g.weighted(list=4, dict=2, named=1, layers=2, both=2, list_of_one_call=1)
    by_name = way in ("dict", "named")
    start = g.one_of("'a'", "'b'") if by_name else g.one_of("0", "0", "1", "-1")
    recorded = (g.one_of("'a'", "'b'") if by_name else g.one_of("0", "1", "2")) if g.chance(0.4) else None
    name = g.parameter_of_forward(g.one_of(f"d={start}", f"domain={start}"), recorded)
    x = g.pick(2, 3, 4)
    if way in ("layers", "both"):
        shape = g.shape(x)
        made = f"nn.Conv{len(shape) - 2}d({shape[1]}, 3, 1)" if len(shape) > 2 else f"nn.Linear({shape[1]}, 3)"
        cs = g.layer("cs", f"nn.ModuleList([{', '.join([made] * 3)}])")
        y = g.emit(f"{cs}[{name}]($0)", x)
        if way == "layers":
            norm(g, y)
    else:
        y = layer_on(g, x)
    if way != "layers":
        shape = g.shape(y)
        made = f"nn.BatchNorm{max(len(shape) - 2, 1)}d({shape[1]})"
        if way == "dict":
            ns = g.layer("ns", f"nn.ModuleDict({{{', '.join(f'{k!r}: {made}' for k in 'abc')}}})", "positive")
            g.emit(f"{ns}[{name}]($0)", y)
        elif way == "named":
            ns = g.layer("ns", f"nn.ModuleDict({{{', '.join(f'{k!r}: {made}' for k in 'abc')}}})", "positive")
            g.emit(f"getattr({ns}, {name})($0)", y)
        else:
            ns = g.layer("ns", f"nn.ModuleList([{', '.join([made] * 3)}])", "positive")
            g.emit(g.one_of(f"{ns}[{name}]($0)", f"[*{ns}][{name}]($0)", f"{ns}[min({name}, 2)]($0)"), y)
    for value in ("'a'", "'b'", "'c'") if by_name else ("0", "1", "2"):
        g.vary(Variation(options={name: value}))
    g.vary(*(Variation(5, options={name: value}) for value in (("'c'", "'a'") if by_name else ("2", "0"))))


@kind
def number_of_layers(g: CallBuilder) -> None:
    """How deep the network is, or what it returns on its way, is an argument."""
    begin(g)
    around(g)
    x = g.pick(2, 3, 4)
    shape = g.shape(x)
    n = len(shape) - 2
    layer = (
        f"nn.Conv{n}d({shape[1]}, {shape[1]}, {g.one_of('1', '3, padding=1')})"
        if n
        else f"nn.Linear({shape[1]}, {shape[1]})"
    )
    norm_code = f"nn.BatchNorm{max(n, 1)}d({shape[1]})"
    stage = g.one_of(
        f"nn.Sequential({layer}, {norm_code})",
        f"nn.Sequential({layer}, {norm_code}, nn.ReLU())",
        layer,
        f"nn.Sequential({norm_code}, {layer})",
    )
    stages = g.layer("stages", f"nn.ModuleList([{', '.join([stage] * 3)}])", "positive")
    g.preamble.append("import functools, itertools")
    g.execute(g.preamble[-1])
    default = g.one_of("3", "2", "1", "None")
    recorded = g.one_of("1", "2", "3") if g.chance(0.3) else None
    name = g.parameter_of_forward(f"{g.one_of('depth', 'upto', 'n')}={default}", recorded)
    code = g.one_of(
        f"functools.reduce(lambda h, stage: stage(h), {stages}[:{name}], $0)", f"functools.reduce(lambda h, stage: stage(h), [*{stages}][:{name}], $0)",
        f"functools.reduce(lambda h, i: {stages}[i](h) if {name} is None or i < {name} else h, range(3), $0)",
        f"list(itertools.accumulate({stages}, lambda h, stage: stage(h), initial=$0))[-1 if {name} is None else {name}]",
        f"nn.Sequential(*{stages}[:{name}])($0)", f"sum(stage($0) for stage in {stages}[:{name}])",
    )  # fmt: skip
    y = g.emit(code, x)
    if g.chance(0.7):
        norm(g, y)
    for value in ("1", "2", "3", "0"):
        g.vary(Variation(options={name: value}))


# Methods ------------------------------------------------------------------------------------------------------------


def _halves(g: CallBuilder, method: str, head: str = "") -> str:
    """Something, a public method that ends in the middle, something."""
    y = norm(g, pinned(g)) if g.chance(0.3) else features(g)
    if g.chance(0.25):
        y = g.emit(g.one_of("F.relu($0)", "$0 * 2", "$0.clone()"), y)
    y = g.cut(y, method, head, repeated=g.chance(0.3))
    if g.steps[-2].code.startswith("m.n"):
        target(g, y)
    else:
        norm(g, y)
    return y


@kind
def method_of_features(g: CallBuilder) -> None:
    """``forward_features``, as timm's models have it; bnfuse looks for it by itself."""
    begin(g)
    around(g)
    _halves(g, "forward_features", g.one_of("", "forward_head"))
    for variation in (Variation(), Variation(5), Variation(size=1)):
        variation.method = "forward_features"
        g.vary(variation)
    g.vary(Variation(method="forward_features"), Variation())


@kind
def method_of_intermediates(g: CallBuilder) -> None:
    """``forward_intermediates``, as timm's models have it."""
    begin(g)
    around(g)
    y = norm(g, pinned(g)) if g.chance(0.3) else features(g)
    last = len(g.steps)
    z = target(g, y) if g.steps[-1].code.startswith("m.n") else norm(g, y)
    shown = g.one_of(f"{z}, [{y}]", f"[{y}, {z}]", f"{{'image_features': {z}, 'image_intermediates': [{y}]}}")
    lines = [str(step) for step in g.steps]
    if g.chance(0.4):
        lines, shown = lines[:last], f"[{y}]"
    names = ", ".join(["m", *(argument.name for argument in g.inputs)])
    g.methods.append(
        "\n".join([f"def forward_intermediates({names}):", *("    " + line for line in lines), f"    return {shown}"])
    )
    for variation in (Variation(), Variation(5)):
        variation.method = "forward_intermediates"
        g.vary(variation)


@kind
def method_given(g: CallBuilder) -> None:
    """Methods of any name, calls of which are given."""
    begin(g)
    around(g)
    method = g.one_of("encode", "embed", "get_features", "extract", "backbone_forward", "encode_image")
    head = g.one_of("", "", "forward_head", "decode", "classify")
    y = _halves(g, method, head)
    shape = g.shape(y)
    g.given.append(Variation(method=method))
    for variation in (Variation(), Variation(5), Variation(size=1)):
        variation.method = method
        g.vary(variation)
    if head:
        g.given.append(Variation(method=head, arguments=(f"drawn(7, {shape})",)))
        g.vary(Variation(method=head, arguments=(f"drawn(8, {shape})",)))
        g.vary(Variation(method=head, arguments=(f"net.{method}(drawn(9, {g.inputs[0].shape}))",)))


@kind
def idle_sharer(g: CallBuilder) -> None:
    """A layer belongs to a module as well that the recorded call does not run."""
    begin(g)
    around(g)
    x = g.pick(2, 3, 4)
    c = same_size(g, x)
    y = g.emit(f"{c}($0)", x)
    way = g.weighted(container=3, tied=3, norm=2)
    if way == "container":
        idle = g.layer("idle", f"nn.Sequential({c}, {g.one_of('nn.ReLU()', 'nn.Identity()', 'nn.Tanh()')})")
    elif way == "tied":
        idle = same_size(g, x)
        g.setup.append(f"{idle}.weight = {c}.weight")
        if g.layers[idle[2:]].code != g.layers[c[2:]].code:
            raise Unfit
    else:
        n = plain_norm(g, y)
        z = g.emit(f"{n}($0)", y)
        idle = g.layer("idle", f"nn.Sequential({n}, nn.ReLU())")
    if way != "norm":
        z = norm(g, y)
    name = g.parameter_of_forward(g.one_of("auxiliary=False", "use_teacher=False"))
    how = g.weighted(flag=3, method=2)
    if how == "flag":
        g.choose(f"not {name}", "$0", f"$0 + {idle}($1)" if g.shape(z) == g.shape(x) else f"{idle}($1)", z, x)
        g.vary(Variation(options={name: "True"}))
        g.vary(Variation(5, options={name: "True"}))
    else:
        if x not in [argument.name for argument in g.inputs]:
            raise Unfit
        g.signature.clear()
        names = [argument.name for argument in g.inputs]
        g.methods.append(f"def teach({', '.join(['m', *names])}):\n    return {idle}({x})")
        g.given.append(Variation(method="teach"))
        g.vary(Variation(method="teach"))
        g.vary(Variation(5, method="teach"))


# Memory -------------------------------------------------------------------------------------------------------------


@kind
def counter(g: CallBuilder) -> None:
    """The first call is not like the third."""
    begin(g)
    around(g)
    way = g.weighted(number=4, buffer=2, list=1, toggle=1, globally=1, sizes=1, generator=1)
    limit = g.one_of(1, 2, 2, 3)
    if way == "number":
        g.attribute("calls", "0")
        g.statement("m.calls += 1")
        g.methods.append("def reset(m):\n    m.calls = 0")
        condition = g.one_of(
            f"m.calls <= {limit}", f"m.calls % {limit + 1} == 1", "m.calls == 1", f"m.calls < {limit + 1}"
        )
    elif way == "buffer":
        count = g.layer("count", "nn.Buffer(torch.zeros((), dtype=torch.int64))")
        g.statement(f"{count}.add_(1)")
        g.methods.append(f"def reset(m):\n    {count}.zero_()")
        condition = g.one_of(f"{count} <= {limit}", f"int({count}) <= {limit}", f"{count}.item() < {limit + 1}")
    elif way == "list":
        g.attribute("history", "[]")
        g.statement("m.history.append(x0.shape)")
        g.methods.append("def reset(m):\n    m.history.clear()")
        condition = f"len(m.history) <= {limit}"
    elif way == "toggle":
        g.attribute("odd", "False")
        g.statement("m.odd = not m.odd")
        g.methods.append("def reset(m):\n    m.odd = False")
        condition = "m.odd"
    elif way == "sizes":
        g.attribute("sizes", "set()")
        g.statement("m.sizes.add(x0.shape)")
        g.methods.append("def reset(m):\n    m.sizes.clear()")
        condition = "len(m.sizes) == 1"
    elif way == "generator":
        g.remember("count", "itertools.count()", "import itertools")
        condition = f"next(count) < {limit}"
    else:
        g.remember("count", "[0]")
        g.statement("count[0] += 1")
        condition = f"count[0] <= {limit}"
    fork(g, condition)
    g.vary(*[Variation()] * 5)
    g.vary(Variation(), Variation(5), Variation(size=1), Variation())
    if g.methods:
        g.vary(*[Variation()] * 3, Variation(method="reset", arguments=()), *[Variation()] * 3)


@kind
def remembered(g: CallBuilder) -> None:
    """An activation of one call is used in the next."""
    begin(g)
    around(g)
    forward = g.chance(0.3)
    y = norm(g, pinned(g)) if forward else features(g)
    buffer = g.chance(0.2)
    if buffer:
        shape = (1, g.shape(y)[1], *[1] * (len(g.shape(y)) - 2))
        g.attribute("past", f"nn.Buffer(torch.zeros({shape}))")
        z = g.emit(
            g.one_of("$0 + m.past", "$0 * (1 + m.past)", "$0 - m.past.mean()", "torch.cat([$0, m.past.expand_as($0)])"),
            y,
        )
        axes = tuple(axis for axis in range(len(shape)) if axis != 1)
        g.statement(f"m.past.copy_($0.mean({axes}, keepdim=True))", y)
        g.methods.append("def reset(m):\n    m.past.zero_()")
    else:
        g.attribute("past", "None")
        combined = g.one_of(
            "($0 + m.past)", "0.5 * $0 + 0.5 * m.past", "torch.cat([m.past, $0])", "m.past", "torch.maximum($0, m.past)", "$0 - m.past",
            "torch.cat([m.past[..., -1:], $0[..., :-1]], -1)", "$0 * torch.sigmoid(m.past)", "F.relu($0 + m.past)",
        )  # fmt: skip
        missing = g.one_of(
            "m.past is None", "m.past is None or m.past.shape != $0.shape", "not isinstance(m.past, torch.Tensor)"
        )
        z = g.emit(f"$0 if {missing} else {combined}", y)
        kept = g.one_of("$0", "$0", "$0.detach()", "$1", "$0.clone()", "$0[..., -1:].expand_as($0)")
        g.statement(f"m.past = {kept}", y, z)
        g.methods.append("def reset(m):\n    m.past = None")
    target(g, z) if forward else norm(g, z)
    g.vary(*[Variation()] * 3)
    g.vary(Variation(), Variation(), Variation(method="reset", arguments=()), Variation(5), Variation(5))
    g.vary(Variation(size=1), Variation(size=1))
    if g.chance(0.3):
        g.kept.append("net.past")


@kind
def cached_table(g: CallBuilder) -> None:
    """What depends on sizes only is made once and kept, in or outside the network; the original then trains."""
    begin(g, "image", "sequence", "tokens")
    around(g)
    y = features(g)
    way = g.weighted(function=3, dict=2, attribute=2)
    made = g.one_of("torch.linspace(0.5, 1.5, {}).double()", "torch.arange({}).double()", "torch.ones({}).double()")
    if way == "function":
        lines = f"import functools\n@functools.lru_cache\ndef table(n):\n    return {made.format('n')}"
        g.preamble.append(lines)
        g.execute(lines)
        value = "table($0.shape[-1])"
    elif way == "dict":
        g.remember("tables", "{}")
        value = f"tables.setdefault($0.shape[-1], {made.format('$0.shape[-1]')})"
    else:
        g.attribute("table", "None")
        g.statement(
            f"m.table = {made.format('$0.shape[-1]')} if m.table is None or len(m.table) != $0.shape[-1] else m.table",
            y,
        )
        value = "m.table"
    z = g.emit(g.one_of(f"$0 * {value}", f"$0 + {value}", f"$0 * {value} + $0"), y)
    norm(g, z) if g.chance(0.5) else g.emit("$0 * T".replace("T", value), norm(g, y))
    g.vary(Variation(), Variation(size=1), Variation(size=2), Variation())
    g.trained = True


@kind
def kept_elsewhere(g: CallBuilder) -> None:
    """An object outside the network, or one that it holds, keeps an activation."""
    begin(g)
    around(g)
    forward = g.chance(0.3)
    y = norm(g, pinned(g)) if forward else features(g)
    way = g.weighted(
        store=3, deque=2, dict=2, closure=2, held=2, attribute=1.5, module=1, list=1, partial=1, of_class=1
    )
    part = g.one_of("$0", "$0", "$0", "$0.detach()", "$0[:, :1]", "$0.mean()", "[$0]", "$0.clone()", "float($0.sum())")
    store = "import types"
    if way in ("store", "partial"):
        g.remember("store", "types.SimpleNamespace()", store)
        g.statement(f"store.features = {part}" if way == "store" else f"vars(store).update(features={part})", y)
        g.kept.append("store")
        read = "store.features"
    elif way == "deque":
        g.remember("kept", "collections.deque(maxlen=2)", "import collections")
        g.statement(g.one_of(f"kept.append({part})", f"kept.appendleft({part})", f"kept.extend([{part}])"), y)
        g.kept.append("list(kept)")
        read = "kept[0]"
    elif way == "dict":
        g.remember("kept", "{}")
        g.statement(
            g.one_of(
                f"kept['features'] = {part}", f"kept.update(features={part})", f"kept.__setitem__('features', {part})"
            ),
            y,
        )
        g.kept.append("kept")
        read = "kept['features']"
    elif way == "list":
        g.remember("kept", "[]")
        g.statement(g.one_of(f"kept.append({part})", f"kept[:] = [{part}]", f"kept.insert(0, {part})"), y)
        g.kept.append("kept")
        read = "kept[0]"
    elif way == "closure":
        lines = "def keeper():\n    kept = []\n    def keep(x):\n        kept[:] = [x]\n    keep.kept = kept\n    return keep"
        g.remember("keep", "keeper()", lines)
        g.statement(f"keep({part})", y)
        g.kept.append("keep.kept")
        read = "keep.kept[0]"
    elif way == "held":
        g.preamble.append(store)
        g.execute(store)
        g.attribute("store", g.one_of("types.SimpleNamespace()", "dict()"))
        held = g.layers["store"].code == "dict()"
        g.statement(f"m.store['features'] = {part}" if held else f"m.store.features = {part}", y)
        g.kept.append("net.store")
        read = "m.store['features']" if held else "m.store.features"
    elif way == "module":
        layers = [name for name in g.layers if name[0] in "cl" and name[1:].isdigit()]
        if not layers:
            raise Unfit
        name = g.random.choice(layers)
        g.statement(f"m.{name}.seen = {part}", y)
        g.kept.append(f"net.{name}.seen")
        read = f"m.{name}.seen"
    elif way == "of_class":
        g.statement(f"type(m).seen = {part}", y)
        g.kept.append("type(net).seen")
        read = "m.seen"
    else:
        g.statement(
            g.one_of(f"m.seen = {part}", f"m.__dict__['seen'] = {part}", f"object.__setattr__(m, 'seen', {part})"), y
        )
        g.kept.append("net.seen")
        read = "m.seen"
    if part in ("$0", "$0.detach()", "$0.clone()") and way not in ("deque", "list") and g.chance(0.4):
        y = g.emit(read)
    target(g, y) if forward else norm(g, y)
    g.vary(Variation(), Variation())
    g.vary(Variation(5))


@kind
def kept_by_an_argument(g: CallBuilder) -> None:
    """A list or an object that is passed collects activations."""
    begin(g)
    around(g)
    forward = g.chance(0.3)
    y = norm(g, pinned(g)) if forward else features(g)
    way = g.one_of("list", "dict", "object", "tensor")
    part = g.one_of("$0", "$0", "$0.detach()", "$0[:, :1]", "$0.mean()", "$0.clone()")
    if way == "tensor":
        channels = g.shape(y)[1]
        code, given, line = (
            "torch.zeros(C).double()",
            f"torch.zeros({channels}).double()",
            "kept.add_($0.transpose(0, 1).flatten(1).sum(1))",
        )
    else:
        code = {"list": "[]", "dict": "{}", "object": "types.SimpleNamespace()"}[way]
        given = code
        line = {
            "list": f"kept.append({part})",
            "dict": f"kept.update(features={part})",
            "object": f"setattr(kept, 'features', {part})",
        }[way]
    if way == "object":
        g.preamble.append("import types")
        g.execute("import types")
    optional = g.chance(0.6)
    g.parameter_of_forward("kept=None" if optional else "kept", given if not optional or g.chance(0.4) else None)
    g.statement(f"kept is None or {line}" if optional else line, y)
    target(g, y) if forward else norm(g, y)
    g.vary(Variation(options={"kept": given}))
    g.vary(Variation(5, options={"kept": given}), Variation(options={"kept": given}))
    if optional:
        g.vary(Variation(options={"kept": "None"}))


# Aliases ------------------------------------------------------------------------------------------------------------


def _twice(codes: list[str]) -> list[str]:
    return [f"a := {codes[0]}", *["a"] * (len(codes) - 1)]


@kind
def one_tensor_twice(g: CallBuilder) -> None:
    """The recorded call passes one tensor for two parameters."""
    begin(g, count=2)
    g.variables["x1"] = g.variables["x0"]
    twice = g.one_of(
        _twice,
        _twice,
        _twice,
        lambda codes: [f"a := {codes[0]}", "a.view_as(a)"],
        lambda codes: [f"a := {codes[0]}", "a[...]"],
    )
    g.pack = twice
    if twice is not _twice:
        g.variables["x1"] = g.variables["x0"].view_as(g.variables["x0"])
    layer, other = same_size(g, "x0"), same_size(g, "x0")
    way = g.weighted(beside=4, same=2, condition=3, written=1)
    if way == "beside":
        a = g.emit(f"{layer}($0)", "x0")
        b = norm(g, "x1")
        g.emit(g.one_of("$0 + $1", "F.relu($0 + $1)", "$1 - $0", "torch.cat([$0, $1], 1)"), a, b)
    elif way == "same":
        a, b = g.emit(f"{layer}($0)", "x0"), g.emit(f"{other}($0)", "x1")
        g.emit(g.one_of("$0 + $1", "$0 - $1", "torch.cat([$0, $1])"), norm(g, a), norm(g, b))
    elif way == "written":
        a = g.emit(f"{layer}($0)", "x0")
        g.statement(g.one_of("$0.mul_(2)", "$0.add_(1)", "$0[:, :1].zero_()"), "x0")
        b = norm(g, "x1")
        g.emit("$0 + $1", a, b)
    else:
        condition = g.one_of(
            "x0 is x1",
            "x0.data_ptr() == x1.data_ptr()",
            "torch.equal(x0, x1)",
            "id(x0) == id(x1)",
            "x0 is not x1",
            "x1 is x0",
        )
        fork(g, condition)
    for variation in (Variation(), Variation(5), Variation(size=1)):
        variation.pack = list
        g.vary(variation)
    reach(g, "-{}")


@kind
def list_of_tensors(g: CallBuilder) -> None:
    """An argument that is a list, of one tensor twice or of as many as there are."""
    begin(g, "image", "image", "sequence", "vector", count=2)
    twice = g.chance(0.5)
    if twice:
        g.variables["x1"] = g.variables["x0"]
    star = g.chance(0.25)
    g.positional = ("*xs",) if star else ("xs",)
    g.variables["xs"] = (tuple if star else list)([g.variables["x0"], g.variables["x1"]])

    def listed(codes: list[str]) -> list[str]:
        return codes if star else [f"[{', '.join(codes)}]"]

    g.pack = (lambda codes: listed(_in_list(codes))) if twice else listed
    c, d = same_size(g, "x0"), same_size(g, "x0")
    way = g.weighted(beside=3, sum=4, length=3, changed=0 if star else 2)
    if way == "beside":
        y = g.emit(f"{c}(xs[0])")
        z = g.emit(f"{plain_norm(g, 'x0')}(xs[1])")
        g.emit(g.one_of("$0 + $1", "F.relu($0 + $1)", "$1 - $0"), y, z)
    elif way == "sum":
        code = g.one_of(
            f"sum({c}(x) for x in xs)", f"torch.stack([{c}(x) for x in xs]).sum(0)", f"sum({c}(x) * i for i, x in enumerate(xs))",
            f"{c}(xs[0]) + {d}(xs[-1])", f"sum({c}(x) if i else {d}(x) for i, x in enumerate(xs))", f"{c}(xs[0]) * len(xs)",
        )  # fmt: skip
        norm(g, g.emit(code))
    elif way == "length":
        g.emit("xs[0] + xs[-1]")
        fork(
            g,
            g.one_of(
                "len(xs) > 1", "len(xs) == 2", "len(xs) % 2 == 0", "xs[0] is xs[-1]", "bool(xs[1:])", "len(xs) < 3"
            ),
        )
    else:
        y = g.emit(f"{c}(xs[0])")
        g.statement(g.one_of("xs.append($0)", "xs[0] = $0", "xs.insert(0, $0)", "xs.extend([$0])"), y)
        norm(g, y)
    g.order = [name for name in g.order if name not in ("x0", "x1")]
    for count in (1, 2, 3):
        g.vary(Variation(count=count, pack=listed))
    g.vary(Variation(5, pack=listed))


def _in_list(codes: list[str]) -> list[str]:
    return [f"(a := {codes[0]})", *["a"] * (len(codes) - 1)]


@kind
def returned_input(g: CallBuilder) -> None:
    """What is returned is an input, or a part of one, or what was written to one."""
    begin(g, count=g.one_of(1, 2))
    around(g)
    way = g.weighted(condition=3, written=3, both=2, view=2)
    if way == "condition":
        y = features(g)
        z = norm(g, y)
        g.final = (
            g.one_of("$0 if len(x0) > 1 else x0", "(x0, $0)", "$0 if x0.sum() > 0 else (x0, $1)", "[$0, x0[:1]]"),
            (z, y),
        )
    elif way == "written":
        g.statement(g.one_of("$0.mul_(2)", "$0.add_(1)", "$0.relu_()", "$0[:, :1].zero_()"), "x0")
        y = g.emit(f"{same_size(g, 'x0')}($0)", "x0")
        norm(g, y)
        if g.chance(0.5):
            g.statement(
                g.one_of(
                    "$0.copy_($1)", "$0.add_($1)", "$0[:1] = $1[:1]", "$0.set_($1)" if g.chance(0.2) else "$0.sub_($1)"
                ),
                "x0",
                y,
            )
    elif way == "both":
        y = g.emit(f"{same_size(g, 'x0')}($0)", "x0")
        z = norm(g, y)
        g.statement(g.one_of("$0.copy_($1)", "$0.add_($1)", "$0.mul_($1)"), "x0", g.one_of(y, z))
    else:
        y = norm(g, features(g))
        g.final = (g.one_of("(x0.view_as(x0), $0)", "($0, x0[:, :1])", "[x0.detach(), $0]", "dict(x=x0, y=$0)"), (y,))
    reach(g, "{}", "-{}", "{}.abs()")
    g.vary(Variation(1))
    g.vary(Variation(5, 1))


@kind
def forward_replaced(g: CallBuilder) -> None:
    """The forward of an instance is another function, which may hold on to the original."""
    begin(g)
    around(g)
    x = features(g)
    norm(g, x)
    modules = [name for name in g.layers if name[0] in "cln" and name[1:].isdigit()]
    module = "m" if g.chance(0.6) or not modules else f"m.{g.random.choice(modules)}"
    f = f"{module}.forward"
    g.preamble += ["import functools, types"]
    g.ending.append(
        f"{f} = "
        + g.one_of(
            f"torch.no_grad()({f})", f"torch.no_grad()({f})", f"functools.partial({f})", f"(lambda f: lambda *a, **k: f(*a, **k))({f})",
            f"types.MethodType(type({module}).forward, {module})", f"functools.wraps({f})(functools.partial({f}))",
            f"functools.partial(type({module}).forward, {module})", f"torch.enable_grad()({f})", f"(lambda *a, f={f}, **k: f(*a, **k))",
        )
    )  # fmt: skip


@kind
def plain(g: CallBuilder) -> None:
    """Nothing of the kind; only more calls."""
    begin(g, count=g.one_of(1, 1, 2))
    around(g)
    y = features(g)
    norm(g, y) if g.chance(0.6) else target(g, norm(g, pinned(g)))
    reach(g, "-{}", "9 * {}")
