"""The adversary of several calls: a few networks of each kind, and proof that it finds a fusion that is blind to them."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import bnfuse
from fuzz import calls
from fuzz.calls_command import NOT_PROMISED, promised, shrunk, try_calls
from fuzz.check_calls import _beside_zeros, apart, called, check
from fuzz.kinds import KINDS
from fuzz.protocol import CalledProgram

NETWORKS = 5
MOST_TRIED = 80


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def drawn(kind: str, index: int) -> CalledProgram:
    return calls.draw(list(KINDS).index(kind) + index * len(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_random_networks_on_further_calls(kind: str) -> None:
    for index in range(NETWORKS):
        outcome = check(drawn(kind, index))
        wrong = outcome.failure and promised(outcome, drawn(kind, index))
        assert not wrong, f"{outcome.failure}\n{drawn(kind, index)}\n{outcome.detail}"
        assert outcome.failure or outcome.calls >= 2


@pytest.mark.parametrize("kind", NOT_PROMISED)
def test_a_kind_is_not_promised_only_where_the_plan_says_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = next(p for index in range(MOST_TRIED) if check(p := drawn(kind, index)).failure)
    assert not promised(check(program), program)
    monkeypatch.setattr("fuzz.calls_command.unseen", lambda program: "arguments")
    assert promised(check(program), program)


def test_a_seed_gives_the_same_network_and_calls() -> None:
    for seed in range(len(KINDS)):
        assert str(calls.draw(seed)) == str(calls.draw(seed))
        assert calls.draw(seed) == calls.draw(seed)
        assert calls.draw(seed).kind == list(KINDS)[seed]
    assert str(calls.draw(0)) != str(calls.draw(len(KINDS)))


class GivenCall:
    """What bnfuse.Call is to be."""

    def __init__(self, *arguments: Any, method: str = "forward", **options: Any) -> None:
        self.arguments, self.options, self.method = arguments, options, method


def test_calls_of_methods_are_given_where_the_library_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    program = next(p for p in (drawn("method_given", index) for index in range(30)) if ".apply" not in p.fusion)
    given: list[GivenCall] = []

    def fuse(model: nn.Module, example: Any, *, calls: list[GivenCall], **_: Any) -> nn.Module:
        given.extend(calls)
        return copy.deepcopy(model)

    monkeypatch.setattr(bnfuse, "Call", GivenCall, raising=False)
    monkeypatch.setattr(bnfuse, "fuse", fuse)
    assert not check(program).failure
    names = {call.method for sequence in program.further for call in sequence} - {""}
    assert {call.method for call in given} == names
    assert all(isinstance(call.arguments[0], torch.Tensor) and not call.options for call in given)


# Mutants: what the adversary must find ------------------------------------------------------------------------------


def folded_blindly(model: nn.Module, example: Any, **_: Any) -> nn.Module:
    """Every norm is folded into any layer that makes up for it on the one call that is given."""
    arguments, options = ((), example) if isinstance(example, dict) else (example, {})

    def run(net: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            given = copy.deepcopy((arguments, options))
            output: dict[str, Any] = called(copy.deepcopy(net), *given[0], **given[1])
        return {path: leaf for path, leaf in output.items() if path.startswith("output")}

    fused, wanted = copy.deepcopy(model), run(model)
    for name, norm in model.named_modules():
        if (
            isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.running_var is not None
            and norm.weight is not None
        ):
            for trial in _trials(fused, name):
                try:
                    got = run(trial)
                except RuntimeError:
                    continue
                if got.keys() == wanted.keys() and all(apart(got[path], wanted[path]) < 1e-9 for path in wanted):
                    fused = trial
                    break
    return fused


def _trials(net: nn.Module, name: str) -> Iterator[nn.Module]:
    """Copies without a norm, whose work each layer in turn has taken up: once, or as one of several terms."""
    for place, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and "weight" in layer._parameters:
            for terms in (1, 2, 3, 4):
                trial = copy.deepcopy(net)
                norm, layer = trial.get_submodule(name), trial.get_submodule(place)
                scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
                shift = (norm.bias - norm.running_mean * scale).detach()
                if len(layer.weight) != len(scale):
                    continue
                rows = (-1, *[1] * (layer.weight.dim() - 1))
                bias = 0 if layer.bias is None else layer.bias.detach()
                layer.weight = nn.Parameter(layer.weight.detach() * scale.view(rows))
                layer.bias = nn.Parameter(bias * scale + shift / terms)
                parent, _, leaf = name.rpartition(".")
                setattr(trial.get_submodule(parent), leaf, nn.Identity())
                yield trial


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnfuse, "fuse", folded_blindly)
    monkeypatch.setattr(
        bnfuse, "plan", lambda net, example, **_: SimpleNamespace(apply=lambda net: folded_blindly(net, example))
    )


def failing(kind: str, found: Callable[[str], bool]) -> CalledProgram:
    for index in range(MOST_TRIED):
        program = drawn(kind, index)
        if "by_hook" not in program.source and found(check(program).failure):  # copies of hooked weights fail
            return program
    pytest.fail("the adversary does not find it")


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"plain", "cached_table"}))
@pytest.mark.usefixtures("blind")
def test_blind_folding_is_found(kind: str) -> None:
    failing(kind, lambda failure: failure.startswith("wrong: the outputs differ"))


@pytest.mark.usefixtures("blind")
def test_blind_folding_is_right_where_all_calls_are_alike() -> None:
    removed = 0
    for index in range(NETWORKS * 3):
        if "by_hook" not in drawn("plain", index).source:
            outcome = check(drawn("plain", index))
            removed += outcome.removed
            assert not outcome.failure, outcome.detail
    assert removed > 3, "it folds nothing, so that it proves nothing"


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"forward_replaced"}))  # whose copies lean on the original
def test_a_fusion_that_does_nothing_is_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnfuse, "fuse", lambda net, example, **_: copy.deepcopy(net))
    monkeypatch.setattr(bnfuse, "plan", lambda *_, **__: SimpleNamespace(apply=copy.deepcopy))
    compared = 0
    for index in range(3):
        if "by_hook" not in drawn(kind, index).source:
            outcome = check(drawn(kind, index))
            assert not outcome.failure, outcome.detail
            compared += outcome.calls
    assert compared > 8


def leaves_inference_tensors(model: nn.Module, example: Any, **_: Any) -> nn.Module:
    with torch.inference_mode():
        copy.deepcopy(model)(*(example.values() if isinstance(example, dict) else example))
    return copy.deepcopy(model)


def runs_the_original(model: nn.Module, example: Any, **_: Any) -> nn.Module:
    with torch.no_grad():
        model(*(example.values() if isinstance(example, dict) else example))
    return copy.deepcopy(model)


def shares_parameters(model: nn.Module, example: Any, **_: Any) -> nn.Module:
    return copy.copy(model)


def raises_on_one_sample(model: nn.Module, example: Any, **_: Any) -> nn.Module:
    def refuse(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(arguments[0], torch.Tensor) and len(arguments[0]) == 1:
            raise ValueError("one sample")

    fused = copy.deepcopy(model)
    fused.register_forward_pre_hook(refuse)
    return fused


MUTANTS = {
    leaves_inference_tensors: ("cached_table", "wrong: the original does not train"),
    runs_the_original: ("counter", "touched"),
    shares_parameters: ("plain", "wrong: the outputs differ at the recorded call"),
    raises_on_one_sample: ("plain", "crash: the fused network raises ValueError"),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_found(mutant: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnfuse, "fuse", mutant)
    kind, wanted = MUTANTS[mutant]
    failing(kind, lambda failure: failure.startswith(wanted))


# What is printed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["number_of_frames", "optional_mask", "method_given", "counter", "kept_by_an_argument", "forward_replaced"]
)
@pytest.mark.usefixtures("blind")
def test_failures_shrink_to_programs_that_show_them(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = failing(kind, lambda failure: failure.startswith("wrong: the outputs differ"))
    small = shrunk(program, check(program).failure, seconds=5)
    assert len(small.steps) <= 6, str(small)
    assert len(small.further) <= 1
    dtype = torch.get_default_dtype()
    try:
        exec(str(small), {"__name__": "printed"})
    finally:
        torch.set_default_dtype(dtype)
    assert float(capsys.readouterr().out) > 1e-9, str(small)


def test_zeros_are_judged_by_what_is_usual() -> None:
    zeros, usual = torch.zeros(2, 3), torch.full((2, 3), 4.0)
    assert apart(zeros + 1e-7, zeros) == float("inf")
    assert _beside_zeros(zeros + 1e-7, zeros, usual) == pytest.approx(2.5e-8)
    for spoilt in (
        (zeros, zeros, None),
        (zeros[0], zeros, usual),
        (usual, usual, usual),
        (zeros, zeros, zeros),
        (0.0, 0.0, 1.0),
    ):
        assert _beside_zeros(*spoilt) == float("inf")


@pytest.mark.usefixtures("blind")
def test_the_table_counts_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert try_calls(range(4 * len(KINDS)), shrinking=0, kind="^(index|plain)$") == 1
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["kind"] == ["networks", "norms", "removed", "calls", "wrong", "crashed", "rounding"]
    assert rows["index"][0] == rows["plain"][0] == "4"
    assert int(rows["index"][4]) == int(rows["all"][4]) > 0
    assert rows["plain"][4] == "0"
