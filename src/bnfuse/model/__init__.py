"""A module tree and its inputs: names, copies, wrappers, tensors in nested data, running without a trace.

Everything that needs a ``torch.nn.Module`` and nothing else lives here, so that it can be used from every room above.
It knows no graph, no norm and no plan.
"""
