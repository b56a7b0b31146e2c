"""Random networks with shared layers and computed weights, and proof that mistakes in steps are found in them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bnfuse.changes import Source
from bnfuse.model import placing
from bnfuse.restructuring import bake, untie
from fuzz.check import bare_algebra, check
from fuzz.generate import draw

KINDS = ("bake", "untie")
NETWORKS = range(20)


def test_random_networks() -> None:
    steps = 0
    for seed in NETWORKS:
        program = draw(seed, structures=True)
        outcome = check(program, thorough=seed % 8 == 0, restructure=KINDS)
        assert not outcome.failure, f"seed {seed}: {outcome.failure}\n{program}\n{outcome.detail}"
        steps += outcome.steps
    assert steps > len(NETWORKS) / 4, "networks without steps test nothing"


def test_random_networks_with_branches() -> None:
    steps = 0
    for seed in NETWORKS:
        program = draw(seed, branches=True)
        outcome = check(program, thorough=seed % 8 == 0, restructure=("merge",))
        assert not outcome.failure, f"seed {seed}: {outcome.failure}\n{program}\n{outcome.detail}"
        steps += outcome.steps
    assert steps > len(NETWORKS) / 4, "networks without steps test nothing"


def raw_weights_read_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bake._Search, "_other_reader", lambda self, calls, prefixes: None)


def copies_without_contents(patch: pytest.MonkeyPatch) -> None:
    original = placing._parameter

    def parameter(shape: Any, source: Source | None, like: Any, name: str) -> Any:
        return original(shape, None if source is not None and source.exact is None else source, like, name)

    patch.setattr(placing, "_parameter", parameter)


def readers_ignored(patch: pytest.MonkeyPatch) -> None:
    original = untie._Search._refusal

    def refusal(self: Any, layer: Any, side: Any) -> Any:
        found = original(self, layer, side)
        norms = all(value in side.sites for value in side.values(self._calls[id(layer)]))
        return None if norms and untie.settings_of(layer) else found

    patch.setattr(untie._Search, "_refusal", refusal)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], range] = {
    raw_weights_read_elsewhere: range(75, 95),
    copies_without_contents: range(20),
    readers_ignored: range(33, 53),
}
"""Mutants, with the seeds that are tried."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mistakes_are_found(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_algebra():
        for seed in MUTANTS[mutant]:
            program = draw(seed, structures=True)
            with monkeypatch.context() as patch:
                mutant(patch)
                failure = check(program, restructure=KINDS).failure
            if failure and not check(program, restructure=KINDS).failure:
                return
    pytest.fail("the adversary does not find it")
