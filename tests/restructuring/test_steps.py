"""Steps as a part of plans and of saved models: what is printed, applied, written, read and refused."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from restructuring.test_bake import Masked, both_parametrized, conv
from restructuring.test_untie import IMAGE, Head, Net, SharedModules, norm, norms, tied
from support import assert_untouched, fused_and_checked, prepared, snapshot
from torch import Tensor, nn

import bnfuse
from bnfuse.changes import Former, NewLayer, Placement, Row, Source, Step
from bnfuse.model.marks import marked
from bnfuse.planner.steps import former_name
from bnfuse.restructuring.kinds import checked_kinds
from bnfuse.tools.cli import main
from bnfuse.tools.zoo import randomise_
from bnfuse.transaction import Changes, rewrite


class Both(nn.Module):
    """A parametrised layer, a masked one and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.m, self.a, self.b = both_parametrized(), Masked(4, 4, 3, padding=1), norm(), norm()
        self.head = Head()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.b(self.m(self.a(self.p(x)).sin())).sin())


def make_tied() -> nn.Module:
    return tied(2, uses=2)


MODELS: list[Callable[[], nn.Module]] = [Both, SharedModules, make_tied]


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_to_the_bit(make: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    fused = bnfuse.fuse(prepared(make()).to(dtype), IMAGE.to(dtype), restructure=True)
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    fresh = bnfuse.load(make(), tmp_path / "fused.safetensors")
    assert_same(fresh, fused, IMAGE.to(dtype))
    assert bnfuse.structure(fresh) == bnfuse.structure(fused)
    if make is not make_tied:  # whose forward is a function of another module
        meta = torch.device("meta")
        with meta:
            shell = make()
        filled = [module for module in shell.modules() if isinstance(module, Masked)]
        for module in filled:
            module.mask = torch.empty(module.weight.shape, device=meta)
        assert_same(bnfuse.load(shell, tmp_path / "fused.safetensors"), fused, IMAGE.to(dtype))


def assert_same(one: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    found, wanted = (list(model(*inputs)) for model in (one, other))
    assert all(map(torch.equal, found, wanted))


def test_a_part_of_a_larger_model_and_a_part_of_that() -> None:
    fused = bnfuse.fuse(prepared(Both()), IMAGE, restructure=True)
    whole = nn.ModuleDict({"net": fused, "other": nn.Linear(2, 2)}).double()
    fresh = nn.ModuleDict({"net": Both(), "other": nn.Linear(2, 2)}).double()
    said = json.loads(json.dumps(bnfuse.structure(whole).to_dict()))
    bnfuse.restructure(fresh, said).load_state_dict(whole.state_dict())
    assert_same(fresh["net"].eval(), fused, IMAGE)
    head = bnfuse.restructure(Head().double(), bnfuse.structure(fused.head)).eval()
    head.load_state_dict(fused.head.state_dict())
    assert_same(head, fused.head, IMAGE)


def test_restructuring_what_is_restructured() -> None:
    fused = bnfuse.fuse(prepared(Head()), IMAGE, restructure=True)
    said = bnfuse.structure(fused)
    before = snapshot(fused)
    bnfuse.restructure(fused, said)
    assert_untouched(fused, before)
    with pytest.raises(bnfuse.CheckpointError, match="fused already"):
        bnfuse.restructure(fused, bnfuse.structure(bnfuse.fuse(prepared(Head()), IMAGE)))


def test_another_model_is_refused_and_left_as_it_was() -> None:
    said = bnfuse.structure(bnfuse.fuse(prepared(Head()), IMAGE, restructure=True))
    for other in (Head(depth=3), Head(depth=1), Head(count=2)):
        before = snapshot(other)
        with pytest.raises(bnfuse.CheckpointError):
            bnfuse.restructure(other, said)
        assert_untouched(other, before)


class Noting(pickle.Unpickler):
    """Notes where what it reads is defined."""

    seen: ClassVar[set[str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.seen.add(module.partition(".")[0])
        return super().find_class(module, name)


def test_a_model_that_is_pickled_whole_needs_no_bnfuse() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), SharedModules())
    fused = bnfuse.fuse(prepared(net), IMAGE, restructure=True)
    loaded = Noting(io.BytesIO(pickle.dumps(fused))).load()
    assert_same(loaded, fused, IMAGE)
    assert type(loaded[0]) is nn.Conv2d
    assert "torch" in Noting.seen
    assert "bnfuse" not in Noting.seen


GOOD = bnfuse.structure(bnfuse.fuse(prepared(Head(1)), IMAGE, restructure="untie")).to_dict()
PLACE = GOOD["placed"][0]


def layer(kind: str, **settings: Any) -> dict[str, Any]:
    return {"layer": kind, "settings": settings}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"names": []}, "names is empty"),
        ({"names": ["nowhere"]}, "no module nowhere"),
        ({"names": [""]}, "that can be replaced"),
        ({"names": ["convs.0.0", "convs.0.1"]}, "are not one"),
        ({"module": {"former": ""}}, "nothing stands in the place"),
        ({"module": layer("Module")}, "no layer that is made anew"),
        ({"module": layer("Linear", in_features=4)}, "cannot be made"),
        ({"module": layer("Linear", in_features=10**6, out_features=10**6)}, "many more parameters"),
        ({"module": layer("Linear", in_features=4, out_features=4, device="cuda")}, "cannot be made"),
        ({"module": layer("Conv2d", in_channels=[{}])}, "a setting is a dict"),
        ({"module": {"row": [["a", {"former": "no.where"}]]}}, "another model"),
        ({"module": {"row": [["a"]]}}, "a row is no list"),
        ({"module": {"row": [["a.b", layer("Identity")]]}}, "row cannot be made"),
        ({"module": 3}, "a module is a int"),
    ],
)
def test_damaged_places_are_refused(place: dict[str, Any], said: str) -> None:
    model = Head(1)
    before = snapshot(model)
    with pytest.raises(bnfuse.CheckpointError) as error:
        bnfuse.restructure(model, GOOD | {"placed": [PLACE | place], "removed": [], "created": [], "modules": {}})
    assert said in str(error.value)
    assert_untouched(model, before)


def test_damaged_tensors_are_refused() -> None:
    model = Head(1)
    for own, said in (
        ({"names": ["predict.weight"], "shape": [10**12]}, "many more parameters"),
        ({"names": ["predict.weight", "convs.0.1.weight"], "shape": [1]}, "not one tensor"),
        ({"names": ["none.weight"], "shape": [1]}, "no module none"),
    ):
        before = snapshot(model)
        with pytest.raises(bnfuse.CheckpointError, match=said):
            bnfuse.restructure(model, GOOD | {"placed": [], "removed": [], "created": [], "modules": {}, "own": [own]})
        assert_untouched(model, before)


class Kept(SharedModules, PyTorchModelHubMixin):
    """A model that a library keeps in a folder."""


class KeptInside(nn.Module, PyTorchModelHubMixin):
    def __init__(self) -> None:
        super().__init__()
        self.c = Masked(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x)


def test_a_folder_of_a_library_that_is_lenient_about_names(tmp_path: Path) -> None:
    fused = bnfuse.fuse(prepared(Kept()).float(), IMAGE.float(), restructure=True)
    fused.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Kept.from_pretrained(tmp_path)
    assert_same(bnfuse.from_pretrained(Kept, tmp_path), fused, IMAGE.float())
    plan = bnfuse.plan(prepared(KeptInside()), IMAGE, restructure=True)
    assert not plan.steps
    assert "without a word" in str(plan)


# Plans ----------------------------------------------------------------------------------------------------------------


def test_what_a_plan_prints() -> None:
    net = Net(
        lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin(), m.d(m.e(x)).sin(), m.e(x)),
        c=Masked(4, 4, 3, bias=False), a=norm(), b=norm(), e=conv(), d=norm(),
    )  # fmt: skip
    plan = bnfuse.plan(prepared(net), IMAGE, restructure=True)
    assert (
        str(plan)
        == """\
Net: 3 batch norms, 2 fused, 1 kept
norm  kind         channels  fused into
----  -----------  --------  ----------
a     BatchNorm2d         4  a.layer
b     BatchNorm2d         4  b.layer
bake c: the weight that Masked computes, in a Conv2d (no more parameters)
untie c: 2 copies in the places of the norms behind it (+144 parameters)
no untie of e: not every use of it has a norm of its own right behind it that
    can go: see an output of the model
kept: d
  backward: conv2d in e (Conv2d): e.weight is used more than once, and not every
    use asks for the same edit: see conv2d in e (Conv2d)
  forward: sin in Net: no scale or shift passes through it"""
    )
    said = json.loads(json.dumps(plan.to_dict()))
    assert [(step["kind"], step["modules"], step["parameters"]) for step in said["steps"]] == [
        ("bake", ["c"], 0),
        ("untie", ["a", "b", "c"], 144),
    ]
    assert [(one["kind"], one["subject"], one["reason"]["code"]) for one in said["unchanged"]] == [
        ("untie", "e", "use-without-norm")
    ]
    assert bnfuse.plan(prepared(net), IMAGE).to_dict()["steps"] == []


def test_a_plan_is_for_the_model_that_it_was_made_for() -> None:
    model = prepared(Both())
    plan = bnfuse.plan(model, IMAGE, restructure=True)
    before = snapshot(model)
    assert_same(plan.apply(model), bnfuse.fuse(model, IMAGE, restructure=True), IMAGE)
    assert_untouched(model, before)
    with torch.no_grad():
        model.p.parametrizations.weight.original0.mul_(2)
    with pytest.raises(bnfuse.FusionError, match="has changed"):
        plan.apply(model)


@pytest.mark.parametrize("given", ["unties", ["bake", "fold"], 3, {"bake": 1, "x": 2}])
def test_kinds_that_are_unknown(given: Any) -> None:
    for verb in (bnfuse.plan, bnfuse.fuse):
        with pytest.raises(bnfuse.InputError, match="'bake', 'untie', 'merge'"):
            verb(Head(), IMAGE.float(), restructure=given)


def test_a_typo_gets_a_hint() -> None:
    with pytest.raises(bnfuse.InputError, match="Did you mean 'untie'"):
        bnfuse.plan(Head(), IMAGE.float(), restructure="unties")


def test_a_graph_has_no_modules_to_change() -> None:
    graph = torch.export.export(nn.BatchNorm1d(4).eval(), (torch.ones(2, 4),))
    for verb in (bnfuse.plan, bnfuse.fuse):
        with pytest.raises(bnfuse.InputError, match="fuse the model that it was made of"):
            verb(graph, restructure="untie")


def test_without_norms_a_weight_is_still_baked() -> None:
    model = prepared(nn.Sequential(Masked(4, 4, 3), nn.ReLU()))
    fused = bnfuse.fuse(model, IMAGE, restructure="bake")  # and no warning that nothing was done
    assert type(fused[0]) is nn.Conv2d
    assert torch.allclose(fused(IMAGE), model(IMAGE), rtol=1e-12)


def test_without_verification_and_within_a_budget() -> None:
    model = prepared(SharedModules()).float()
    x = IMAGE.float()
    fused = bnfuse.fuse(model, x, restructure=True, verify=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    kept = bnfuse.fuse(model, x, restructure=True, options=bnfuse.Options(budget=0.0))
    assert any(isinstance(module, nn.BatchNorm2d) for module in kept.modules())
    for one, other in zip(kept(x), model(x), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_further_calls_count() -> None:
    """A method that runs the shared layer alone."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = conv(), norms(2)

        def forward(self, x: Tensor) -> Any:
            return [n(self.c(y)).sin() for n, y in zip(self.n, (x, -x), strict=True)]

        def embed(self, x: Tensor) -> Tensor:
            return self.c(x).cos()

    model = prepared(Model())
    assert len(bnfuse.plan(model, IMAGE, restructure="untie").steps) == 1
    plan = bnfuse.plan(model, IMAGE, calls=[bnfuse.Call(IMAGE, method="embed")], restructure="untie")
    assert not plan.steps
    assert "see cos in Model" in str(plan.unchanged[0])


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "heads.py").write_text(
        "from restructuring.test_untie import SharedModules\nfrom support import prepared\n"
        "make = lambda: prepared(SharedModules()).float()\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["heads.py:make", "--input", "1x4x8x8", "--restructure", "all"]
    assert main(["plan", *arguments]) == 0
    assert "untie levels.0.conv: 4 copies" in capsys.readouterr().out
    assert main(["plan", *arguments, "--all"]) == 0
    assert "untie levels.0.conv: 4 copies" in capsys.readouterr().out
    assert main(["fuse", *arguments, "--json", "-o", "fused.safetensors"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["kept"] == 0
    assert [step["kind"] for step in said["plan"]["steps"]] == ["untie"]
    assert main(["fuse", "heads.py:make", "--input", "1x4x8x8", "--restructure", "melt"]) == 2
    assert "--restructure melt" in capsys.readouterr().err


# The parts ------------------------------------------------------------------------------------------------------------


def step(*placements: Placement) -> Step:
    return Step(kind="merge", subject="x", what="x", placements=placements)


def test_what_is_placed_twice_is_marked_by_what_stood_there_first() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.BatchNorm2d(4))

    model = make().eval()
    expected = model(IMAGE.float())
    identity = NewLayer("Identity")
    first = step(Placement(("0",), Row((("a", identity), ("b", Former()), ("c", identity)))))
    second = step(Placement(("0",), Row((("x", Former("b.0")), ("y", Former("b.1")), ("z", Former("c"))))))
    undo = [rewrite(Changes(steps=(one,)), model) for one in (first, second)]
    assert torch.equal(model(IMAGE.float()), expected)
    (said,) = marked(model)["placed"]
    assert (said["names"], said["kind"]) == (["0"], "Sequential")
    assert said["module"] == {
        "row": [["x", {"former": "0"}], ["y", {"former": "1"}], ["z", {"layer": "Identity", "settings": {}}]]
    }
    fresh = bnfuse.restructure(make(), bnfuse.structure(model)).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IMAGE.float()), expected)
    assert former_name("0.y", [first, second]) == "0.1"
    assert former_name("1", [first, second]) == "1"
    while undo:
        undo.pop()()
    assert marked(model)["modules"] == {}
    assert "placed" not in marked(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in make().named_modules()]


def test_a_step_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    conv1x1 = {"in_channels": 4, "out_channels": 4, "kernel_size": 1}
    for placement in (
        Placement(("2",), NewLayer("Identity")),
        Placement(("",), NewLayer("Identity")),
        Placement(("0",), NewLayer("Conv2d", conv1x1, {"weight": Source("0.weight", torch.zeros(2, 2))})),
        Placement(("0",), NewLayer("Conv2d", conv1x1, {"weight": Source("7.weight")})),
        Placement(("0",), NewLayer("Conv2d", conv1x1, {"gain": Source("0.weight")})),
        Placement(
            ("0",),
            NewLayer(
                "Conv2d", conv1x1, {"weight": Source("0.weight", torch.full((4, 4, 1, 1), 1e300, dtype=torch.float64))}
            ),
        ),
    ):
        before = snapshot(model)
        with pytest.raises(bnfuse.FusionError):
            rewrite(Changes(steps=(step(Placement(("1",), NewLayer("Identity"))), step(placement))), model)
        assert_untouched(model, before)


class NormBehindASum(nn.Module):
    """The branches are one layer, beside which a zero is added; the norm behind goes all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.n(self.a(x) + self.b(x)))


def test_a_norm_goes_behind_branches_that_are_merged_in_code_that_stays() -> None:
    model = prepared(NormBehindASum())
    plan, fused = fused_and_checked(model, torch.randn(2, 4, 8, 8, dtype=torch.float64), restructure="merge")
    assert [step.kind for step in plan.steps] == ["merge"]
    assert type(fused.n) is nn.Identity


def test_all_kinds_have_a_word() -> None:
    assert (
        checked_kinds("all")
        == checked_kinds(True)
        == checked_kinds(["untie", "all"])
        == (*("bake", "untie", "merge", "clip"),)
    )
    with pytest.raises(bnfuse.InputError, match="melt"):
        checked_kinds(["all", "melt"])


class OneSize(nn.Module):
    """Returns at another size what is inside at the first."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.a, self.b = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)), nn.Conv2d(2, 2, 1)
        self.norm, self.branches = nn.BatchNorm2d(2), branches

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x) if self.branches else self.a(x)
        if x.shape[-1] != 4:
            return y
        return y + self.norm(x) if self.branches else self.norm(y)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("kinds", ["bake", "merge", True])
def test_what_another_call_returns_stays_behind_a_step(branches: bool, kinds: Any) -> None:
    model = randomise_(OneSize(branches)).double().eval()
    fused = bnfuse.fuse(model, torch.randn(2, 2, 4, 4, dtype=torch.float64), restructure=kinds)
    with torch.no_grad():
        for size in (4, 5, 8, 3):
            x = torch.randn(2, 2, size, size, dtype=torch.float64)
            assert (model(x) - fused(x)).abs().max() < 1e-12, size


class SumOfBranches(NormBehindASum):
    """Python's own ``sum`` begins with the number 0, to which two zeros are added."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.n(self.a(x) + sum([self.b(x), self.c(x)])))


def test_a_norm_goes_behind_zeros_that_python_adds_up() -> None:
    model = prepared(SumOfBranches())
    plan, fused = fused_and_checked(model, torch.randn(2, 4, 8, 8, dtype=torch.float64), restructure="merge")
    assert [step.subject for step in plan.steps] == ["a"]
    assert type(fused.n) is nn.Identity
