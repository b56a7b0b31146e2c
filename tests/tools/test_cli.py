"""The command line: exit status, standard output and error, files written."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bnfuse
from bnfuse.errors import InputError, VerificationError
from bnfuse.model.calls import Call
from bnfuse.tools import cli
from bnfuse.tools.cli import main, parse_call
from bnfuse.tools.given_inputs import parse_shape
from bnfuse.tools.zoo.specs import build

NETWORKS = """
import torch
from torch import nn
from bnfuse.tools.zoo import randomise_

def net():
    torch.manual_seed(0)
    return randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid()))

def plain():
    return nn.Linear(3, 4)

def tokens():
    return randomise_(nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(60, 4), nn.BatchNorm1d(4)))

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), randomise_(nn.BatchNorm1d(4))

    def forward(self, x, mode="plain"):
        return self.norm(self.linear(x))

    def encode(self, x, raw=False):
        return self.linear(x) if raw else self.forward(x)

    def other(self, x, mask):
        return self.linear(x) * mask

def encoder():
    return Encoder()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(3, 4), nn.Linear(5, 4), randomise_(nn.BatchNorm1d(4))

    def forward(self, a, b):
        return self.norm(self.left(a)) + self.right(b)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("networks", None)
    logging.getLogger("bnfuse").setLevel(logging.NOTSET)


@pytest.mark.parametrize(("text", "shape"), [("1x3x224x224", (1, 3, 224, 224)), ("7", (7,)), ("10x2", (10, 2))])
def test_shapes(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "3x", "x3", "0x3", "-1x3", "1,3", "1X3", "1x3.5", "1x 3"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_shape(text)
    assert str(caught.value) == f"{text!r} is no shape: write positive whole numbers as in 1x3x224x224"


def unwrapped(said: str) -> str:
    """A message without the line breaks that make it fit."""
    assert max(map(len, said.splitlines())) <= 80
    return re.sub(r"\n {4}(?=\S)", " ", said)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:net"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "Sequential: 2 batch norms, 1 fused, 1 kept"
    assert lines[3].split() == ["1", "BatchNorm2d", "4", "0"]
    assert lines[4] == "kept: 3"
    assert lines[5].startswith("  backward: ")
    assert captured.err == ""


def test_plan_with_a_row_for_each_norm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:net", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sequential: 2 batch norms, 1 fused, 1 kept"
    assert lines[3].split() == ["1", "BatchNorm2d", "4", "fused", "into", "0"]
    assert lines[4].split()[:4] == ["3", "BatchNorm2d", "4", "kept:"]


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks:net", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["spec"], data["norms"], data["fused"], data["kept"]) == ("networks:net", 2, 1, 1)
    assert data["decisions"][0]["into"] == ["0"]
    assert data["decisions"][1]["reasons"]


def test_fuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "networks.py:net", "--input", "2x3x9x9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Sequential: 2 batch norms, 1 fused, 1 kept\n")
    assert "(2, 4, 7, 7)" in out
    assert out.endswith("\nequivalent: 1 of 2 batch norms are gone\n")


def test_what_the_model_holds_before_and_after(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    torch.save(build("networks.py:net").state_dict(), folder / "weights.pt")

    def said(*arguments: str) -> list[str]:
        assert main(["fuse", "networks.py:net", *arguments]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        start = lines.index("What the model holds") + 3
        return lines[start : lines.index("", start)]

    rows = ["batch norms 2 1 -1", "parameters 128 120 -8", "buffers 18 9 -9", "size (MB) 0.001 0.001 -0.000"]
    assert said() == rows
    *first, last = said("-o", "out.pt")
    sizes = {name: (folder / name).stat().st_size for name in ("weights.pt", "out.pt")}
    assert (first, last) == (rows, f"file (MB) {sizes['out.pt'] / 1e6:.3f}")
    *_, last = said("-o", "out.pt", "--weights", "weights.pt")
    change = (folder / "out.pt").stat().st_size - sizes["weights.pt"]
    assert last == f"file (MB) {sizes['weights.pt'] / 1e6:.3f} {sizes['out.pt'] / 1e6:.3f} {change / 1e6:+.3f}"
    assert main(["fuse", "networks.py:net", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["sizes"]
    assert data["before"] == {"norms": 2, "parameters": 128, "buffers": 18, "size": 4 * 144 + 8 * 2}
    assert data["after"] == {"norms": 1, "parameters": 120, "buffers": 9, "size": 4 * 128 + 8}


def test_fuse_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "networks.py:net", "--json", "--input", "2x3x9x9", "-o", "out.pt"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["equivalent"] is True
    assert data["output"] == "out.pt"
    assert data["plan"]["fused"] == 1
    assert data["comparison"]["outputs"][0]["shape"] == [2, 4, 7, 7]
    assert captured.err == ""


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_the_fused_weights_are_saved(name: str, folder: Path) -> None:
    assert main(["fuse", "networks.py:net", "-o", name]) == 0
    path = folder / name
    if name.endswith("safetensors"):
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == {"0.weight", "0.bias", *(f"3.{part}" for part in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    ))}  # fmt: skip
    fused = bnfuse.fuse(build("networks.py:net"))
    assert all(torch.equal(fused.state_dict()[key], tensor) for key, tensor in state.items())


def test_weights_are_loaded(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    state = {key: 2 * tensor for key, tensor in build("networks.py:net").state_dict().items()}
    torch.save(state, folder / "weights.pt")
    assert main(["fuse", "networks.py:net", "--weights", "weights.pt", "-o", "out.pt"]) == 0
    saved = torch.load(folder / "out.pt", weights_only=True)["state_dict"]
    assert torch.equal(saved["3.running_mean"], state["3.running_mean"])


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_fused_weights_are_read_again(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "networks.py:net", "-o", name]) == 0
    capsys.readouterr()
    assert main(["plan", "networks.py:net", "--weights", name, "--json"]) == 0
    assert [decision["norm"] for decision in json.loads(capsys.readouterr().out)["decisions"]] == ["3"]
    fused, again = bnfuse.fuse(build("networks.py:net")), build("networks.py:net", folder / name)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in fused.state_dict().items())
    assert main(["plan", "networks.py:encoder", "--weights", name]) == 2
    assert "is that of another model" in capsys.readouterr().err


def test_an_unknown_ending(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "networks.py:net", "-o", "out.onnx"]) == 2
    assert "write .safetensors, .pt, .pth" in capsys.readouterr().err


def test_several_inputs_and_tokens() -> None:
    assert main(["fuse", "networks.py:Two", "--input", "2x3", "--input", "2x5"]) == 0
    assert main(["fuse", "networks.py:tokens", "--input", "3x10"]) == 0


def test_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:net", "--json", "--keep", "1", "--keep", "[3]"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2


def test_an_untrained_zoo_model_gets_random_norms_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pytorchcv:resnet20_cifar10", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kept"] == 0
    assert captured.err == "bnfuse: no --weights, so weights and norms are random\n"


def test_a_model_without_norms_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:plain"]) == 0
    assert capsys.readouterr().out == "Linear: no batch norm\n\n"
    assert main(["fuse", "networks.py:plain", "-o", "plain.pt"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Linear: no batch norm\n\n")
    assert captured.err.startswith("bnfuse: Linear holds no batch norm, so nothing was fused")
    assert torch.load("plain.pt")["state_dict"].keys() == {"weight", "bias"}
    assert main(["fuse", "networks.py:plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["norms"] == 0


def test_verbose_logs_each_norm(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["plan", "networks.py:net", "--verbose"]) == 0
    assert [record.message.split(":")[0] for record in caplog.records if record.name == "bnfuse"] == [
        "1",
        "3",
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["plan", "timm:resnet1888"], "SpecError", "timm has no model 'resnet1888'; did you mean resnet18"),
        (["plan", "networks.py:ne"], "SpecError", "networks.py has no 'ne'; did you mean net"),
        (["plan", "networks.py:net", "--input", "1xx3"], "InputError", "'1xx3' is no shape"),
        (["fuse", "networks.py:net", "--input", "2x5x9x9"], "InputError", "--input 2x5x9x9: the model does not run"),
        (["fuse", "networks.py:net", "--keep", "tail.*"], "InputError", ""),
        (
            ["fuse", "networks.py:net", "--weights", "absent.pt"],
            "SpecError",
            "there is no weights file absent.pt",
        ),
        (
            ["fuse", "networks.py:net", "-o", "absent/out.pt"],
            "BnFuseError",
            "there is no folder absent to write out.pt into",
        ),
    ],
)
def test_a_mistake_is_told_plainly_with_status_2(
    arguments: list[str], error: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"bnfuse: {message}")
    assert "Traceback" not in captured.err
    assert main([*arguments, "--json"]) == 2
    data = json.loads(capsys.readouterr().out)
    assert data["error"] == error
    assert data["message"].startswith(message)


def test_inputs_that_cannot_be_inferred_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "torch.nn:ReLU"]) == 2
    said = unwrapped(capsys.readouterr().err)
    assert said.endswith("\nWrite what it takes, an --input for each argument, as in --input 1x3x224x224.\n")
    assert "example_inputs" not in said


def test_a_fused_model_that_is_not_equivalent_has_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse(*_: object, **__: object) -> None:
        raise VerificationError("the outputs differ")

    monkeypatch.setattr(cli, "fuse_with_plan", fuse)
    assert main(["fuse", "networks.py:net", "-o", "out.pt"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "bnfuse: the outputs differ\n"
    assert captured.out == ""
    assert not Path("out.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--version"], 0), (["--help"], 0), ([], 2), (["plan"], 2), (["melt", "timm:resnet18"], 2)],
)
def test_what_argparse_answers(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == status
    if arguments == ["--version"]:
        assert capsys.readouterr().out == f"bnfuse {version('bnfuse')}\n"


@pytest.mark.parametrize("start", [[str(Path(sys.executable).parent / "bnfuse")], [sys.executable, "-m", "bnfuse"]])
def test_the_installed_command(folder: Path, start: list[str]) -> None:
    command = [*start, "plan", "networks:net", "--json"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["fused"] == 1


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bnfuse", "plan", "networks:net"]
    with os.fdopen(writing, "w") as stdout:
        finished = subprocess.run(command, cwd=folder, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (141, "")


# Further calls --------------------------------------------------------------------------------------------------------


def test_calls_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:encoder", "--input", "2x3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fused"] == 1
    named = ["--input", "2x3", "--call", "encode raw=true", "--json"]
    assert main(["plan", "networks.py:encoder", *named]) == 0
    assert json.loads(capsys.readouterr().out)["fused"] == 0
    assert main(["fuse", "networks.py:encoder", *named]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]


def test_what_was_not_seen_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:encoder", "--input", "2x3"]) == 0
    assert "not seen: mode was never given another value" in capsys.readouterr().out
    assert main(["plan", "networks.py:encoder", "--input", "2x3", "--no-infer-calls"]) == 0
    assert "not seen" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["encode raw", "=true", "encode a=", "a b"])
def test_what_is_no_call(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "networks.py:encoder", "--input", "2x3", "--call", text]) == 2
    assert "is no call" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "fuse"])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("encode raww=true", "unexpected keyword argument 'raww'"),
        ("encode x=2x4", "multiple values for argument 'x'"),
        ("other mask=7x9", "The size of tensor"),
    ],
)
def test_a_call_that_the_model_does_not_take(
    command: str, text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["networks.py:encoder", "--input", "2x3", "--call", "encode raw=true", "--call", text]
    assert main([command, *arguments]) == 2
    first, second = unwrapped(capsys.readouterr().err).strip().split("\n")
    assert first.startswith(f"bnfuse: --call {text!r}: the model does not take this call: ")
    assert why in first
    assert "--input" in second
    assert "bnfuse.fuse(" not in first + second


@pytest.mark.parametrize(("columns", "width"), [(None, 80), ("50", 50), ("200", 200)])
def test_messages_fit_the_terminal(
    columns: str | None, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(cli, "waiting", lambda _: contextlib.nullcontext())
        monkeypatch.setenv("COLUMNS", columns)
    arguments = ["networks.py:Two", "--input", "2x3", "--input", "2x7"]
    assert main(["plan", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert width / 2 < max(map(len, lines)) <= width
    with pytest.raises(SystemExit):
        main(["census", "timm", "--again", "never"])
    assert max(map(len, capsys.readouterr().err.splitlines())) <= width


def test_inputs_that_the_model_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--input", "2x3", "--input", "2x7"]
    assert main(["plan", "networks.py:Two", *shapes, "--call", "forward"]) == 2
    first, second = unwrapped(capsys.readouterr().err).strip().split("\n")
    assert first.startswith(
        "bnfuse: --input 2x3 --input 2x7: the model does not run on these inputs: RuntimeError: mat1"
    )
    assert second.endswith("as in --input 1x3x224x224.")


def test_values_of_keywords() -> None:
    call = parse_call("a=1 b=-2.5 c=none d=False e=2x3 f=word", Call(), torch.nn.Linear(1, 1).double())
    shape = call.kwargs.pop("e")
    assert (shape.shape, shape.dtype) == ((2, 3), torch.float64)
    assert call.kwargs == {"a": 1, "b": -2.5, "c": None, "d": False, "f": "word"}
