"""Shell completion: what a shell offers once it has read the script."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bnfuse.tools.cli import main
from bnfuse.tools.completion import SHELLS

BASH = """
source script.bash
offered() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _shtab_bnfuse
  echo "${COMPREPLY[@]}"
}
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["bnfuse", ""], ["demo", "plan", "fuse", "census"]),
        (["bnfuse", "pl"], ["plan"]),
        (["bnfuse", "census", "t"], ["torchvision", "timm"]),
        (["bnfuse", "fuse", "timm:resnet18", "--we"], ["--weights"]),
        (["bnfuse", "fuse", "timm:resnet18", "--weights", "train"], ["trained.pt"]),
        (["bnfuse", "fuse", "timm:resnet18", "-o", "train"], ["trained.pt"]),
        (["bnfuse", "plan", "train"], ["trained.pt"]),
        (["bnfuse", "plan", "timm:resnet18", "--keep", "train"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash(
    words: list[str],
    offered: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trained.pt").touch()
    Path("script.bash").write_text(script("bash", capsys))
    made = subprocess.run(
        ["bash", "-c", BASH + 'offered "$@"', "bash", *words], capture_output=True, text=True, check=True
    )
    assert made.stdout.split() == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_that_it_can_read(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    assert all(word in text for word in ("bnfuse", "weights", "no-infer-calls", "census"))
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "csh"])
    assert caught.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == [
        "bnfuse: --print-completion takes the package shtab: run",
        "    pip install 'bnfuse[cli]'",
    ]
