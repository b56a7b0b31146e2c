"""The command line: ``bnfuse demo``, ``bnfuse plan SPEC``, ``bnfuse fuse SPEC`` and ``bnfuse census ZOO``.

The exit status is 0 when the model is fused and verified (or planned), 1 when the fused model is not
equivalent (of a census: when a model is wrong or bnfuse crashed on it), and 2 when the command cannot do what was
asked.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import bnfuse
from bnfuse.api import fuse_with_plan, plan_observed
from bnfuse.errors import BnFuseError, InputError, VerificationError
from bnfuse.fusion_plan import Plan
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import first_line, installed_version
from bnfuse.model.inputs import random_inputs
from bnfuse.planner.nothing_fused import nothing_fused
from bnfuse.planner.options import Options
from bnfuse.planner.problem import captured
from bnfuse.printing.sizes import Holding, holdings_table
from bnfuse.printing.tables import decisions_table
from bnfuse.printing.terminal import say, show, show_plan, show_restructuring, show_unseen
from bnfuse.printing.waiting import waiting
from bnfuse.reporting.facts import Facts
from bnfuse.reporting.report import checked_path, write
from bnfuse.restructuring.kinds import ALL, KINDS
from bnfuse.tools import onnx, zoo
from bnfuse.tools.census.ledger import OUTCOMES
from bnfuse.tools.completion import SHELLS, PrintCompletion
from bnfuse.tools.given_inputs import described_tensor, given_inputs, parse_shape
from bnfuse.tools.zoo.weights import ENDINGS, STRUCTURE

EXIT_NOT_EQUIVALENT = 1
EXIT_USAGE = 2
EXIT_CLOSED_PIPE = 141  # as a shell says of a command that SIGPIPE ended

_SAY_INPUTS = "Write what it takes, an --input for each argument, as in --input 1x3x224x224."

logger = logging.getLogger("bnfuse")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind ``bnfuse``; None reads them from the process.

    Returns:
        The exit status; 141 where nobody reads standard output to its end, as behind ``| head``.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (status 0), and when the arguments make no sense (2).
    """
    options = _parser().parse_args(arguments)
    if options.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logger.setLevel(logging.INFO)
    try:
        status = _status(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, as head does. What is left to write goes nowhere, also at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    return status


def _status(options: argparse.Namespace) -> int:
    """Do what was asked for, and say what went wrong."""
    try:
        options.run(options)
    except BnFuseError as error:
        logger.info("what led to the error:", exc_info=error)
        say(str(error))
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=2))
        return EXIT_NOT_EQUIVALENT if isinstance(error, VerificationError) else EXIT_USAGE
    return 0


def parse_count(text: str) -> int:
    """Read a count such as ``150M``.

    >>> parse_count("150M")
    150000000

    Args:
        text: a whole number, with k, M or G behind it for thousands, millions or milliards.

    Raises:
        InputError: it is not of that form.
    """
    found = re.fullmatch(r"([1-9]\d*)([kMG]?)", text)
    if found is None:
        raise InputError(f"{text!r} is no count: write a whole number, such as 150M or 150000000")
    return int(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]]


class _Parser(argparse.ArgumentParser):
    """Says in lines that fit what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        say(message)
        sys.exit(EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bnfuse", description="Remove batch normalisation from trained PyTorch models, exactly.")
    parser.add_argument(
        "--version", action="version", version=f"bnfuse {installed_version() or 'from a folder of sources'}"
    )
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        action=PrintCompletion,
        choices=SHELLS,
        help=f"print a script that completes this command in a shell ({', '.join(SHELLS)})",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fuse a real pretrained network and classify photographs with it")
    demo.set_defaults(run=_demo, json=False)

    common = _Parser(add_help=False)
    common.add_argument(
        "spec",
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME, pytorchcv:NAME, package.module:factory or path/to/file.py:factory",
    )
    common.add_argument(
        "--input",
        metavar="INPUT",
        action="append",
        default=[],
        help="an input: a shape such as 1x3x224x224, with a dtype as in int64:1x10, a .pt file of torch.save (a "
        "tensor, a tuple of arguments or a dict of them by name), or an image, whose pixels are taken from 0 to 1 as "
        "they are; mask=bool:1x1x7x7 gives a keyword argument; repeat it for several (default: inferred from the "
        "model)",
    )
    common.add_argument(
        "--weights",
        metavar="FILE",
        help="a .safetensors file, or a state dict saved with torch.save (default: a model of a zoo gets random "
        "weights and norms, one of your own is taken as it is)",
    )
    common.add_argument(
        "--keep",
        metavar="PATTERN",
        action="append",
        default=[],
        help="a norm to leave alone, by module name or glob pattern; repeat it for more",
    )
    common.add_argument(
        "--call",
        metavar="CALL",
        action="append",
        default=[],
        help="a further call that the fused model is to take, on the same inputs: a method, keyword arguments or both, "
        "such as forward_features, or 'encode normalise=true mask=1x1x14x14'; repeat it for more",
    )
    common.add_argument(
        "--no-infer-calls",
        action="store_true",
        help="count only the calls that are named, and none that are inferred (other sizes, flags, forward_features)",
    )
    common.add_argument(
        "--restructure",
        metavar="KIND",
        action="append",
        default=[],
        help=f"what may change in the structure of the model, so that more norms can go: {', '.join(KINDS)}, or all; "
        "repeat it for more",
    )
    common.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
    common.add_argument(
        "--report",
        metavar="OUT.html",
        type=Path,
        help="write a page with everything: the network before and after, each norm, where error arises, ranges",
    )

    plan = commands.add_parser(
        "plan", parents=[common], help="show for every norm what it would be fused into, or why it would stay"
    )
    plan.add_argument(
        "--all",
        action="store_true",
        help="a row for each norm with all that is said of it, instead of norms grouped by why they stay",
    )
    plan.set_defaults(run=_plan)

    fuse = commands.add_parser("fuse", parents=[common], help="fuse the norms and prove that the outputs agree")
    fuse.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        help="save the fused weights with their structure: as OUT.safetensors, for --weights and bnfuse.load, or with "
        "torch.save as OUT.pt or OUT.pth, for --weights alone",
    )
    fuse.add_argument(
        "--onnx",
        nargs=2,
        metavar=("BEFORE.onnx", "AFTER.onnx"),
        type=Path,
        help="export the model and the fused model with torch.onnx.export, to look at them in Netron",
    )
    fuse.set_defaults(run=_fuse)

    census = commands.add_parser(
        "census", help="build, fuse and verify every model of a zoo, and keep a row of each in a file"
    )
    census.add_argument("zoo", metavar="ZOO", choices=zoo.ZOOS, help=", ".join(zoo.ZOOS))
    census.add_argument("--match", metavar="GLOB", default="*", help="only the models whose name matches, as resnet*")
    census.add_argument(
        "--max-params", metavar="COUNT", type=parse_count, default="150M", help="no larger model (default: 150M)"
    )
    census.add_argument(
        "--jobs", metavar="N", type=int, default=os.cpu_count() or 1, help="models at a time (default: one a core)"
    )
    census.add_argument(
        "--resume",
        "--output",
        dest="output",
        metavar="FILE",
        type=Path,
        help="the file of rows, compressed if it ends in .gz; models that have a row there are not visited again "
        "(default: census-ZOO.jsonl)",
    )
    census.add_argument(
        "--again",
        metavar="OUTCOME",
        action="append",
        default=[],
        choices=OUTCOMES,
        help="visit again the models with this outcome; repeat it for more",
    )
    census.add_argument(
        "--sample",
        action="store_true",
        help="only the smallest model of each family of those in the file, with torch.fx beside; with --restructure "
        "the smallest of each series of names",
    )
    census.add_argument(
        "--restructure",
        action="store_true",
        help="the models of the file once more, with every kind of restructuring, where that may do something; their "
        "rows go into a file of the same name in the folder restructured beside it",
    )
    census.add_argument("--timeout", metavar="SECONDS", type=float, default=300.0, help="for one model (default: 300)")
    census.add_argument("--memory", metavar="GIB", type=float, default=10.0, help="for one model (default: 10)")
    census.set_defaults(run=_census, json=False)

    for command in (demo, plan, fuse, census):
        command.add_argument("--verbose", action="store_true", help="log every decision on standard error")
    return parser


def _demo(options: argparse.Namespace) -> None:
    from bnfuse.tools import demo

    demo.run()


def _plan(options: argparse.Namespace) -> None:
    facts, wanted = _facts(options), _wanted(options)
    model = _model(options)
    inputs = _inputs(options, model)
    calls = _calls(options, model, inputs)
    with _naming(options, calls), _waiting(options, "planning"):
        plan = plan_observed(model, inputs, calls=calls, observer=facts, **wanted)
    if facts is not None:
        write(facts, options.report)
    if options.json:
        _print_json({"spec": options.spec, **plan.to_dict(), **_written(options)})
        return
    _show_plan(plan, options.all)
    if facts is not None:
        print(f"wrote {options.report}")


def _facts(options: argparse.Namespace) -> Facts | None:
    """What collects the facts of a report, if one is wanted; the file is looked at before any work."""
    if options.report is None:
        return None
    checked_path(options.report)
    return Facts(options.spec)


def _written(options: argparse.Namespace) -> dict[str, Any]:
    """The files that were written beside the weights, for JSON."""
    found: dict[str, Any] = {} if options.report is None else {"report": str(options.report)}
    onnx = getattr(options, "onnx", None)
    return found if onnx is None else {**found, "onnx": list(map(str, onnx))}


def _show_plan(plan: Plan, every: bool) -> None:
    if not every:
        show_plan(plan.model, plan.decisions, plan.unseen, plan.restructuring)
        return
    show(decisions_table(plan.model, plan.decisions))
    show_restructuring(plan.restructuring)
    show_unseen(plan.unseen)


def _fuse(options: argparse.Namespace) -> None:
    output: Path | None = options.output
    if output is not None and output.suffix not in ENDINGS:
        raise BnFuseError(f"{output.name} has an ending that is not known: write {', '.join(ENDINGS)}")
    if output is not None and not output.parent.is_dir():
        raise BnFuseError(f"there is no folder {output.parent} to write {output.name} into")
    facts, wanted = _facts(options), _wanted(options)
    if options.onnx is not None:
        onnx.check(options.onnx)
    model = _model(options)
    inputs = _inputs(options, model)
    calls = _calls(options, model, inputs)
    with _naming(options, calls), _waiting(options, "fusing and verifying"):
        fused, plan = fuse_with_plan(model, inputs, calls=calls, observer=facts, **wanted)
    with _waiting(options, "comparing"):
        comparison = bnfuse.compare(model, fused, [Call.of(inputs), *calls])
    if output is not None:
        _save(fused, output)
    if options.onnx is not None:
        with _waiting(options, "exporting"):
            onnx.export([model, fused], Call.of(inputs), options.onnx)
    if facts is not None:
        facts.add_comparison(comparison)
        facts.add_files(_files(options))
        write(facts, options.report)
    before, after = Holding.of(model, len(plan.decisions)), Holding.of(fused, len(plan.kept))
    if options.json:
        report: dict[str, Any] = {"spec": options.spec, "plan": plan.to_dict()}
        report["sizes"] = {"before": vars(before), "after": vars(after)}
        report["comparison"] = comparison.to_dict()
        report |= {"equivalent": True, "output": None if output is None else str(output), **_written(options)}
        _print_json(report)
        return
    show_plan(plan.model, plan.decisions, steps=plan.restructuring)
    if warning := nothing_fused(plan, model):
        say(warning)
    show(holdings_table("What the model holds", before, after, _files(options)))
    print(comparison)
    judged = "" if comparison.within_tolerance() else ", since the difference is rounding, judged in float64"
    print(f"\nequivalent{judged}: {len(plan.fused)} of {len(plan.decisions)} batch norms are gone")
    if output is not None:
        print(f"saved {output}")
    for path in [*([] if options.report is None else [options.report]), *(options.onnx or [])]:
        print(f"wrote {path}")


def _files(options: argparse.Namespace) -> list[tuple[str, int | None, int | None]]:
    """The sizes of the files that were written; that of the weights beside that of those that were read."""
    found: list[tuple[str, int | None, int | None]] = []
    if options.output is not None:
        read = options.weights and Path(options.weights).is_file()
        size = Path(options.weights).stat().st_size if read else None
        found.append(("file", size, options.output.stat().st_size))
    if options.onnx is not None:
        before, after = map(onnx.size, options.onnx)
        found.append(("ONNX file", before, after))
    return found


def _waiting(options: argparse.Namespace, doing: str) -> contextlib.AbstractContextManager[None]:
    """Show what is being done, unless the log does."""
    return contextlib.nullcontext() if options.verbose else waiting(f"{doing} {options.spec}")


def _census(options: argparse.Namespace) -> None:
    from bnfuse.tools.census import run
    from bnfuse.tools.census.worker import Settings

    settings = Settings(
        max_parameters=options.max_params,
        seconds=options.timeout,
        memory=round(options.memory * 2**30),
        rivals=options.sample and not options.restructure,
        infer_calls=not options.restructure,  # what the rows of the census, which those are put beside, were made with
        restructure=options.restructure,
    )
    output = options.output or Path(f"census-{options.zoo}.jsonl")
    visit = run.census_restructured if options.restructure else run.census
    if visit(options.zoo, output, settings, options.jobs, options.match, options.again, options.sample):
        raise VerificationError(f"bnfuse failed on some models: see the rows in {output}")


def _model(options: argparse.Namespace) -> nn.Module:
    """Build the model; an untrained one of a zoo gets random norms, since fresh ones would prove nothing."""
    with _waiting(options, "building"):
        model = zoo.build(options.spec, options.weights)
    if options.weights is None and zoo.is_zoo(options.spec):
        zoo.randomise_(model)
        say("no --weights, so weights and norms are random")
    return model


def _inputs(options: argparse.Namespace, model: nn.Module) -> tuple[Any, ...] | dict[str, Any] | Call:
    if not options.input:
        with _waiting(options, "finding inputs for"):
            call = captured(model, None, advice=_SAY_INPUTS).runs[0].call
        return call.args or call.kwargs
    return given_inputs(options.input, model)


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    """What is asked of `fuse` and `plan`, beside the model and its calls; looked at before any work."""
    chosen = Options(infer_calls=not options.no_infer_calls)
    return {"keep": options.keep, "restructure": _kinds(options), "options": chosen}


def _kinds(options: argparse.Namespace) -> Sequence[str]:
    """The kinds of restructuring that are named on the command line."""
    for kind in options.restructure:
        if kind not in (*KINDS, ALL):
            near = difflib.get_close_matches(kind.lower(), (*KINDS, ALL), 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"--restructure {kind}: {meant}Write {', '.join(KINDS)} or {ALL}; repeat it for several.")
    return tuple(options.restructure)


def _calls(options: argparse.Namespace, model: nn.Module, inputs: Any) -> list[Call]:
    """The further calls that are named on the command line."""
    return [parse_call(text, Call.of(inputs), model) for text in options.call]


def parse_call(text: str, first: Call, model: nn.Module) -> Call:
    """Read a call such as ``encode normalise=true mask=1x1x14x14``.

    >>> parse_call("encode flag=true depth=2 name=big", Call(1), nn.Identity())
    Call(1, flag=True, depth=2, name='big', method='encode')

    Args:
        text: a method (forward if there is none), and keyword arguments: true, false, none, a number, the shape of a
            tensor of random numbers, also with a dtype (``bool:1x14``), or any other word as text.
        first: the call whose inputs it takes.
        model: gives the dtype and device of tensors.

    Raises:
        InputError: it is not of that form.
    """
    method, keywords = FORWARD, dict(first.kwargs)
    for place, word in enumerate(text.split()):
        name, equals, value = word.partition("=")
        if not equals and place == 0 and name.isidentifier():
            method = name
        elif equals and name.isidentifier() and value:
            keywords[name] = _value(value, model)
        else:
            raise InputError(f"{text!r} is no call: write a method and keywords, as in 'encode normalise=true'")
    return Call(*first.args, method=method, **keywords)


@contextlib.contextmanager
def _naming(options: argparse.Namespace, calls: Sequence[Call]) -> Iterator[None]:
    """Say of a call that the model does not take which of the arguments of the command line it was."""
    try:
        yield
    except InputError as error:
        if error.call is None:
            raise
        why = first_line(error.__cause__ or error)
        for text, call in zip(options.call, calls, strict=True):
            if call is error.call:
                raise InputError(
                    f"--call {text!r}: the model does not take this call: {why}\n"
                    f"Write a method and keywords that it has, and shapes that fit --input, as in "
                    f"--call 'encode normalise=true mask=1x1x14x14'."
                ) from error
        given = " ".join(f"--input {shape}" for shape in options.input) or "without --input"
        raise InputError(
            f"{given}: the model does not run on these inputs: {why}\n"
            f"Write a shape that it takes for each of its positional inputs, as in --input 1x3x224x224."
        ) from error


_WORDS = {"true": True, "false": False, "none": None}


def _value(text: str, model: nn.Module) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        return random_inputs(model, [parse_shape(text)])[0]
    if re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)*", text):
        return described_tensor(text, model)
    try:
        return float(text)
    except ValueError:
        return text


def _save(model: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        bnfuse.save(model, path)
        return
    try:
        torch.save({"state_dict": model.state_dict(), STRUCTURE: bnfuse.structure(model).to_dict()}, path)
    except (OSError, RuntimeError) as error:
        raise BnFuseError(f"{path} cannot be written: {error}") from error


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    sys.exit(main())
