"""The rows of a census, and the file that keeps them.

A file holds one JSON object a line: a heading with the versions, then rows, the newest of a model counting. A line is
written and flushed as soon as a model is done, so an interruption loses nothing but the models at work; a last line
that was torn is left out. A name that ends in ``.gz`` makes a compressed file, in which each new line is a member of
its own until the census closes it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from bnfuse.errors import BnFuseError

FUSED = "fused"
NO_NORMS = "no norms"
SAME = "same as"
TOO_LARGE = "too large"
NOT_BUILT = "cannot be built"
NOT_RUN = "does not run"
WRONG = "wrong"
CRASHED = "crashed"

OUTCOMES = (FUSED, NO_NORMS, SAME, TOO_LARGE, NOT_BUILT, NOT_RUN, WRONG, CRASHED)
FAILURES = (WRONG, CRASHED)
"""The outcomes that are mistakes of bnfuse; `NOT_BUILT` and `NOT_RUN` are the zoo's own."""


RESTRUCTURED = "restructured"
"""The folder, beside the files of rows, of those that were made with restructuring."""


@dataclass(frozen=True)
class KeptReason:
    """Why a norm stays, without names: two norms that stay for the same reason have equal ones.

    Attributes:
        direction: "backward", "forward" or "beside", None if no way was tried.
        operator: the operator that refused, None if it was none.
        code: of the cause, see :mod:`bnfuse.reasons`.
    """

    direction: str | None
    operator: str | None
    code: str


@dataclass(frozen=True)
class Kept:
    """Norms of one model that stay for the same reasons.

    Attributes:
        count: how many.
        reasons: one for each way that was tried.
        norm: the name of one of them.
        full: its reasons in full, with names.
    """

    count: int
    reasons: tuple[KeptReason, ...]
    norm: str
    full: str


@dataclass(frozen=True)
class Rival:
    """What another tool made of the model.

    Attributes:
        removed: norms removed; None if it failed.
        error: relative L2 error of its outputs in float64; None if it failed, or gave other outputs.
        failure: what it raised, empty if nothing.
    """

    removed: int | None = None
    error: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Restructured:
    """What ``restructure=True`` made of the model.

    Attributes:
        kinds: the kinds of restructuring that there were when the row was made.
        plain: norms that go without restructuring, by the same code.
        steps: how many steps were carried out, by kind.
        gone: norms that stay without restructuring and go with it, by the kind of the step that lets them go; "" where
            no single step can be told.
        grown: by how many numbers the parameters of the model grow through the steps.
    """

    kinds: tuple[str, ...]
    plain: int
    steps: Mapping[str, int] = field(default_factory=dict)
    gone: Mapping[str, int] = field(default_factory=dict)
    grown: int = 0


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        model: its name in the zoo.
        family: the file of the zoo that it comes from.
        outcome: one of `OUTCOMES`.
        parameters: how many numbers it has to train.
        input: the shapes of the inputs that it was fused with.
        other: the shapes of the inputs of the last check, other values and if possible of another size and batch.
        norms: batch norms that it holds.
        executed: those that ran.
        removed: those that went.
        kept: those that ran and stayed, by reason.
        error64: relative L2 error of the fused model in float64, on the other inputs; None if it could not be had.
        noise64: of a model with an error64 above 1e-9, the relative L2 error that moving each of its parameters by one
            unit in the last place makes in float64.
        widened: whether casts in the code of the model were widened to float64 for that.
        own32, error32: relative L2 error of the model, and of the fused model, in float32, against float64.
        seconds: by phase: build, forward, fuse, verify, and total.
        fingerprint: of its operators and shapes.
        same_as: the model of the same operators and shapes that was done before.
        calibrated: whether its statistics come from a run.
        alive: whether two samples give different outputs, None if that was not to be seen.
        phase: what it was doing when it failed.
        error: why it failed.
        rivals: what other tools made of it, by name.
        restructured: in a row of the pass in which the structure may change, what that did.
    """

    model: str
    family: str
    outcome: str
    parameters: int | None = None
    input: str | None = None
    other: str | None = None
    norms: int | None = None
    executed: int | None = None
    removed: int | None = None
    kept: tuple[Kept, ...] = ()
    error64: float | None = None
    widened: bool = False
    own32: float | None = None
    error32: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str | None = None
    same_as: str | None = None
    calibrated: bool | None = None
    alive: bool | None = None
    phase: str | None = None
    error: str | None = None
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    noise64: float | None = None
    restructured: Restructured | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without what is empty."""
        empty = {name.name: name.default for name in fields(Row)} | {"seconds": {}, "rivals": {}}
        return {name: value for name, value in asdict(self).items() if name not in empty or value != empty[name]}

    @staticmethod
    def of(data: Mapping[str, Any]) -> Row:
        """The row that `to_dict` wrote; what it does not know is left out."""
        known = {name.name: data[name.name] for name in fields(Row) if name.name in data}
        known["kept"] = tuple(
            Kept(k["count"], tuple(KeptReason(**reason) for reason in k["reasons"]), k["norm"], k["full"])
            for k in data.get("kept", ())
        )
        known["rivals"] = {name: Rival(**rival) for name, rival in data.get("rivals", {}).items()}
        if "restructured" in known:
            found = known["restructured"]
            known["restructured"] = Restructured(**{**found, "kinds": tuple(found["kinds"])})
        return Row(**known)


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Row], bool]:
    """Read a file of rows.

    Returns:
        The headings, the newest row of each model by name, and whether the file holds nothing else: no older rows of
        a model and no torn line.

    Raises:
        BnFuseError: it is no file of rows.
    """
    headings: list[dict[str, Any]] = []
    rows: dict[str, Row] = {}
    lines, clean = _lines(path)
    for number, line in enumerate(lines):
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise BnFuseError(f"{path} is no file of a census: line {number + 1} is no JSON") from None
            clean = False
            break
        if "census" in data:
            headings.append(data)
        elif "model" in data and "outcome" in data:
            clean &= data["model"] not in rows
            rows.pop(data["model"], None)
            rows[data["model"]] = Row.of(data)
        else:
            raise BnFuseError(f"{path} is no file of a census: line {number + 1} is neither heading nor row")
    return headings, rows, clean


def _lines(path: Path) -> tuple[list[str], bool]:
    """Every whole line, and whether the file ends where a line ends."""
    content = path.read_bytes()
    whole = True
    if path.suffix == ".gz":
        content, whole = _decompressed(content)
    whole &= not content or content.endswith(b"\n")
    return content.decode(errors="replace").splitlines(), whole


def _decompressed(content: bytes) -> tuple[bytes, bool]:
    """As much as can be had of a compressed file whose last member may be torn."""
    out = io.BytesIO()
    while content:
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            out.write(member.decompress(content))
        except zlib.error:
            return out.getvalue(), False
        if not member.eof:
            return out.getvalue(), False
        content = member.unused_data
    return out.getvalue(), True


class Ledger:
    """A file of rows that is open for more of them.

    Args:
        path: it is made if it does not exist, and mended if its last line was torn.
        heading: the versions of everything that takes part.
    """

    def __init__(self, path: Path, heading: Mapping[str, Any]) -> None:
        self.path = path
        self.headings, self.rows, clean = read(path) if path.exists() else ([], {}, True)
        if not clean:
            self._rewrite()
        self.file = self._open()
        if heading not in self.headings[-1:]:
            self.headings.append(dict(heading))
            self._write(heading)

    def _open(self) -> IO[bytes]:
        return self.path.open("ab")

    def add(self, row: Row) -> None:
        """Write a row; an older one of the same model no longer counts."""
        self.rows.pop(row.model, None)
        self.rows[row.model] = row
        self._write(row.to_dict())

    def _write(self, data: Mapping[str, Any]) -> None:
        self.file.write(_packed(_line(data), self.path))
        self.file.flush()

    def close(self, order: Iterable[str] = ()) -> None:
        """Write the file anew in a settled order, without older rows.

        Args:
            order: names of models; others follow in the order in which they came.
        """
        self.file.close()
        names = [*(name for name in order if name in self.rows), *self.rows]
        self.rows = {name: self.rows[name] for name in dict.fromkeys(names)}
        self._rewrite()

    def _rewrite(self) -> None:
        lines = [*self.headings, *(row.to_dict() for row in self.rows.values())]
        new = self.path.with_name(self.path.name + ".new")
        new.write_bytes(_packed(b"".join(map(_line, lines)), self.path))
        os.replace(new, self.path)


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _packed(content: bytes, path: Path) -> bytes:
    return gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
