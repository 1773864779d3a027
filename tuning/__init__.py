"""The tuner: from a model and texts to a profile.

In the order of a job:

1. ``model`` opens a checkpoint, ``texts`` reads the calibration texts and ``windows`` cuts them.
2. ``capture`` runs the model once and keeps each layer's Q, K and V.
3. ``search/`` finds the thresholds of one layer at a time: explore, refine, validate. ``workers``
   does several layers side by side.
4. ``allocation/`` divides the error among layers, if the user set a goal for the whole model.
   ``end_to_end`` runs that model.
5. ``run`` does all of this for a job, ``journal`` keeps every finished step so that a stopped job
   can go on, and ``report`` and ``console`` show what was found.

Nothing here imports vLLM. Only ``search.bayes`` imports Ax, which takes seconds.
"""
