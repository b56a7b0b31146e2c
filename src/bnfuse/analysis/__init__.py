"""What the run alone does not say, found by looking at the modules: the norms, biases that can be created, layers with
a handler of the caller's, values that must stay as they are.

It adds to a graph and decides nothing.
"""
