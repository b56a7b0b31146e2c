"""``python -m fuzz --files``: files of fused models, damaged in all kinds of ways, are loaded.

Each must be refused with a ``CheckpointError`` that leaves the model as it was to the bit, or load what was saved to
the bit (where the damage hit what does not matter). Nothing else may happen: no other exception, no half-loaded model,
no code run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bnfuse.checkpoint.files import _hash
from bnfuse.errors import CheckpointError
from bnfuse.tools.zoo.randomise import randomise_

_HEADER = 8
"""Bytes of the length of the header, which begins a file."""


class Net(nn.Module):
    """Norms that go, a created bias, a tied weight, an activation in place, a buffer and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.right(self.left(self.stem(x).mean((2, 3))).tanh()))
        return y


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the contents behind it."""
    (size,) = struct.unpack("<Q", data[:_HEADER])
    return json.loads(data[_HEADER : _HEADER + size]), data[_HEADER + size :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def rehashed(header: dict[str, Any], body: bytes) -> bytes:
    """A file whose hash is that of what it holds, as a forger would make it; as it is where it cannot be read."""
    from safetensors.torch import load

    with contextlib.suppress(Exception):  # then it is refused for that
        header["__metadata__"]["bnfuse.sha256"] = _hash(load(joined(header, body)))
    return joined(header, body)


def bit_flips(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(changed))
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncation(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def more_bytes(data: bytes, draw: random.Random) -> bytes:
    place = draw.choice([len(data), draw.randrange(len(data))])
    return data[:place] + draw.randbytes(draw.randint(1, 40)) + data[place:]


def swapped_tensors(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    one, other = draw.sample([name for name in header if name != "__metadata__"], 2)
    header[one], header[other] = header[other], header[one]
    return joined(header, body)  # with the hash to match it would be the file of another model


def renamed_tensor(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    header[draw.choice(["", "x", name + ".x", "__class__", "stem.1.running_mean", "steps"])] = header.pop(name)
    return draw.choice([joined, rehashed])(header, body)


def other_entry(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    entry[draw.choice(list(entry))] = draw.choice(_HOSTILE)
    return draw.choice([joined, rehashed])(header, body)


def other_metadata(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    metadata = header["__metadata__"]
    metadata[draw.choice(list(metadata))] = draw.choice(["", "{", "null", "[" * 3000, "\\u0000", "1e999", "NaN", 3])
    return joined(header, body)


def other_structure(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    said = json.loads(header["__metadata__"]["bnfuse"])
    place: Any = said
    while True:  # a place anywhere in it
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        if draw.random() < 0.3:
            del place[key]
        else:
            place[key] = draw.choice(_HOSTILE)
        break
    header["__metadata__"]["bnfuse"] = json.dumps(said)
    return joined(header, body)


def other_version(data: bytes, draw: random.Random) -> bytes:
    header, body = parts(data)
    said = json.loads(header["__metadata__"]["bnfuse"])
    said["format"] = draw.choice([0, 2, -1, 10**30, "1", 1.0, None, True, [1]])
    header["__metadata__"]["bnfuse"] = json.dumps(said)
    return joined(header, body)


_HOSTILE: list[Any] = [
    None, True, 0, -1, 2**62, 1e308, "", "x", "..", "stem", "stem.1", "norm", "__class__", "forward", "F32", "I64",
    [], [[]], ["stem.1"], ["left", "right"], [-1], [2**62], [4, 4], {}, {"names": ["stem.2"]}, "a." * 500, "\0",
    "__import__('os').system('false')",
]  # fmt: skip

DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    bit_flips, truncation, more_bytes, swapped_tensors, renamed_tensor, other_entry, other_metadata, other_structure,
    other_version,
]  # fmt: skip


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that loading may change: the modules, and all tensors to the bit."""
    tensors = {name: (tensor.dtype, tensor.tolist()) for name, tensor in model.state_dict().items()}
    return {"": [(name, id(module)) for name, module in model.named_modules()], **tensors}


def outcome(data: bytes, path: Path, fresh: nn.Module, saved: dict[str, Any]) -> str:
    """What became of loading: "refused", "loaded", or what went wrong."""
    path.write_bytes(data)
    model = copy.deepcopy(fresh)
    before = state(model)
    try:
        bnfuse.load(model, path)
    except CheckpointError:
        return "refused" if state(model) == before else "wrong: refused, and the model has changed"
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        return f"crashed: {type(error).__name__}: {str(error)[:80]}"
    now = state(model)
    return "loaded" if {**now, "": 0} == {**saved, "": 0} else "wrong: loaded something else than was saved"


def try_files(count: int, seed: int = 0) -> tuple[Counter[tuple[str, str]], dict[str, int]]:
    """Load so many damaged files.

    Returns:
        How often each outcome came of each kind of damage; and a seed for each outcome that must not be.
    """
    torch.manual_seed(0)
    fused = bnfuse.fuse(randomise_(Net()), torch.randn(2, 2, 6, 6))
    fresh = Net().eval()
    counts: Counter[tuple[str, str]] = Counter()
    failures: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fused.safetensors"
        bnfuse.save(fused, path)
        data = path.read_bytes()
        for number in range(seed, seed + count):
            draw = random.Random(number)
            damage = DAMAGES[number % len(DAMAGES)]
            found = outcome(damage(data, draw), path, fresh, state(fused))
            counts[damage.__name__, found] += 1
            if found not in ("refused", "loaded"):
                failures.setdefault(f"{damage.__name__}: {found}", number)
    return counts, failures


def main(count: int, seed: int) -> int:
    """Print what became of each kind of damage; 1 if anything went wrong."""
    began = time.perf_counter()
    counts, failures = try_files(count, seed)
    print(f"{'damage':20s}{'files':>10s}{'refused':>10s}{'loaded':>10s}{'wrong':>10s}{'crashed':>10s}")
    for damage in (*(kind.__name__ for kind in DAMAGES), "all"):
        total = Counter[str]()
        for (kind, found), number in counts.items():
            if damage in (kind, "all"):
                total[found.partition(":")[0]] += number
        numbers = (sum(total.values()), *(total[name] for name in ("refused", "loaded", "wrong", "crashed")))
        print(f"{damage:20s}" + "".join(f"{number:>10d}" for number in numbers))
    print(f"{time.perf_counter() - began:.0f} s")
    for failure, number in failures.items():
        print(f"seed {number}: {failure}", file=sys.stderr)
    return int(bool(failures))
