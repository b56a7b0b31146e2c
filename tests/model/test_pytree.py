"""Finding and replacing tensors in whatever a model takes or returns."""

import enum
import logging
import threading
import types
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bnfuse.model.pytree import DEEPEST, map_tensors, tensors

Pair = namedtuple("Pair", "mean variance")


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Frozen:
    scores: Tensor


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    scores: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """What `transformers.utils.ModelOutput` does: items and attributes are the same thing."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            if getattr(self, item.name) is not None:
                self[item.name] = getattr(self, item.name)

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        _, _, *remaining = super().__reduce__()
        return type(self), tuple(getattr(self, item.name) for item in fields(self)), *remaining  # type: ignore[arg-type]


@dataclass
class Classified(ModelOutput):
    logits: Tensor | None = None
    pooled: Tensor | None = None


class Instances:
    """Detectron's: fields in a dictionary behind `__getattr__`."""

    def __init__(self, **values: object) -> None:
        self._image_size = (2, 2)
        self._fields = values

    def __getattr__(self, name: str) -> object:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(name)
        return self._fields[name]


class Slotted:
    __slots__ = ("__hidden", "boxes", "missing")

    def __init__(self, boxes: Tensor) -> None:
        self.boxes = boxes
        self.__hidden = boxes + 1


class Derived(Slotted):
    def __init__(self, boxes: Tensor) -> None:
        super().__init__(boxes)
        self.scores = boxes + 2


class Node:
    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.parent = self


def zeros() -> Tensor:
    return torch.zeros(1)


def model_output() -> Classified:
    return Classified(logits=zeros())


TREES: list[tuple[Any, list[str]]] = [
    (zeros(), [""]),
    ((zeros(), zeros()), ["[0]", "[1]"]),
    ([zeros(), [zeros()], "text", None, 3], ["[0]", "[1][0]"]),
    ({"out": zeros(), 3: {"aux": zeros()}}, ["['out']", "[3]['aux']"]),
    (OrderedDict(out=zeros()), ["['out']"]),
    (defaultdict(list, out=[zeros()]), ["['out'][0]"]),
    (UserDict(out=zeros()), ["['out']"]),
    (types.MappingProxyType({"out": zeros()}), ["['out']"]),
    (deque([zeros()]), ["[0]"]),
    ({zeros()}, ["{0}"]),
    (frozenset([zeros()]), ["{0}"]),
    (Pair(zeros(), [zeros()]), [".mean", ".variance[0]"]),
    (Output(zeros(), (zeros(),)), [".logits", ".hidden[0]"]),
    (Frozen(zeros()), [".scores"]),
    (FrozenSlots(zeros()), [".scores"]),
    (model_output(), [".logits"]),
    (Instances(boxes=zeros()), ["._fields['boxes']"]),
    (Slotted(zeros()), ["._Slotted__hidden", ".boxes"]),
    (Derived(zeros()), ["._Slotted__hidden", ".boxes", ".scores"]),
    (types.SimpleNamespace(out=zeros()), [".out"]),
    (torch.ones(2, 2).max(dim=1), ["[0]", "[1]"]),
    (pack_sequence([torch.zeros(2, 1), torch.zeros(1, 1)]), [".data", ".batch_sizes"]),
    (Node(zeros()), [".value"]),
    (nn.Linear(1, 1), []),
    (nn.Linear, []),
    (torch, []),
    (zeros, []),
    (lambda: zeros(), []),
    (logging.getLogger(), []),
    (threading.Lock(), []),
    ((value for value in [zeros()]), []),
    (torch.float32, []),
    ((torch.device("cpu"), torch.Size([1]), range(3), object()), []),
    ({"model": nn.Linear(1, 1), "kind": nn.Linear, "size": 3}, []),
]


def name(value: object) -> str:
    return type(value).__name__ if not isinstance(value, list) else ""


@pytest.mark.parametrize(("tree", "paths"), TREES, ids=name)
def test_paths(tree: Any, paths: list[str]) -> None:
    assert [path for path, _ in tensors(tree)] == paths


@pytest.mark.parametrize(("tree", "paths"), TREES, ids=name)
def test_map(tree: Any, paths: list[str]) -> None:
    before = [tensor.clone() for _, tensor in tensors(tree)]
    mapped = map_tensors(tree, lambda tensor: tensor + 7)
    assert type(mapped) is type(tree)
    assert [path for path, _ in tensors(mapped)] == paths
    assert [tensor.tolist() for _, tensor in tensors(mapped)] == [(tensor + 7).tolist() for tensor in before]
    assert [tensor.tolist() for _, tensor in tensors(tree)] == [tensor.tolist() for tensor in before]
    assert mapped is tree if not paths and not isinstance(tree, (tuple, dict)) else mapped is not tree


def test_attributes_and_items_of_a_model_output_stay_one() -> None:
    mapped = map_tensors(model_output(), lambda tensor: tensor + 1)
    assert mapped.logits is mapped["logits"]
    assert mapped.pooled is None


def test_packed_sequence_still_unpacks() -> None:
    packed = pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    mapped = map_tensors(packed, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert isinstance(mapped, PackedSequence)
    assert nn.utils.rnn.pad_packed_sequence(mapped)[0].dtype == torch.float64


def test_cycles_end_and_stay_cycles() -> None:
    items: list[Any] = [zeros()]
    items.append({"back": items})
    assert [path for path, _ in tensors(items)] == ["[0]"]
    mapped = map_tensors(items, torch.clone)
    assert mapped is not items
    assert mapped[1]["back"] is mapped
    node = map_tensors(Node(zeros()), torch.clone)
    assert node.parent is node


def test_a_shared_tensor_is_mapped_once() -> None:
    shared = zeros()
    first, second = map_tensors([shared, shared], torch.clone)
    assert first is second
    assert first is not shared


def test_depth_is_limited() -> None:
    tree: Any = zeros()
    for _ in range(DEEPEST):
        tree = [tree]
    assert len(tensors(tree)) == 1
    assert tensors([tree]) == []
    assert map_tensors([tree], torch.clone) == [tree]


def test_objects_without_data_keep_their_identity() -> None:
    @dataclass
    class Setting:
        size: int = 1
        sizes: list[int] = field(default_factory=list)

    class Sentinel:
        pass

    class Sizes(enum.Enum):
        SMALL = [1, 2]  # noqa: RUF012

    class Uncopied:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.sizes = [1]

        def __reduce_ex__(self, protocol: object) -> Any:
            raise TypeError("cannot be copied")

    sentinel, setting, module, uncopied = Sentinel(), Setting(), nn.Linear(1, 1), Uncopied()
    mapped = map_tensors([sentinel, setting, module, Sizes.SMALL, uncopied], torch.clone)
    assert mapped[0] is sentinel
    assert mapped[1] == setting
    assert mapped[1].sizes is not setting.sizes
    assert mapped[2] is module
    assert mapped[3] is Sizes.SMALL
    assert mapped[4] is uncopied
