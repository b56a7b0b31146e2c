"""Example inputs: read in every form, and proposed from the model."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model.inputs import Candidate, candidates, normalise, random_inputs, token_bound


def first_that_runs(model: nn.Module) -> Candidate:
    model.eval()
    for candidate in candidates(model):
        try:
            with torch.inference_mode():
                model(*candidate.args, **candidate.kwargs)
        except Exception:  # noqa: BLE001 - a proposal that does not fit may fail in any way
            continue
        return candidate
    raise AssertionError("no candidate runs")


class HeadFirst(nn.Module):
    """Registers its last layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(7, 2)
        self.stem = nn.Conv2d(3, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


class TwoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, left: Tensor, right: Tensor, weight: float = 1.0) -> Tensor:
        return self.stem(left) - weight * self.stem(right)


class OneByOne(nn.Module):
    """Takes no batch but of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(5))


class Declaring(nn.Module):
    """States the size of its images in an attribute, and takes no other."""

    def __init__(self, attribute: str, value: object) -> None:
        super().__init__()
        setattr(self, attribute, value)
        self.stem = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (48, 40):
            raise ValueError("48x40 only")
        return self.stem(x)


class Config:
    image_size = (48, 40)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Conv2d(3, 4, 3), "float32 2x3x224x224 (from the model itself, Conv2d)"),
        (nn.Sequential(nn.Conv1d(5, 4, 3)), "float32 2x5x224 (from 0, Conv1d)"),
        (nn.Conv3d(3, 4, 3), "float32 2x3x16x112x112 (from the model itself, Conv3d)"),
        (nn.ConvTranspose2d(100, 4, 4), "float32 2x100x4x4 (from the model itself, ConvTranspose2d)"),
        (nn.ConvTranspose1d(6, 4, 4), "float32 2x6x4 (from the model itself, ConvTranspose1d)"),
        (nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), "float32 2x7 (from 0, Linear)"),
        (nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(16)), "float32 2x16x7 (from 0, Linear)"),
        (nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 4)), "float32 2x9 (from 0, BatchNorm1d)"),
        (nn.BatchNorm2d(9), "float32 2x9x224x224 (from the model itself, BatchNorm2d)"),
        (nn.BatchNorm3d(2), "float32 2x2x16x112x112 (from the model itself, BatchNorm3d)"),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), "int64 2x16 (from 0, Embedding)"),
        (nn.LSTM(5, 6), "float32 16x2x5 (from the model itself, LSTM)"),
        (nn.GRU(5, 6, batch_first=True), "float32 2x16x5 (from the model itself, GRU)"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(26 * 26 * 4, 3)),
            "float32 2x1x28x28 (from 0, Conv2d)",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(30 * 30 * 4, 3)),
            "float32 2x3x32x32 (from 0, Conv2d)",
        ),
        (HeadFirst(), "float32 2x3x224x224 (from stem, Conv2d)"),
        (TwoImages(), "2 times float32 2x3x224x224 (from stem, Conv2d)"),
        (OneByOne(), "float32 1x5 (from layer, Linear)"),
        (nn.Linear(4, 3).bfloat16(), "bfloat16 2x4 (from the model itself, Linear)"),
        (nn.Linear(4, 3).double(), "float64 2x4 (from the model itself, Linear)"),
        (Declaring("in_size", (48, 40)), "float32 2x1x48x40 (the model's in_size)"),
        (Declaring("image_size", [48, 40]), "float32 2x1x48x40 (the model's image_size)"),
        (Declaring("config", Config()), "float32 2x1x48x40 (the model's image_size)"),
        (Declaring("pretrained_cfg", {"input_size": (1, 48, 40)}), "float32 2x1x48x40 (timm pretrained_cfg)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_candidate_that_runs(model: nn.Module, expected: str) -> None:
    assert first_that_runs(model).description == expected


@pytest.mark.parametrize(
    ("package", "name", "expected"),
    [
        ("timm", "resnet10t", "float32 2x3x176x176 (timm pretrained_cfg)"),
        ("pytorchcv", "resnet20_cifar10", "float32 2x3x32x32 (the model's in_size)"),
        ("torchvision", "squeezenet1_1", "float32 2x3x224x224 (from features.0, Conv2d)"),
    ],
)
def test_models_of_the_zoos(package: str, name: str, expected: str) -> None:
    from bnfuse.tools.zoo.specs import build

    assert first_that_runs(build(f"{package}:{name}")).description == expected


def test_nothing_is_proposed_where_nothing_tells_a_shape() -> None:
    assert list(candidates(nn.ReLU())) == []


def test_a_lazy_model_gets_no_guess_that_would_fix_its_shape() -> None:
    assert list(candidates(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)))) == []


def test_candidates_are_distinct_and_few() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    shapes = [tuple(candidate.args[0].shape) for candidate in candidates(model)]
    assert len(shapes) == len(set(shapes)) <= 15


def test_the_values_are_seeded_and_the_global_random_state_is_left_alone() -> None:
    model = nn.Linear(4, 3)
    state = torch.get_rng_state()
    once, again = (next(candidates(model)).args[0] for _ in range(2))
    assert torch.equal(once, again)
    assert once.std() > 0.1
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_stay_below_the_size_of_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(3, 4))
    assert token_bound(model) == 3
    assert token_bound(nn.Linear(3, 4)) is None
    (tokens,) = random_inputs(model, [(50, 50)], token_bound(model))
    assert tokens.dtype == torch.int64
    assert tokens.unique().tolist() == [0, 1, 2]


X = torch.zeros(1)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, 2), (X, 2), {}),
        ([X, 2], (X, 2), {}),
        ({"x": X}, (), {"x": X}),
        (OrderedDict(x=X), (), {"x": X}),
        ((), (), {}),
    ],
)
def test_example_inputs_in_every_form(given: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    assert normalise(given) == (args, kwargs)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (None, "NoneType"),
        ("1x3x224x224", "str"),
        (X.numpy(), "numpy.ndarray"),
        ({1: X}, "a dict with the key 1"),
    ],
)
def test_anything_else_is_refused(given: object, got: str) -> None:
    with pytest.raises(InputError) as caught:
        normalise(given)
    assert str(caught.value) == (
        f"example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments; got {got}"
    )
