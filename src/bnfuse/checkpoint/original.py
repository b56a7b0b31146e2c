"""Going back: what a fused model keeps of the model that it was made from, and how it becomes that again.

Kept are the norms that are gone and the former contents of every tensor that changed, in one plain attribute of the
model: it is copied and pickled with the model, and is no part of its state dict.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bnfuse.checkpoint.structure import structure
from bnfuse.errors import FusionError
from bnfuse.model import own_steps, tree
from bnfuse.model.alone import one_at_a_time
from bnfuse.model.copying import copy_model
from bnfuse.model.marks import ATTRIBUTE as MARK
from bnfuse.model.marks import mark_of
from bnfuse.model.pretrained import describe
from bnfuse.model.witness import fingerprint
from bnfuse.model.wrappers import checked, unwrap

ATTRIBUTE = "_bnfuse_original"


@dataclass(frozen=True)
class Original:
    """What is needed to restore a model.

    Attributes:
        norms: the norms that are gone, by all of their names.
        before: the former contents of the tensors that changed, by name.
        after: a hash of what they hold since then.
        created: the names of parameters that layers were given.
        out_of_place: the names of activations that worked in place.
        marks: what an earlier fusing has left, by the name of the module.
        whole: a copy of the original, where modules stand in other places since then; then nothing else is kept but
            ``after``, of all tensors.
    """

    norms: dict[str, nn.Module] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    created: tuple[str, ...] = ()
    out_of_place: tuple[str, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)
    whole: nn.Module | None = None


def keep_original(fused: nn.Module, original: nn.Module) -> None:
    """Let a fused model keep what is needed to become the original again.

    Args:
        original: the model before; nothing of it is shared.
    """
    said = structure(fused)
    if said.placed or said.own:
        after = {name: fingerprint(tensor) for name, tensor in _tensors(fused).items()}
        fused.__dict__[ATTRIBUTE] = Original(after=after, whole=copy_model(original))
        return
    former = dict(tree.named_modules(original))
    names = [name for norm in said.removed for name in norm.names if name in former]
    # What has a mark was fused before, and stays fused.
    copies = {id(former[name]): copy_model(former[name]) for name in names if MARK not in former[name].__dict__}
    own, old = (_tensors(model) for model in (fused, original))
    changed = [name for name in own if name in old and fingerprint(own[name]) != fingerprint(old[name])]
    fused.__dict__[ATTRIBUTE] = Original(
        {name: copies[id(former[name])] for name in names if id(former[name]) in copies},
        {name: old[name].detach().clone() for name in changed},
        {name: fingerprint(own[name]) for name in changed},
        tuple(name for made in said.created for name in made.names if name not in old),
        tuple(name for name in said.out_of_place if getattr(former.get(name), "inplace", False)),
        {name: module.__dict__[MARK] for name, module in former.items() if MARK in module.__dict__},
    )


@one_at_a_time
def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give a fused model its norms and its former weights back, exactly, so that it trains as before fusing.

    >>> import bnfuse
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> fused = bnfuse.fuse(net, options=bnfuse.Options(reversible=True))
    >>> type(bnfuse.unfuse(fused)[1]).__name__
    'BatchNorm2d'

    Args:
        model: what :func:`bnfuse.fuse` gave with ``Options(reversible=True)``, or a copy of it.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        A model with the parameters, buffers and structure of the original, in evaluation mode.

    Raises:
        FusionError: the model keeps nothing of its original, or its weights have changed since it was fused, which
            going back would undo; the model is as it was.
    """
    inner, wrap = unwrap(checked(model))
    kept = inner.__dict__.get(ATTRIBUTE)
    if not isinstance(kept, Original):
        raise FusionError(
            f"{type(inner).__name__} keeps nothing of the model that it was made from. "
            f"Fuse with options=bnfuse.Options(reversible=True), or go on with the original, which fuse leaves alone."
        )
    own = _tensors(inner)
    other = [name for name, hashed in kept.after.items() if name not in own or fingerprint(own[name]) != hashed]
    if other:
        raise FusionError(
            f"{len(other)} tensors have changed since {type(inner).__name__} was fused, such as {other[0]}: "
            f"going back would undo that. Train the original instead, then fuse."
        )
    target = inner if inplace else copy_model(inner)
    _restore(target, target.__dict__.pop(ATTRIBUTE))
    target.eval()
    return model if inplace else wrap(target)


def _restore(model: nn.Module, kept: Original) -> None:
    modules = dict(tree.named_modules(model))
    own = _tensors(model)
    device = next(iter(own.values())).device if own else torch.device("cpu")
    if kept.whole is not None:
        model.__class__ = type(kept.whole)
        object.__setattr__(model, "__dict__", kept.whole.to(device).__dict__)  # also for what refers to the copy
        return
    with torch.no_grad():
        for name, before in kept.before.items():
            own[name].data = before.to(own[name].device)
    for name in kept.created:
        path, _, place = name.rpartition(".")
        modules[path]._parameters[place] = None
    for name, norm in kept.norms.items():
        path, _, place = name.rpartition(".")
        modules[path]._modules[place] = norm.to(device)
    modules = dict(tree.named_modules(model))
    for name in kept.out_of_place:
        setattr(modules[name], "inplace", True)  # noqa: B010
    for name, module in tree.named_modules(model):
        module.__dict__.pop(MARK, None)
        if name in kept.marks:
            module.__dict__[MARK] = kept.marks[name]
    own_steps.show(model)
    modules = dict(tree.named_modules(model))
    still = [name for name in kept.marks if mark_of(modules[name]).instead_of or mark_of(modules[name]).created]
    own_steps.hide(modules, still)  # around what an earlier fusing has left
    describe(model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)
