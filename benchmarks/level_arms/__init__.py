"""Ways to divide the error among layers, beside each other: what is Bayesian optimisation worth?

    python -m benchmarks.level_arms --output results.csv

Each arm ends in about five levels of a real model, from nearly lossless to fast. All are measured
alike: predicted time of attention at the longest length, and divergence from the dense model on
windows of a text that no arm saw. An arm's worth is the *hypervolume* of its levels: the area below
a reference that they leave, predicted time by the log of the divergence.

Arms:

- *one tolerance* for all layers, at five tolerances.
- *analytic*: the divisions that ``vllm_afbs.tune`` makes, at the same five budgets; *shrunk*, with
  each layer's damage moved half of the way (in logs) to the mean.
- *coordinate*, *random*, *ax* around the analytic ones; *random* and *ax* around one tolerance; and
  *ax* without low fidelity, and with one objective (``tuning.allocation.front_search``).
- *theta trials*: the tuner before levels (``benchmarks.theta_tuner``), and SpargeAttn's tuner, each
  at three tolerances; and the paper's algorithm to the letter, which takes hours and runs only if
  it is named.

Query blocks have 128 rows and key blocks 64 keys. One tolerance and the analytic divisions have
arms with key blocks of 128, too, and *theta trials* has those that it had. A seed sets everything
random and which parts of the texts are used.

``--engine vllm`` runs the model at the lengths that it serves, and skips what transformers masks.
"""
