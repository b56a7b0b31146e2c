"""What runs of a model did, as data: operators, the tensors between them, the calls of modules, the norms.

Nothing is computed here and nothing is decided: ``capture`` and ``analysis`` write a graph, all others read it.
"""
