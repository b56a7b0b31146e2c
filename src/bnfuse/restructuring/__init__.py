"""Changing the structure of a model, where it is asked for: what fusing alone cannot do with new numbers in old places.

Each kind proposes `bnfuse.changes.Step`, as data, from what the model did; a step changes no output. Those that help
norms to go are carried out on a copy, on which the planner plans as on any model; those that follow fusing are proposed
from the model without its norms. What comes out is verified against the original like any plan.
"""
