"""From a model to a plan: run it, solve, try the plan where the code may depend on its inputs, and solve again.

The rooms below each do one step; this one knows their order. A ``Plan`` is made nowhere else.
"""
