"""From a model and its inputs to a ``Plan``: which norms go, and which parameters change for it.

Here live the order of the steps (run, solve, try the plan on other inputs, solve again) and the choice of the norms
that must stay. What an operator does belongs in ``rules``, how a norm is solved in ``solve``, whether two outputs are
equal in ``verify``. Nothing here changes the caller's model: plans are tried on copies.
"""
