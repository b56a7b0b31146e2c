"""Graphs that PyTorch has made of models: laid out as modules to be fused, and put back into the form they had.

``torch.export`` and ``torch.fx`` write a model down as a graph, in which a batch norm may be a function that is given
its parameters (``aten.batch_norm``, ``F.batch_norm``), so that there is no module to take away, and a layer without a
bias has no place for one. Instead of teaching every room about a second kind of model, this one gives a graph what it
lacks (:mod:`~bnfuse.exported.lifting`): each norm, one function or arithmetic, becomes a module that holds the same
tensors under the same names; each layer without a bias gets one of zeros; what works in place gets a switch for it.
What comes out is a module like any other, with the same numbers, and it is recorded, solved, rewritten and verified
by the ordinary way, with the same reasons.

Afterwards the *original* graph, not the laid-out one, gets what has changed (:mod:`~bnfuse.exported.rewriting`): the
nodes of norms that went are taken out, biases that are not zero are handed to their layers, what was switched off
works on a copy, tensors that nothing reads any more go. A ``GraphModule`` stays one, with its hooks and attributes;
an ``ExportedProgram`` becomes a new one with its signature and state made to fit (:mod:`~bnfuse.exported.program`).
What comes back is then compared with what was given, so that a mistake made here is found as any other.
"""
