"""Facts of networks that nobody built: any number of operators, and names that try to break the page."""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]

HOSTILE = [
    "</script><script>window.broken=1</script>",
    '<img src=x onerror="window.broken=1">',
    "<!--<script>",
    "\"'`&amp;&lt;\\u003c\\",
    "javascript:window.broken=1",
    "{{constructor.constructor('window.broken=1')()}}",
    "\u202egnol dna sdrawkcab\u202c שלום עולם مرحبا",
    "a_very_long_name" * 30,
    "line\nbreak\ttab\u2028separator",
    "__proto__",
]
"""Texts that a page may show, and must not obey."""


class Network:
    """Facts that grow operator by operator."""

    def __init__(self, model: str) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.edges: list[list[Any]] = []
        self.modules: dict[str, dict[str, Any]] = {"": {"name": "", "class": model, "parent": None}}
        self.decisions: list[dict[str, Any]] = []
        self.model = model
        self.kept = 0

    def module(self, name: str, kind: str) -> str:
        """Enter a module and the containers on the way to it."""
        if name not in self.modules:
            parent = name.rpartition(".")[0]
            self.module(parent, "Sequential")
            self.modules[name] = {"name": name, "class": kind, "parent": parent}
        return name

    def node(self, operator: str, kind: str, module: str, *inputs: int, label: str = "", **more: Any) -> int:
        """Enter an operator that reads others.

        Returns:
            Its id.
        """
        place = len(self.nodes)
        self.nodes.append(
            {
                "id": place,
                "operator": operator,
                "kind": kind,
                "module": module,
                "class": self.modules[module]["class"],
                "label": label or operator,
                "shape": [1, 64, 56, 56],
                "dtype": "float32",
                "parameters": [f"{module}.weight"] if kind in ("layer", "norm") else [],
                "decision": None,
                "removed": False,
                "changed": False,
                "created": [],
                **more,
            }
        )
        self.edges += [[source, place, "1x64x56x56"] for source in inputs]
        return place

    def conv(self, name: str, source: int) -> int:
        return self.node("conv2d", "layer", self.module(name, "Conv2d"), source, label="conv2d 64→64 3x3")

    def norm(self, name: str, source: int, into: int | None, refused_by: int | None = None) -> int:
        """Enter a norm: taken up by a layer, or kept since an operator refused."""
        decision = len(self.decisions)
        place = self.node(
            "batch_norm",
            "norm",
            self.module(name, "BatchNorm2d"),
            source,
            label="batch_norm 64",
            decision=decision,
            removed=into is not None,
        )
        reason = None
        if into is None:
            self.kept += 1
            reason = {
                "code": "no-negative-scale" if self.kept % 2 else "nothing-passes",
                "text": f"max_pool2d in stages.{decision}: a maximum passes no negative scale",
                "meaning": "A maximum of negated numbers is a minimum.",
                "advice": "Nothing, unless the pooling can run before the norm.",
                "refused_by": [] if refused_by is None else [refused_by],
                "details": ["backward: conv2d has another reader", "forward: max_pool2d refused"],
            }
        else:
            self.nodes[into].update(changed=True, created=[f"{self.nodes[into]['module']}.bias"])
        self.decisions.append(
            {
                "norm": name,
                "class": "BatchNorm2d",
                "channels": 64,
                "removed": into is not None,
                "into": [] if into is None else [self.nodes[into]["module"]],
                "into_nodes": [] if into is None else [into],
                "norm_nodes": [place],
                "path": [] if into is None else [[into, place]],
                "reason": reason,
            }
        )
        return place

    def facts(self, kind: str = "fuse") -> Facts:
        """The facts, with numbers for the plots."""
        layers = [node for node in self.nodes if node["kind"] in ("layer", "norm")]
        removed = sum(decision["removed"] for decision in self.decisions)

        def spread(scale: float) -> dict[str, float]:
            return {
                "minimum": -3.1 * scale,
                "q01": -2.2 * scale,
                "q25": -0.6 * scale,
                "median": 0.02 * scale,
                "q75": 0.7 * scale,
                "q99": 2.4 * scale,
                "maximum": 3.5 * scale,
                "channel_spread": 1.5 + scale,
            }

        return {
            "bnfuse": "0.1.0",
            "kind": kind,
            "model": self.model,
            "spec": "zoo:synthetic",
            "inputs": ["float32 1x3x224x224"],
            "calls": ["forward(x)", "forward_features(x)"],
            "machine": "torch 2.14.1, 2 threads, x86_64",
            "summary": {
                "norms": len(self.decisions),
                "removed": removed,
                "rows": [
                    {"name": "parameters", "before": 7978856, "after": 7937384, "unit": ""},
                    {"name": "buffers", "before": 83769, "after": 41800, "unit": ""},
                    {"name": "multiply-adds", "before": 2865000000, "after": 2834000000, "unit": "multiply-adds"},
                    {"name": "parameters and buffers", "before": 32250500, "after": 31916736, "unit": "bytes"},
                    {
                        "name": "latency",
                        "before": 0.0912,
                        "after": 0.0801,
                        "unit": "s",
                        "quartiles": {"before": [0.0902, 0.0922], "after": [0.0797, 0.0805]},
                    },
                    {"name": "file", "before": 32412512, "after": None, "unit": "bytes"},
                ],
                "difference": {
                    "largest": 7.1e-6,
                    "relative": 1.4e-6,
                    "rounding": 2.0e-6,
                    "equal": True,
                    "text": "output: float32 1x1000\nlargest difference 7.1e-06 where 5.07123 became 5.07124",
                },
                "assumed": ["the model is used in evaluation mode"],
                "unseen": ["the argument mask of forward was never given"],
                "warning": None,
            },
            "graph": {"nodes": self.nodes, "edges": self.edges, "modules": list(self.modules.values())},
            "decisions": self.decisions,
            "errors": [
                {
                    "module": node["module"],
                    "node": node["id"],
                    "relative": 0.0 if place % 7 == 0 else 0.5e-7 * (1 + place % 5),
                    "rounding": 1e-7 * (1 + place % 3),
                }
                for place, node in enumerate(layers)
            ],
            "ranges": [
                {
                    "module": node["module"],
                    "node": node["id"],
                    "weight": {"before": spread(0.1 + place % 3), "after": spread(0.3 + place % 5)},
                    "activation": {"before": spread(1.0 + place % 4), "after": spread(2.0 + place % 6)},
                }
                for place, node in enumerate(layers)
                if node["kind"] == "layer"
            ],
        }


def network(operators: int, kind: str = "fuse") -> Facts:
    """A network of stages, blocks and branches, with concatenations and residual sums.

    Args:
        operators: about how many; never fewer.
        kind: "plan" or "fuse".
    """
    made = Network("Synthetic")
    x = made.node("input", "input", "", label="input x")
    x = made.conv("stem.conv", x)
    x = made.norm("stem.norm", x, into=x)
    x = made.node("relu", "operator", made.module("stem.relu", "ReLU"), x)
    stage = block = 0
    while len(made.nodes) < operators:
        name = made.module(f"stages.{stage}.blocks.{block}", "Block")
        made.module(f"stages.{stage}", "Stage")
        first = made.conv(f"{name}.left.conv", x)
        left = made.norm(f"{name}.left.norm", first, into=first)
        left = made.node("relu", "operator", made.module(f"{name}.left.act", "ReLU"), left)
        second = made.conv(f"{name}.right.conv", x)
        pool = made.node("max_pool2d", "operator", made.module(f"{name}.right.pool", "MaxPool2d"), second)
        kept = block % 3 == 2
        right = made.norm(f"{name}.right.norm", pool, into=None if kept else second, refused_by=pool if kept else None)
        both = made.node("cat", "operator", name, left, right)
        both = made.conv(f"{name}.mix", both)
        x = made.node("add", "operator", name, both, x)
        block += 1
        if block == 8:
            stage, block = stage + 1, 0
    x = made.node("flatten", "operator", "", x)
    x = made.node("linear", "layer", made.module("head", "Linear"), x, label="linear 64→10")
    made.node("output", "output", "", x, label="output")
    return made.facts(kind)


def hostile() -> Facts:
    """A small network all of whose texts try to break the page."""
    made = Network(HOSTILE[0])
    x = made.node(HOSTILE[1], "input", "", label=HOSTILE[1])
    for place, text in enumerate(HOSTILE):
        name = made.module(f"{text}.block", HOSTILE[(place + 1) % len(HOSTILE)])
        conv = made.conv(f"{name}.conv{text}", x)
        x = made.norm(f"{name}.norm{text}", conv, into=None if place % 2 else conv, refused_by=conv)
        made.nodes[x]["label"] = text
        reason = made.decisions[-1]["reason"]
        if reason:
            reason.update(code=text, text=text, meaning=text, advice=text, details=HOSTILE)
    made.node("output", "output", "", x)
    facts = made.facts()
    facts.update(spec=HOSTILE[2], inputs=HOSTILE, calls=HOSTILE, machine=HOSTILE[3])
    facts["summary"].update(assumed=HOSTILE, unseen=HOSTILE, warning=HOSTILE[0])
    facts["summary"]["difference"]["text"] = "\n".join(HOSTILE)
    facts["summary"]["rows"] += [{"name": text, "before": 1, "after": 2, "unit": text} for text in HOSTILE]
    return facts


def merged() -> Facts:
    """A small network two of whose layers become one, so that it is drawn in another way after."""

    before, after = Network("Merged"), Network("Merged")
    x = before.node("input", "input", "", label="input")
    x = before.norm("stem.norm", before.conv("stem", x), into=1)
    before.module("block", "Block")
    branches = [before.conv(f"block.{name}", x) for name in "ab"]
    branches = [before.norm(f"block.n{name}", branch, branch) for name, branch in zip("ab", branches, strict=True)]
    x = before.node("add", "operator", "block", *branches)
    x = before.node("relu", "operator", before.module("block.act", "ReLU"), x)
    before.node("output", "output", "", before.conv("last", x))
    x = after.node("input", "input", "", label="input", before=0)
    x = after.norm("stem.norm", after.conv("stem", x), into=1)
    after.module("block", "Sequential")
    x = after.node("relu", "operator", after.module("block.act", "ReLU"), after.conv("block.merged", x), before=8)
    after.node("output", "output", "", after.conv("last", x), before=10)
    for node, place in zip(after.nodes, (0, 1, 2, None, 8, 9, 10), strict=True):
        node["before"] = place
    after.nodes[3]["changed"] = True
    places = {"refused_by": [], "path": []}
    for number, decision in enumerate(before.decisions):
        if number == 0:
            decision.update(step=None, after={"norm_nodes": [2], "into_nodes": [1], **places})
        else:
            decision.update(step=0, into=["block"], into_nodes=[], path=[])
            decision["after"] = {"norm_nodes": [], "into_nodes": [3], **places}
    facts = before.facts()
    facts["graph_after"] = after.facts()["graph"]
    facts["steps"] = [{"kind": "merge", "subject": "block", "what": "2 layers and their sum", "parameters": -104}]
    facts["unchanged"] = [{"kind": "bake", "subject": "last", "reason": "it is computed"}]
    facts["left_out"] = 2
    return facts
