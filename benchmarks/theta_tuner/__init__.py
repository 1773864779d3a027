"""The tuner before its guard theta was dropped: Bayesian optimisation of one scalar a layer.

It is an arm of the benchmarks. Ax proposes quantiles of the blocks' self-similarity, which set each
head's theta, and lengths; inside a trial, each head's tau is searched roughly (``explore``). Each
head's tau is then searched again at the longest length (``refine``) and accepted on held-out text
(``validation``). ``layer`` runs the three stages.
"""
