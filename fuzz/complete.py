r"""Norms that could go but stay, found by numbers alone: ``python -m fuzz.complete --count 200``.

For small networks of the operators in :data:`OPERATORS`, bnfuse does its work first. Then, for every norm that it
kept, this asks whether some other contents of the parameters would let the norm go too. Nothing of bnfuse's rules,
units or propagation is used: the unknowns are, for every layer on its own,

* a factor ``exp(u)`` for each output and for each input channel of its weight, and its bias (made if it has none);
* for every other norm that is left, a factor for its gain and an addend to its bias;

and the equations are that the outputs on random inputs stay as they are. The norm's own work, ``a*x + c``, is taken
away little by little, ``a**(1-r)*x + (1-r)*c`` for ``r`` from 0 to 1, and after each step a few Gauss-Newton
steps follow the solution. If the outputs still agree to 1e-9 at ``r = 1``, and on inputs that the fit never saw,
the norm could go.

What this does not see: solutions with negative or zero factors (so all gains are drawn positive), solutions in which a
norm goes only if one that bnfuse removed comes back, and solutions by other means than factors and biases. What it
finds is proven by its residual; what it does not find is no proof. It also finds what no change of units per channel
can do: ``x + norm(x)`` is a multiple of x, so the producer of x may take the whole sum.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

import bnfuse
from fuzz.check import tensors_of
from fuzz.generate import Builder, Spoilt, Unfit
from fuzz.program import Program

SOLVED = 1e-9
STEPS = 8
OPERATORS = (
    "conv2d (1x1, 3x3, padded or not, groups)", "linear", "batch_norm", "relu", "leaky_relu", "silu", "add", "sub",
    "cat", "chunk", "slice", "flip of channels", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d + flatten",
    "multiplication by and addition of a number", "product with a gate", "a convolution called twice",
)  # fmt: skip


# Networks -----------------------------------------------------------------------------------------------------------


def _conv(g: Builder) -> str:
    x = g.pick(4)
    channels, out = g.shape(x)[1], g.one_of(2, 4)
    size, padding = g.one_of((1, 0), (1, 0), (3, 1), (3, 0))
    groups = g.one_of(1, 1, 1, 2 if channels % 2 == 0 else 1)
    bias = g.one_of(True, False)
    return g.apply(
        g.layer("c", f"nn.Conv2d({channels}, {out}, {size}, padding={padding}, groups={groups}, bias={bias})"), x
    )


def _norm(g: Builder) -> None:
    x = g.pick(4, where=lambda tensor: tensor.shape[1] <= 8)
    g.apply(g.layer("n", f"nn.BatchNorm2d({g.shape(x)[1]})", g.one_of("positive", "positive", "scale")), x)


def _conv_norm(g: Builder) -> None:
    y = _conv(g)
    z = g.apply(g.layer("n", f"nn.BatchNorm2d({g.shape(y)[1]})", g.one_of("positive", "positive", "scale")), y)
    if g.chance(0.4):
        g.emit("F.relu($0)", z)


def _single(g: Builder) -> None:
    g.emit(
        g.one_of(
            "F.relu($0)",
            "F.relu($0)",
            "F.leaky_relu($0, 0.1)",
            "F.silu($0)",
            "F.avg_pool2d($0, 2)",
            "F.max_pool2d($0, 2)",
            "$0.flip(1)",
            "$0 * 2",
            "$0 + 0.5",
            "$0 * 0.5 - 1",
            "$0[:, :2]",
            "$0[:, 1:]",
        ),
        g.pick(4),
    )


def _pair(g: Builder) -> None:
    x = g.pick(4)
    g.emit(g.one_of("$0 + $1", "$0 + $1", "$0 - $1", "torch.cat([$0, $1], 1)", "$0 * torch.sigmoid($1)"), x, g.alike(x))


def _split(g: Builder) -> None:
    x = g.pick(4, where=lambda tensor: tensor.shape[1] % 2 == 0)
    a, b = g.emit("$0.chunk(2, 1)", x, outputs=2)
    if g.chance(0.5):
        g.emit(g.one_of("$0 + $1", "torch.cat([$1, $0], 1)", "$0 * torch.sigmoid($1)"), a, b)


def _again(g: Builder) -> None:
    convolutions = [(layer, x) for layer, x in g.applied if layer.startswith("m.c")]
    if not convolutions:
        raise Unfit
    layer, before = g.random.choice(convolutions)
    g.apply(layer, g.pick(4, where=lambda tensor: tensor.shape[1] == before.shape[1]))


def _head(g: Builder) -> None:
    y = g.emit("F.adaptive_avg_pool2d($0, 1).flatten(1)", g.pick(4))
    g.apply(g.layer("l", f"nn.Linear({g.shape(y)[1]}, 3)"), y)


ACTIONS: tuple[Callable[[Builder], Any], ...] = (
    _conv, _conv, _norm, _norm, _conv_norm, _single, _single, _single, _pair, _pair, _split, _again, _head,
)  # fmt: skip


def small(seed: int) -> Program:
    """A small network of the operators above."""
    for attempt in range(100):
        g = Builder(seed + attempt * 1_000_003)
        g.input((2, g.one_of(2, 4), 6, 6))
        try:
            for _ in range(g.one_of(4, 6, 8, 10)):
                try:
                    g.random.choice(ACTIONS)(g)
                except Unfit:
                    continue
            if not any(name in g.read for name in ("x0",)):
                continue
            program = g.finish()
        except Spoilt:
            continue
        if any(layer.dressing for layer in program.layers):
            return program
    raise RuntimeError(f"no network could be drawn from seed {seed}")


# The search ---------------------------------------------------------------------------------------------------------


class _Affine(nn.Module):
    """A norm written as what it does."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_var is not None
        assert norm.running_mean is not None
        a = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.weight = nn.Parameter(a.detach().clone())
        self.bias = nn.Parameter((norm.bias - norm.running_mean * a).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def _with_biases(model: nn.Module) -> nn.Module:
    """A copy in which every layer has a bias and every norm is an affine map."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0], dtype=torch.float64))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, _Affine(child))
    return model


@dataclass
class Search:
    """Contents of all parameters as a function of one vector of unknowns."""

    model: nn.Module
    norm: str

    def __post_init__(self) -> None:
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, _Affine))}
        self.sizes: list[int] = []
        for name, layer in self.layers.items():
            if name == self.norm:
                continue
            self.sizes += [layer.weight.shape[0]] * 2
            if not isinstance(layer, _Affine):
                self.sizes.append(self._inputs(layer))

    @staticmethod
    def _inputs(layer: Any) -> int:
        return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features

    def contents(self, unknowns: Tensor, done: float) -> dict[str, Tensor]:
        """Of every parameter, with ``done`` of the norm taken away."""
        parts = iter(unknowns.split(self.sizes))
        made = dict(self.parameters)
        for name, layer in self.layers.items():
            weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
            if name == self.norm:
                made[f"{name}.weight"], made[f"{name}.bias"] = weight ** (1 - done), bias * (1 - done)
                continue
            out, added = next(parts).exp(), next(parts)
            made[f"{name}.bias"] = bias * out + added
            if isinstance(layer, _Affine):
                made[f"{name}.weight"] = weight * out
                continue
            taken = next(parts).exp()
            groups = getattr(layer, "groups", 1)
            rows = taken.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
            factor = out[:, None] * rows
            made[f"{name}.weight"] = weight * factor.reshape(*factor.shape, *[1] * (weight.dim() - 2))
        return made

    def outputs(self, unknowns: Tensor, done: float, inputs: tuple[Tensor, ...]) -> Tensor:
        results = tensors_of(functional_call(self.model, self.contents(unknowns, done), inputs))
        return torch.cat([result.flatten() for result in results.values() if result.is_floating_point()])

    def residual(self, inputs: tuple[Tensor, ...], unseen: tuple[Tensor, ...]) -> float:
        """The largest difference of the outputs, relative, that is left when the norm is gone."""
        if not self.sizes:
            return float("inf")
        unknowns = torch.zeros(sum(self.sizes), dtype=torch.float64)
        with torch.no_grad():
            wanted, wanted_unseen = (self.outputs(unknowns, 0.0, x) for x in (inputs, unseen))
        scale = wanted.abs().max()
        for step in range(1, STEPS + 1):
            done = step / STEPS
            for _ in range(3 if step < STEPS else 12):
                with torch.no_grad():
                    error = self.outputs(unknowns, done, inputs) - wanted
                size = float(error.abs().max() / scale)
                if size < SOLVED / 100:
                    break
                if not size < 1e3:
                    return float("inf")
                jacobian = jacfwd(self.outputs)(unknowns, done, inputs)
                unknowns = unknowns - _least_squares(jacobian, error)
            if size > 0.3:
                return size
        with torch.no_grad():
            return float((self.outputs(unknowns, 1.0, unseen) - wanted_unseen).abs().max() / scale)


def _least_squares(jacobian: Tensor, error: Tensor) -> Tensor:
    """The smallest step, since scales may be moved between layers freely. By the normal equations, regularised."""
    values, vectors = torch.linalg.eigh(jacobian.T @ jacobian)
    keep = values > 1e-13 * values[-1]
    inverse = torch.where(keep, 1 / values.clamp(min=1e-300), 0)
    return vectors @ (inverse * (vectors.T @ (jacobian.T @ error)))


@dataclass(frozen=True)
class Missed:
    """A norm that stays although it could go."""

    program: Program
    norm: str
    residual: float
    reasons: str


def missed(program: Program) -> tuple[int, int, list[Missed]]:
    """How many norms there are, how many stay, and which of these could go."""
    model = program.build()
    inputs = tuple(3 * x for x in program.arguments(0, batch=4))  # far enough for both sides of every relu
    plan = bnfuse.plan(model, inputs)
    fused = _with_biases(bnfuse.fuse(model, inputs, verify=False))
    found = []
    for decision in plan.kept:
        if "did not run" in str(decision.reasons[0]):
            continue
        residual = Search(fused, decision.norm).residual(inputs, tuple(5 * x for x in program.arguments(1, batch=6)))
        if residual < SOLVED:
            found.append(Missed(program, decision.norm, residual, "; ".join(map(str, decision.reasons))))
    return len(plan.decisions), len(plan.kept), found


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m fuzz.complete")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    norms = kept = could = 0
    for seed in range(options.seed, options.seed + options.count):
        met, stay, found = missed(small(seed))
        norms, kept, could = norms + met, kept + stay, could + len(found)
        for one in found:
            _say(
                f"\n=== seed {seed}: {one.norm} could go (residual {one.residual:.1e})\n{one.program}\n--- {one.reasons}\n"
            )
    _say(f"{options.count} networks, {norms} norms, {kept} kept, of which {could} could go")
    return 1 if could else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
