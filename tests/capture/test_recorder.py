"""Operators as they are recorded."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from recording import X, graph_of, operators
from torch import nn


def test_operators_are_seen_whole() -> None:
    graph = graph_of(lambda m, x: m["n"](m["c"](x)).relu_().flatten(1), X, c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3))
    assert operators(graph) == ["conv2d", "batch_norm", "relu", "flatten"]
    assert [node.call.path for node in graph.nodes] == ["layers.c", "layers.n", "", ""]


def test_what_does_nothing_is_no_operator() -> None:
    graph = graph_of(lambda m, x: m["i"](F.dropout(x * 2, training=False)).contiguous(), X, i=nn.Identity())
    assert operators(graph) == ["mul"]


def test_scripted_parts_are_seen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases announce the end of scripting
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    graph = graph_of(lambda m, x: m["s"](x), X, s=scripted)
    assert operators(graph) == ["conv2d", "relu"]
    assert graph.nodes[0].bound["weight"].names == ("layers.s.0.weight",)
