"""Ways to divide the error among layers, beside each other: what is Bayesian optimisation worth?

    python -m benchmarks.level_arms --output results.csv

Each arm ends in about five levels of a real model, from nearly lossless to fast. All are measured
alike: predicted time of attention at the longest length, and divergence from the dense model on
windows of a text that no arm saw. An arm's worth is the *hypervolume* of its levels: the area below
a reference that they leave, predicted time by the log of the divergence.

Arms:

- *one tolerance* for all layers, at five tolerances.
- *analytic*: the divisions that ``vllm_afbs.tune`` makes, at the same five budgets.
- *coordinate*, *random*, *ax* around the analytic ones; *random* and *ax* around one tolerance; and
  *ax* without low fidelity, and with one objective (``tuning.allocation.front_search``).
- *theta trials*: the tuner before levels (``benchmarks.theta_tuner``), and SpargeAttn's tuner, each
  at three tolerances; and the paper's algorithm to the letter, which takes hours and runs only if
  it is named.

A seed sets everything random and which parts of the texts are used. Block shape is no arm: nothing
searches it.
"""
