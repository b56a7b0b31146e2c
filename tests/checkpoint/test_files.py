"""Files of fused models: what is loaded equals what was saved, and what does not fit leaves the model as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import assert_untouched, snapshot
from test_structure import BUILDERS, Block, X, assert_same_outputs, built, plain, wider
from torch import Tensor, nn

import bnfuse
from bnfuse import CheckpointError


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(_bits(tensor), _bits(second[name])), name


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_loaded_equals_what_was_saved(
    builder: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    fused = bnfuse.fuse(built(builder, 0), X, options=bnfuse.Options(infer_calls=False)).to(dtype)
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    fresh = built(builder, 1).train()
    assert bnfuse.load(fresh, tmp_path / "fused.safetensors") is fresh
    assert_same_state(fused, fresh)
    assert_same_outputs(fused, fresh)
    assert not any(module.training for module in fresh.modules())
    assert os.listdir(tmp_path) == ["fused.safetensors"]


def test_a_real_architecture_on_the_meta_device(tmp_path: Path) -> None:
    model = bnfuse.tools.zoo.randomise_(timm.create_model("mobilenetv3_small_050")).eval()
    fused = bnfuse.fuse(model)
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    with torch.device("meta"):
        empty = timm.create_model("mobilenetv3_small_050")
    bnfuse.load(empty, tmp_path / "fused.safetensors")
    assert_same_state(fused, empty)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fused(x), empty(x))


def test_no_forward_runs_and_training_flags_stay(tmp_path: Path) -> None:
    fused = bnfuse.fuse(built(plain, 0))
    fused[0].weight.requires_grad_(False)
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    fresh = built(plain, 1)
    fresh[3].bias.requires_grad_(False)
    ran = []
    fresh.register_forward_hook(lambda *_: ran.append(1))
    bnfuse.load(fresh, tmp_path / "fused.safetensors")
    assert not ran
    assert [name for name, it in fresh.named_parameters() if not it.requires_grad] == ["3.bias"]


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("row", self.first.weight.detach()[0])
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x))) + self.row


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    fused = bnfuse.fuse(built(Tied, 0), X[..., 0, :4])
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    assert "second.weight" not in load_file(tmp_path / "fused.safetensors")
    fresh = built(Tied, 1)
    bnfuse.load(fresh, tmp_path / "fused.safetensors")
    assert fresh.first.weight is fresh.second.weight
    assert fresh.row.data_ptr() == fresh.first.weight.data_ptr()
    assert_same_state(fused, fresh)


def test_channels_last_stays(tmp_path: Path) -> None:
    fused = bnfuse.fuse(built(plain, 0))
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    fresh = built(plain, 1).to(memory_format=torch.channels_last)
    bnfuse.load(fresh, tmp_path / "fused.safetensors")
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_state(fused, fresh)


def test_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors writes by way of it, and does not ask for it."""
    monkeypatch.setitem(sys.modules, "numpy", None)
    target = tmp_path / "fused.safetensors"
    with pytest.raises(CheckpointError, match="takes numpy: run pip install numpy"):
        bnfuse.save(bnfuse.fuse(built(plain, 0), X), target)
    assert os.listdir(tmp_path) == []


def test_one_that_was_trained_on_and_one_without_norms(tmp_path: Path) -> None:
    fused = bnfuse.fuse(built(plain, 0)).train()
    optimiser = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(X).square().mean().backward()
    optimiser.step()
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    assert_same_state(bnfuse.load(built(plain, 1), tmp_path / "fused.safetensors"), fused)
    linear = nn.Linear(2, 3)
    bnfuse.save(linear, tmp_path / "linear.safetensors")
    assert_same_state(bnfuse.load(nn.Linear(2, 3), tmp_path / "linear.safetensors"), linear)


def test_one_that_is_fused_already_takes_it(tmp_path: Path) -> None:
    fused = bnfuse.fuse(built(plain, 0))
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    other = bnfuse.fuse(built(plain, 1))
    assert_same_state(bnfuse.load(other, tmp_path / "fused.safetensors"), fused)


def test_loading_needs_neither_pickle_nor_the_network(tmp_path: Path) -> None:
    bnfuse.save(bnfuse.fuse(built(plain, 0)), tmp_path / "fused.safetensors")
    code = (
        "import pickle, sys, torch\n"
        "def no(*_, **__): raise SystemExit('pickle')\n"
        "pickle.load = pickle.loads = torch.load = no\n"
        "pickle.Unpickler = None\n"
        "from torch import nn\nimport bnfuse\n"
        "model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))\n"
        "print(type(bnfuse.load(model, sys.argv[1])[1]).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "fused.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "Identity\n"


# Writing ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fused.safetensors"
    bnfuse.save(bnfuse.fuse(built(plain, 0)), path)
    before = path.read_bytes()

    def breaks(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(CheckpointError, match="no space left"):
        bnfuse.save(bnfuse.fuse(built(plain, 1)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    bnfuse.save(bnfuse.fuse(built(plain, 0)), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "real.safetensors").stat().st_size > 1000


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    path, other = tmp_path / "fused.safetensors", tmp_path / "other"
    other.touch()
    for _ in range(2):
        bnfuse.save(bnfuse.fuse(built(plain, 0)), path)
        assert path.stat().st_mode == other.stat().st_mode
        path.chmod(0o640)
        other.chmod(0o640)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    for model, path, said in [
        (nn.Linear(2, 2), "m.pt", "ends in .safetensors"),
        (nn.Linear(2, 2), "missing/m.safetensors", "cannot be written"),
        (Extra(2, 2), "m.safetensors", "holds a dict as _extra_state"),
        (nn.Linear(2, 2, device="meta"), "m.safetensors", "weight has no plain contents"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            bnfuse.save(model, tmp_path / path)
    assert not os.listdir(tmp_path)


# Reading ---------------------------------------------------------------------------------------------------------------


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], rehash: bool = True) -> None:
    """The file with other contents, and mostly with the hash that goes with them."""
    tensors, metadata = content(path)
    change(tensors, metadata)
    if rehash:
        metadata["bnfuse.sha256"] = bnfuse.checkpoint.files._hash(tensors)
    save_file(tensors, path, metadata)


def _swap(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["3.weight"], tensors["3.bias"] = tensors["3.weight"] + 1, tensors["3.bias"]


@pytest.mark.parametrize(
    ("change", "rehash", "said"),
    [
        (lambda tensors, _: tensors.pop("0.bias"), True, "1 missing in the file: 0.bias"),
        (lambda tensors, _: tensors.update(more=torch.ones(1)), True, "1 unknown to the model: more"),
        (lambda tensors, _: tensors.update({"3.bias": torch.ones(3)}), True, "(3,) in the file, (2,) in the model"),
        (_swap, False, "its tensors are not those that were saved"),
        (lambda _, said: said.pop("bnfuse"), True, "holds no structure of a fused model"),
        (lambda _, said: said.update(bnfuse="{"), True, "is damaged: JSONDecodeError"),
        (lambda _, said: said.update(bnfuse="[" * 100000), True, "is damaged"),
        (lambda _, said: said.update(bnfuse="3"), True, "the structure is a int"),
        (lambda _, said: said.update({"bnfuse.same": '{"a": "b"}'}), True, "its list of shared tensors"),
        (lambda _, said: said.update(bnfuse=json.dumps({"format": 7})), True, "install a newer bnfuse"),
    ],
)
def test_a_file_that_does_not_fit(
    change: Callable[[dict[str, Tensor], dict[str, str]], None], rehash: bool, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "fused.safetensors"
    bnfuse.save(bnfuse.fuse(built(plain, 0)), path)
    rewritten(path, change, rehash)
    model = built(plain, 1)
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        bnfuse.load(model, path)
    assert said in str(error.value)
    assert_untouched(model, before)


def test_files_of_other_origin(tmp_path: Path) -> None:
    path = tmp_path / "fused.safetensors"
    bnfuse.save(bnfuse.fuse(built(plain, 0)), path)
    whole = path.read_bytes()
    model = built(plain, 1)
    before = snapshot(model)
    for made, said in [(whole[:-8], "damaged"), (whole[:5], "damaged"), (b"", "damaged"), (b"x" * 200, "damaged")]:
        path.write_bytes(made)
        with pytest.raises(CheckpointError, match=said):
            bnfuse.load(model, path)
    with pytest.raises(CheckpointError, match="There is no file"):
        bnfuse.load(model, tmp_path / "missing.safetensors")
    path.write_bytes(whole)
    for other in (built(wider, 0), built(Block, 0)):
        with pytest.raises(CheckpointError, match="that of another model"):
            bnfuse.load(other, path)
    assert_untouched(model, before)


def test_weights_that_differ_where_the_model_has_one(tmp_path: Path) -> None:
    class Untied(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = nn.Parameter(torch.randn(4, 4))

    Untied.__name__ = "Tied"
    saved = built(Untied, 0)
    bnfuse.save(saved, tmp_path / "fused.safetensors")
    with pytest.raises(CheckpointError, match=r"second.weight and first.weight are one tensor|first.weight and second"):
        bnfuse.load(built(Tied, 1), tmp_path / "fused.safetensors")


def test_a_model_that_changes_what_it_loads(tmp_path: Path) -> None:
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *rest)

    model = Doubling(2, 2)
    bnfuse.save(model, tmp_path / "fused.safetensors")
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="changes its state dict while loading"):
        bnfuse.load(model, tmp_path / "fused.safetensors")
    assert_untouched(model, before)


class Clipped(nn.Module):
    """A norm before one ReLU6, and none before the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.second, self.clip, self.last = nn.Conv2d(8, 8, 3), nn.Hardtanh(0.0, 3.0), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.clip(self.second(self.act(self.norm(self.first(x))))))
        return y


def test_bounds_of_an_equalised_model(tmp_path: Path) -> None:
    fused = bnfuse.fuse(built(Clipped, 0), X)
    with torch.no_grad():
        fused.first.weight.mul_(torch.logspace(-1, 1, 8).reshape(8, 1, 1, 1))
    equalised = bnfuse.equalise(fused, X, relu6="ceilings")
    names = [name for name in equalised.state_dict() if name.endswith("upper")]
    assert names == ["norm.upper", "clip.0.upper"]
    bnfuse.save(equalised, tmp_path / "equalised.safetensors")
    with torch.device("meta"):
        empty = Clipped()
    for fresh in (built(Clipped, 1), empty):
        bnfuse.load(fresh, tmp_path / "equalised.safetensors")
        assert_same_state(equalised, fresh)
        assert_same_outputs(equalised, fresh)
        assert bnfuse.structure(fresh) == bnfuse.structure(equalised)
    with pytest.raises(CheckpointError, match="is fused already, with another structure"):
        bnfuse.load(bnfuse.fuse(built(Clipped, 1), X), tmp_path / "equalised.safetensors")
    said = bnfuse.structure(equalised).to_dict()
    said["removed"][0]["ceiling"] = [10**9]
    with pytest.raises(CheckpointError, match="more bounds than the model has parameters"):
        bnfuse.restructure(built(Clipped, 1), said)


def test_what_is_no_model_and_no_safetensors_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="takes the fused model itself"):
        bnfuse.save(nn.Linear(2, 2).state_dict(), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    fused = bnfuse.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.randn(1, 3, 4, 4))
    found = {"state_dict": fused.state_dict(), "bnfuse": bnfuse.structure(fused).to_dict()}
    with pytest.raises(CheckpointError, match=r"found\['bnfuse'\]"):
        bnfuse.load(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), tmp_path / "m.pt")
    model = bnfuse.restructure(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), found["bnfuse"])
    model.load_state_dict(found["state_dict"])
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(model.eval()(x), fused(x))
