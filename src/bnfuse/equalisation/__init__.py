"""Rescaling the channels of a model so that 8-bit integers lose less of it; its outputs stay as they are.

What is free to be rescaled (:mod:`bnfuse.equalisation.families`), what the scales are worth
(:mod:`bnfuse.equalisation.noise`), what is known of the activations (:mod:`bnfuse.equalisation.observed`), and the
public call (:mod:`bnfuse.equalisation.equalising`).
"""
