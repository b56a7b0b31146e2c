"""Building models from a SPEC, loading weights, randomising norms; every mistake is one line that helps."""

import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from bnfuse.errors import SpecError
from bnfuse.tools import zoo

FACTORIES = """
from dataclasses import dataclass
import torch
from torch import nn
from helper import WIDTH

@dataclass
class Settings:
    width: "int" = WIDTH

class Net(nn.Module):
    def __init__(self, width=None):
        super().__init__()
        self.layer = nn.Linear(3, width or Settings().width)
        self.norm = nn.BatchNorm1d(width or Settings().width)

    @classmethod
    def wide(cls):
        from helper import WIDE
        return cls(WIDE)

net = Net()
number = 3

def broken():
    raise RuntimeError("no such\\nfile")

def tensor():
    return torch.zeros(1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of factories, and a module beside it that the file imports."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "helper.py").write_text("WIDTH = 4\nWIDE = 40\n")
    monkeypatch.chdir(tmp_path)
    for name in ("factories", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("factories", "helper"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:ResNet18", "ResNet"),
        ("torchvision:googlenet", "GoogLeNet"),
        ("torchvision:inception_v3", "Inception3"),
        ("torchvision:lraspp_mobilenet_v3_large", "LRASPP"),
        ("timm:resnet18", "ResNet"),
        ("timm:resnet18.a1_in1k", "ResNet"),
        ("pytorchcv:resnet20_cifar10", "CIFARResNet"),
        ("torch.nn:ReLU", "ReLU"),
        ("factories:Net", "Net"),
        ("factories:Net.wide", "Net"),
        ("factories:net", "Net"),
        ("factories.py:Net", "Net"),
        ("./factories.py:Net.wide", "Net"),
    ],
)
def test_a_spec_builds_its_model(spec: str, kind: str, folder: Path) -> None:
    path = list(sys.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(zoo.build(spec)).__name__ == kind
    assert sys.path == path


FORMS = "torchvision:NAME, timm:NAME, pytorchcv:NAME, package.module:factory or path/to/file.py:factory"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", f"'resnet18' does not name a model: write {FORMS}"),
        ("timm:", f"'timm:' does not name a model: write {FORMS}"),
        ("torchvision:resnet5O", "torchvision has no model 'resnet5o'; did you mean resnet50..."),
        ("timm:resnet1888", "timm has no model 'resnet1888'; did you mean resnet18..."),
        ("timm:zzzz", "timm has no model 'zzzz'; timm.list_models() names them all"),
        (
            "timm:resnet18.nobody",
            "timm:resnet18.nobody: building the model failed: RuntimeError: "
            "Invalid pretrained tag (nobody) for resnet18.",
        ),
        ("pytorchcv:alexne", "pytorchcv has no model 'alexne'; did you mean alexnet..."),
        (
            "torchvison:resnet18",
            "there is no Python module torchvison; did you mean torchvision or pytorchcv?",
        ),
        ("no.module:net", f"there is no Python module no.module; a SPEC is {FORMS}"),
        ("torch.nn:Relu", "torch.nn has no 'Relu'; did you mean ReLU..."),
        ("absent.py:net", "there is no file absent.py"),
        ("factories.py:nett", "factories.py has no 'nett'; did you mean net?"),
        ("factories.py:number", "factories.py:number is a int, where a factory was expected"),
        ("factories.py:tensor", "factories.py:tensor made a Tensor, where a torch.nn.Module was expected"),
        (
            "factories.py:broken",
            "factories.py:broken: building the model failed: RuntimeError: no such file",
        ),
        ("torch.nn:Linear", "torch.nn:Linear: building the model failed: TypeError: ..."),
        ("wrong.py:net", "importing wrong.py failed: SyntaxError: ..."),
        (
            "needy:net",
            "importing needy failed: ModuleNotFoundError: No module named 'absent_package'",
        ),
    ],
)
def test_a_wrong_spec_is_one_line_that_helps(spec: str, message: str, folder: Path) -> None:
    (folder / "wrong.py").write_text("def net() return 3\n")
    (folder / "needy.py").write_text("import absent_package\n")
    with pytest.raises(SpecError) as caught:
        zoo.build(spec)
    beginning = message.removesuffix("...")  # the rest is up to the installed releases
    assert str(caught.value)[: len(beginning) if beginning != message else None] == beginning
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["torchvision", "timm", "pytorchcv"])
def test_a_missing_zoo_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=f"^{package} is not installed: run pip install {package}$"):
        zoo.build(f"{package}:resnet18")


def small_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.randomise_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), seed)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "model_state_dict", "data_parallel"])
def test_a_state_dict_is_found_wherever_it_lies(form: str, tmp_path: Path) -> None:
    trained, fresh = small_model(1), small_model(2)
    state: dict[str, object] = dict(state_of(trained))
    if form == "data_parallel":
        state = {f"module.{key}": tensor for key, tensor in state.items()}
    elif form != "plain":
        state = {form: state, "epoch": 3}
    torch.save(state, tmp_path / "weights.pt")
    zoo.load_weights(fresh, tmp_path / "weights.pt")
    assert all(torch.equal(trained.state_dict()[key], tensor) for key, tensor in fresh.state_dict().items())


def test_safetensors(tmp_path: Path) -> None:
    trained, fresh = small_model(1), small_model(2)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    zoo.load_weights(fresh, tmp_path / "weights.safetensors")
    assert all(torch.equal(trained.state_dict()[key], tensor) for key, tensor in fresh.state_dict().items())


def test_a_tied_weight_may_be_saved_once(tmp_path: Path) -> None:
    trained, fresh = (
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
    )
    for model in (trained, fresh):
        model[1].weight = model[0].weight
    save_model(trained, str(tmp_path / "weights.safetensors"))
    zoo.load_weights(fresh, tmp_path / "weights.safetensors")
    assert torch.equal(fresh[1].weight, trained[1].weight)


def test_a_state_dict_from_before_torch_counted_batches(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in state_of(small_model()).items() if "num_batches" not in key}
    torch.save(state, tmp_path / "weights.pt")
    zoo.load_weights(small_model(2), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: [state.pop(key) for key in ("0.bias", "1.weight", "1.bias", "2.bias")],
            "4 missing: 0.bias, 1.weight, 1.bias, ...",
        ),
        (lambda state: state.update({"head.weight": torch.zeros(1)}), "1 unknown to the model: head.weight"),
        (
            lambda state: state.update({"2.weight": torch.zeros(5, 4)}),
            "1 of another shape: 2.weight (5x4 in the file, 2x4 in the model)",
        ),
        (
            lambda state: state.update({"x": state.pop("2.bias"), "0.bias": torch.zeros(())}),
            "1 missing: 2.bias; 1 unknown to the model: x; "
            "1 of another shape: 0.bias (scalar in the file, 4 in the model)",
        ),
    ],
)
def test_weights_that_do_not_fit(change: object, message: str, tmp_path: Path) -> None:
    state = state_of(small_model())
    change(state)  # type: ignore[operator]
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(SpecError) as caught:
        zoo.load_weights(small_model(), path)
    assert str(caught.value) == f"the weights in {path} do not fit the model: {message}"


class Touch:
    """Writes a file when it is unpickled, as a hostile checkpoint would run anything."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(small_model(), path)
    with pytest.raises(SpecError) as caught:
        zoo.load_weights(small_model(), path)
    assert str(caught.value) == (
        f"{path} holds the class torch.nn.modules.container.Sequential and not only tensors, and loading it "
        "would run code from the file; save the weights alone with torch.save(model.state_dict(), FILE), or "
        "pass a factory that builds the trained model as path/to/file.py:factory"
    )


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_never_runs(save: object, tmp_path: Path) -> None:
    save({"state_dict": Touch(tmp_path / "touched")}, tmp_path / "model.pt")  # type: ignore[operator]
    with pytest.raises(SpecError):
        zoo.load_weights(small_model(), tmp_path / "model.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.pt", b"hello", "cannot be read as a state dict saved with torch.save: "),
        ("empty.pt", b"", "cannot be read as a state dict saved with torch.save: EOFError"),
        ("text.safetensors", b"hello", "cannot be read as safetensors: SafetensorError: "),
    ],
)
def test_a_file_of_something_else(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        zoo.load_weights(small_model(), path)
    assert str(caught.value).startswith(f"{path} {message}")
    assert "\n" not in str(caught.value)


def test_a_file_without_a_state_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(SpecError, match=r"list\.pt holds a list, where a state dict was expected$"):
        zoo.load_weights(small_model(), tmp_path / "list.pt")
    with pytest.raises(SpecError, match=r"^there is no weights file absent\.pt$"):
        zoo.load_weights(small_model(), "absent.pt")


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(1000),
        nn.BatchNorm2d(1000, dtype=torch.float16),
        nn.BatchNorm3d(1000, affine=False),
        nn.BatchNorm2d(1000, track_running_stats=False),
        nn.SyncBatchNorm(1000),
        FrozenBatchNorm2d(1000),
    ],
    ids=lambda norm: repr(norm),
)
def test_randomise_reaches_every_kind_of_norm(norm: nn.Module) -> None:
    state = torch.get_rng_state()
    identities = {name: id(tensor) for name, tensor in norm.state_dict(keep_vars=True).items()}
    assert zoo.randomise_(norm) is norm
    assert identities == {name: id(tensor) for name, tensor in norm.state_dict(keep_vars=True).items()}
    assert torch.equal(torch.get_rng_state(), state)
    tensors = {name: tensor.float() for name, tensor in norm.state_dict().items()}
    if "running_var" in tensors:
        assert 0.5 <= tensors["running_var"].min() < 0.6 < 1.9 < tensors["running_var"].max() <= 2
        assert tensors["running_mean"].std() == pytest.approx(0.3, rel=0.1)
    if "weight" in tensors:
        magnitude = tensors["weight"].abs()
        assert 5 <= int((magnitude == 0).sum()) <= 40
        assert 0.5 <= magnitude[magnitude > 0].min() < 0.6 < 1.4 < magnitude.max() <= 1.5
        assert 400 < int((tensors["weight"] < 0).sum()) < 600
        assert tensors["bias"].std() == pytest.approx(0.3, rel=0.1)


def test_randomise_is_seeded_and_leaves_other_layers_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    others = {key: tensor for key, tensor in state_of(model).items() if not key.startswith("2.")}
    once = state_of(zoo.randomise_(model, seed=5))
    again = state_of(zoo.randomise_(model, seed=5))
    other_seed = state_of(zoo.randomise_(model, seed=6))
    assert all(torch.equal(once[key], tensor) for key, tensor in others.items())
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["2.running_mean"], other_seed["2.running_mean"])


def test_names_and_families() -> None:
    assert {"resnet18", "fasterrcnn_resnet50_fpn"} <= set(zoo.names("torchvision"))
    assert {"resnet18", "vit_base_patch16_224"} <= set(zoo.names("timm"))
    assert {"resnet18", "ntsnet_cub"} <= set(zoo.names("pytorchcv"))
    specs = ("torchvision:fasterrcnn_resnet50_fpn", "torchvision:resnet18", "timm:seresnet50", "pytorchcv:resnet18_wd4")
    assert [zoo.family(spec) for spec in specs] == ["detection.faster_rcnn", "resnet", "resnet", "resnet"]
    assert zoo.family("networks.py:net") == "own"
    with pytest.raises(SpecError) as caught:
        zoo.names("torchvison")
    assert str(caught.value) == "'torchvison' is no zoo; did you mean torchvision or pytorchcv?"


def test_options_of_a_constructor() -> None:
    assert zoo.build("torchvision:resnet18", options={"num_classes": 7}).fc.out_features == 7
    with pytest.raises(SpecError, match="unexpected keyword argument 'colour'"):
        zoo.build("torch.nn:ReLU", options={"colour": 7})


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_calibrated_statistics(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)).eval()
    zoo.randomise_(model)
    x = 5 * torch.randn(2, 3, 8, 8) + 2
    zoo.calibrate_(model, x)
    between = model[0](x).transpose(0, 1).flatten(1)
    assert torch.allclose(model[1].running_mean, between.mean(1), atol=1e-5)
    assert torch.allclose(model[1].running_var, between.var(1), rtol=1e-4)
    assert not model[1].training
    assert getattr(model[1], "momentum", 0.1) == 0.1


def test_no_variance_is_tiny_by_chance() -> None:
    norm = nn.BatchNorm2d(2).eval()
    x = torch.stack([torch.randn(2, 8, 8), torch.ones(2, 8, 8)], 1)
    zoo.calibrate_(norm, x)
    assert float(norm.running_var[1]) == 0
    zoo.calibrate_(norm, x, floor=0.5)
    assert float(norm.running_var[1]) == pytest.approx(float(norm.running_var[0]) / 4)


def test_no_parameter_stays_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Linear(4, 4))
    nn.init.zeros_(model[0].bias)
    model[4].weight.requires_grad_(False).fill_(1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    assert zoo.wake_(model) is model
    assert torch.equal(state, torch.get_rng_state())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"0.bias", "2.weight", "2.bias", "3.weight"}
    assert all(len(set(dict(model.named_parameters())[name].tolist())) == 4 for name in changed)
    assert float(model[0].bias.detach().abs().min()) >= 0.05
