"""The adversary of restructuring: a few networks of each kind, and proof that it finds what is wrong."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import bnfuse
from bnfuse.changes import Source
from bnfuse.model import placing
from bnfuse.model.marks import ATTRIBUTE
from bnfuse.restructuring import bake
from fuzz import check_restructured, restructured
from fuzz.check_restructured import RestructuredOutcome, check, looks_at_modules
from fuzz.restructured import RestructuredProgram
from fuzz.restructured_command import shrunk, try_restructuring
from fuzz.restructured_kinds import KINDS
from fuzz.shrink import _parts_left_out

NETWORKS = range(2, 4)
STEPS = ("untie", "bake", "merge")
"""What kinds of networks begin with, and what steps some of them have to have."""

real = check_restructured.fuse_with_plan


@functools.cache
def drawn(kind: str, index: int) -> RestructuredProgram:
    return restructured.draw(list(KINDS).index(kind) + index * len(KINDS))


@functools.cache
def outcome(kind: str, index: int) -> RestructuredOutcome:
    return check(drawn(kind, index))


def first(kind: str, wanted: Callable[[RestructuredOutcome], object]) -> RestructuredProgram:
    """The first network of a kind of which something holds, and whose code does nothing but call modules."""
    numbers = (index for index in (*NETWORKS, *range(20)) if not looks_at_modules(drawn(kind, index)))
    return next(drawn(kind, index) for index in numbers if wanted(outcome(kind, index)))


@pytest.mark.parametrize("kind", KINDS)
def test_random_networks(kind: str) -> None:
    for index in NETWORKS:
        found = outcome(kind, index)
        assert not found.failure, f"{found.failure}\n{drawn(kind, index)}\n{found.detail}"
        assert found.refused or found.calls >= 2


@pytest.mark.parametrize("prefix", STEPS)
def test_the_networks_are_restructured(prefix: str) -> None:
    found = [outcome(kind, index) for kind in KINDS if kind.startswith(prefix) for index in NETWORKS]
    assert sum((one.steps for one in found), Counter())[prefix] >= 2
    gained = sum(one.removed - one.plainly for one in found)
    assert gained > 0 or (prefix == "merge" and not gained)


def test_a_seed_gives_the_same_network() -> None:
    for seed in range(0, len(KINDS), 3):
        assert str(restructured.draw(seed)) == str(restructured.draw(seed))
        assert restructured.draw(seed) == restructured.draw(seed)
        assert restructured.draw(seed).kind == list(KINDS)[seed]
    assert str(restructured.draw(0)) != str(restructured.draw(len(KINDS)))


def test_a_printed_program_shows_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    dtype = torch.get_default_dtype()
    try:
        exec(str(drawn("untie_twice", 2)), {"__name__": "printed"})
    finally:
        torch.set_default_dtype(dtype)
    assert float(capsys.readouterr().out.splitlines()[-1]) < 1e-9


# Mutants: what the adversary must find ------------------------------------------------------------------------------


def is_off(fused: nn.Module, original: nn.Module) -> None:
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.001)


def touches_the_original(fused: nn.Module, original: nn.Module) -> None:
    original.eval().train(not original.training)


def leans_on_the_original(fused: nn.Module, original: nn.Module) -> None:
    for name, parameter in fused.named_parameters():
        path, _, place = name.rpartition(".")
        holder = dict(original.named_modules()).get(path)
        if holder is not None and holder._parameters.get(place) is not None:
            holder._parameters[place].data = parameter.data


def works_more(fused: nn.Module, original: nn.Module) -> None:
    fused.register_forward_hook(lambda module, given, made: (torch.eye(2) @ torch.eye(2), None)[1])


def is_not_marked(fused: nn.Module, original: nn.Module) -> None:
    for module in fused.modules():
        module.__dict__.pop(ATTRIBUTE, None)


def fits_one_batch(fused: nn.Module, original: nn.Module) -> None:
    def refuse(module: nn.Module, given: tuple[Any, ...]) -> None:
        if len(given[0]) != batch[0]:
            raise ValueError("another batch")

    batch: list[int] = []
    fused.register_forward_pre_hook(lambda module, given: batch.append(len(given[0])) if not batch else None)
    fused.register_forward_pre_hook(refuse)


MUTANTS: dict[Callable[[nn.Module, nn.Module], None], str] = {
    is_off: "wrong: the outputs differ at the recorded call",
    touches_the_original: "touched: fuse changes",
    leans_on_the_original: "touched: fuse changes",
    works_more: "wrong: the multiply-adds rise",
    is_not_marked: "crash: load raises CheckpointError",
    fits_one_batch: "crash: the fused network raises ValueError",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_found(mutant: Callable[[nn.Module, nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse_with_plan(model: nn.Module, *arguments: Any, **options: Any) -> tuple[nn.Module, bnfuse.Plan]:
        fused, made = real(model, *arguments, **options)
        mutant(fused, model)
        return fused, made

    monkeypatch.setattr(check_restructured, "fuse_with_plan", fuse_with_plan)
    monkeypatch.setattr(check_restructured, "APPLIED_EVERY", 10**9)
    found = {check(drawn(kind, index)).failure for kind in ("untie_twice", "bake_layers") for index in NETWORKS}
    assert any(failure.startswith(MUTANTS[mutant]) for failure in found), found


def test_a_restructuring_that_keeps_norms_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program = first("merge_branches", lambda found: found.plainly)

    def fuse_with_plan(model: nn.Module, *arguments: Any, **options: Any) -> tuple[nn.Module, bnfuse.Plan]:
        return real(model, *arguments, **options, keep="*" if options.get("restructure") else ())

    monkeypatch.setattr(check_restructured, "fuse_with_plan", fuse_with_plan)
    monkeypatch.setattr(check_restructured, "APPLIED_EVERY", 10**9)
    monkeypatch.setattr(check_restructured, "IN_PLACE_EVERY", 10**9)
    assert not check(program).failure, "verification took them out, the network is told"
    monkeypatch.setattr(check_restructured, "_was_corrected", lambda *_: False)
    assert check(program).failure.startswith("wrong: more norms stay with restructuring")


@pytest.mark.parametrize("prefix", STEPS)
def test_a_wrong_step_is_found_that_verification_drops(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"untie": "untie_twice", "bake": "bake_layers", "merge": "merge_branches"}
    program = first(kinds[prefix], lambda found: {*found.steps} == {prefix})
    right = placing._parameter
    if prefix == "bake":
        monkeypatch.setattr(bake, "Source", lambda like, exact: Source(like, 1.001 * exact))
    else:
        monkeypatch.setattr(placing, "_parameter", lambda *made: nn.Parameter(1.001 * right(*made)))
    assert check(program).failure == f"wrong: a step of kind {prefix} fails, though no code looks at a module"


def test_what_cannot_be_fused_plainly_is_trained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding alone may move more without the steps than with them."""
    program = first("untie_twice", lambda found: found.steps["untie"])

    def fuse_with_plan(model: nn.Module, *arguments: Any, **options: Any) -> tuple[nn.Module, bnfuse.Plan]:
        if not options.get("restructure"):
            raise bnfuse.VerificationError
        return real(model, *arguments, **options)

    monkeypatch.setattr(check_restructured, "TRAINED_EVERY", 1)
    monkeypatch.setattr(check_restructured, "fuse_with_plan", fuse_with_plan)
    assert not check(program).failure


def test_failures_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    program = first("untie_twice", lambda found: found.steps["untie"])

    def fuse_with_plan(model: nn.Module, *arguments: Any, **options: Any) -> tuple[nn.Module, bnfuse.Plan]:
        fused, made = real(model, *arguments, **options)
        if any(step.kind == "untie" for step in made.steps):
            is_off(fused, model)
        return fused, made

    monkeypatch.setattr(check_restructured, "fuse_with_plan", fuse_with_plan)
    monkeypatch.setattr(check_restructured, "APPLIED_EVERY", 10**9)
    failure = check(program).failure
    assert failure.startswith("wrong: the outputs differ")
    small = shrunk(program, failure, seconds=4)
    assert len(small.source) < len(program.source)
    assert len(small.further) < len(program.further)
    assert check(small).failure == failure


def test_what_is_inside_a_layer_shrinks() -> None:
    found = {*_parts_left_out("module('x', 'y = m.c(x); m.n(y) + x', c=weight_norm(nn.Linear(4, 4)), n=nn.Identity())")}
    assert "module('x', 'y = m.c(x); m.n(y)', c=weight_norm(nn.Linear(4, 4)), n=nn.Identity())" in found
    assert "module('x', 'y = x; m.n(y) + x', c=weight_norm(nn.Linear(4, 4)), n=nn.Identity())" in found
    assert "module('x', 'y = m.c(x); m.n(y) + x', c=nn.Linear(4, 4), n=nn.Identity())" in found


def test_the_table_counts_by_kind(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.restructured_command.check", lambda program: outcome(program.kind, 2))
    assert try_restructuring(range(len(KINDS)), shrinking=0, kind="^(untie_twice|bake_layers)$") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["kind"][:4] == ["networks", "norms", "plainly", "removed"]
    assert rows["untie_twice"][0] == rows["bake_layers"][0] == "1"
    assert rows["all"][0] == "2"
    assert int(rows["all"][1]) == outcome("untie_twice", 2).norms + outcome("bake_layers", 2).norms
