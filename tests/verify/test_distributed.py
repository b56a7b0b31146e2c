"""Several processes: `compare` over all of them, and models that are sharded.

``torchrun`` is started once, with two processes that make all checks and write down what they find; this file is what
they run. The tests read it.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnfuse
from bnfuse.tools.zoo.randomise import randomise_
from bnfuse.verify.ranks import _device_of

CHECKS: dict[str, Callable[[int], Any]] = {}
"""What each process does, in this order; it is given its rank."""


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CHECKS[function.__name__] = function
    return function


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
    )  # fmt: skip
    randomise_(model.to(dtype))
    return model.eval()


def pair() -> tuple[nn.Module, nn.Module]:
    """A network in float32, and one whose outputs differ, so that some samples fall into another class."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
        return randomise_(layers).eval()  # type: ignore[return-value]

    before, after = made(), made()
    with torch.no_grad():
        after[4].weight.add_(0.05 * torch.randn(6, 16, generator=torch.Generator().manual_seed(3)))
    return before, after


def batches(first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of different lengths and magnitudes, with labels; the largest difference is in batch 5."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(3 + number % 4, 3, 8, 8, generator=generator) * (4 if number == 5 else 1)
        yield x, torch.randint(6, (len(x),), generator=generator)


def fields(comparison: bnfuse.Comparison) -> str:
    """Every number of a comparison, to the last bit."""
    return repr(comparison)


def message(function: Callable[[], Any]) -> list[str]:
    """The class and message of what a function raises."""
    try:
        function()
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def shares(*bounds: int) -> Callable[[int], Any]:
    """Compare batches, of which rank r gets those from bounds[r] to bounds[r + 1]."""

    def compared(rank: int) -> Any:
        before, after = pair()
        mine = batches(bounds[rank], bounds[rank + 1])
        joined = bnfuse.compare(before, after, mine, group=dist.group.WORLD)
        return [fields(joined), fields(bnfuse.compare(before, after, batches(bounds[0], bounds[-1])))]

    return compared


CHECKS["even"] = shares(0, 4, 8)
CHECKS["uneven"] = shares(0, 2, 7)
CHECKS["the first has none"] = shares(0, 0, 7)
CHECKS["the second has none"] = shares(0, 7, 7)


@check
def no_batch_at_all(rank: int) -> Any:
    return message(lambda: bnfuse.compare(*pair(), [], group=dist.group.WORLD))


@check
def one_rank_alone(rank: int) -> Any:
    """Without a group nobody is waited for."""
    return str(bnfuse.compare(*pair(), batches(0, 2)).samples) if rank == 1 else "did not call"


@check
def a_model_fails_on_one_rank(rank: int) -> Any:
    mine = [torch.ones(2, 3, 8, 8), torch.ones(2, 4 if rank else 3, 8, 8)]
    return message(lambda: bnfuse.compare(*pair(), mine, group=dist.group.WORLD))


@check
def the_data_fail_on_one_rank(rank: int) -> Any:
    def broken() -> Iterator[Any]:
        yield from batches(0, 2)
        if rank == 0:
            raise OSError("image 17 cannot be read")

    return message(lambda: bnfuse.compare(*pair(), broken(), group=dist.group.WORLD))


@check
def what_is_no_module_on_one_rank(rank: int) -> Any:
    before, after = pair()
    other: Any = after if rank else (lambda x: x)
    return message(lambda: bnfuse.compare(before, other, batches(0, 1), group=dist.group.WORLD))


@check
def a_group_of_one(rank: int) -> Any:
    group: Any = dist.new_group([1])
    return message(lambda: bnfuse.compare(*pair(), batches(0, 1), group=group))


@check
def a_sampler_that_repeats(rank: int) -> Any:
    def compared(size: int, **options: Any) -> Any:
        data = TensorDataset(*map(torch.cat, zip(*batches(0, 4), strict=True)))
        part = TensorDataset(*data[:size])
        sampler = options.get("sampler", DistributedSampler(part, shuffle=False))
        return bnfuse.compare(*pair(), DataLoader(part, sampler=sampler, batch_size=2), group=dist.group.WORLD)

    odd = message(lambda: compared(15))
    return [odd, compared(16).samples, compared(15, sampler=range(rank, 15, 2)).samples]


@check
def data_parallel_wrappers(rank: int) -> Any:
    """They synchronise buffers at every call, and would wait for a batch that the other does not have."""
    before, after = map(nn.parallel.DistributedDataParallel, pair())
    mine = batches(0, 2) if rank == 0 else batches(2, 7)
    return fields(bnfuse.compare(before, after, mine, group=dist.group.WORLD))


@check
def the_same_plan_everywhere(rank: int) -> Any:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    model = network()
    fused = bnfuse.fuse(nn.parallel.DistributedDataParallel(model), x)
    plan = bnfuse.plan(model, x)
    difference = float((fused(x) - model(x)).detach().abs().max())
    weights = {name: tensor.tolist() for name, tensor in fused.module.state_dict().items()}
    return [json.dumps(plan.to_dict()) + repr(weights), len(plan.fused), difference, type(fused).__name__]


@check
def sharded_by_fsdp(rank: int) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def shard(model: nn.Sequential) -> nn.Sequential:
        fully_shard(model[3], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def state(model: nn.Module) -> list[Any]:
        return [(name, id(t), type(t).__name__, t.to_local().sum().item()) for name, t in model.named_parameters()]

    def difference(model: nn.Module) -> float:
        return float((model(x) - network()(x)).detach().abs().max())

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    plan = bnfuse.plan(network(), x)
    model = shard(network())
    before = state(model)
    found: dict[str, Any] = {
        "refused": [
            message(lambda: bnfuse.fuse(model, x)),
            message(lambda: bnfuse.fuse(model, x, inplace=True)),
            message(lambda: bnfuse.plan(model, x)),
            message(lambda: plan.apply(model)),
        ],
        "compared together": message(lambda: bnfuse.compare(network(), model, [x], group=dist.group.WORLD)),
        "compared": bnfuse.compare(network(), model, x).outputs[0].relative_l2,
        "as before": state(model) == before,
        "works": difference(model),
        "works whole": bnfuse.compare(model, network(), x).outputs[0].relative_l2,  # FSDP has left it whole
    }
    found["works again"] = difference(model)
    fused = shard(bnfuse.fuse(network(), x))
    found["fused, then sharded"] = difference(fused)
    found["norms left"] = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    gathered = network()
    with torch.no_grad():
        for parameter in gathered.parameters():
            parameter.zero_()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # who has it all
        gathered.load_state_dict(whole)
        found["gathered, then fused"] = difference(bnfuse.fuse(gathered, x))
    return found


@check
def tensor_parallel(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    model = randomise_(layers.double()).eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = model(x).detach()
    mesh = init_device_mesh("cpu", (2,))
    first = nn.Sequential(copy.deepcopy(model[0]))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    refused = message(lambda: bnfuse.fuse(model, x))
    parts = parallelize_module(copy.deepcopy(first), mesh, {"0": ColwiseParallel(use_local_output=False)})
    compared = [bnfuse.compare(whole, parts, x) for whole in (first, nn.Sequential(nn.Linear(4, 8).double()))]
    differences = [comparison.outputs[0].relative_l2 for comparison in compared]
    return [refused, float((model(x) - expected).detach().abs().max()), differences]


@check
def the_page(rank: int) -> Any:
    """The script in the documentation, wherever it stands; the processes are joined already, and stay so."""
    [script] = [
        block
        for page in (Path(__file__).parents[2] / "docs").glob("*.md")
        for block in re.findall("^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        if block.startswith("# torchrun ")
    ]
    names: dict[str, Any] = {"__name__": "__main__"}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        for name in ("init_process_group", "destroy_process_group"):
            patch.setattr(dist, name, lambda *args: None)
        exec(script, names)
    return [printed.getvalue(), str(names["comparison"])]


def work(folder: Path) -> None:
    """Make every check, in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=45))
    found = {}
    for name, function in CHECKS.items():
        try:
            found[name] = function(dist.get_rank())
        except Exception:  # noqa: BLE001
            found[name] = traceback.format_exc()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # both have written all; a thread of gloo that outlives the interpreter would abort the process


# The tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), __file__, str(folder),
    ]  # fmt: skip
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=os.environ | settings, start_new_session=True, **pipes) as started:
        try:
            said, _ = started.communicate(timeout=100)
        finally:
            if started.poll() is None:  # torchrun and what it has started
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["even", "uneven", "the first has none", "the second has none"])
def test_all_ranks_find_what_one_process_finds(found: list[dict[str, Any]], name: str) -> None:
    """To the last bit: counts, shares, sums, and the largest difference with its place."""
    for rank in range(2):
        joined, alone = found[rank][name]
        assert joined == alone
        assert "accuracy_before=Accuracy(top1=0." in joined
        assert "batches=8" in joined or ("batches=7" in joined and "batch=5" in joined)


def test_the_pair_of_networks_can_tell() -> None:
    """Two shares of the batches have different results, in every number that is compared above."""
    first, whole = (bnfuse.compare(*pair(), batches(0, last)) for last in (4, 7))
    assert first.samples != whole.samples
    assert first.accuracy_before != whole.accuracy_before
    assert first.accuracy_after != whole.accuracy_after
    one, all_of_them = first.outputs[0], whole.outputs[0]
    for name in ("batch", "max_abs", "expected", "relative_l2", "relative_max", "mse", "argmax_agreement", "before"):
        assert getattr(one, name) != getattr(all_of_them, name), name
    assert all_of_them.argmax_agreement is not None
    assert 0 < all_of_them.argmax_agreement < 1


def test_no_batch_on_any_rank(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        kind, text = found[rank]["no_batch_at_all"]
        assert (kind, "no batch on any rank" in text) == ("InputError", True)


def test_one_rank_may_compare_alone(found: list[dict[str, Any]]) -> None:
    assert found[0]["one_rank_alone"] == "did not call"
    assert found[1]["one_rank_alone"] == "7"


def test_an_error_on_one_rank_is_one_on_all(found: list[dict[str, Any]]) -> None:
    (kind, text), (own_kind, own) = (found[rank]["a_model_fails_on_one_rank"] for rank in range(2))
    assert kind == own_kind == "InputError"
    assert own.startswith("compare() could not run `before` (Sequential) on batch 1 of the inputs")
    assert text.startswith(
        "compare() failed on rank 1, so that no rank has a result\n  error:    InputError: compare()"
    )
    assert own in text
    (own_kind, own), (kind, text) = (found[rank]["the_data_fail_on_one_rank"] for rank in range(2))
    assert (own_kind, own) == ("OSError", "image 17 cannot be read")
    assert kind == "InputError"
    assert "failed on rank 0" in text
    assert "OSError: image 17 cannot be read" in text
    (_, own), (_, text) = (found[rank]["what_is_no_module_on_one_rank"] for rank in range(2))
    assert "after is a function" in own
    assert "failed on rank 0" in text


def test_only_members_of_a_group_compare(found: list[dict[str, Any]]) -> None:
    kind, text = found[0]["a_group_of_one"]
    assert (kind, "no member" in text) == ("InputError", True)
    assert found[1]["a_group_of_one"] == ["nothing", ""]


def test_no_sample_counts_twice(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        (kind, text), even, uneven = found[rank]["a_sampler_that_repeats"]
        assert kind == "InputError"
        assert "repeats 1 of 15" in text
        assert "sampler=range(dist.get_rank(), len(dataset), dist.get_world_size())" in text
        assert (even, uneven) == (16, 15)


def test_data_parallel_models_do_not_wait_for_each_other(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert found[rank]["data_parallel_wrappers"] == found[rank]["uneven"][1]


def test_every_rank_makes_the_same_plan(found: list[dict[str, Any]]) -> None:
    (first, *rest), (second, *others) = (found[rank]["the_same_plan_everywhere"] for rank in range(2))
    assert first == second
    for fused, difference, kind in (rest, others):
        assert (fused, kind) == (2, "DistributedDataParallel")
        assert difference < 1e-12


def test_a_model_that_fsdp_has_sharded(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        fsdp = found[rank]["sharded_by_fsdp"]
        assert not isinstance(fsdp, str), fsdp
        for kind, text in fsdp["refused"]:
            assert kind == "InputError"
            assert text.startswith("FSDPSequential is sharded by FSDP: each process holds a part of the weights only")
            assert "Fuse first, then shard" in text
        kind, text = fsdp["compared together"]
        assert (kind, "Compare before the model is sharded" in text) == ("InputError", True)
        assert fsdp["as before"]
        for name in ("compared", "works", "works whole", "works again", "fused, then sharded"):
            assert fsdp[name] < 1e-12, name
        assert fsdp["norms left"] == 0
    assert found[0]["sharded_by_fsdp"]["gathered, then fused"] < 1e-12


def test_a_model_with_distributed_parameters(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert not isinstance(found[rank]["tensor_parallel"], str), found[rank]["tensor_parallel"]
        (kind, text), difference, (same, other) = found[rank]["tensor_parallel"]
        assert (kind, text.startswith("0.weight is a DTensor: each process holds a part")) == ("InputError", True)
        assert max(difference, same) < 1e-12
        assert other > 0.1


def test_the_script_of_the_page_runs(found: list[dict[str, Any]]) -> None:
    (printed, comparison), (nothing, same) = (found[rank]["the_page"] for rank in range(2))
    assert (printed, nothing, comparison) == (comparison + "\n", "", same)
    assert comparison.startswith("16 batches, 1001 samples\n")
    assert comparison.count("accuracy ") == 2
    assert comparison.endswith("\nequal within tolerance")


@pytest.mark.parametrize("group", [True, "WORLD", dist.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(bnfuse.InputError, match=r"group|member"):
        bnfuse.compare(nn.Identity(), nn.Identity(), torch.ones(1), group=group)


def test_without_processes_the_whole_world_is_this_one() -> None:
    assert dist.group.WORLD is None
    assert bnfuse.compare(*pair(), batches(0, 2), group=dist.group.WORLD).samples == 7


@pytest.mark.parametrize("indices", [(None, 1), (1, 0), (None, None)])
def test_results_are_sent_from_the_device_of_the_models(
    indices: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL sends from the current device, and several ranks must not use one."""

    def model(index: int | None) -> Any:
        device = torch.device("cpu") if index is None else torch.device("cuda", index)
        return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)]))

    monkeypatch.setattr(torch.accelerator, "device_index", contextlib.nullcontext)
    with _device_of(map(model, indices)) as used:
        assert used == next((index for index in indices if index is not None), None)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
