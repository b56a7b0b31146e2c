"""A run of a model becomes a graph: every operator is seen by PyTorch's dispatcher, while the model really runs.

It records what happened and pins what is seen outside. It knows nothing of norms, units or rules, and the run leaves
no trace on the model.
"""
