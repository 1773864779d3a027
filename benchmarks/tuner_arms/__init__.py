"""Our tuner beside every alternative a user has, on a real model's heads.

    python -m benchmarks.tuner_arms --output results.csv

Every arm sees the same captured tensors through the same evaluator, under the same tolerance, and
spends evaluations and cost as ``tuning.search.scorer`` defines them. Lambda is left out of all, as
the backend serves none. What an arm found is measured alike (``unseen``): on a text that no arm
saw, at the longest length, with all rows. Arms end at different errors, so sparsities are also
compared where each arm's mean error there equals the tolerance.

A seed sets everything random and which parts of the texts are used, so arms without chance have a
spread too.

Arms for every layer:

- *afbs*: what ``vllm_afbs.tune`` runs, its validation on held-out text included. It spends its
  evaluations on a curve of tolerances, of which the job's is measured here.
- *theta trials*: the tuner before, which tuned the guard theta by Bayesian optimisation; and that
  without Bayesian optimisation, binary search, validation or low fidelity (``stages``).
- *spargeattn*, *grid*, *random*, *one setting* (``sweeps``).

For some layers: *oracle* (``sweeps``), the best that these thresholds allow on the calibration
text, which another text need not bear out. For one head of each of those layers, as their seconds
a step allow no more: *single-fidelity BO* and *paper literal* (``per_head``).

Arms are first timed alone, on a few layers, with and without the evaluator's cache (``times``).
``--work`` keeps finished arms, so that a run that was cut off is gone on with.
"""
