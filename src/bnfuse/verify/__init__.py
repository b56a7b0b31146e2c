"""Whether two models are equal: running both, measuring how far the outputs lie apart, and judging the difference.

It knows modules and tensors, and nothing of graphs, norms or plans.
"""
