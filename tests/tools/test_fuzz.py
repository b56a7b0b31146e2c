"""The adversary: a few hundred random networks, and proof that it finds what is wrong when something is."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bnfuse import reasons, transaction, units
from bnfuse.analysis import norms
from bnfuse.capture import module_calls
from bnfuse.graph import graph, same_run
from bnfuse.model import sandbox
from bnfuse.rules import activation, layers, products, sums
from bnfuse.rules import indexing as places
from bnfuse.rules import norms as norm_rules
from bnfuse.rules import reductions as pooling
from bnfuse.solve import parallel_layer as beside
from bnfuse.solve import propagation as trial
from bnfuse.solve import search as solve
from fuzz.check import bare_algebra, check
from fuzz.command import main
from fuzz.generate import draw
from fuzz.program import Program
from fuzz.shrink import shrink

NETWORKS = 240
SEEDS_OF_MUTANTS = range(6100, 6500)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def drawn(seed: int) -> Program:
    return draw(seed)


@pytest.mark.parametrize("part", range(4))
def test_random_networks(part: int) -> None:
    removed = met = 0
    for seed in range(part, NETWORKS, 4):
        program = drawn(seed)
        outcome = check(program, thorough=seed % 6 == 0)
        assert not outcome.failure, f"seed {seed}: {outcome.failure}\n{program}\n{outcome.detail}"
        met, removed = met + outcome.norms, removed + outcome.removed
    assert removed > 0.35 * met, "an adversary whose norms all stay tests nothing"


def test_a_seed_gives_the_same_network() -> None:
    assert str(draw(3)) == str(draw(3))
    assert str(draw(3)) != str(draw(4))


def test_a_printed_program_runs() -> None:
    dtype = torch.get_default_dtype()
    names: dict[str, Any] = {}
    try:
        exec(str(drawn(0)), names)
        with torch.no_grad():
            names["net"](*(names[argument.name] for argument in drawn(0).inputs))
    finally:
        torch.set_default_dtype(dtype)
    printed, built = names["net"].state_dict(), drawn(0).build().state_dict()
    assert all(torch.equal(printed[name], built[name]) for name in built)


# Mutants: what the adversary must find ------------------------------------------------------------------------------


def groups_mixed_up(patch: pytest.MonkeyPatch) -> None:
    def by_group(layer: Any, vector: torch.Tensor, rows: int) -> torch.Tensor:
        return vector.reshape(layer.groups, -1)[:1]

    patch.setattr(layers, "_by_group", by_group)


def negative_scale_through_relu(patch: pytest.MonkeyPatch) -> None:
    original = activation.link
    patch.setattr(
        activation, "pass_positive_scale", lambda node, trial, x, y: original(trial, x, y, lambda u: u, lambda u: u)
    )


def zero_padding_ignored(patch: pytest.MonkeyPatch) -> None:
    original = layers.layer_of

    def uniform(node: Any) -> Any:
        layer = original(node)
        return layer and dataclasses.replace(layer, uniform=layer.uniform or not layer.transposed)

    patch.setattr(layers, "layer_of", uniform)


def eps_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = norm_rules.parts

    def parts(node: Any, trial: Any) -> Any:
        weight, _, mean, bias = original(node, trial)
        return weight, trial.content(node.bound["running_var"]).sqrt(), mean, bias

    patch.setattr(norm_rules, "parts", parts)


def transposed_weight_taken_for_a_plain_one(patch: pytest.MonkeyPatch) -> None:
    original = layers.layer_of

    def plain(node: Any) -> Any:
        layer = original(node)
        square = layer and node.operator.startswith("conv_transpose") and layer.channels_in == layer.channels_out
        return dataclasses.replace(layer, transposed=False) if square else layer

    patch.setattr(layers, "layer_of", plain)


def shared_parameters_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trial, "check_edits", lambda network, edits: None)


def forget_cause(patch: pytest.MonkeyPatch, forgotten: reasons.Cause) -> None:
    original = graph.Value.pin

    def pin(self: graph.Value, cause: reasons.Cause, **fields: Any) -> None:
        if cause is not forgotten:
            original(self, cause, **fields)

    patch.setattr(graph.Value, "pin", pin)


def outputs_not_pinned(patch: pytest.MonkeyPatch) -> None:
    forget_cause(patch, reasons.IS_OUTPUT)


def views_not_pinned(patch: pytest.MonkeyPatch) -> None:
    forget_cause(patch, reasons.WRITTEN_THROUGH_VIEW)


def hooks_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module_calls, "has_own_hooks", lambda module: False)
    patch.setattr(norms, "has_hooks", lambda module: False)
    patch.setattr(transaction, "_HOOKS", ())  # a hook that is on what stands in the place of its norm sees the same


def numbers_of_the_shape_trusted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trial.Trial, "assume", lambda self, node: None)
    patch.setattr(
        same_run.Counterparts, "certain", property(lambda self: True, lambda self, value: None), raising=False
    )


def memory_not_watched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve, "_check_memory", lambda network, norm: None)


def run_leaves_traces(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sandbox.SavedState, "restore", lambda self: None)


def padded_zeros_counted(patch: pytest.MonkeyPatch) -> None:
    original = pooling._pool
    patch.setattr(pooling, "_pool", lambda *args, **options: original(*args, **{**options, "shift": True}))


def sign_of_a_sum_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = sums._Sum.__init__

    def positive(self: Any, node: Any, trial: Any, operands: Any, factors: Any, z: Any) -> None:
        original(self, node, trial, operands, tuple(map(abs, factors)), z)

    patch.setattr(sums._Sum, "__init__", positive)


def shift_through_a_number_unscaled(patch: pytest.MonkeyPatch) -> None:
    original = products.Unit

    class Unscaled(original):  # type: ignore[misc, valid-type]
        pass

    patch.setattr(products, "_times_number", lambda node, trial, x, number, z: products.link(trial, x, z, _same, _same))


def unequal_units_taken_for_equal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(units.Unit, "same_as", lambda self, other: True)


def middle_tap_taken_for_its_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(beside, "_taps", lambda sibling, trial: tuple(size // 2 for size in sibling.layer.w.shape[2:]))


def layer_of_another_tensor_taken_for_one_beside(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(beside, "_origin", lambda value, removed: None)


def factors_of_a_norm_beside_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = beside._terms
    patch.setattr(beside, "_terms", lambda node: (terms := original(node)) and dict.fromkeys(terms, 1.0))


def places_of_a_tensor_trusted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(places, "_check_uniform", lambda node, trial, unit, axes: None)


def shift_added_up_as_if_once(patch: pytest.MonkeyPatch) -> None:
    def add(node: Any, trial: Any, x: Any, y: Any, source: Any) -> None:
        whole = next(unit for value in (y, source, x) if (unit := trial.unit(value)) is not None)
        for value in (y, source):
            trial.demand(value, whole)
        trial.demand(x, whole.scale_only())

    patch.setattr(places, "_add", add)


def _same(unit: Any) -> Any:
    return unit


def parts_of_parameters_trusted(patch: pytest.MonkeyPatch) -> None:
    edit = trial.Trial.edit

    def no_identity(self: Any, node: Any, value: Any, unit: Any) -> None:
        if not unit.is_identity:
            edit(self, node, value, unit)

    patch.setattr(trial.Trial, "edit", no_identity)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    groups_mixed_up: "groups=", negative_scale_through_relu: "", zero_padding_ignored: "padding", eps_forgotten: "",
    transposed_weight_taken_for_a_plain_one: "ConvTranspose", shared_parameters_ignored: "", outputs_not_pinned: "",
    views_not_pinned: r"[a-z]_\(|\+= |\] = ", hooks_ignored: "hook", numbers_of_the_shape_trusted: "shape|len|numel",
    memory_not_watched: r"inplace|Act|[a-z]_\(", run_leaves_traces: "", padded_zeros_counted: "avg_pool|AvgPool",
    sign_of_a_sum_forgotten: "sub| - ", shift_through_a_number_unscaled: "", unequal_units_taken_for_equal: "",
    middle_tap_taken_for_its_own: r"pad\(|, 2, padding|, 4, padding",
    layer_of_another_tensor_taken_for_one_beside: r"\+", factors_of_a_norm_beside_forgotten: r"sub| - |alpha",
    parts_of_parameters_trusted: r"m\.[wp]\d+(\[|\.chunk)",
    places_of_a_tensor_trusted: "gather|scatter|index_", shift_added_up_as_if_once: "scatter_add|index_add",
}  # fmt: skip
"""Mutants, with what a program must mention to be worth a try (which only saves time)."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_found(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in SEEDS_OF_MUTANTS:
        if not re.search(MUTANTS[mutant], drawn(seed).source):
            continue
        with bare_algebra():
            with monkeypatch.context() as patch:
                mutant(patch)
                failure = check(drawn(seed)).failure
            if failure and not check(drawn(seed)).failure:
                return
    pytest.fail("the adversary does not find it")


def test_failures_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    eps_forgotten(monkeypatch)
    program = next(drawn(seed) for seed in range(50) if check(drawn(seed)).failure)
    small = shrink(program, lambda candidate: bool(check(candidate).failure), seconds=5)
    assert check(small).failure
    assert len(small.steps) <= 4, str(small)


def test_what_crossed_which_rule(capsys: pytest.CaptureFixture[str]) -> None:
    accept = trial.Trial.accept
    with warnings.catch_warnings():  # the command ignores them from then on
        assert main(["--coverage", "--count", "3"]) == 0
    said = capsys.readouterr().out
    crossed = re.findall(r"^  (\w+): (\d+), \d+$", said, re.M)
    assert any(int(times) for operator, times in crossed if operator == "conv2d")
    assert said.splitlines()[-1].startswith("3 networks, ")
    assert trial.Trial.accept is accept
