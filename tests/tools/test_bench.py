"""The benchmarks measure what they say, and a target that is missed is called missed."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import bnfuse
from bench import command, compiling, fusing, growth, latency, memory, restructuring, rivals
from bench import stages as stages_of_fuse
from bench.child import child
from bench.growth import Family
from bench.networks import (
    NETWORKS,
    QUICK,
    DenseBlock,
    Network,
    chain,
    forward,
    refused_stream,
    residual_stream,
    selected,
)
from bench.section import Section, Settings, Target, at_most
from bench.timing import Effort, Rounds, Spread, geometric_mean, measured
from bnfuse.tools.timing import interleaved, threads, timed

ONCE = Effort.exactly(1)
ONE_THREAD = Settings().clock


class FakeClock:
    """Stands still until it is set forward."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, then: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
        def run() -> Any:
            self.now += seconds
            return then()

        return run


class PartlyFused(nn.Module):
    """The first norm is fused, the second stays: its output is read before it and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.kept = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.convolution(x)))
        return torch.relu(self.kept(x)) * x.amax()


class Branching(PartlyFused):
    """Not for a symbolic tracer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


TINY = Network("own:tiny", PartlyFused, (3, 8, 8))
BRANCHING = Network("own:branching", Branching, (3, 8, 8))


# Timing ---------------------------------------------------------------------------------------------------------------


def orders(names: str, rounds: int) -> list[str]:
    seen: list[str] = []
    measures = {name: lambda name=name: float(seen.append(name) or 1) for name in names}
    interleaved(measures, rounds)
    return ["".join(seen[start : start + len(names)]) for start in range(0, len(seen), len(names))]


def test_every_round_has_everything_once_and_everything_comes_first_and_after_everything_else() -> None:
    found = orders("abc", 6)
    assert all(sorted(order) == ["a", "b", "c"] for order in found)
    assert len(set(found)) == 6
    assert [order[0] for order in found].count("a") == 2
    assert {pair for order in found for pair in itertools.pairwise(order)} == {
        (a, b) for a in "abc" for b in "abc" if a != b
    }
    assert orders("ab", 4) == ["ab", "ba", "ba", "ab"]


def test_rounds_that_warm_up_are_forgotten() -> None:
    times = iter([9.0, 8.0, 1.0, 2.0])
    assert interleaved({"a": lambda: next(times)}, rounds=2, warm_up=2) == {"a": [1.0, 2.0]}


def test_the_clock_stops_before_the_result_is_freed() -> None:
    clock = FakeClock()

    class Slow:
        def __del__(self) -> None:
            clock.now += 100

    measure = timed(clock.work(2, Slow), clock)
    assert measure() == 2
    assert clock.now == 102


def test_ratios_are_taken_within_a_round() -> None:
    load = [1.0, 10.0, 1.0, 5.0, 2.0]
    rounds = Rounds({"a": [3 * slow for slow in load], "b": [2 * slow for slow in load], "c": list(load)})
    assert rounds.ratio("a", "b") == Spread(1.5, 1.5, 1.5)
    assert rounds.ratio("a", {"b": 1.0, "c": 4.0}) == Spread(0.5, 0.5, 0.5)
    assert rounds.ratio({"b": 2.0}, "c").median == 4
    assert rounds.milliseconds("c") == 2000
    assert rounds.has({"a": 1.0, "b": 2.0})
    assert not rounds.has({"a": 1.0, "d": 2.0})


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    assert (str(Spread(1, 0.5, 2)), Spread(1, 0.5, 2).range) == ("1.000", "0.500-2.000")


@pytest.mark.parametrize(("seconds_of_one", "rounds"), [(10.0, 5), (0.1, 20), (0.5, 10)])
def test_there_are_as_many_rounds_as_there_is_time_for(seconds_of_one: float, rounds: int) -> None:
    assert Effort(5.0, 5, 20).rounds(seconds_of_one) == rounds
    assert measured({"a": lambda: seconds_of_one}, Effort(5.0, 5, 20)).count == rounds


def test_the_number_of_rounds_can_be_asked_for() -> None:
    assert Settings(repeat=4).effort(100, 10, 20).rounds(1000) == 4
    assert Settings(quick=True).effort(100, 10, 20).rounds(0) == 3


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_target_is_counted_and_judged() -> None:
    assert str(at_most("fused/deleted", 1.02, {"resnet18": 1.0, "mixnet_s": 1.04})) == (
        "fused/deleted at most 1.02: 1 of 2, worst mixnet_s 1.04: MISSED"
    )
    assert str(at_most("fused/deleted", 1.02, {"resnet18": 1.02})).endswith("1 of 1, worst resnet18 1.02: met")
    assert str(at_most("fused/deleted", 1.02, {})) == "fused/deleted at most 1.02: not measured"


# Rivals ---------------------------------------------------------------------------------------------------------------


def test_exactly_the_norms_that_the_plan_removes_are_deleted() -> None:
    model, x = TINY.build(), TINY.inputs()
    plan = bnfuse.plan(model, x)
    fused, bare = plan.apply(model), rivals.without_norms(model, plan)
    with_biases = rivals.without_norms(model, plan, biases=True)
    assert [type(module) for module in bare.modules()] == [type(module) for module in fused.modules()]
    assert rivals.count_norms(bare) == rivals.count_norms(fused) == 1
    assert bare.convolution.bias is None
    assert torch.equal(bare.convolution.weight, model.convolution.weight)
    assert torch.equal(with_biases.convolution.bias, torch.zeros(4))
    assert rivals.count_norms(model) == 2
    assert rivals.is_right(forward(model, x), forward(fused, x))
    assert not rivals.is_right(forward(model, x), forward(bare, x))


def test_rounding_is_right_and_more_is_not() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert rivals.is_right(x, x * (1 + 1e-5))
    assert not rivals.is_right(x, x * 1.05)
    assert not rivals.is_right(x, x[:4])


def test_what_cannot_be_made_says_why() -> None:
    assert rivals.attempt(lambda: 3) == (3, "")
    made, why = rivals.attempt(lambda: rivals.fx_fused(BRANCHING.build()))
    assert made is None
    assert why.startswith("TraceError: ")


# Stages ---------------------------------------------------------------------------------------------------------------


def test_a_step_within_another_counts_for_itself() -> None:
    clock = FakeClock()
    found = stages_of_fuse.Stages(clock)
    inner = found.wrapped("solve", clock.work(2))
    outer = found.wrapped("verify", clock.work(5, inner))
    clock.work(1, outer)()
    assert {stage: seconds for stage, seconds in found.of_total(8).items() if seconds} == {
        "solve": 2, "verify": 5, "other": 1,
    }  # fmt: skip
    found.reset()
    assert sum(found.seconds.values()) == 0


def test_the_steps_of_the_library_are_found_and_put_back() -> None:
    model, x = TINY.build(), TINY.inputs()
    before = bnfuse.api.rewrite
    with stages_of_fuse.stages(ONE_THREAD) as found:
        assert bnfuse.api.rewrite is not before
        bnfuse.fuse(model, x)
        bnfuse.fuse(TINY.build(), x, inplace=True)
        seconds = found.seconds
    assert bnfuse.api.rewrite is before
    assert all(seconds[stage] > 0 for stage in ("copy", "capture", "solve", "rewrite", "verify"))


def test_a_step_that_the_library_no_longer_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages_of_fuse.STEPS, "bnfuse.api.gone", "solve")
    before = bnfuse.api.rewrite
    with pytest.raises(AttributeError, match="gone"), stages_of_fuse.stages(ONE_THREAD):
        pass
    assert bnfuse.api.rewrite is before


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [network for network in (*NETWORKS, *QUICK) if network.name.startswith("own:")],
    ids=lambda network: network.name,
)
def test_our_own_networks_lose_all_norms(network: Network) -> None:
    model, x = network.build(), network.inputs(2)
    assert x.shape[0] == 2
    fused = bnfuse.fuse(model, x)
    assert rivals.count_norms(model) > rivals.count_norms(fused) == 0


@pytest.mark.parametrize(("make", "norms"), [(chain, 6), (residual_stream, 6), (refused_stream, 6), (DenseBlock, 12)])
def test_growing_networks_have_as_many_norms_as_asked_for(make: Callable[[int], nn.Module], norms: int) -> None:
    model, x = make(6).eval(), torch.randn(1, *growth.GROWTH_SHAPE)
    assert rivals.count_norms(model) == norms
    assert forward(model, x).isfinite().all()


def test_networks_are_selected_with_and_without_their_zoo() -> None:
    assert [network.name for network in selected("resnet*", NETWORKS)] == [
        "torchvision:resnet18",
        "torchvision:resnet50",
    ]
    assert all(network.name.startswith("timm:") for network in selected("timm:*", NETWORKS))
    assert len(selected("efficientnet_b0", NETWORKS)) == 2
    assert selected("nothing", NETWORKS) == []


# Latency --------------------------------------------------------------------------------------------------------------


def latency_findings(network: Network) -> list[latency.Finding]:
    return list(latency.examine(network, ONCE, ONE_THREAD))


def test_latency_in_both_formats_at_both_batch_sizes() -> None:
    findings = latency_findings(TINY)
    assert [(found.batch, found.channels_last) for found in findings] == [(1, False), (8, False), (1, True), (8, True)]
    for found in findings:
        assert found.norms == (2, 1)
        assert 0 < found.identities < 1e-3
        assert found.share_of_identities == 100 * found.identities / found.rounds.median(latency.FUSED)
        assert set(found.rounds.seconds) == set(latency.CANDIDATES)
        assert found.problems == {}
    section = latency.report(findings)
    assert [len(table.rows) for table in section.tables] == [4, 4, 2]
    ratios = [ratio for found in findings for ratio in found.rounds.ratios("fused", "deleted")]
    pooled = f"{statistics.median(ratios):.3f}"
    assert [row[3] for row in section.tables[2].rows] == [pooled, pooled]
    first = json.loads(json.dumps(section.data))["measurements"][0]
    again = latency.Finding.from_dict(first).to_dict()
    assert {**again, "fused over": first["fused over"]} == first
    assert first["network"] == "own:tiny"
    assert set(first["fused over"]) == {"original", "deleted", "deleted, with biases"}
    assert f"of 1, worst own:tiny {pooled}" in str(section.targets[0])
    assert "of 4, worst own:tiny batch" in str(section.targets[2])


def test_a_failure_is_a_cell() -> None:
    findings = latency_findings(BRANCHING)
    assert all(found.problems == {"torch.fx": "fails"} for found in findings)
    assert findings[0].errors["torch.fx"].startswith("TraceError")
    times, ratios, _ = latency.report(findings).tables
    place = [column.heading for column in times.columns].index("torch.fx")
    assert {row[place] for row in times.rows} == {"fails"}
    assert {row[[column.heading for column in ratios.columns].index("/ torch.fx")] for row in ratios.rows} == {""}


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "fx_fused", lambda model: nn.Sequential(model, nn.Hardtanh(-1e-3, 1e-3)))
    assert {found.problems["torch.fx"] for found in latency_findings(TINY)} == {"wrong"}


@pytest.mark.parametrize(("times", "verdict"), [(1, "met"), (20, "MISSED")])
def test_a_slower_fused_network_misses_the_target(times: int, verdict: str) -> None:
    clock = FakeClock()

    def network(seconds: float) -> Callable[[Tensor], Tensor]:
        return lambda x: clock.work(seconds, lambda: x)()

    candidates = dict.fromkeys(latency.CANDIDATES, network(0.01)) | {latency.FUSED: network(0.01 * times)}
    rounds, problems, errors = latency.compare(candidates, torch.ones(3), Effort.exactly(5), clock)
    finding = latency.Finding("own:slow", 1, False, (2, 0), 0.0, rounds, problems, errors)
    assert [str(target).rpartition(": ")[2] for target in latency.report([finding]).targets] == [verdict] * 4


def test_a_small_network_is_called_several_times_in_a_row_and_timed_as_one_call() -> None:
    clock = FakeClock()
    called: list[str] = []

    def network(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: clock.work(0.02, lambda: (called.append(name), x)[1])()

    candidates = {name: network(name) for name in (latency.ORIGINAL, latency.FUSED)}
    rounds, _, _ = latency.compare(candidates, torch.ones(3), ONCE, clock)
    assert rounds.seconds == {name: pytest.approx([0.02] * rounds.count) for name in candidates}
    first, second = called[-6], called[-1]
    assert called[-6:] == 3 * [first] + 3 * [second]
    assert first != second


def test_a_fused_network_that_is_wrong_misses_the_target() -> None:
    candidates: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(latency.CANDIDATES, lambda x: x)
    candidates[latency.FUSED] = lambda x: 2 * x
    rounds, problems, errors = latency.compare(candidates, torch.ones(3), ONCE, ONE_THREAD)
    assert problems == {"fused": "wrong"}
    finding = latency.Finding("own:wrong", 1, False, (2, 0), 0.0, rounds, problems, errors)
    assert str(latency.report([finding]).targets[0]).endswith("without own:wrong batch 1: MISSED")


# Fusing ---------------------------------------------------------------------------------------------------------------


def test_fusing() -> None:
    found = fusing.examine(TINY, ONCE, ONE_THREAD)
    assert set(found.rounds.seconds) == {"forward", "deepcopy", *fusing.WAYS}
    assert set(found.stages) == set(stages_of_fuse.STAGES)
    assert (found.norms, found.left) == (2, {"fuse, verify=False": 1, "fuse": 1, "torch.fx": 1})
    assert found.comparable
    assert [len(table.rows) for table in fusing.report([found]).tables] == [1, 1, 1]


def test_what_torch_fx_cannot_do_is_left_out_of_the_mean() -> None:
    found = fusing.examine(BRANCHING, ONCE, ONE_THREAD)
    assert found.problems == {"torch.fx": "fails"}
    assert not found.comparable
    section = fusing.report([found])
    assert "fails" in section.tables[1].rows[0]
    assert [target.met for target in section.targets] == [None, None]


def fused_in(bare: float, verified: float, name: str = "own:tiny") -> fusing.Finding:
    seconds = {"forward": 1.0, "deepcopy": 1.0, fusing.BARE: bare, fusing.VERIFIED: verified, fusing.FX: 2.0}
    rounds = Rounds({name: [second] * 3 for name, second in seconds.items()})
    return fusing.Finding(name, rounds, {}, 2, dict.fromkeys(fusing.WAYS, 0), {}, {})


@pytest.mark.parametrize(
    ("found", "met"),
    [
        ([fused_in(2, 3.9)], [True, True]),
        ([fused_in(2.1, 4)], [False, False]),
        ([fused_in(1, 2), fused_in(4, 7.5, "own:other")], [True, True]),
        ([fused_in(1, 2), fused_in(5, 7.5, "own:other")], [False, True]),
    ],
)
def test_the_targets_of_fusing_are_geometric_means(found: list[fusing.Finding], met: list[bool]) -> None:
    assert [target.met for target in fusing.report(found).targets] == met


# Growth ---------------------------------------------------------------------------------------------------------------


def test_growth() -> None:
    found = growth.examine(Family("chain", chain, (2, 20)), 2, ONE_THREAD)
    assert found.norms == {2: 2, 20: 20}
    assert found.left == {2: 0, 20: 0}
    assert set(found.rounds.seconds) == {"2", "2 forward", "20", "20 forward"}
    assert found.rounds.count == 2
    section = growth.report([found])
    assert len(section.tables[0].rows) == 2
    assert json.loads(json.dumps(section.data))["families"][0]["norms"] == {"2": 2, "20": 20}


@pytest.mark.parametrize(
    ("seconds", "met"), [((1.0, 14.0), [True, True]), ((1.0, 16.0), [False, False]), ((2.0, 15.5), [False, True])]
)
def test_growth_is_time_per_norm(seconds: tuple[float, float], met: list[bool]) -> None:
    rounds = Rounds(
        {"10": [seconds[0]] * 3, "100": [seconds[1]] * 3, "10 forward": [1.0] * 3, "100 forward": [1.0] * 3}
    )
    none = dict.fromkeys(stages_of_fuse.STAGES, 0.0)
    found = growth.Finding(
        Family("chain", chain, (10, 100)), {10: 10, 100: 100}, {10: 0, 100: 0}, rounds, {10: none, 100: none}
    )
    assert found.growth().median == pytest.approx(seconds[1] / seconds[0] / 10)
    assert [target.met for target in growth.report([found]).targets] == met


def test_what_would_take_too_long_is_given_up() -> None:
    assert growth.expected([(10, 1.0), (100, 100.0)], 1000) == pytest.approx(10_000)
    assert growth.expected([(10, 1.0)], 1000) == 0
    found = growth.examine(Family("chain", chain, (1, 10, 5000)), 1, ONE_THREAD, patience=0.0)
    assert found.sizes == [1, 10]
    targets = growth.report([found]).targets
    assert [target.met for target in targets] == [False, False]
    assert "given up, 10 took" in targets[0].text
    assert targets[1].text.endswith("at 10 against 1")


# Memory and compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_place", "copying", "met"), [(60, 300, [True, True]), (80, 300, [False, True]), (60, 350, [True, False])]
)
def test_memory_beyond_a_forward_pass(in_place: int, copying: int, met: list[bool]) -> None:
    peaks = {work: [memory.MIB] * 3 for work in memory.WORK}
    peaks[memory.IN_PLACE] = [(1 + in_place) * memory.MIB] * 3
    peaks[memory.COPYING] = [(1 + copying) * memory.MIB] * 3
    section = memory.report(memory.Finding("own:large", 240 * memory.MIB, peaks))
    assert [target.met for target in section.targets] == met
    assert len(section.tables[0].rows) == len(memory.WORK)


@pytest.mark.skipif(not memory._CLEAR_PEAK.exists(), reason="Linux alone tells")
def test_the_memory_of_a_copy_is_seen() -> None:
    with child("bench.memory", memory.QUICK.name, memory.COPY, "1") as process:
        model, peak = map(int, process.ask().split())
    assert 44 * memory.MIB < model < 46 * memory.MIB
    assert 0.6 * model < peak < 2 * model


def test_a_process_that_fails_is_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = Network("own:unknown", PartlyFused)
    found = compiling.examine(unknown, 1, ONCE, 1)
    assert found.problem == "original: StopIteration"
    assert compiling.report([found]).tables[0].rows[0] == (
        "own:unknown", "no", *("",) * 3, *("fails", "fails", "fails", *("",) * 5) * 2
    )  # fmt: skip


def test_compile_times_are_reported_as_they_are() -> None:
    times = {"original": [2.0, 4.0], "fused": [1.0, 2.0], "deleted": [1.0, 1.0]}
    files = {"original": 9, "fused": 8, "deleted": 7}
    finding = compiling.Finding("own:tiny", Rounds(times), Rounds(times), files, True)
    section = compiling.report([finding])
    row = section.tables[0].rows[0]
    assert row[:9] == ("own:tiny", "yes", "9", "8", "7", "3.0", "1.5", "1.0", "0.500")
    assert row[10] == "1.500"
    assert len(row) == len(section.tables[0].columns)
    assert [target.met for target in section.targets] == [True, True]
    slow = Rounds({**times, "fused": [1.3, 2.6]})
    assert [target.met for target in compiling.report([replace(finding, cold=slow)]).targets] == [False, True]
    slower = replace(finding, warm=Rounds({**times, "fused": [3.0, 6.0]}))
    assert [target.met for target in compiling.report([slower]).targets] == [True, False]
    assert [target.met for target in compiling.report([replace(slower, freezing=False)]).targets] == [True, None]


# Restructuring --------------------------------------------------------------------------------------------------------


def test_a_restructured_network_is_measured_beside_the_others() -> None:
    found = restructuring.examine(restructuring.QUICK[0], Settings(repeat=2))
    assert found.steps == {"untie": 1}
    assert (found.norms["original"], found.norms["restructured"]) == (3, 0)
    assert found.norms["fused"] > 0
    assert found.parameters["restructured"] > found.parameters["fused"]
    assert found.error < restructuring.ERROR
    assert found.rounds.count == 2


def test_restructuring_is_judged_by_time_norms_layers_and_error() -> None:
    three = {"original": [2.0], "fused": [1.0], "restructured": [1.0]}
    norms = {"original": 3, "fused": 2, "restructured": 0}
    good = restructuring.Finding("own:good", {"merge": 2}, norms, norms, norms, 1e-12, Rounds(three))
    assert [target.met for target in restructuring.report([good]).targets] == [True, True, True]
    times = {**three, "restructured": [1.1], "timm's own": [1.0]}
    counts = {**norms, "restructured": 3, "timm's own": 0}
    bad = restructuring.Finding("timm:bad", {"merge": 2}, counts, counts, norms, 1e-6, Rounds(times))
    section = restructuring.report([good, bad])
    assert [target.met for target in section.targets] == [False] * 5
    assert [len(table.rows) for table in section.tables] == [3, 1]


def test_a_package_that_is_missing_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "effdet", None)
    [network] = selected("effdet:cspresdet50", restructuring.NETWORKS)
    found = restructuring.examine(network, Settings())
    [table] = restructuring.report([found]).tables
    assert table.rows[0][:2] == ("effdet:cspresdet50", "effdet is not installed")
    assert len(table.rows[0]) == len(table.columns)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_sections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fusing, "QUICK", (TINY,))
    monkeypatch.setattr(latency, "QUICK", tuple(selected("own:small_mlp", QUICK)))
    monkeypatch.setattr(growth, "QUICK", (Family("chain", chain, (1, 10)),))
    return iter(())


@pytest.mark.usefixtures("tiny_sections")
def test_the_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    status = command.main(["latency", "fusing", "growth", "--quick", "--repeat", "1", "--json", str(file)])
    out, err = capsys.readouterr()
    document = json.loads(file.read_text())
    targets = [target for section in document["sections"].values() for target in section["targets"]]
    assert status == (0 if all(target["met"] is not False for target in targets) else 1)
    assert set(document["sections"]) == {"latency", "fusing", "growth"}
    assert {"processor", "cores", "threads", "load", "torch", "bnfuse"} <= set(document["machine"])
    assert torch.__version__.split("+")[0] in out
    assert [len(section["targets"]) for section in document["sections"].values()] == [4, 2, 2]
    assert all(target["text"] in out for target in targets)
    assert "latency [1/1] own:small_mlp batch 8: fused / deleted " in err
    assert [found["batch"] for found in document["sections"]["latency"]["measurements"]] == [1, 8]


@pytest.mark.parametrize(("met", "status"), [(True, 0), (None, 0), (False, 1)])
def test_a_missed_target_is_the_exit_status(
    met: bool | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = latency.report(latency_findings(TINY)[:1]).tables[0]
    monkeypatch.setitem(command.SECTIONS, "latency", lambda settings: Section([table], [Target("fast", met)]))
    assert command.main(["latency", "--json", str(tmp_path / "bench.json")]) == status


def test_nothing_to_measure_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fusing", "growth", "--networks", "nosuch", "--json", str(tmp_path / "bench.json")]) == 2
    assert "--networks 'nosuch' matches nothing" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nosuch"], ["--repeat", "0"], ["--threads", "x"]])
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
