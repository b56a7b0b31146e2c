"""What a model was, in a few bytes, so that a later change is noticed: its layers and the contents of its tensors."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnfuse.model import pytree, tree
from bnfuse.model.describe import dtype_name, shape_text

_BLOCK = 1 << 16
"""So many words are multiplied at a time."""

_STEP = 0x5851F42D4C957F2D
"""An odd number by which the sum is multiplied from one block to the next."""


@dataclass(frozen=True)
class Witness:
    """What some layers and tensors of a model were.

    Attributes:
        layers: the class of every module by its name, and the settings of those of PyTorch's.
        tensors: the fingerprint of each tensor, by the names under which the model holds it.
    """

    layers: dict[str, str]
    tensors: dict[tuple[str, ...], str]

    @staticmethod
    def of(model: nn.Module, chosen: Collection[int]) -> Witness:
        """
        Args:
            chosen: the tensors that matter, by ``id``: parameters, buffers, and those that attributes hold.
        """
        names: dict[int, tuple[Tensor, list[str]]] = {}
        for name, tensor in _held(model):
            if id(tensor) in chosen:
                names.setdefault(id(tensor), (tensor, []))[1].append(name)
        return Witness(_layers(model), {tuple(places): fingerprint(tensor) for tensor, places in names.values()})

    def change(self, model: nn.Module) -> str:
        """What is no longer the same in the model, as a sentence; "" if nothing is."""
        layers = _layers(model)
        for name, layer in self.layers.items():
            if layers.get(name) != layer:
                got = layers.get(name, "nothing")
                return f"{name or 'The model itself'} is another layer:\n  got:      {got}\n  expected: {layer}"
        held = dict(_held(model))
        for names, expected in self.tensors.items():
            missing = [name for name in names if name not in held]
            if missing:
                return f"The model holds no {missing[0]}."
            first, *others = (held[name] for name in names)
            if fingerprint(first) != expected:
                return f"{names[0]} has changed."
            if any(other is not first for other in others):
                return f"{' and '.join(names)} are no longer one tensor."
        return ""


def fingerprint(tensor: Tensor) -> str:
    """A text that is another one for another dtype, shape or element, bit by bit.

    The bytes are read as words of 32 bits, which are multiplied by random 64-bit numbers and added up modulo 2^64 (a
    multilinear hash; Lemire and Kaser, Strongly Universal String Hashing is Fast, 2014). One word that changes always
    changes the sum. Any other change is missed with a chance of about 2^-32, also one that only moves elements or
    flips signs.

    >>> fingerprint(torch.tensor([1.0, 2.0])) == fingerprint(torch.tensor([2.0, 1.0]))
    False
    """
    with torch.no_grad():
        try:
            contents = f"{_sum(_bytes(tensor)):016x}"
        except (RuntimeError, NotImplementedError):  # sparse, quantised, nested, or a class with elements of its own
            file = io.BytesIO()
            torch.save(tensor.detach(), file)
            contents = hashlib.sha256(file.getbuffer()).hexdigest()
    shape = "nested" if tensor.is_nested else shape_text(tensor.shape)
    return f"{dtype_name(tensor.dtype)} {shape} {contents}"


def _bytes(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise RuntimeError("its elements are not in one block of memory")
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()  # words begin at multiples of their size
    return flat.view(torch.uint8)


def _sum(data: Tensor) -> int:
    whole = data.numel() // 4 * 4
    words, rest = data[:whole].view(torch.int32), data[whole:]
    weights = _weights().to(data.device)
    scratch = torch.empty_like(weights)
    total = data.numel()
    for start in range(0, words.numel(), _BLOCK):
        block = words[start : start + _BLOCK]
        product = torch.mul(block, weights[: block.numel()], out=scratch[: block.numel()])
        total = (total * _STEP + int(product.sum())) % 2**64
    return (total * _STEP + int.from_bytes(bytes(rest.tolist()), "little")) % 2**64


@functools.cache
def _weights() -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randint(-(2**63), 2**63 - 1, (_BLOCK,), generator=generator, dtype=torch.int64, device="cpu")
        return random | 1


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and the tensors in attributes, under each of their names."""
    for path, module in tree.named_modules(model):
        prefix = f"{path}." if path else ""
        for registry in (module._parameters, module._buffers):
            for place, tensor in registry.items():
                if tensor is not None:
                    yield prefix + place, tensor
    for name, attribute in tree.plain_attributes(model):
        for path, tensor in pytree.tensors(attribute):
            yield name + path, tensor


def _layers(model: nn.Module) -> dict[str, str]:
    return {name: _layer(module) for name, module in tree.named_modules(model)}


def _layer(module: nn.Module) -> str:
    kind = type(module)
    settings = module.extra_repr() if kind.extra_repr.__module__.startswith("torch.nn.") else ""
    return f"{kind.__name__}({settings})"
