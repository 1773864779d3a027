"""The tuner: capture -> evaluator -> search -> profile.

``model`` opens a checkpoint, ``capture`` records its Q, K and V, ``evaluator`` scores thresholds
on them with the served selector, ``scorer`` counts what that costs, ``bracket`` finds each head's
tau, ``bayes`` proposes theta and the length to try it at, ``search`` joins them for one layer,
``validation`` has held-out text confirm the result, ``run`` does all layers and
``journal`` lets a stopped run go on. Nothing here imports vLLM, and only ``bayes`` imports Ax,
which takes seconds.
"""
