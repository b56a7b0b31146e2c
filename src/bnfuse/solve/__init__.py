"""Graph in, ``Solution`` out: which norms can go, and the edits that this takes.

All of it is algebra on units. It sees no module tree, runs no model and writes to no tensor; what an operator does to
units is known by ``rules``.
"""
