"""The recipe of CONTRIBUTING.md for a new operator: two files, written as they stand there, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rule_cases import BACKWARD, Case, Net, anything, check, conv

ROOT = Path(__file__).parents[2]


def test_a_rule_takes_two_files(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## A rule for a new operator\n")[1].split("\n## ")[0]
    names = re.findall(r"`((?:src|tests)/[\w/]+\.py)`", text)
    files = dict(zip(names, re.findall(r"```python\n(.*?)```", text, re.DOTALL), strict=True))
    assert len(files) == 2
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("rule_cases.py", "support.py", "conftest.py"):
        (tmp_path / "tests" / "rules").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    for name, source in files.items():
        assert not (ROOT / name).exists(), f"{name} stands in the recipe as new"
        (tmp_path / name).write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "src"), str(tmp_path / "tests")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout


def test_without_it_the_norm_stays() -> None:
    case = Case(
        lambda: Net(lambda m, x: m.n(m.u(x).cumsum(2)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: cumsum in Net: no scale or shift passes through it"],
    )
    check(case)
