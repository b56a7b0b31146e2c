"""Inputs that the command line takes: shapes, names, dtypes, files, and what is said of those that cannot be read."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from bnfuse.errors import InputError
from bnfuse.model.calls import Call
from bnfuse.tools.cli import main, parse_call
from bnfuse.tools.given_inputs import given_inputs

MASKED = """
import torch
from torch import nn
from bnfuse.tools.zoo import randomise_

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, mask, scale=None):
        assert mask.dtype == torch.bool
        y = self.norm(self.conv(x)).relu() * mask
        return y if scale is None else y * scale

def masked():
    torch.manual_seed(0)
    return randomise_(Masked())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "masked.py").write_text(MASKED)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("masked", None)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("2x3", torch.float64),
        ("bool:2x3", torch.bool),
        ("int64:2x3", torch.int64),
        ("uint8:2x3", torch.uint8),
        ("bfloat16:2x3", torch.bfloat16),
        ("complex64:2x3", torch.complex64),
    ],
)
def test_dtypes(text: str, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 3).double()
    [made] = given_inputs([text], model)
    assert (made.shape, made.dtype) == ((2, 3), dtype)
    assert given_inputs([f"x={text}"], model).keys() == {"x"}
    assert torch.equal(given_inputs([text], model)[0], made)
    assert len(set(made.flatten().tolist())) > 1


def test_two_inputs_of_a_shape_are_not_the_same() -> None:
    for text in ("4x5", "float32:4x5"):
        one, other = given_inputs([text, text], nn.Linear(3, 3))
        assert not torch.equal(one, other)


def test_whole_numbers_are_tokens_that_the_model_knows() -> None:
    model = nn.Sequential(nn.Embedding(7, 2))
    for text in ("9x50", "int32:9x50"):
        [made] = given_inputs([text], model)
        assert set(made.unique().tolist()) == set(range(7))
    assert given_inputs(["mask=bool:9x50"], model)["mask"].dtype == torch.bool


def test_positional_and_named_inputs_are_a_call() -> None:
    call = given_inputs(["2x3", "mask=bool:2x3"], nn.Linear(3, 3))
    assert isinstance(call, Call)
    assert (len(call.args), set(call.kwargs)) == (1, {"mask"})


@pytest.mark.parametrize(
    "inputs",
    [
        ["2x3x5x5", "mask=bool:2x1x5x5"],
        ["x=2x3x5x5", "mask=bool:2x1x5x5"],
        ["2x3x5x5", "bool:2x1x5x5"],
        ["2x3x5x5", "bool:2x1x5x5", "scale=float32:1"],
        ["batch.pt"],
        ["by_name.pt"],
        ["x.pt", "mask=mask.pt"],
        ["photo.png", "bool:1x1x5x6"],
    ],
)
def test_a_model_with_a_mask_is_fused(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    x, mask = torch.randn(2, 3, 5, 5), torch.rand(2, 1, 5, 5) > 0.5
    torch.save((x, mask), "batch.pt")
    torch.save({"x": x, "mask": mask}, "by_name.pt")
    torch.save(x, "x.pt")
    torch.save(mask, "mask.pt")
    Image.new("RGB", (6, 5), (255, 0, 51)).save("photo.png")
    arguments = [word for text in inputs for word in ("--input", text)]
    assert main(["fuse", "masked.py:masked", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["plan"]["fused"] == 1
    assert data["comparison"]["within_tolerance"]
    assert captured.err == (
        "bnfuse: photo.png is 1x3x5x6 float32, its pixels from 0 to 1, neither resized\n    nor normalised\n"
        if "photo.png" in inputs
        else ""
    )


@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_pixels_stay_where_they_are(kind: str) -> None:
    image = Image.new(kind, (3, 2))
    image.putpixel((2, 1), (255, 0, 51) if kind == "RGB" else 51)
    image.save("photo.png")
    [made] = given_inputs(["photo.png"], nn.Linear(1, 1).double())
    expected = torch.zeros(1, 3, 2, 3, dtype=torch.float64)
    expected[0, :, 1, 2] = torch.tensor([1.0, 0.0, 0.2] if kind == "RGB" else [0.2] * 3, dtype=torch.float64)
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["bol:1x2"], "'bol' is no dtype: did you mean bool?"),
        (["real:1x2"], "'real' is no dtype: write one of float64, "),
        (["int64:1xx2"], "'1xx2' is no shape: write"),
        (["mask="], "'mask=' is no shape"),
        (["x=1x2", "x=1x3"], "--input x=1x3: x is given twice"),
        (["absent.pt"], "there is no file absent.pt"),
        (["x=absent.png"], "there is no file absent.png"),
        (["inputs.npy"], "inputs.npy cannot be read as an input: write a shape"),
        (["broken.pt"], "broken.pt cannot be read: "),
        (["module.pt"], "module.pt cannot be read: UnpicklingError. Save the inputs alone"),
        (["number.pt"], "number.pt holds int: save a tensor"),
        (["broken.png"], "broken.png cannot be read as an image: UnidentifiedImageError"),
    ],
)
def test_a_mistake_is_told_plainly(inputs: list[str], message: str, folder: Path) -> None:
    (folder / "broken.pt").write_text("nothing")
    (folder / "broken.png").write_text("nothing")
    torch.save(nn.Identity(), "module.pt")
    torch.save(3, "number.pt")
    with pytest.raises(InputError) as caught:
        given_inputs(inputs, nn.Linear(3, 3))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_image_without_pillow(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "photo.png").write_text("anything")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match="run pip install pillow"):
        given_inputs(["photo.png"], nn.Linear(3, 3))


def test_calls_take_dtypes_too() -> None:
    call = parse_call("mask=bool:2x3 ids=int64:4", Call(), nn.Linear(3, 3))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in call.kwargs.items()} == {
        "mask": (torch.bool, (2, 3)),
        "ids": (torch.int64, (4,)),
    }
