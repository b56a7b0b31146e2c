"""The report of one model: what happened to its norms, as a page to look at and as data behind it.

The facts are collected here as plain data (dictionaries, lists, words and numbers) while the recorded calls are still
there; ``page`` draws them. Nothing is decided here, and no model is changed.
"""
