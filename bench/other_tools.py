"""``python -m bench.other_tools SPEC FAMILY SECONDS``: every tool that is installed on one model, a line for each."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnfuse
from bnfuse.model import pytree
from bnfuse.model.describe import first_line
from bnfuse.tools import zoo
from bnfuse.tools.census.rivals import counted_run
from bnfuse.tools.census.worker import Job, Settings, Visit, built, running
from bnfuse.tools.zoo import inputs as zoo_inputs
from bnfuse.verify.float64 import float64_copy, to_float64
from bnfuse.verify.measure import compare_outputs

WRONG = 1e-2
"""Relative L2 error of an output that no rounding explains, in float32 either."""

Args = tuple[Any, ...]
Result = tuple[int, Any]
"""How many norms ran, and what came out."""


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        package: that it comes with.
        run: what it makes of a model that it may change, run on the inputs.
        wide: whether it takes models in float64.
    """

    package: str
    run: Callable[[nn.Module, Args], Result]
    wide: bool = True

    def version(self) -> str:
        """The version that is installed, "" where none is."""
        try:
            return version(self.package).partition("+")[0]
        except PackageNotFoundError:
            return ""


def _bnfuse(model: nn.Module, args: Args) -> Result:
    return counted_run(bnfuse.fuse(model, args), args, False)


def _restructured(model: nn.Module, args: Args) -> Result:
    return counted_run(bnfuse.fuse(model, args, restructure=True), args, False)


def _torch_fx(model: nn.Module, args: Args) -> Result:
    return counted_run(optimization.fuse(model), args, False)


def _children(model: nn.Module, args: Args) -> Result:
    """A convolution and the norm that is declared after it, as in the recipes that are found in many places."""

    def fuse(module: nn.Module) -> None:
        last, before = "", None
        for name, child in list(module.named_children()):
            if isinstance(before, nn.Conv2d) and isinstance(child, nn.BatchNorm2d):
                setattr(module, last, fuse_conv_bn_eval(before, child))
                setattr(module, name, nn.Identity())
            else:
                fuse(child)
            last, before = name, child

    fuse(model)
    return counted_run(model, args, False)


def _brevitas(model: nn.Module, args: Args) -> Result:
    module = importlib.import_module("brevitas.graph.quantize")
    return counted_run(module.preprocess_for_quantize(model, relu6_to_relu=False).eval(), args, False)


def _aimet(model: nn.Module, args: Args) -> Result:
    module = importlib.import_module("aimet_torch.batch_norm_fold")
    module.fold_all_batch_norms(model, None, dummy_input=args)
    return counted_run(model.eval(), args, False)


def _onnx_runtime(model: nn.Module, args: Args) -> Result:
    """The exporter with its own optimisations, then those of ONNX Runtime that leave a standard graph."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        exported, optimised = str(Path(folder) / "exported.onnx"), str(Path(folder) / "optimised.onnx")
        torch.onnx.export(model, args, exported, dynamo=True, verbose=False)
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = optimised
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
        given = [tensor.numpy() for _, tensor in pytree.tensors(args)]
        names = [value.name for value in session.get_inputs()]
        outputs = [torch.from_numpy(found) for found in session.run(None, dict(zip(names, given, strict=True)))]
        nodes = onnx.load(optimised, load_external_data=False).graph.node
    return sum(node.op_type == "BatchNormalization" for node in nodes), outputs


TOOLS = {
    "bnfuse": Tool("bnfuse", _bnfuse),
    "bnfuse, restructured": Tool("bnfuse", _restructured),
    "torch.fx fuse": Tool("torch", _torch_fx),
    "pairs by declaration": Tool("torch", _children),
    "torch.onnx, ONNX Runtime": Tool("onnxruntime", _onnx_runtime, wide=False),
    "Brevitas": Tool("brevitas", _brevitas),
    "AIMET": Tool("aimet-torch", _aimet),
}


@dataclass(frozen=True)
class Case:
    """A model, its inputs, how many norms run and what comes out."""

    model: nn.Module
    args: Args
    norms: int
    expected: Any

    @staticmethod
    def of(model: nn.Module, args: Args) -> Case:
        return Case(model, args, *counted_run(model, args, False))


def judged(tool: Tool, case: Case) -> dict[str, Any]:
    """Run a tool on a copy of a model, and compare what comes out with what the model gives."""
    try:
        left, got = tool.run(copy.deepcopy(case.model), pytree.map_tensors(case.args, torch.clone))
    except Exception as error:  # noqa: BLE001 (a tool that fails is a result)
        return {"norms": case.norms, "left": case.norms, "verdict": "fails", "why": first_line(error)[:200]}
    expected = case.expected if tool.wide else [tensor for _, tensor in pytree.tensors(case.expected)]
    outputs = compare_outputs(expected, got).outputs
    distance = max((0.0 if output.exact else output.relative_l2 for output in outputs), default=0.0)
    why = next((output.problem for output in outputs if output.problem), f"relative L2 error {distance:.1e}")
    if any(output.problem for output in outputs) or distance > WRONG:
        return {"norms": case.norms, "left": case.norms, "verdict": "wrong", "why": why}
    return {"norms": case.norms, "left": left, "verdict": "right", "why": why}


def main(spec: str, family: str, seconds: str) -> int:
    """Print a line for each tool, and end after so many seconds of processor time.

    The models are in float64 where they and a tool take that: a detector, which sorts and drops boxes, may give others
    for another rounding.
    """
    import resource  # not on every system

    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    here = Visit(Job(spec, family), Settings(), lambda phase: None)
    form = zoo_inputs.form(here.job.zoo, family)
    model = built(here, form.options if form is not None else {})
    zoo.wake_(zoo.randomise_(model, here.seed, dead=0.0), here.seed)
    args = running(here, model, form).args
    with torch.no_grad():
        narrow = Case.of(model, args)
        try:
            wide = Case.of(float64_copy(model), pytree.map_tensors(args, to_float64))
        except RuntimeError:  # its code makes tensors of float32
            wide = narrow
        for name, tool in TOOLS.items():
            if tool.version():
                print(json.dumps({"tool": name, **judged(tool, wide if tool.wide else narrow)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
