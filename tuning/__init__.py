"""The tuner: capture -> evaluator -> search -> profile.

``model`` opens a checkpoint, ``capture`` records its Q, K and V, ``evaluator`` scores thresholds
on them with the served selector, ``bracket`` finds each head's tau, ``bayes`` proposes theta and
the length to try it at, ``search`` joins them for one layer, ``run`` does all layers and
``journal`` lets a stopped run go on. Nothing here imports vLLM, and only ``bayes`` imports Ax,
which takes seconds.
"""
